"""Targets: class names, ids and mids as people type them, and what they stand for."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.ontology import ancestors, depth, node_name


class Unusable(ValueError):
    """A file, a target or a model that cannot be used; the message is one line that says why."""


def one_line(error: BaseException) -> str:
    """Take the reason that the system gives, or the first line of an error's text, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


@dataclass(frozen=True)
class SoundClass:
    """A class that a separator was trained on."""

    index: int  # of AudioSet's 527
    mid: str  # AudioSet's machine id, "/m/0bt9lr"
    name: str  # display name, "Dog"


def find_class(text: str | int, classes: Sequence[SoundClass]) -> SoundClass:
    """Find a class by its index, mid, name, or an unambiguous beginning of its name, in any case.

    Unusable for a text that fits none or several of `classes`; the message suggests names that are near.
    """
    wanted = str(text).strip()
    folded = wanted.casefold()
    for one in classes:
        if wanted in (str(one.index), one.mid) or folded == one.name.casefold():
            return one
    beginning = [one for one in classes if folded and one.name.casefold().startswith(folded)]
    if len(beginning) == 1:
        return beginning[0]
    if beginning:
        raise Unusable(f"class {wanted!r} is not one class: {_listed([one.name for one in beginning])} begin so")
    names = {one.name.casefold(): one.name for one in classes}
    near = [names[name] for name in difflib.get_close_matches(folded, list(names), n=3, cutoff=0.5)]
    near += [one.name for one in classes if folded and folded in one.name.casefold() and one.name not in near]
    hint = f"did you mean {_listed(near[:3], 'or')}?" if near else f"there are {_listed([c.name for c in classes])}"
    raise Unusable(f"no class {wanted!r} in this model; {hint}")


def group_by_level(classes: Sequence[SoundClass], level: int) -> dict[str, list[SoundClass]]:
    """Group classes by the nodes above them at a level of AudioSet's ontology; 1 are its roots ("Animal").

    A class with parents in several groups is in each, and one that lies above the level is a group by itself.
    """
    groups: dict[str, list[SoundClass]] = {}
    for one in classes:
        above = [mid for mid in (one.mid, *sorted(ancestors(one.mid))) if depth(mid) == level]
        for mid in above or [one.mid]:
            groups.setdefault(node_name(mid), []).append(one)
    return groups


def _listed(names: Sequence[str], last: str = "and") -> str:
    shown = [repr(name) for name in names[:12]] + ([f"{len(names) - 12} more"] if len(names) > 12 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {last} {shown[-1]}"
