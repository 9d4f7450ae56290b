"""Fusion frames: features as FiLM over time: every gain and shift of a band-split body has a value in each frame."""

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes, silent


class Fusion(fusions.Fusion):
    """Features that steer a band-split body frame by frame, in all of its layers."""

    bodies = ("bandsplit",)

    def __init__(self, sizes: Sizes, body: nn.Module) -> None:
        super().__init__()
        self.project = silent(nn.Linear(sizes.dim, sizes.query_hidden))

    def steer(
        self, hidden: Float[Tensor, "batch 1 query_hidden"], features: Features, frames: int
    ) -> Float[Tensor, "batch frames query_hidden"]:
        """Add the projected features of each frame to what the query gives for all of them."""
        return hidden + self.project(features.rows(frames)).to(hidden.dtype)
