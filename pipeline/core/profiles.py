"""Profiles: settings for a purpose, as what differs from profiles/default.yaml.

profiles/default.yaml is params.yaml as it comes. Every other file of the folder names only what it has differently:
mappings are gone into key by key, but those of WHOLE, which are taken as they stand. In the sections of ENTRIES there
may be further entries, and one that is null is left out.
"""

import io
import itertools
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

DEFAULT = "default"
ENTRIES = frozenset("separators mae_separators variants mixit_music mixit_clips".split())
WHOLE = frozenset("gate loss_weights fusion_options metrics config".split())  # keys that belong together


def names(root: Path) -> list[str]:
    """List the profiles: the default first."""
    found = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def document(name: str, root: Path) -> Any:
    """Read a profile as a whole params.yaml, comments included; ValueError for a name or a key that there is not."""
    if name not in names(root):
        raise ValueError(f"no profile {name!r}; there are {', '.join(names(root))}")
    whole = _yaml().load(root / "profiles" / f"{DEFAULT}.yaml")
    if name != DEFAULT:
        _merge(whole, _yaml().load(root / "profiles" / f"{name}.yaml"), f"profiles/{name}.yaml: ")
    return whole


def text(name: str, root: Path) -> str:
    """Write a profile as a whole params.yaml; the default's bytes are its file's."""
    if name == DEFAULT:
        return (root / "profiles" / f"{DEFAULT}.yaml").read_text(encoding="utf-8")
    out = io.StringIO()
    _yaml().dump(document(name, root), out)
    return out.getvalue()


def purpose(name: str, root: Path) -> str:
    """Read the first sentence of a profile's comment."""
    lines = (root / "profiles" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("# ") for line in comment).split(". ")[0].rstrip(".")


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _merge(into: Any, differences: Any, place: str, entries: bool = False, whole: frozenset[str] = WHOLE) -> None:
    for key, value in differences.items():
        if entries and value is None:
            del into[key]
        elif key not in into and not entries:
            raise ValueError(f"{place}{key} is not in profiles/{DEFAULT}.yaml")
        elif key not in into or key in whole or not (isinstance(value, dict) and isinstance(into[key], dict)):
            into[key] = value
        else:  # an entry's `train` is what it has differently from the section `train`
            within = whole | {"train"} if entries else whole
            _merge(into[key], value, f"{place}{key}.", key in ENTRIES and not entries, within)
