"""No features: zeros of the shapes that A-MAE's have, so that a network of the same shapes learns without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pipeline import upstreams
from pipeline.upstreams import mae


class Upstream(upstreams.Upstream):
    """Zeros, one vector per step of the A-MAE."""

    def __init__(self, *, dim: int, mae_input: mae.MaeInput) -> None:
        super().__init__()
        self.mae_input: mae.MaeInput = mae_input
        self.dim, self.n_layers, self.frames_per_step = dim, 1, mae.FRAMES_PER_STEP[mae_input]

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer of zeros."""
        n = mae.n_steps(self.mae_input, waveform.shape[1])
        return [waveform.new_zeros(waveform.shape[0], n, self.dim)]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], None]:
    """Config of features as wide as the pretrained A-MAE, and with as many steps."""
    return {"dim": mae.read_config(pretrained)["model"]["dim"], "mae_input": options["mae_input"]}, None
