"""Fusion none: no features, the baseline."""

from pipeline.separators import fusions
from pipeline.separators.fusions import Sizes
from pipeline.separators.resunet import UNet


class Fusion(fusions.Fusion):
    """ResUNet30 as it is."""

    reads_features = False

    def __init__(self, sizes: Sizes, unet: UNet) -> None:
        super().__init__()
