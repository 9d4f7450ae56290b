"""Fusion tokens: the features of each frame beside the bins of each band, as `freq` puts them beside those of a U-Net.

A band's token is a linear function of its bins. Were the features concatenated to them, it would be that and a linear
function of the features: the sum below.
"""

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes, silent


class Fusion(fusions.Fusion):
    """Features concatenated to the input of a band-split body."""

    bodies = ("bandsplit",)

    def __init__(self, sizes: Sizes, body: nn.Module) -> None:
        super().__init__()
        self.project = silent(nn.Linear(sizes.dim, sizes.bands * sizes.width))

    def tokens(
        self, tokens: Float[Tensor, "batch frames bands width"], features: Features
    ) -> Float[Tensor, "batch frames bands width"]:
        """Add the projected features of each frame to its bands."""
        return tokens + self.project(features.rows(tokens.shape[1])).unflatten(2, tokens.shape[2:]).to(tokens.dtype)
