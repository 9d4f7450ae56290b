"""Upstreams: encoders whose features a separator may take. One file each; the folder is the registry.

Each file defines `Upstream(**config)` and `read(options, pretrained)`; tests/test_upstreams.py holds
every file to this:

    hidden = upstream.hidden(waveform)          # 32 kHz, any length -> one (batch, positions, dim) per layer
    h = combine(upstream, hidden, "last")       # -> (batch, positions, dim)
    steps = upstream.to_steps(h)                # -> (batch, steps, dim): one vector per time step
    align(steps, upstream.frames_per_step, 201) # -> (batch, 201, dim): one vector per 10-ms frame of the STFT

Resampling, filter banks and pooling over frequency happen inside. Combining comes before pooling, for a maximum of sums
is not the sum of maxima.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.core.config import Params
from pipeline.core.registry import Registry

SAMPLE_RATE = 32000  # Hz, of what every upstream is given
FRAME_RATE = 100  # Hz, of the STFT that features are aligned with

Layers = Literal["last", "last3", "weighted"]
Repeat = Literal["interleave", "tile"]


class Upstream(nn.Module):
    """Base class of upstream encoders. A subclass sets the attributes and defines `hidden`."""

    dim: int  # width of a feature vector
    n_layers: int  # how many layers `hidden` gives
    sample_rate: int = 16000  # Hz, of what the encoder itself hears; `hidden` resamples
    frames_per_step: float  # 10-ms frames that one step stands for
    lora_targets: tuple[str, ...] = ()  # names of the Linear modules that low-rank adapters adapt

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """Output of each layer for 32-kHz waveforms, before any last norm of the encoder."""
        raise NotImplementedError

    def final_norm(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The encoder's own last norm; nothing where it has none."""
        return h

    def to_steps(self, h: Float[Tensor, "batch positions dim"]) -> Float[Tensor, "batch steps dim"]:
        """One vector per time step; nothing to do for encoders without a frequency axis."""
        return h

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The trainable parameters from input to output: embedding, each block, the last with the final norm."""
        return []


REGISTRY = Registry(__name__, __file__, "upstream")
names = REGISTRY.names


def check_sample_rate(sample_rate: int) -> None:
    """ValueError for audio that upstreams would hear at the wrong speed."""
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"audio.sample_rate is {sample_rate}; upstreams hear {SAMPLE_RATE} Hz")


def build(name: str, **config: Any) -> Upstream:
    """Build the Upstream of `pipeline/upstreams/<name>.py`; ValueError for a name that has no file."""
    upstream: Upstream = REGISTRY.module(name).Upstream(**config)
    return upstream


def options(name: str) -> type[Params] | None:
    """Params class of its section `upstreams.<name>`; None if it has none."""
    found: type[Params] | None = getattr(REGISTRY.module(name), "Options", None)
    return found


def read(name: str, options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """(config for `build`, its weights; None: there are none or they are drawn at random).

    `options` are the upstream's own entry of params.yaml with what the separator asks of it; `pretrained` is the folder
    of stage pretrain_mae.
    """
    config, state = REGISTRY.module(name).read(options, pretrained)
    return config, state


def combine(
    upstream: Upstream,
    hidden: Sequence[Float[Tensor, "batch positions dim"]],
    layers: Layers,
    weights: Float[Tensor, " layers"] | None = None,
) -> Float[Tensor, "batch positions dim"]:
    """One feature per position from those of all layers.

    last      the last layer's, under the encoder's final norm
    last3     the mean of the last three layers', each under the final norm (as AudioLDM2 has it); of fewer, of all
    weighted  the sum weighted by softmax(weights) of all layers', each brought to zero mean and unit variance: without
              that the later layers of a pre-norm encoder would drown the others
    """
    if layers == "last":
        return upstream.final_norm(hidden[-1])
    if layers == "last3":
        chosen = [upstream.final_norm(h) for h in hidden[-3:]]
        total = chosen[0]
        for h in chosen[1:]:
            total = total + h
        return total / len(chosen)
    if weights is None or len(weights) != len(hidden):
        raise ValueError(f"weighted layers need one weight for each of the {len(hidden)} layers")
    share = weights.softmax(dim=0)
    total = share[0] * F.layer_norm(hidden[0], hidden[0].shape[-1:])
    for i, h in enumerate(hidden[1:], start=1):
        total = total + share[i] * F.layer_norm(h, h.shape[-1:])
    return total


def align(
    steps: Float[Tensor, "batch steps dim"],
    frames_per_step: float,
    frames: int,
    repeat: Repeat = "interleave",
    first: int = 0,
    stride: int = 1,
) -> Float[Tensor, "batch {frames} dim"]:
    """The step of each 10-ms frame from `first` on: j takes step floor(j / frames_per_step), or j mod steps if `tile`.

    Frames after the last step keep it. With a `stride`, a row for every so many frames: j is the one in its middle, and
    tiles are counted in rows.
    """
    n = steps.shape[1]
    wanted = range(first + stride // 2, first + stride * frames, stride)
    index = [j // stride % n if repeat == "tile" else min(int(j / frames_per_step + 1e-9), n - 1) for j in wanted]
    return steps[:, index]
