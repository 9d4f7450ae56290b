"""Separators, one architecture per file. The folder is the registry: params.yaml names the file.

A query separator maps (mixture (batch, time), query (batch, query_dim)) to the queried source, (batch, time), at
32 kHz and for any number of samples. Each file defines `Separator(query_dim=..., **model)`, with `model` the entry's
`model:` mapping of params.yaml. Training separates a part of each mixture. One whose `hears_whole` is true is called
as `separator(mixture, query, part)`, `part` a slice of the samples, and may look beside it; others get the part alone.
`shared(mixture)`, where a file has it, is what no query changes: tensors (batch, ...) by the name of the argument that
takes them. One whose `learns_interferer` is true is taught what else sounds, beside separation:
`interferer_loss(mixture, query, interferer_query, **shared)`.

One without queries (`Separator.takes_query = False`) maps mixture (batch, time) to all sources, (batch, sources, time),
in no order, at the rate that it is told: `Separator(sample_rate=..., n_sources=..., **model)`. Its
`separate(mixture)` gives (sources, masks (batch, sources, bins, frames)).

tests/test_separators.py holds every file here to that.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import create_model
from torch import Tensor, nn

from pipeline.config import Params


def names() -> list[str]:
    """The architectures there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build the Separator of `pipeline/separators/<name>.py`; ValueError for a name that has no file."""
    if name not in names():
        raise ValueError(f"no separator {name!r}; there are {names()}")
    separator: nn.Module = import_module(f"{__name__}.{name}").Separator(**kwargs)
    return separator


def separate_part(separator: nn.Module, mixture: Tensor, query: Tensor, part: slice) -> Tensor:
    """What each query asks for in this part of its mixture, as in training: (batch, part)."""
    return _separate_part(separator, mixture, query, part)


def separate_part_and_tell(
    separator: nn.Module, mixture: Tensor, query: Tensor, interferer_query: Tensor, part: slice
) -> tuple[Tensor, Tensor]:
    """The same of a separator whose `learns_interferer` is true, and its `interferer_loss`; features computed once."""
    heard = mixture if _hears_whole(separator) else mixture[:, part]
    shared = separator.shared(heard)  # type: ignore[operator]
    estimate = _separate_part(separator, mixture, query, part, **shared)
    loss: Tensor = separator.interferer_loss(heard, query, interferer_query, **shared)  # type: ignore[operator]
    return estimate, loss


def _hears_whole(separator: nn.Module) -> bool:
    return bool(getattr(separator, "hears_whole", False))


def _separate_part(separator: nn.Module, mixture: Tensor, query: Tensor, part: slice, **shared: Tensor) -> Tensor:
    if _hears_whole(separator):
        estimate: Tensor = separator(mixture, query, part, **shared)
    else:
        estimate = separator(mixture[:, part], query, **shared)
    return estimate


def takes_query(name: str) -> bool:
    """Whether it separates what it is asked for; otherwise it gives all sources at once. ValueError as in `build`."""
    if name not in names():
        raise ValueError(f"no separator {name!r}; there are {names()}")
    return bool(getattr(import_module(f"{__name__}.{name}").Separator, "takes_query", True))


def model_params(name: str) -> type[Params]:
    """What `model:` of an entry must say: every argument of the file's Separator, with its type, but query_dim and
    sample_rate, which the data decide.

    A file with `Settings` takes its sizes from another entry, and says the rest there.
    """
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "Settings"):
        settings: type[Params] = module.Settings
        return settings
    arguments = inspect.signature(module.Separator.__init__).parameters.values()
    fields: dict[str, Any] = {
        a.name: (list[int] if a.annotation == Sequence[int] else a.annotation, ...)
        for a in arguments
        if a.name not in ("self", "query_dim", "sample_rate")
    }
    return create_model(f"{name}.model", __base__=Params, **fields)


def read_published(name: str, path: Path, *, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict of a checkpoint that the architecture's authors published, and arguments of the Separator it is of.

    ValueError where the file `pipeline/separators/<name>.py` defines no `read_published(path, sha256=...)`.
    """
    module = import_module(f"{__name__}.{name}")
    if not hasattr(module, "read_published"):
        raise ValueError(f"{path}: separator {name!r} reads no published checkpoints")
    found: tuple[dict[str, Tensor], dict[str, Any]] = module.read_published(path, sha256=sha256)
    return found
