"""Separators, one architecture per file. The folder is the registry: params.yaml names the file.

A query separator maps (mixture (batch, time), query (batch, query_dim)) to the queried source, (batch, time), at
32 kHz and for any number of samples. Each file defines `Separator(query_dim=..., **model)`, with `model` the entry's
`model:` mapping of params.yaml. tests/test_separators.py holds every file here to that.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn


def names() -> list[str]:
    """The architectures there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build the Separator of `pipeline/separators/<name>.py`; ValueError for a name that has no file."""
    if name not in names():
        raise ValueError(f"no separator {name!r}; there are {names()}")
    separator: nn.Module = import_module(f"{__name__}.{name}").Separator(**kwargs)
    return separator
