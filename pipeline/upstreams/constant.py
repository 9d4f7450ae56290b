"""Features without information: one table, the same for every mixture. What it helps, width helps, not knowledge.

An encoder with random weights is `mae_untrained`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.upstreams import mae, none

read = none.read


class Upstream(none.Upstream):
    """A fixed table of unit-variance vectors in place of the zeros; longer mixtures start it again."""

    def __init__(self, *, dim: int, mae_input: mae.MaeInput, seed: int = 0) -> None:
        super().__init__(dim=dim, mae_input=mae_input)
        table = torch.randn(32, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table)
        self.table: Tensor

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer: the table."""
        (zeros,) = super().hidden(waveform)
        rows = torch.arange(zeros.shape[1], device=waveform.device) % len(self.table)
        return [zeros + self.table[rows]]
