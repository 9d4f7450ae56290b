"""Separators, one architecture per file. The folder is the registry: params.yaml names the file.

Each file defines `Separator`, a subclass of one of the two classes below:

QuerySeparator    gives back the source of each mixture that its query asks for, at 32 kHz; trained on pairs of anchors.
                  `Separator(query_dim=..., interferer_query=..., **model)`, with `model` the entry's `model:` mapping
                  of params.yaml
BlindSeparator    gives back all sources of a mixture, in no order; trained by mixture-invariant training.
                  `Separator(sample_rate=..., n_sources=..., **model)`

tests/test_separators.py holds every file here to that.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pipeline.core.config import Params
from pipeline.core.registry import Registry, params_of
from pipeline.core.runtime import read_json
from pipeline.core.weights import read_safetensors
from pipeline.nn.losses import separation_loss

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True)
class Batch:
    """Training mixtures of two anchors, the wanted source of a part of each, and both queries."""

    mixture: Float[Tensor, "batch time"]
    part: slice  # of the samples: what is separated and compared with the target
    target: Float[Tensor, "batch part"]
    query: Float[Tensor, "batch query_dim"]  # embedding of the target
    interferer_query: Float[Tensor, "batch query_dim"]  # of what else sounds, to be predicted or given
    given: Bool[Tensor, " batch"]  # whether a separator that takes the interferer's query is given it

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        tensors = (self.mixture, self.target, self.query, self.interferer_query, self.given)
        mixture, *others = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(mixture, self.part, *others)

    def cut(self) -> "Batch":
        """Reduce the mixtures to the part that is separated."""
        return replace(self, mixture=self.mixture[:, self.part], part=slice(None))


class QuerySeparator(nn.Module):
    """Base class of query-conditioned separators: mixture (batch, time) and query (batch, query_dim) to (batch, part).

    A subclass defines `forward(mixture, query, part=slice(None), **shared)`, which separates `part` (a slice of the
    samples) of each mixture and may use what lies beside it as context; `shared` is what `shared(mixture)` gave, if it
    was computed before. `query` is what `joint_query` returns: for a separator built with `interferer_query` the
    embeddings of what is wanted and of what else sounds, side by side, and else the former alone. It overrides the rest
    where it has something to say.
    """

    hop_length: int  # samples between its STFT's frames
    segment_samples: int | None = None
    """Length of the mixtures that it was trained on. `load` sets it: what the network takes of a whole mixture (its
    level, an encoder's features) it then takes of a longer recording piece by piece, so that an estimate depends on
    what lies near. None: whatever it is given is one mixture."""

    def __init__(self, *, query_dim: int, interferer_query: bool = False) -> None:
        super().__init__()
        self.query_dim = query_dim  # of one embedding
        self.not_given = nn.Parameter(torch.zeros(query_dim)) if interferer_query else None

    @property
    def takes_interferer(self) -> bool:
        """Whether it was built to be given what else sounds."""
        return self.not_given is not None

    @property
    def joint_dim(self) -> int:
        """Width of what `joint_query` returns."""
        return self.query_dim * (1 + self.takes_interferer)

    def joint_query(
        self,
        query: Float[Tensor, "batch query_dim"],
        interferer_query: Float[Tensor, "batch query_dim"] | None = None,
        given: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch joint_dim"]:
        """Join the embeddings of what is wanted and, where it is known, of what else sounds.

        Rows where `given` is false, or all without an `interferer_query`, have a learned vector in its place.
        ValueError for an `interferer_query` that the separator was not built for.
        """
        if self.not_given is None:
            if interferer_query is not None:
                raise ValueError("this separator was trained without train.interferer_query: it takes one query alone")
            return query
        other = self.not_given.to(query.dtype).expand_as(query)
        if interferer_query is not None:
            other = interferer_query if given is None else torch.where(given[:, None], interferer_query, other)
        return torch.cat([query, other], dim=1)

    @property
    def grid_samples(self) -> int:
        """Samples between places where a mixture may be cut without another alignment of what the network pools."""
        return int(self.hop_length)

    @property
    def block_samples(self) -> int:
        """Samples that blocks of a long recording are multiples of, for the same estimate as in one pass."""
        return self.grid_samples

    def is_long(self, samples: int) -> bool:
        """Whether a mixture is longer than those of the training, by more than the grid."""
        return self.segment_samples is not None and samples >= self.segment_samples + self.grid_samples

    def shared(self, mixture: Float[Tensor, "batch time"]) -> dict[str, Tensor]:
        """Compute what no query changes, (batch, ...) by `forward`'s argument names, once for several queries."""
        return {}

    def losses(self, batch: Batch, objectives: Sequence[str]) -> dict[str, Tensor]:
        """Compute the terms of the training loss by name: each of `objectives`, and the separator's own.

        `train.loss_weights` weighs them; the curve has a column for each.
        """
        shared = self.shared(batch.mixture)
        query = batch.query
        if self.takes_interferer:
            query = self.joint_query(query, batch.interferer_query, batch.given)
        estimate = self(batch.mixture, query, batch.part, **shared)
        with torch.autocast(estimate.device.type, enabled=False):
            terms = {
                name: separation_loss(name, estimate.float(), batch.target, batch.mixture).mean() for name in objectives
            }
        return terms | self.auxiliary_losses(batch, **shared)

    def auxiliary_losses(self, batch: Batch, **shared: Tensor) -> dict[str, Tensor]:
        """Compute the separator's own terms of the training loss by name; none by default."""
        return {}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Group the trained parameters for an optimizer; a group with `start_step` does not move before that step."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": learning_rate}]

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Give a part of the network pretrained weights; RuntimeError where they are not exactly its own."""
        if state:
            raise RuntimeError(f"{type(self).__module__} has no part for the pretrained {sorted(state)[:5]}")


class BlindSeparator(nn.Module):
    """Base class of separators without queries: mixture (batch, time) to all its sources (batch, sources, time).

    A subclass defines `separate`, and overrides the rest where it has something to say.
    """

    n_sources: int
    sample_rate: int

    def forward(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch sources time"]:
        """Separate mixtures of any length."""
        return self.separate(mixture)[0]

    def separate(
        self, mixture: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch sources time"], Float[Tensor, "batch sources bins frames"]]:
        """Separate mixtures of any length into (estimates, masks)."""
        raise TypeError(f"{type(self).__module__} defines no separate")

    def learn_statistics(self, waveforms: Iterable[Float[Tensor, "batch time"]]) -> None:
        """Learn the input's level from waveforms of the training data, before the first step; nothing by default."""

    def redraw(self, step: int, seed: int) -> None:
        """Draw new random features, as a function of (step, seed); nothing by default."""

    def pretrained_names(self) -> list[str]:
        """Name the tensors that pretraining hands over; none by default."""
        return []

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Take the pretrained tensors of `pretrained_names`; ValueError where they are not exactly its own."""
        raise ValueError(f"nothing pretrains {type(self).__module__.rpartition('.')[2]}")


REGISTRY = Registry(__name__, __file__, "separator")
names = REGISTRY.names  # of the architectures


def takes_query(name: str) -> bool:
    """Tell a QuerySeparator from a BlindSeparator by the file's name; ValueError for a name that has no file."""
    return issubclass(_separator(name), QuerySeparator)


