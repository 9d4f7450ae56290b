"""Registries: a folder of the package whose files are what params.yaml may name, and the params of what they define."""

import inspect
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, create_model

from pipeline.core.config import Params, Size

SizeOrNone = Annotated[int, Field(ge=0, le=65_536)]  # 0: there is none
Depth = Annotated[int, Field(ge=1, le=128)]
DEPTHS = ("depth", "layers", "stacks")  # arguments that count modules: each is built, one after the other


class Registry:
    """The files of a package's folder, but those that begin with _; `what` is what one of them is called in errors.

    A new entry is a new file: nothing lists them.
    """

    def __init__(self, package: str, file: str, what: str) -> None:
        self.package, self.folder, self.what = package, Path(file).parent, what

    def names(self) -> list[str]:
        """List the entries: the names of the files."""
        return sorted(path.stem for path in self.folder.glob("[a-z]*.py"))

    def module(self, name: str) -> ModuleType:
        """Import an entry; ValueError with the known names for another."""
        if name not in self.names():
            raise ValueError(f"no {self.what} {name!r}; there are {self.names()}")
        return import_module(f"{self.package}.{name}")


def params_of(
    name: str, function: Callable[..., Any], *, given: Collection[str], size: Any = SizeOrNone
) -> type[Params]:
    """Make the Params class of a constructor: its arguments but those `given`, with their types and defaults.

    Whole numbers are sizes, from 0 to 65,536 unless `size` is another type, and real ones are not negative; an
    Annotated type in the signature stands as it is.
    """
    fields: dict[str, Any] = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.name not in ("self", *given):
            whole = Depth if argument.name in DEPTHS else size
            real = Annotated[float, Field(ge=0)]
            kind = {int: whole, float: real, Sequence[int]: list[Size]}.get(argument.annotation)
            default = ... if argument.default is inspect.Parameter.empty else argument.default
            fields[argument.name] = (kind or argument.annotation, default)
    return create_model(name, __base__=Params, **fields)
