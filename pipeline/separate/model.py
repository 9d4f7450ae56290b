"""A trained separator that separates any recording: by class name, by example, or by what a detector finds in it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import separators
from pipeline.core.devices import choose_device
from pipeline.core.weights import read_safetensors
from pipeline.nn import panns
from pipeline.nn.features import SAMPLE_RATE
from pipeline.separate.stream import Blocks, Stream
from pipeline.separate.targets import SoundClass, Unusable, find_class
from pipeline.training.portable import DETECTOR, ENCODER, QUERIES, felt_seconds

CORE_SECONDS, FADE_SECONDS = 16.0, 0.1
MAX_BATCH = 4  # targets separated at once: more take more memory, and on a CPU no less time

Audio = Float[np.ndarray, "channels time"]


@dataclass(frozen=True)
class Stems(Mapping[str, Audio]):
    """Separated sounds by name, (channels, time) at the input's rate, and what is left of the input without them."""

    stems: dict[str, Audio]
    residual: Audio
    sample_rate: int

    def __getitem__(self, name: str) -> Audio:
        return self.stems[name]

    def __iter__(self) -> Any:
        return iter(self.stems)

    def __len__(self) -> int:
        return len(self.stems)


@dataclass(frozen=True)
class Detection:
    """Probability of each class over time."""

    classes: list[SoundClass]
    probability: Float[np.ndarray, "segments classes"]
    segment_seconds: float

    def loudest(self, threshold: float, top_k: int) -> list[tuple[SoundClass, float]]:
        """List up to `top_k` classes whose highest probability is at least `threshold`, the surest first."""
        peak = self.probability.max(axis=0)
        order = np.argsort(-peak, kind="stable")[:top_k]
        return [(self.classes[i], float(peak[i])) for i in order if peak[i] >= threshold]


