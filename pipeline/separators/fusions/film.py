"""Fusion film: the features' mean over time, projected and added to the query."""

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes, silent


class Fusion(fusions.Fusion):
    """Features that steer the body through its FiLM layers."""

    def __init__(self, sizes: Sizes, body: nn.Module) -> None:
        super().__init__()
        self.project = silent(nn.Linear(sizes.dim, sizes.joint_dim))

    def query(self, query: Float[Tensor, "batch joint_dim"], features: Features) -> Float[Tensor, "batch joint_dim"]:
        """Add the projected mean of all steps."""
        return query + self.project(features.values.mean(dim=1)).to(query.dtype)
