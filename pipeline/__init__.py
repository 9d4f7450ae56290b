"""The pipeline; importing any of it in an environment without its packages is one line that says what to do.

A module that scripts may import or run by the name it had before the packages, such as `pipeline.config`, is still
found under it.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any, cast

if find_spec("torch") is None or find_spec("pydantic") is None:
    sys.exit(
        f"error: {sys.executable} has not the packages of this project: `. .venv/bin/activate` first, which "
        "`make repro` sets up"
    )

_EARLIER = {
    "ablations": "experiments.ablations",
    "anchors": "mixtures.anchors",
    "check": "experiments.check",
    "config": "core.config",
    "gate": "experiments.gate",
    "moms": "mixtures.moms",
    "music": "mixtures.tracks",
    "repro": "experiments.repro",
    "seeds": "experiments.seeds",
    "unpack": "datasets._unpack",
}


class _EarlierNames(MetaPathFinder, Loader):
    """Finds a module under its earlier name: the same module object, or its code for `python -m`."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name not in _EARLIER:
            return None
        now = cast(ModuleSpec, find_spec(f"{__name__}.{_EARLIER[name]}"))
        return ModuleSpec(fullname, self, origin=now.origin, loader_state=now)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(spec.loader_state.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = cast(ModuleSpec, module.__spec__).loader_state  # which the import system has replaced

    def get_code(self, fullname: str) -> CodeType | None:
        now = cast(ModuleSpec, self.find_spec(fullname)).loader_state
        return cast(Any, now.loader).get_code(now.name)


sys.meta_path.append(_EarlierNames())
