"""Fusion deep: features added to all bins before the fifth encoder, where a row of the U-Net is 16 STFT frames."""

from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes, silent
from pipeline.separators.resunet import UNet

LEVEL = 4  # encoders before it
FRAMES_PER_ROW = 16


class Fusion(fusions.Fusion):
    """Features at their own rate, inside the U-Net."""

    bodies = ("resunet",)

    def __init__(self, sizes: Sizes, unet: UNet) -> None:
        super().__init__()
        self.project = silent(nn.Linear(sizes.dim, sizes.channels[LEVEL - 1]))

    def join(self, level: int, h: Tensor, features: Features) -> Tensor:
        """Add the projected step of each row to its bins."""
        if level != LEVEL:
            return h
        added = self.project(features.rows(h.shape[2], stride=FRAMES_PER_ROW)).transpose(1, 2)[..., None]
        return h + added.to(h.dtype)
