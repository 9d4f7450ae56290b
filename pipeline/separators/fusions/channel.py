"""Fusion channel: features projected to the bins, as a second input channel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes
from pipeline.separators.resunet import Pointwise, UNet


class Fusion(fusions.Fusion):
    """Features as a second plane beside the magnitudes; the first plane's weights are the baseline's."""

    bodies = ("resunet",)

    def __init__(self, sizes: Sizes, unet: UNet) -> None:
        super().__init__()
        self.project = nn.Linear(sizes.dim, sizes.n_bins)
        enter = Pointwise(2, sizes.channels[0])
        with torch.no_grad():
            enter.weight[:, :1] = unet.enter.weight
            enter.bias.copy_(unet.enter.bias)  # type: ignore[union-attr, arg-type]
        unet.enter = enter

    def plane(
        self, plane: Float[Tensor, "batch 1 rows bins"], features: Features
    ) -> Float[Tensor, "batch 2 rows even_bins"]:
        """Put the projected features of each row behind its magnitudes."""
        second = self.project(features.rows(plane.shape[2]))[:, None].float()
        return torch.cat([plane[..., :-1], second], dim=1)