def build(name: str, **kwargs: Any) -> QuerySeparator:
    """Build the query separator of `pipeline/separators/<name>.py`; ValueError for a name without a file or query."""
    if not takes_query(name):
        raise ValueError(f"separator {name!r} takes no query")
    separator: QuerySeparator = _separator(name)(**kwargs)
    return separator


def build_blind(name: str, **kwargs: Any) -> BlindSeparator:
    """Build the blind separator of `pipeline/separators/<name>.py`; ValueError for a name that needs a query."""
    if takes_query(name):
        raise ValueError(f"separator {name!r} needs a query")
    separator: BlindSeparator = _separator(name)(**kwargs)
    return separator


def load(folder: Path) -> QuerySeparator:
    """Load a trained query separator (config.json, weights.safetensors) in evaluation mode.

    RuntimeError for weights that are not exactly its own.
    """
    config = read_json(folder / "config.json")
    separator = _loaded(build(config["architecture"], **config["model"]), folder)
    separator.segment_samples = config["segment_samples"]
    return separator


def load_blind(folder: Path) -> BlindSeparator:
    """Load a trained blind separator (config.json, weights.safetensors) in evaluation mode.

    RuntimeError for weights that are not exactly its own.
    """
    config = read_json(folder / "config.json")
    return _loaded(build_blind(config["architecture"], sample_rate=config["sample_rate"], **config["model"]), folder)


def model_params(name: str) -> type[Params]:
    """Make the Params class of an entry's `model:`: every argument of the file's Separator, with its type.

    `query_dim`, `sample_rate` and `interferer_query` are left out: data and training decide them. A file with
    `Settings` takes its sizes from another entry, and its own keys are those of `Settings`.
    """
    separator = _separator(name)
    module = import_module(separator.__module__)
    if hasattr(module, "Settings"):
        settings: type[Params] = module.Settings
        return settings
    return params_of(f"{name}.model", separator.__init__, given=("query_dim", "sample_rate", "interferer_query"))


def body_of(name: str) -> str:
    """Name the file of the body of a separator with features, as "resunet" of "mae_resunet"; ValueError without one."""
    settings = getattr(REGISTRY.module(name), "Settings", None)
    if settings is None:
        raise ValueError(f"separator {name!r} takes no features")
    body: str = settings.body_name
    return body


def read_published(name: str, path: Path, *, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint that the architecture's authors published: state dict, and arguments of its Separator.

    ValueError where the file `pipeline/separators/<name>.py` defines no `read_published(path, sha256=...)`.
    """
    module = REGISTRY.module(name)
    if not hasattr(module, "read_published"):
        raise ValueError(f"{path}: separator {name!r} reads no published checkpoints")
    found: tuple[dict[str, Tensor], dict[str, Any]] = module.read_published(path, sha256=sha256)
    return found


def _separator(name: str) -> Any:
    return REGISTRY.module(name).Separator


def weights_file(folder: Path) -> Path:
    """Find the weights of a model: as a stage wrote them, or as they are called in a folder made for elsewhere."""
    elsewhere = folder / "model.safetensors"
    return elsewhere if elsewhere.is_file() else folder / "weights.safetensors"


def _loaded(separator: T, folder: Path) -> T:
    separator.load_state_dict(read_safetensors(weights_file(folder)), strict=True)
    return separator.eval()
