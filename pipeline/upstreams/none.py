"""No features: zeros of the width that A-MAE's have, so that a network of the same shapes learns without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pipeline import upstreams
from pipeline.upstreams import mae


class Upstream(upstreams.Upstream):
    """Zeros, a step for every 70 ms as in Zhao et al.'s reading."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim, self.n_layers, self.frames_per_step = dim, 1, 7.0

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer of zeros."""
        n = mae.n_paper_steps(waveform.shape[1])
        return [waveform.new_zeros(waveform.shape[0], n, self.dim)]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], None]:
    """As wide as the pretrained A-MAE."""
    return {"dim": mae.read_config(pretrained)["model"]["dim"]}, None
