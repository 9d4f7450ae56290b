"""Fusion none: no features, the baseline."""

from torch import nn

from pipeline.separators import fusions
from pipeline.separators.fusions import Sizes


class Fusion(fusions.Fusion):
    """The body as it is."""

    reads_features = False

    def __init__(self, sizes: Sizes, body: nn.Module) -> None:
        super().__init__()
