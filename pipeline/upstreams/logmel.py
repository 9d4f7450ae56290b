"""The A-MAE's own input as features: a control. What these give, no encoder is needed for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pipeline import upstreams
from pipeline.nn.fbank import HOP_SAMPLES, N_MELS, WINDOW_SAMPLES, fbank, normalise, to_16k
from pipeline.nn.features import pad_to


class Upstream(upstreams.Upstream):
    """Log mel energies of each frame of 10 ms. It has nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.n_layers, self.frames_per_step = N_MELS, 1, 1.0

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer: the normalised filter bank, one frame for every hop that begins in the waveform."""
        low = to_16k(waveform, upstreams.SAMPLE_RATE)
        low = low - low.mean(dim=-1, keepdim=True)
        frames = -(-low.shape[-1] // HOP_SAMPLES)
        return [normalise(fbank(pad_to(low, WINDOW_SAMPLES + (frames - 1) * HOP_SAMPLES)))]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], None]:
    """No config and no weights: there is nothing to choose."""
    return {}, None