class Separator:
    """A query separator with the classes, the average queries and the encoder that it was trained with."""

    def __init__(self, folder: Path, *, device: str = "auto") -> None:
        self.folder = folder
        self.config = _config(folder)
        self.device = choose_device(device)
        try:
            self.network = separators.load(folder).to(self.device)
        except (ValueError, RuntimeError, OSError) as error:
            raise Unusable(f"{folder}: {_one_line(error)}") from error
        self.classes = [SoundClass(**one) for one in self.config.get("classes", [])]

    @classmethod
    def from_pretrained(cls, where: str | Path, *, device: str = "auto", download: bool = False) -> "Separator":
        """Load a folder that the graph wrote, or a Hugging Face repository (from the local cache, or `download`ed).

        Unusable where neither is there.
        """
        folder = Path(where)
        if not folder.is_dir() and str(where).count("/") == 1 and not str(where).startswith((".", "/")):
            folder = _repository(str(where), download)
        if not folder.is_dir():
            raise Unusable(f"no model at {where}: `make repro` trains some into data/separators/<name>")
        return cls(folder, device=device)

    @cached_property
    def averages(self) -> Float[Tensor, "classes query_dim"]:
        """Average query of each of `classes`, over the training anchors."""
        path = self.folder / QUERIES
        if not path.is_file():
            raise Unusable(f"{self.folder} has no {QUERIES}: it was trained before separators knew their classes")
        return read_safetensors(path)["query"]

    @cached_property
    def encoder(self) -> panns.QueryEncoder:
        """The query encoder, which turns an example of a sound into a query."""
        if not (self.folder / ENCODER).is_dir():
            raise Unusable(f"{self.folder} has no {ENCODER}/: it cannot be queried by example")
        return panns.load_query_encoder(self.folder / ENCODER).to(self.device)

    @cached_property
    def detector(self) -> panns.Detector:
        """The sound event detector."""
        if not (self.folder / DETECTOR).is_dir():
            raise Unusable(f"{self.folder} has no {DETECTOR}/: it cannot detect what sounds")
        return panns.load_detector(self.folder / DETECTOR).to(self.device)

    def query(self, target: str | int) -> tuple[str, Float[Tensor, " query_dim"]]:
        """Look up a class by name, id or mid: its name and average query; Unusable with suggestions for a typo."""
        found = find_class(target, self.classes)
        return found.name, self.averages[self.classes.index(found)]

    def query_of(self, examples: Sequence[Audio], sample_rate: int) -> Float[Tensor, " query_dim"]:
        """Average the embeddings of example recordings (channels, time)."""
        queries = []
        for audio in examples:
            mono = np.ascontiguousarray(np.asarray(audio, np.float32).mean(axis=0))
            mono = mono if sample_rate == SAMPLE_RATE else soxr.resample(mono, sample_rate, SAMPLE_RATE)
            with torch.inference_mode():
                queries.append(self.encoder.embed(torch.from_numpy(mono)[None].to(self.device))[0].float().cpu())
        return torch.stack(queries).mean(dim=0)

    @cached_property
    def blocks(self) -> Blocks:
        """Sizes of the blocks: the context is the receptive field that was measured when the model was trained."""
        grid = self.network.grid_samples
        context = self.config.get("context_seconds")
        if context is None:
            context = felt_seconds(self.network, self.config["model"]["query_dim"], self.device)
        return self.blocks_of(CORE_SECONDS, FADE_SECONDS, -(-round(context * SAMPLE_RATE) // grid) * grid)

    def blocks_of(self, core_seconds: float, fade_seconds: float, context: int | None = None) -> Blocks:
        """Round sizes in seconds to the network's grid; `context` in samples, by default that of `blocks`."""
        grid = self.network.grid_samples
        core = max(1, round(core_seconds * SAMPLE_RATE / grid)) * grid
        fade = min(core, round(fade_seconds * SAMPLE_RATE))
        return Blocks(core, self.blocks.context if context is None else context, fade)

    def stream(
        self,
        queries: Float[Tensor, "targets query_dim"],
        *,
        channels: int,
        sample_rate: int,
        blocks: Blocks | None = None,
    ) -> Stream:
        """Open a stream that separates what is pushed into it, one stem per query."""
        queries = queries.to(self.device)

        def estimate(mono: Float[Tensor, " time"]) -> Float[Tensor, "targets time"]:
            mixture = mono[None]
            shared = self.network.shared(mixture)
            found = []
            for some in torch.split(queries, MAX_BATCH):
                expanded = {name: t.expand(len(some), *t.shape[1:]) for name, t in shared.items()}
                found.append(self.network(mixture.expand(len(some), -1), some, **expanded))
            return torch.cat(found)

        return Stream(
            estimate,
            len(queries),
            channels=channels,
            sample_rate=sample_rate,
            blocks=blocks or self.blocks,
            device=str(self.device),
        )

    def separate(
        self,
        waveform: Audio | Tensor,
        sample_rate: int,
        targets: Sequence[str | int] | Mapping[str, Float[Tensor, " query_dim"]],
        *,
        blocks: Blocks | None = None,
    ) -> Stems:
        """Separate a recording (channels, time), or (time,) of one channel, at any rate and of any length.

        targets: class names, ids or mids; or queries by the name that their stem is to have. The stems and the residual
        add up to the input. Unusable for an unknown class and for samples that are not finite.
        """
        audio = np.atleast_2d(np.asarray(waveform, np.float32))
        if not np.isfinite(audio).all():
            raise Unusable("the recording has samples that are not finite")
        queries = dict(targets) if isinstance(targets, Mapping) else dict(self.query(target) for target in targets)
        if not queries:
            raise Unusable("no target: give a class, an example or a query")
        stream = self.stream(
            torch.stack(list(queries.values())), channels=len(audio), sample_rate=sample_rate, blocks=blocks
        )
        estimates = np.concatenate([stream.push(audio), stream.flush()], axis=2)
        residual = (audio.astype(np.float64) - estimates.sum(axis=0, dtype=np.float64)).astype(np.float32)
        return Stems(dict(zip(queries, estimates, strict=True)), residual, sample_rate)

    def detect(self, waveform: Audio | Tensor, sample_rate: int) -> Detection:
        """Detect this model's classes over time in a recording (channels, time) or (time,)."""
        mono = np.ascontiguousarray(np.atleast_2d(np.asarray(waveform, np.float32)).mean(axis=0))
        mono = mono if sample_rate == SAMPLE_RATE else soxr.resample(mono, sample_rate, SAMPLE_RATE)
        columns = {index: j for j, index in enumerate(self.detector.class_indices)}
        classes = [one for one in self.classes if one.index in columns]
        with torch.inference_mode():
            found = self.detector.framewise_probability(torch.from_numpy(mono)[None].to(self.device))[0].cpu().numpy()
        chosen = found[:, [columns[one.index] for one in classes]]
        return Detection(classes, chosen, self.detector.segment_samples / SAMPLE_RATE)


def _repository(name: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = "" if download else "; download=True fetches it"
        raise Unusable(f"{name} is neither a folder nor a repository in the local cache{hint}") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise Unusable(f"{folder} has no config.json: it is not a trained separator") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder / 'config.json'}: {_one_line(error)}") from error
    if "query_dim" not in config.get("model", {}):
        raise Unusable(f"{folder} holds a separator without queries: it cannot be asked for a class")
    return config


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
