"""Sound event detection and query embeddings: PANNs, or a small network of the same family.

PANNs are Kong et al. 2020, arXiv:1912.10211. Detection is by decision-level max pooling: a probability per segment and
class, whose maximum over the segments is trained against the clip's weak labels. The query embedding is the
activation before the classifier.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from pipeline.core.devices import exact_float32
from pipeline.core.runtime import read_json, write_atomic
from pipeline.core.weights import read_safetensors
from pipeline.nn.features import (
    MEL_F_MAX,
    MEL_F_MIN,
    MEL_HOP_LENGTH,
    MEL_N_FFT,
    N_MELS,
    SAMPLE_RATE,
    log_mel,
    pad_to,
)

AUDIOSET_CLASSES = 527
FRAME_SAMPLES = MEL_HOP_LENGTH  # a frame-wise probability is one per 10 ms
# A freshly initialised FiLM layer then shifts its batch-normalised activation by about half a standard deviation. The
# small network's own activations are some 30 long, which saturates the separator: it learns three times as slowly.
QUERY_LENGTH = 4.0


class Detector(nn.Module):
    """Says which classes sound when.

    Class j of its output is AudioSet's class `class_indices[j]`. Segment i starts at sample i * segment_samples; what
    is left of a clip after its last whole segment has no probability of its own.
    """

    class_indices: list[int]
    segment_samples: int

    def framewise_probability(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments classes"]:
        """Probability of each class in each segment, at 32 kHz, at the network's own resolution.

        At least one segment: a waveform shorter than that is followed by silence. `to_frames` gives the 10-ms frames.
        """
        raise NotImplementedError


class QueryEncoder(nn.Module):
    """Turns an example of a sound into the query for a separator."""

    query_dim: int
    segment_dim: int  # of what `segments` gives
    segment_frames: int  # frames of 10 ms that one segment stands for

    def embed(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch query_dim"]:
        """The non-negative activations before the classifier, at 32 kHz."""
        raise NotImplementedError

    def segments(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments segment_dim"]:
        """Activations that `embed` pools over time, of the last of `conv_blocks`; at least one segment."""
        raise NotImplementedError

    def conv_blocks(self) -> list[nn.Module]:
        """From input to output. They may be held in another precision than the front end before them."""
        raise NotImplementedError


def to_frames(
    probability: Float[Tensor, "batch segments classes"], *, segment_samples: int, n_frames: int
) -> Float[Tensor, "batch {n_frames} classes"]:
    """One value per 10 ms: each segment's, repeated, and the last one's up to `n_frames` (as PANNs pads 992 to 1001).

    ValueError if n_frames is fewer than the segments cover.
    """
    frames = probability.repeat_interleave(segment_samples // FRAME_SAMPLES, dim=1)
    if n_frames < frames.shape[1]:
        raise ValueError(f"{probability.shape[1]} segments cover {frames.shape[1]} frames, more than {n_frames}")
    return torch.cat([frames, frames[:, -1:].expand(-1, n_frames - frames.shape[1], -1)], dim=1)


def panns_models() -> ModuleType:
    """panns_inference.models, loaded without its package's __init__.

    That __init__ downloads the class labels into the home folder at import and, offline, leaves an empty file and no
    classes behind. models.py also imports matplotlib, whose only effect is a font cache in the home folder: it is
    given an empty module instead.
    """
    name = "pipeline_panns_inference"
    if f"{name}.models" in sys.modules:
        return sys.modules[f"{name}.models"]
    spec = find_spec("panns_inference")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("panns_inference is not installed; see requirements.txt")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    empty = [m for m in ("matplotlib", "matplotlib.pyplot") if m not in sys.modules]
    sys.modules.update({name: package} | {module: ModuleType(module) for module in empty})
    try:
        return import_module(f"{name}.models")
    finally:
        for module in empty:
            del sys.modules[module]


def _build_panns(name: str, tensors: Mapping[str, Tensor] | None) -> Any:
    """A frozen network of panns_inference with these weights (None: any); RuntimeError names what does not fit."""
    network = getattr(panns_models(), name)(
        sample_rate=SAMPLE_RATE,
        window_size=MEL_N_FFT,
        hop_size=MEL_HOP_LENGTH,
        mel_bins=N_MELS,
        fmin=MEL_F_MIN,
        fmax=MEL_F_MAX,
        classes_num=AUDIOSET_CLASSES,
    )
    if tensors is not None:
        network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


class PannsDetector(Detector):
    """Cnn14_DecisionLevelMax, pretrained on AudioSet; `tensors` is its published state dict.

    Its transform is a convolution with frozen weights, which are part of the state dict: 6 % of the forward time.
    """

    SEGMENT_FRAMES = 32  # five poolings by two

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = _build_panns("Cnn14_DecisionLevelMax", tensors)
        self.class_indices = list(range(AUDIOSET_CLASSES))
        self.segment_samples = self.SEGMENT_FRAMES * FRAME_SAMPLES

    def framewise_probability(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments classes"]:
        """One segment per 0.32 s."""
        waveform = pad_to(waveform, (self.SEGMENT_FRAMES - 1) * FRAME_SAMPLES)
        n_segments = (waveform.shape[-1] // FRAME_SAMPLES + 1) // self.SEGMENT_FRAMES
        frames = self.network(waveform)["framewise_output"]
        # The network repeats its segments to frames; every 32nd of those is a segment again.
        return frames[:, : n_segments * self.SEGMENT_FRAMES : self.SEGMENT_FRAMES]


class PannsQueryEncoder(QueryEncoder):
    """Cnn14, pretrained on AudioSet: 2048 activations, from the maximum plus the mean over time.

    `tensors` is its published state dict; None: they are loaded later.
    """

    network: Any
    segment_frames = PannsDetector.SEGMENT_FRAMES

    def __init__(self, tensors: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.network = network = _build_panns("Cnn14", tensors)
        self.query_dim, self.segment_dim = network.fc1.out_features, network.fc1.in_features

    def embed(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch query_dim"]:
        """At least 0.32 s: a shorter waveform is followed by silence."""
        return self.network(self._padded(waveform))["embedding"]

    def segments(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments segment_dim"]:
        """One per 0.32 s. Without dropout, also where it learns."""
        with torch.autocast(waveform.device.type, enabled=False), exact_float32():
            x = self.network.logmel_extractor(self.network.spectrogram_extractor(self._padded(waveform).float()))
            x = self.network.bn0(x.transpose(1, 3)).transpose(1, 3)
        blocks = self.conv_blocks()
        x = x.to(next(blocks[0].parameters()).dtype)
        for block in blocks:
            x = block(x, pool_size=(1, 1) if block is blocks[-1] else (2, 2), pool_type="avg")
        return x.mean(dim=3).transpose(1, 2)

    def conv_blocks(self) -> list[nn.Module]:
        """The six convolutional blocks, input to output."""
        return [getattr(self.network, f"conv_block{number}") for number in range(1, 7)]

    def _padded(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch padded"]:
        return pad_to(waveform, (self.segment_frames - 1) * FRAME_SAMPLES)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(
        self, x: Float[Tensor, "batch in_channels frames mels"]
    ) -> Float[Tensor, "batch out_channels out_frames out_mels"]:
        """Divide frames and mels by the stride."""
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)), inplace=True)


class SmallCnn(Detector, QueryEncoder):
    """Cnn14's family in small: detector and query encoder in one network, trained from weak labels in minutes.

    A block per entry of `channels`. The first convolution strides by two and every block but the last is followed by
    an average pooling by two, so that four blocks give a segment of 16 frames (0.16 s). Striding in the first
    convolution instead of pooling after the first block is what makes a training step four times as fast.
    """

    def __init__(self, *, class_indices: Sequence[int], channels: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        self.class_indices = list(class_indices)
        self.channels = list(channels)
        self.query_dim, self.segment_dim = embedding_dim, self.channels[-1]
        self.segment_frames = 2 ** len(self.channels)
        self.segment_samples = self.segment_frames * FRAME_SAMPLES
        if not 1 <= len(self.channels) <= 6:
            raise ValueError(f"{len(self.channels)} blocks do not fit {N_MELS} mels; between 1 and 6 do")

        self.norm = nn.BatchNorm1d(N_MELS)
        self.blocks = nn.ModuleList(
            ConvBlock(*widths, stride=2 if index == 0 else 1)
            for index, widths in enumerate(pairwise([1, *self.channels]))
        )
        self.fc = nn.Linear(self.channels[-1], embedding_dim)
        self.classifier = nn.Linear(embedding_dim, len(self.class_indices))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv2d):
                # Channels innermost, there and so in all that follows: 0.7 of the time of a training step on a CPU.
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def features(self, log_mel: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch segments channels"]:
        """The blocks' output averaged over the mels. Frames after the last whole segment are left out."""
        n_segments = log_mel.shape[1] // self.segment_frames
        if n_segments == 0:
            raise ValueError(f"{log_mel.shape[1]} frames are fewer than a segment of {self.segment_frames}")
        h = self.norm(log_mel[:, : n_segments * self.segment_frames].transpose(1, 2)).transpose(1, 2)[:, None]
        h = h.to(next(self.blocks.parameters()).dtype)
        for index, block in enumerate(self.blocks):
            h = block(h if index == 0 else F.avg_pool2d(h, 2))
        return h.mean(dim=3).transpose(1, 2)

    def segment_logits(self, log_mel: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch segments classes"]:
        """Each segment with its neighbours, maximum plus mean of three, as Cnn14_DecisionLevelMax has it."""
        h = self.features(log_mel).transpose(1, 2)
        h = F.max_pool1d(h, 3, stride=1, padding=1) + F.avg_pool1d(h, 3, stride=1, padding=1)
        return self.classifier(F.relu(self.fc(h.transpose(1, 2))))

    def forward(self, log_mel: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch classes"]:
        """Logits of a clip's weak labels: each class where it is surest (decision-level maximum)."""
        return self.segment_logits(log_mel).amax(dim=1)

    def framewise_probability(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments classes"]:
        """One segment per 2^blocks frames of 10 ms."""
        return self.segment_logits(self.log_mel(waveform)).sigmoid()

    def embed(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch query_dim"]:
        """The maximum plus the mean over all segments, through the layer before the classifier, as in Cnn14.

        Brought to length QUERY_LENGTH.
        """
        h = self.segments(waveform)
        return QUERY_LENGTH * F.normalize(F.relu(self.fc(h.amax(dim=1) + h.mean(dim=1))), dim=1)

    def segments(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch segments segment_dim"]:
        """One per 2^blocks frames of 10 ms."""
        return self.features(self.log_mel(waveform))

    def conv_blocks(self) -> list[nn.Module]:
        """The convolutional blocks, one per entry of `channels`."""
        return list(self.blocks)

    def log_mel(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames mels"]:
        """Compute the input of forward from 32 kHz; at least one segment."""
        # Reflection at the ends needs more than half a window, which is less than two frames.
        with exact_float32():
            return log_mel(pad_to(waveform, max(2, self.segment_frames - 1) * FRAME_SAMPLES))


def config_of(network: nn.Module) -> dict[str, Any]:
    """Describe a network as `save` writes it beside the weights; ValueError for a network that is none of these."""
    if isinstance(network, SmallCnn):
        arguments = {
            "class_indices": network.class_indices,
            "channels": network.channels,
            "embedding_dim": network.query_dim,
        }
        return {"class": "SmallCnn", "arguments": arguments}
    if isinstance(network, PannsDetector | PannsQueryEncoder):
        return {"class": type(network).__name__}
    raise ValueError(f"cannot save a {type(network).__name__}; only SmallCnn, PannsDetector and PannsQueryEncoder")


def save(network: nn.Module, directory: Path) -> None:
    """Write config.json and weights.safetensors, byte for byte the same for the same network."""
    config = config_of(network)
    directory.mkdir(parents=True, exist_ok=True)
    weights = network if isinstance(network, SmallCnn) else network.network
    assert isinstance(weights, nn.Module)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.state_dict().items()}
    write_atomic(directory / "weights.safetensors", as_bytes(tensors))
    write_atomic(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load(directory: Path) -> nn.Module:
    config = read_json(directory / "config.json")
    tensors = read_safetensors(directory / "weights.safetensors")
    match config["class"]:
        case "SmallCnn":
            network = SmallCnn(**config["arguments"])
            network.load_state_dict(tensors)
            return network.eval()
        case "PannsDetector":
            return PannsDetector(tensors).eval()
        case "PannsQueryEncoder":
            return PannsQueryEncoder(tensors).eval()
    raise ValueError(f"{directory / 'config.json'}: no class {config['class']!r}")


def build_query_encoder(config: Mapping[str, Any]) -> QueryEncoder:
    """A query encoder of the sizes that `config_of` tells, without its weights."""
    return SmallCnn(**config["arguments"]) if config["class"] == "SmallCnn" else PannsQueryEncoder(None)


def load_detector(directory: Path) -> Detector:
    """The detector that `save` wrote, on the CPU, ready for inference; ValueError if it is not a detector."""
    network = _load(directory)
    if not isinstance(network, Detector):
        raise ValueError(f"{directory} holds a {type(network).__name__}, which does not detect")
    return network


def load_query_encoder(directory: Path) -> QueryEncoder:
    """The query encoder that `save` wrote, on the CPU, ready for inference; ValueError if it does not embed."""
    network = _load(directory)
    if not isinstance(network, QueryEncoder):
        raise ValueError(f"{directory} holds a {type(network).__name__}, which does not embed")
    return network
