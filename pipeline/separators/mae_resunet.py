"""MAE-ResUNet: ResUNet30 with features of an upstream encoder (Zhao et al., arXiv:2407.11745, section II)."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from pipeline.separators import _features, resunet
from pipeline.separators._features import fold, unfold
from pipeline.separators.fusions import Features


class Settings(_features.Settings):
    """Settings of the features of a resunet."""

    body_name = "resunet"


class Separator(_features.Featured, resunet.Separator):
    """ResUNet30 with an upstream: `body` are the baseline's arguments, `settings` those of `Settings`."""

    def __init__(
        self,
        *,
        query_dim: int,
        interferer_query: bool = False,
        body: Mapping[str, Any],
        upstream_config: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query, **body)
        sizes = {"n_bins": self.n_fft // 2, "channels": body["channels"]}
        self.take_features(Settings.model_validate(settings), upstream_config, self.unet, **sizes)

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice = slice(None),
        *,
        features: Float[Tensor, "batch *windows steps dim"] | None = None,
    ) -> Float[Tensor, "batch part"]:
        """Separate `part` of each mixture; the encoder is given all of the mixture.

        `features`: what `shared(mixture)` gave, if it was computed before.
        """
        if self.upstream is None:
            return super().forward(mixture, query, part)
        located, query, windows = self.steered(mixture, query, part, features)
        return self.masked(mixture[:, part], lambda spectrum: self.logits(spectrum, query, located, windows))

    def logits(
        self,
        spectrum: Complex[Tensor, "batch frames bins"],
        query: Float[Tensor, "batch *windows joint_dim"],
        features: Features,
        windows: int = 1,
    ) -> Float[Tensor, "batch 3 padded_frames masked_bins"]:
        """Compute what the mask is made of: the U-Net on STFT and features, which are of as many windows an item."""
        plane = self.normed(spectrum)
        if windows > 1:
            plane = F.pad(plane, (0, 0, 0, windows * features.total - plane.shape[2]))
        logits = self.unet(
            unfold(self.fusion.plane(fold(plane, windows, 2), features), windows, 2),
            query,
            lambda level, h: unfold(self.fusion.join(level, fold(h, windows, 2), features), windows, 2),
        )
        return logits[..., : plane.shape[3]]
