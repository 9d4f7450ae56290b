"""MAE-bandsplit: the band-split network with features of an upstream encoder."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.separators import _features, bandsplit
from pipeline.separators._features import fold, unfold


class Settings(_features.Settings):
    """Settings of the features of a bandsplit."""

    body_name = "bandsplit"


class Separator(_features.Featured, bandsplit.Separator):
    """The band-split network with an upstream: `body` are its own arguments, `settings` those of `Settings`."""

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
        sizes = {name: body[name] for name in ("bands", "width", "query_hidden")}
        self.take_features(Settings.model_validate(settings), upstream_config, self, n_bins=self.n_fft // 2, **sizes)

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

        def enter(tokens: Tensor) -> Tensor:
            frames = tokens.shape[1]
            if windows > 1:
                tokens = F.pad(tokens, (0, 0, 0, 0, 0, windows * located.total - frames))
            return unfold(self.fusion.tokens(fold(tokens, windows, 1), located), windows, 1)[:, :frames]

        def steer(hidden: Tensor, frames: int) -> Tensor:
            if windows == 1:
                return self.fusion.steer(hidden, located, frames)
            hidden = hidden.transpose(0, 1).reshape(-1, 1, hidden.shape[2])
            over_time = self.fusion.steer(hidden, located, located.total).expand(-1, located.total, -1)
            return unfold(over_time, windows, 1)[:, :frames]

        return self.masked(mixture[:, part], query, enter, steer)
