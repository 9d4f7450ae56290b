"""Features without information: drawn once, the same for every mixture. What they help, width helps, not knowledge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import upstreams
from pipeline.upstreams import mae


class Upstream(upstreams.Upstream):
    """A fixed table of unit-variance vectors, one per step of the A-MAE; longer mixtures start it again."""

    def __init__(self, *, dim: int, mae_input: mae.MaeInput, seed: int = 0) -> None:
        super().__init__()
        self.mae_input: mae.MaeInput = mae_input
        self.dim, self.n_layers, self.frames_per_step = dim, 1, mae.FRAMES_PER_STEP[mae_input]
        table = torch.randn(32, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table)
        self.table: Tensor

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer: the table."""
        n = mae.n_steps(self.mae_input, waveform.shape[1])
        rows = torch.arange(n, device=waveform.device) % len(self.table)
        return [self.table[rows].expand(waveform.shape[0], -1, -1)]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], None]:
    """As wide as the pretrained A-MAE, and with as many steps."""
    return {"dim": mae.read_config(pretrained)["model"]["dim"], "mae_input": options["mae_input"]}, None
