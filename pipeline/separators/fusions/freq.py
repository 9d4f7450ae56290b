"""Fusion freq: STFT and features side by side along frequency, as published (Zhao et al., arXiv:2407.11745, II-B).

For 2 s, n_fft 1024 and an A-MAE of width 768, (batch, 1, 224, 513) and (batch, 1, 224, 768) become 1281 columns, of
which the last is dropped; of the U-Net's 1280 the first 513 are the mask's, so that Nyquist has one. The U-Net does 2.5
times the baseline's work.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.separators import fusions
from pipeline.separators.fusions import Features, Sizes
from pipeline.separators.resunet import BINS_MULTIPLE, UNet


class Fusion(fusions.Fusion):
    """Features as more frequency bins."""

    bodies = ("resunet",)

    def __init__(self, sizes: Sizes, unet: UNet) -> None:
        super().__init__()

    def plane(
        self, plane: Float[Tensor, "batch 1 rows bins"], features: Features
    ) -> Float[Tensor, "batch 1 rows columns"]:
        """Put the features of each row beside its bins, and drop the last column."""
        joined = torch.cat([plane, features.rows(plane.shape[2])[:, None]], dim=3)[..., :-1]
        # Nothing to add for the published widths.
        return F.pad(joined, (0, -joined.shape[3] % BINS_MULTIPLE))
