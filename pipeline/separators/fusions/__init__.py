"""Fusions: how an upstream's features join a body, one per file. The folder is the registry: `fusion` names a file.

    mixture -> STFT -> |X|, normed -> plane --> U-Net, steered by the query -> mask -> iSTFT
            -> upstream -> features ----^          ^            ^
                                        |          |            |
                                      plane       join        query        (and losses, beside separation)

    mixture -> STFT -> bands -> tokens --> layers, steered by the query -> masks -> iSTFT
            -> upstream -> features ^                   ^        ^
                                    |                   |        |
                                  tokens              steer    query      (and losses, beside separation)

Each file defines `Fusion(sizes, body, **fusion_options)`, a subclass of the class below that overrides the places where
its features enter, and says which `bodies` have these. Files whose features enter by a layer begin it with zero weights
(`silent`): as the baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.core.config import Params, Size
from pipeline.core.registry import Registry, params_of
from pipeline.separators import Batch
from pipeline.upstreams import Repeat, align


@dataclass(frozen=True)
class Sizes:
    """Sizes that a fusion's layers are made from."""

    dim: int  # of the features
    query_dim: int  # of one embedding
    joint_dim: int  # of what `QuerySeparator.joint_query` returns: that, or twice as much
    n_bins: int  # of the STFT without Nyquist
    channels: Sequence[int] = ()  # of the U-Net's encoders
    bands: int = 0  # of a band-split body, as are the next two
    width: int = 0  # of its tokens
    query_hidden: int = 0  # numbers that its gains and shifts are made from


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
    bodies: Sequence[str] = ("resunet", "bandsplit")  # files of pipeline/separators that have the places it overrides

    def plane(
        self, plane: Float[Tensor, "batch 1 rows bins"], features: Features
    ) -> Float[Tensor, "batch planes rows columns"]:
        """Make the U-Net's input from the normed magnitudes, Nyquist included; by default it is dropped."""
        return plane[..., :-1].contiguous()

    def query(self, query: Float[Tensor, "batch joint_dim"], features: Features) -> Float[Tensor, "batch joint_dim"]:
        """Change the query that steers the body; by default it stays."""
        return query

    def join(self, level: int, h: Tensor, features: Features) -> Tensor:
        """Change what goes into the next block after `level` encoders (see UNet.forward); by default nothing."""
        return h

    def tokens(
        self, tokens: Float[Tensor, "batch frames bands width"], features: Features
    ) -> Float[Tensor, "batch frames bands width"]:
        """Change the tokens that go into the layers of a band-split body; by default nothing."""
        return tokens

    def steer(
        self, hidden: Float[Tensor, "batch 1 query_hidden"], features: Features, frames: int
    ) -> Float[Tensor, "batch moments query_hidden"]:
        """Change what a band-split body makes all gains and shifts from, for all frames or for each; it stays."""
        return hidden

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Compute the fusion's own terms of the training loss by name; none by default."""
        return {}


REGISTRY = Registry(__name__, __file__, "fusion")
names = REGISTRY.names


def options(name: str) -> type[Params]:
    """Make the Params class of a fusion's `fusion_options`: the arguments of its constructor beside the sizes."""
    constructor = REGISTRY.module(name).Fusion.__init__
    return params_of(f"{name}.fusion_options", constructor, given=("sizes", "unet", "body"), size=Size)


def reads_features(name: str) -> bool:
    """Say whether a fusion needs an upstream at all."""
    reads: bool = REGISTRY.module(name).Fusion.reads_features
    return reads


def bodies(name: str) -> Sequence[str]:
    """List the bodies that a fusion can join features to."""
    found: Sequence[str] = REGISTRY.module(name).Fusion.bodies
    return found


def build(name: str, sizes: Sizes, body: nn.Module, options: Mapping[str, Any]) -> Fusion:
    """Build the Fusion of `pipeline/separators/fusions/<name>.py`; ValueError for an option that it does not have."""
    try:
        fusion: Fusion = REGISTRY.module(name).Fusion(sizes, body, **options)
    except TypeError as error:
        raise ValueError(f"fusion_options of fusion {name!r}: {error}") from error
    return fusion


def silent(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weights and bias to zero: what it adds begins as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
