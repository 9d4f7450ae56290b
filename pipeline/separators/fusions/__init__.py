"""Fusions: how an upstream's features join ResUNet30, one per file. The folder is the registry: `fusion` names a file.

    mixture -> STFT -> |X|, normed -> plane --> U-Net, steered by the query -> mask -> iSTFT
            -> upstream -> features ----^          ^            ^
                                        |          |            |
                                      plane       join        query        (and losses, beside separation)

Each file defines `Fusion(sizes, unet, **fusion_options)`, a subclass of the class below that overrides the places where
its features enter. Files whose features enter by a layer begin it with zero weights (`silent`): as the baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators.resunet import UNet
from pipeline.upstreams import Repeat, align


@dataclass(frozen=True)
class Sizes:
    """Sizes that a fusion's layers are made from."""

    dim: int  # of the features
    query_dim: int
    n_bins: int  # of the U-Net's plane: the STFT's without Nyquist
    channels: Sequence[int]  # of the U-Net's encoders


@dataclass(frozen=True)
class Features:
    """An upstream's features of whole mixtures, and where among them the part lies that is separated."""

    values: Float[Tensor, "batch steps dim"]  # at the upstream's own time steps
    n_sounding: int  # of the steps; those behind them are of padding
    steps_per_frame: float  # time steps of the upstream per STFT frame
    repeat: Repeat
    first: int  # STFT frame that the part begins at
    total: int  # STFT frames of the whole mixture

    def sounding(self) -> Float[Tensor, "batch sounding dim"]:
        """Take the steps that lie in the mixture, without those of padding."""
        return self.values[:, : self.n_sounding]

    def rows(self, n: int, stride: int = 1) -> Float[Tensor, "batch {n} dim"]:
        """Take the step of each of the part's n rows, a row being `stride` STFT frames."""
        return align(self.values, self.steps_per_frame, n, self.repeat, self.first, stride)


class Fusion(nn.Module):
    """Base class of fusions: by itself, features that change nothing."""

    reads_features = True  # False: no upstream is built at all

    def plane(
        self, plane: Float[Tensor, "batch 1 rows bins"], features: Features
    ) -> Float[Tensor, "batch planes rows columns"]:
        """Make the U-Net's input from the normed magnitudes, Nyquist included; by default it is dropped."""
        return plane[..., :-1].contiguous()

    def query(self, query: Float[Tensor, "batch query_dim"], features: Features) -> Float[Tensor, "batch query_dim"]:
        """Change the query that steers the U-Net; by default it stays."""
        return query

    def join(self, level: int, h: Tensor, features: Features) -> Tensor:
        """Change what goes into the next block after `level` encoders (see UNet.forward); by default nothing."""
        return h

    def losses(
        self,
        features: Features,
        query: Float[Tensor, "batch query_dim"],
        interferer_query: Float[Tensor, "batch query_dim"],
    ) -> dict[str, Tensor]:
        """Compute the fusion's own terms of the training loss by name; none by default."""
        return {}


def names() -> list[str]:
    """List the fusions: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def reads_features(name: str) -> bool:
    """Say whether a fusion needs an upstream at all."""
    reads: bool = import_module(f"{__name__}.{name}").Fusion.reads_features
    return reads


def build(name: str, sizes: Sizes, unet: UNet, options: Mapping[str, Any]) -> Fusion:
    """Build the Fusion of `pipeline/separators/fusions/<name>.py`; ValueError for an option that it does not have."""
    try:
        fusion: Fusion = import_module(f"{__name__}.{name}").Fusion(sizes, unet, **options)
    except TypeError as error:
        raise ValueError(f"fusion_options of fusion {name!r}: {error}") from error
    return fusion


def silent(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weights and bias to zero: what it adds begins as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
