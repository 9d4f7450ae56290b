"""The folder of recordings that are made by rule: whose it is, and what of them is there already."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.runtime import checkout, write_json


def claim(
    root: Path, marker: str, identity: str, clear: Callable[[], None], *, param: str, source: str
) -> dict[str, Any]:
    """The content of the file `marker` in the folder `root`, which is this checkout's from now on if it was nobody's.

    What another identity (options, code) has left is removed by `clear`, but only if this checkout made it: the owner's
    place relative to the folder is in the marker, so that both may be moved or copied together. ValueError, which
    names `param` and what to do, for recordings of another checkout and for files that `source` did not make.
    """
    state = _state(root, marker, param, source)
    if state.get("identity") == identity:
        return state
    there = os.path.realpath(root)
    owner = os.path.relpath(os.path.realpath(checkout()), there)
    if (other := state.get("owner", owner)) != owner:
        raise ValueError(
            f"{param} {str(root)!r} holds what the checkout {os.path.normpath(os.path.join(there, str(other)))!r} has "
            f"made for itself; give this one another folder, or remove {str(root)!r} if that one needs it no longer"
        )
    clear()
    state = {"identity": identity, "owner": owner}
    write_json(root / marker, state)  # first: what lies there from now on was made by these options
    return state


def _state(root: Path, marker: str, param: str, source: str) -> dict[str, Any]:
    """Read the marker of an earlier run; empty for a folder that may be filled."""
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{param} {str(root)!r} is not a folder")
    if not (root / marker).exists():
        if root.exists() and (others := sorted(path.name for path in root.iterdir() if path.name[0] != ".")):
            raise ValueError(
                f"{param} {str(root)!r} holds files that {source} did not make ({others[0]!r}); "
                f"give it an empty folder, or set {param.replace('root', 'source')} to what lies there"
            )
        return {}
    try:
        state = json.loads((root / marker).read_bytes())
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def is_there(path: Path, size: int | None) -> bool:
    """Whether the file exists, and has this size where it is known."""
    return path.is_file() and (size is None or path.stat().st_size == size)
