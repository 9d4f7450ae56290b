"""Fusion attention: cross-attention from the rows of the bottleneck (32 STFT frames) to the features' time steps."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes, silent
from pipeline.separators.resunet import FRAMES_MULTIPLE, UNet

LEVEL = 6  # all encoders come before it


class Fusion(fusions.Fusion):
    """Features that each row of the bottleneck chooses for itself, with up to `heads` heads."""

    bodies = ("resunet",)

    def __init__(self, sizes: Sizes, unet: UNet, *, heads: int = 4) -> None:
        super().__init__()
        self.cross = CrossAttention(sizes.channels[LEVEL - 1], sizes.dim, heads)

    def join(self, level: int, h: Tensor, features: Features) -> Tensor:
        """Add what the rows of the bottleneck found to all their bins."""
        if level != LEVEL:
            return h
        # Where the rows lie in the mixture; both lengths end as the U-Net's do, at 32 frames.
        span = (features.first / FRAMES_MULTIPLE, -(-features.total // FRAMES_MULTIPLE))
        return self.cross(h, features.values, span)


class CrossAttention(nn.Module):
    """Cross-attention over time, the times of rows and steps being given as sines and cosines."""

    def __init__(self, channels: int, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            channels, math.gcd(channels, heads), kdim=dim, vdim=dim, batch_first=True
        )
        silent(self.attention.out_proj)

    def forward(
        self,
        h: Float[Tensor, "batch channels rows bins"],
        steps: Float[Tensor, "batch steps dim"],
        span: tuple[float, int],
    ) -> Float[Tensor, "batch channels rows bins"]:
        """Add the same to all bins of a row. `span`: the first row's place, and how many rows the mixture has."""
        with torch.autocast(h.device.type, enabled=False):
            rows = h.float().mean(dim=3).transpose(1, 2)
            found, _ = self.attention(
                rows + time_code(rows, *span), steps + time_code(steps), steps, need_weights=False
            )
        return h + found.transpose(1, 2)[..., None].to(h.dtype)


def time_code(x: Float[Tensor, "batch n dim"], first: float = 0, total: int | None = None) -> Float[Tensor, "n dim"]:
    """Encode where in the mixture each of n vectors lies, from 0 to 1, as sines and cosines of 1 to 32 half turns.

    They are number `first` and on of `total`; by default they are all there are.
    """
    n, dim = x.shape[1:]
    place = (torch.arange(n, device=x.device) + first + 0.5) / (total or n)
    turns = torch.pi * 32 ** torch.linspace(0, 1, -(-dim // 2), device=x.device)
    angle = place[:, None] * turns
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]
