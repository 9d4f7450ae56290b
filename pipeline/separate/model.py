"""A trained separator that separates any recording: by class name, by example, or by what a detector finds in it."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.core.devices import Precision, autocast, choose_device, use_precision
from pipeline.core.weights import read_safetensors
from pipeline.nn import panns
from pipeline.nn.features import SAMPLE_RATE
from pipeline.separate import hub
from pipeline.separate.stream import RATIO_HOP, Blocks, Stereo, Stream, down_mix
from pipeline.separate.targets import SoundClass, Unusable, find_class, group_by_level, one_line
from pipeline.separators import BlindSeparator, QuerySeparator
from pipeline.training.portable import DETECTOR, ENCODER, QUERIES, felt_seconds

WINDOW_SECONDS = 10.0  # of a block with its context: what a network is given at once
FADE_SECONDS = 0.1
GPU_BLOCKS = 8  # separated at once on a GPU
# Targets x blocks at once. On a CPU four at once took 1.5 (ResUNet30) and 2.4 times (band-split) as long as one by one,
# and three and five times the memory.
CPU_BATCH, GPU_BATCH = 1, 32
DETECTED_SECONDS = 10.0  # of a recording that the detector is given at once
SHIFT_SECONDS = 0.5  # demucs': what `shifts` moves the recording by at most

Audio = Float[np.ndarray, "channels time"]
Query = Float[Tensor, " query_dim"]


@dataclass(frozen=True)
class Stems(Mapping[str, Audio]):
    """Separated sounds by name, (channels, time) at the input's rate, and what is left of the input without them."""

    stems: dict[str, Audio]
    residual: Audio
    sample_rate: int
    detected: dict[str, float] = field(default_factory=dict)  # probability by class name, where the detector was asked

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
    """A trained separator with the classes, the average queries and the encoder that it was trained with.

    takes_queries   False: the model gives all sounds of a recording, in no order, and can be asked for none
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], network: nn.Module, *, device: str, precision: Precision
    ) -> None:
        self.folder, self.config, self.precision = folder, config, precision
        try:
            self.device = choose_device(device)
            self.network = network.to(self.device)
        except (ValueError, RuntimeError) as error:
            raise Unusable(f"device {device}: {one_line(error)}") from error
        use_precision(precision)
        self.takes_queries = isinstance(network, QuerySeparator)
        self.sample_rate = int(self.config["sample_rate"])
        self.classes = [SoundClass(**one) for one in self.config.get("classes", [])]

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        download: bool = False,
        revision: str | None = None,
        token: str | None = None,
        sha256: str | None = None,
    ) -> "Separator":
        """Load a folder that the graph wrote, a Hugging Face repository, or a checkpoint that uss published.

        A repository comes from the local cache, or is `download`ed. A `.ckpt` is converted if its hash is `sha256`
        (None: the published one, by the file's name). Unusable where there is no model, or another file.
        """
        path = Path(where)
        if path.suffix == ".ckpt":
            return cls(path, *hub.load_published(path, sha256), device=device, precision=precision)
        folder = hub.find(where, download=download, revision=revision, token=token)
        return cls(folder, *hub.load(folder), device=device, precision=precision)

    # ------------------------------------------------------------------------------------------------------- queries

    @cached_property
    def averages(self) -> Float[Tensor, "classes query_dim"]:
        """Average query of each of `classes`, over the training anchors."""
        path = self.folder / QUERIES
        if not path.is_file():
            raise Unusable(f"{self.folder} has no {QUERIES}: it was trained before separators knew their classes")
        return read_safetensors(path)["query"]

    @property
    def not_given(self) -> Query | None:
        """The vector in place of an interferer that is not known; None of models that take no such query."""
        network = self.network
        held = network.not_given if isinstance(network, QuerySeparator) else None
        return None if held is None else held.detach().cpu()

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

    def query(self, target: str | int) -> tuple[str, Query]:
        """Look up a class by name, id or mid: its name and average query; Unusable with suggestions for a typo."""
        if not self.takes_queries:
            raise Unusable(f"{self.folder} holds a separator without queries: it cannot be asked for {target!r}")
        found = find_class(target, self.classes)
        return found.name, self.averages[self.classes.index(found)]

    def query_of(self, examples: Sequence[Audio], sample_rate: int) -> Query:
        """Average the embeddings of example recordings (channels, time)."""
        queries = []
        for audio in examples:
            mono = down_mix(torch.from_numpy(np.ascontiguousarray(audio, np.float32))[None])[0].numpy()
            mono = mono if sample_rate == SAMPLE_RATE else soxr.resample(mono, sample_rate, SAMPLE_RATE)
            with torch.inference_mode():
                queries.append(self.encoder.embed(torch.from_numpy(mono)[None].to(self.device))[0].float().cpu())
        return torch.stack(queries).mean(dim=0)

    def level_queries(self, levels: Iterable[int], found: Detection, threshold: float) -> dict[str, Query]:
        """Make a query for each group of classes at these levels of AudioSet's ontology that the detector finds.

        It is the mean of the queries of those classes of the group that are found, weighted by their probability.
        """
        peaks = {one.index: p for one, p in found.loudest(threshold, len(found.classes))}
        queries = {}
        for level in levels:
            for name, members in group_by_level(self.classes, level).items():
                there = [one for one in members if one.index in peaks]
                if there:
                    weights = torch.tensor([peaks[one.index] for one in there])
                    rows = self.averages[[self.classes.index(one) for one in there]]
                    queries[name] = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        return queries

    # -------------------------------------------------------------------------------------------------------- blocks

    @cached_property
    def unit(self) -> int:
        """Samples that a block's core and context are multiples of."""
        network = self.network
        own = network.block_samples if isinstance(network, QuerySeparator) else int(getattr(network, "hop_length", 1))
        return math.lcm(own, RATIO_HOP)

    @cached_property
    def blocks(self) -> Blocks:
        """Sizes of the blocks.

        The context is the receptive field that was measured when the model was trained. A separator without queries
        normalises by all that it is given: a block with its context is as long as its training mixtures.
        """
        if not isinstance(self.network, QuerySeparator):
            seconds = max(self.config["segment_seconds"])
            context = max(1, int(seconds / 4 * self.sample_rate / self.unit)) * self.unit
            return self.blocks_of(seconds / 2, min(FADE_SECONDS, seconds / 8), context)
        seconds = self.config.get("context_seconds")
        if seconds is None:
            seconds = felt_seconds(self.network, self.config["model"]["query_dim"], self.device)
        # What a network takes of a whole mixture it takes of windows only in what is longer than one.
        least = (self.network.segment_samples or 0) + self.network.grid_samples
        context = max(round((seconds + FADE_SECONDS) * self.sample_rate), least)
        context = -(-context // self.unit) * self.unit
        core = max(WINDOW_SECONDS - 2 * context / self.sample_rate, WINDOW_SECONDS / 2)
        return self.blocks_of(core, FADE_SECONDS, context)

    def blocks_of(self, core_seconds: float, fade_seconds: float, context: int | None = None) -> Blocks:
        """Round sizes in seconds to the network's grid; `context` in samples, by default that of `blocks`."""
        core = max(1, round(core_seconds * self.sample_rate / self.unit)) * self.unit
        context = self.blocks.context if context is None else context
        fade = min(core, context, round(fade_seconds * self.sample_rate))
        batch = GPU_BLOCKS if self.device.type == "cuda" else 1
        return Blocks(core, context, fade, self.sample_rate, batch)

    # ---------------------------------------------------------------------------------------------------- separation

    def stream(
        self,
        queries: Float[Tensor, "targets query_dim"] | None = None,
        *,
        without: Query | Float[Tensor, "targets query_dim"] | None = None,
        channels: int,
        sample_rate: int,
        blocks: Blocks | None = None,
        stereo: Stereo = "mid",
        shifts: int = 1,
    ) -> Stream:
        """Open a stream that separates what is pushed into it, one stem per query, or all that a model without gives.

        without   query of what is not wanted, for a model that takes one; Unusable for others. One for all targets,
                  or one for each (`what_else_sounds`)
        shifts    estimates of the recording at so many places of the network's grid are averaged: as many times slower
        """
        if isinstance(self.network, BlindSeparator):
            n_targets, separated = self.network.n_sources, self.network
        else:
            if queries is None or not len(queries):
                raise Unusable("no target: give a class, an example or a query")
            n_targets, separated = len(queries), self._querying(queries, without)
        distance = round(SHIFT_SECONDS * self.sample_rate)

        def estimate(mono: Float[Tensor, "rows time"]) -> Float[Tensor, "rows targets time"]:
            with autocast(self.device, self.precision):
                found = separated(mono)
                for i in range(1, shifts):
                    by = i * distance // shifts
                    found = found + separated(torch.nn.functional.pad(mono, (by, 0)))[..., by:]
            return found / shifts

        return Stream(
            estimate,
            n_targets,
            channels=channels,
            sample_rate=sample_rate,
            blocks=blocks or self.blocks,
            device=str(self.device),
            stereo=stereo,
            ordered=self.takes_queries,
        )

    def _querying(
        self, queries: Float[Tensor, "targets query_dim"], without: Query | Float[Tensor, "targets query_dim"] | None
    ) -> Any:
        """Make the function that separates mixtures (rows, time) into (rows, targets, time)."""
        network, n_targets = self.network, len(queries)
        assert isinstance(network, QuerySeparator)
        self._check_without(without is not None)
        with torch.inference_mode():
            queries = queries.to(self.device)
            other = None if without is None else without.to(self.device).expand_as(queries)
            queries = network.joint_query(queries, other)
        at_once = GPU_BATCH if self.device.type == "cuda" else CPU_BATCH

        def separated(mono: Float[Tensor, "rows time"]) -> Float[Tensor, "rows targets time"]:
            shared = network.shared(mono)
            pairs = [(row, target) for row in range(len(mono)) for target in range(n_targets)]
            found = []
            for first in range(0, len(pairs), at_once):
                rows, targets = (list(some) for some in zip(*pairs[first : first + at_once], strict=True))
                found.append(network(mono[rows], queries[targets], **{name: t[rows] for name, t in shared.items()}))
            return torch.cat(found).reshape(len(mono), n_targets, -1)

        return separated

    def separate(
        self,
        waveform: Audio | Tensor,
        sample_rate: int,
        targets: Sequence[str | int] | Mapping[str, Query] | None = None,
        *,
        without: Sequence[str | int] = (),
        threshold: float = 0.5,
        blocks: Blocks | None = None,
        stereo: Stereo = "mid",
        shifts: int = 1,
    ) -> Stems:
        """Separate a recording (channels, time), or (time,) of one channel, at any rate and of any length.

        targets   class names, ids or mids; or queries by the name that their stem is to have; or None: what the
                  detector finds with a probability of `threshold`, or all that a model without queries gives, the
                  loudest first
        without   classes that are not wanted

        What the detector finds does sound: a model that takes what is not wanted is given it of each of them. The stems
        and the residual add up to the input. Unusable for an unknown class and for samples that are not finite.
        """
        audio = np.atleast_2d(np.asarray(waveform, np.float32))
        if not np.isfinite(audio).all():
            raise Unusable("the recording has samples that are not finite")
        detected: dict[str, float] = {}
        queries: dict[str, Query] = {}
        if self.takes_queries:
            if targets is None:
                found = self.detect(audio, sample_rate).loudest(threshold, len(self.classes))
                detected = {one.name: probability for one, probability in found}
                targets = list(detected)
            queries = dict(targets) if isinstance(targets, Mapping) else dict(self.query(t) for t in targets)
            if not queries:
                return Stems({}, audio, sample_rate)
        elif targets is not None:
            raise Unusable(f"{self.folder} holds a separator without queries: it gives all sounds, unasked")
        stacked, unwanted = torch.stack(list(queries.values())) if queries else None, self.query_without(without)
        stream = self.stream(
            stacked,
            without=self.what_else_sounds(stacked, unwanted) if detected and stacked is not None else unwanted,
            channels=len(audio),
            sample_rate=sample_rate,
            blocks=blocks,
            stereo=stereo,
            shifts=shifts,
        )
        estimates = np.concatenate([stream.push(audio), stream.flush()], axis=2)
        residual = (audio.astype(np.float64) - estimates.sum(axis=0, dtype=np.float64)).astype(np.float32)
        names = list(queries)
        if not self.takes_queries:
            estimates = estimates[np.argsort(-np.square(estimates).sum(axis=(1, 2)), kind="stable")]
            names = self.ranked_names([[one] for one in estimates], sample_rate)
        return Stems(dict(zip(names, estimates, strict=True)), residual, sample_rate, detected)

    def query_without(self, classes: Sequence[str | int]) -> Query | None:
        """Average the queries of classes that are not wanted; None for none. Unusable where the model takes none."""
        self._check_without(bool(classes))
        return torch.stack([self.query(one)[1] for one in classes]).mean(dim=0) if classes else None

    def what_else_sounds(
        self, queries: Float[Tensor, "targets query_dim"], without: Query | None = None
    ) -> Float[Tensor, "targets query_dim"] | None:
        """Average, for each of several sounds that are all in a recording, the queries of the others and `without`.

        None where the model takes no such query, or nothing else sounds. Measured: the class that does sound beside a
        target gains 0.8 dB of SI-SDR, one that does not costs 1.6; so it is for sounds that are known to be there.
        """
        network = self.network
        if not isinstance(network, QuerySeparator) or not network.takes_interferer:
            return without
        unwanted = [] if without is None else [without]
        others = [[*queries[:k], *queries[k + 1 :], *unwanted] for k in range(len(queries))]
        return torch.stack([torch.stack(each).mean(dim=0) for each in others]) if others[0] else None

    def _check_without(self, asked: bool) -> None:
        if asked and isinstance(self.network, QuerySeparator) and not self.network.takes_interferer:
            raise Unusable(f"{self.folder} takes no query of what is not wanted")

    def ranked_names(self, stems: Iterable[Iterable[Audio]], sample_rate: int) -> list[str]:
        """Name stems, each given in blocks, by their rank and what the detector, if there is one, is surest of."""
        names = []
        for rank, stem in enumerate(stems, start=1):
            name = "source"
            if (self.folder / DETECTOR).is_dir():
                found = self.detect_in(stem, sample_rate).loudest(0.0, 1)
                name = found[0][0].name if found else name
            names.append(f"{rank} {name}")
        return names

    # ----------------------------------------------------------------------------------------------------- detection

    def detect(self, waveform: Audio | Tensor, sample_rate: int) -> Detection:
        """Detect this model's classes over time in a recording (channels, time) or (time,)."""
        return self.detect_in([np.atleast_2d(np.asarray(waveform, np.float32))], sample_rate)

    def detect_in(self, blocks: Iterable[Audio], sample_rate: int) -> Detection:
        """Detect this model's classes in a recording of any length that comes in blocks, in constant memory."""
        columns = {index: j for j, index in enumerate(self.detector.class_indices)}
        classes = [one for one in self.classes if one.index in columns]
        segment = self.detector.segment_samples
        size = max(1, round(DETECTED_SECONDS * SAMPLE_RATE / segment)) * segment
        found = []
        with torch.inference_mode():
            for piece in _pieces(blocks, sample_rate, size):
                given = torch.from_numpy(piece)[None].to(self.device)
                found.append(self.detector.framewise_probability(given)[0].cpu().numpy())
        if not found:
            raise Unusable("there is no sound to detect anything in")
        chosen = np.concatenate(found)[:, [columns[one.index] for one in classes]]
        return Detection(classes, chosen, segment / SAMPLE_RATE)

    # ----------------------------------------------------------------------------------------------------- elsewhere

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the model to a folder that needs nothing else: weights, config.json, queries, networks, model card."""
        return hub.save(self.folder, self.config, self.network, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the model to a Hugging Face repository, which is made where it is not there; return its address."""
        with tempfile.TemporaryDirectory() as scratch:
            made = self.save_pretrained(Path(scratch) / self.folder.stem)
            return hub.push(made, repository, private=private, token=token)


def _pieces(blocks: Iterable[Audio], sample_rate: int, size: int) -> Iterable[Float[np.ndarray, " time"]]:
    """Down-mix and resample blocks to pieces of `size` samples at 32 kHz, the last one shorter."""
    resampler = None
    if sample_rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32")
    waiting = np.zeros(0, np.float32)

    def resampled(mono: np.ndarray, *, last: bool) -> np.ndarray:
        return mono if resampler is None else resampler.resample_chunk(mono, last=last)

    for block in blocks:
        mono = down_mix(torch.from_numpy(np.ascontiguousarray(block, np.float32))[None])[0].numpy()
        waiting = np.concatenate([waiting, resampled(mono, last=False)])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    waiting = np.concatenate([waiting, resampled(np.zeros(0, np.float32), last=True)])
    if len(waiting):
        yield waiting
