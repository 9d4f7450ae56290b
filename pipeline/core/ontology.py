"""AudioSet's 527 rated classes and the ontology of 632 nodes that they are part of (Gemmeke et al. 2017).

A class is named by its `mid` ("/m/09x0r"); its index 0..526 is that of class_labels_indices.csv. The two files
lie in assets/ and are read on the first call. An ontology node may have several parents.
"""

import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Class:
    """One of the 527 classes that AudioSet's clips are rated for."""

    index: int
    mid: str
    name: str


@cache
def classes() -> tuple[Class, ...]:
    """All 527, in the order of their index."""
    with open(ASSETS / "class_labels_indices.csv", encoding="utf-8", newline="") as file:
        found = tuple(Class(int(row["index"]), row["mid"], row["display_name"]) for row in csv.DictReader(file))
    assert [c.index for c in found] == list(range(527))
    assert len({c.mid for c in found}) == 527
    return found


@cache
def _by_mid() -> dict[str, Class]:
    return {c.mid: c for c in classes()}


@cache
def _children() -> dict[str, tuple[str, ...]]:
    nodes = json.loads((ASSETS / "ontology.json").read_text(encoding="utf-8"))
    return {node["id"]: tuple(node["child_ids"]) for node in nodes}


@cache
def _names() -> dict[str, str]:
    nodes = json.loads((ASSETS / "ontology.json").read_text(encoding="utf-8"))
    return {node["id"]: node["name"] for node in nodes}


@cache
def _parents() -> dict[str, tuple[str, ...]]:
    parents: dict[str, list[str]] = {mid: [] for mid in _children()}
    for mid, children in _children().items():
        for child in children:
            parents[child].append(mid)
    return {mid: tuple(above) for mid, above in parents.items()}


def _closure(mid: str, edges: dict[str, tuple[str, ...]]) -> frozenset[str]:
    if mid not in edges:
        raise ValueError(f"no node {mid!r} in AudioSet's ontology")
    seen: set[str] = set()
    todo = list(edges[mid])
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo.extend(edges[node])
    return frozenset(seen)


def is_class(mid: str) -> bool:
    """Whether `mid` is one of the 527."""
    return mid in _by_mid()


def is_node(mid: str) -> bool:
    """Whether `mid` is a node of the ontology: a class, or one of the 105 nodes that clips are not rated for."""
    return mid in _children()


def class_of(mid: str) -> Class:
    """The class with this mid. ValueError for anything that is not one of the 527."""
    try:
        return _by_mid()[mid]
    except KeyError:
        raise ValueError(f"no class {mid!r} among AudioSet's 527") from None


@cache
def ancestors(mid: str) -> frozenset[str]:
    """Every node above `mid`, without itself; nodes outside the 527 among them."""
    return _closure(mid, _parents())


@cache
def descendants(mid: str) -> frozenset[str]:
    """Every node below `mid`, without itself; nodes outside the 527 among them."""
    return _closure(mid, _children())


@cache
def kin(mid: str) -> frozenset[str]:
    """`mid`, its ancestors and its descendants: what a clip of this class may be labelled with as well.

    Siblings are not kin: a clip of White noise says nothing about Pink noise.
    """
    return frozenset({mid}) | ancestors(mid) | descendants(mid)


def node_name(mid: str) -> str:
    """Look up the name of a class or of another node of the ontology; KeyError for neither."""
    return _names()[mid]


@cache
def depth(mid: str) -> int:
    """Count the levels from the ontology's roots ("Animal": 1) down to a node, on the shortest way."""
    return 1 + min((depth(parent) for parent in _parents()[mid]), default=0)
