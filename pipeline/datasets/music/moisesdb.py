"""MoisesDB (Pereira et al. 2023, arXiv:2307.15913) as published: 240 tracks, 14.4 hours, stereo wav at 44.1 kHz.

    <root>/[moisesdb/][moisesdb_v0.1/]<uuid>/data.json
                                      <uuid>/<stemName>/<id>.<extension>

    data.json   song, artist, genre, stems: [{stemName, tracks: [{id, extension, has_bleed, ...}, ...]}, ...]

A stem is the sum of its recordings, and one stemName may come several times. There is no mixture: it is the sum of all
stems. Recordings of one track differ in length. Non-commercial licence; nothing of it may be passed on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.datasets.music import Stem, Track, in_order, inside, root_of

_PLACES = ("", "moisesdb_v0.1", "moisesdb", "moisesdb/moisesdb_v0.1")


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """The tracks sorted by their uuid; stems by name. Folders without data.json are counted and passed over."""
    counts = Counter() if counts is None else counts
    root_of(root)
    for place in _PLACES:
        base = root / place
        if base.is_dir() and not base.is_symlink() and any(base.glob("*/data.json")):
            folders, _ = inside(base, counts)
            prefix = f"{place}/" if place else ""
            listed = [name for name in folders if (base / name / "data.json").is_file()]
            counts["folders_without_data_json"] += len(folders) - len(listed)
            yield from in_order(_track(root, f"{prefix}{name}") for name in listed)
            return
    raise FileNotFoundError(f"music.root {str(root)!r}: no <track>/data.json of MoisesDB in there")


def _track(root: Path, folder: str) -> Track:
    where = root / folder / "data.json"
    try:
        data = json.loads(where.read_bytes())
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    found: dict[str, list[str]] = {}
    bleeding = set()
    for i, stem in enumerate(_get(data, "stems", list, where)):
        at = f"stems[{i}]"
        name = _get(stem, "stemName", str, where, at)
        for j, part in enumerate(_get(stem, "tracks", list, where, at)):
            inner = f"{at}.tracks[{j}]"
            file = f"{_get(part, 'id', str, where, inner)}.{_get(part, 'extension', str, where, inner).lstrip('.')}"
            if "/" in file or "/" in name:
                raise ValueError(f"{where}: {inner}: {name!r} and {file!r} must be names, not paths")
            found.setdefault(name, []).append(f"{folder}/{name}/{file}")
            if part.get("has_bleed"):
                bleeding.add(name)
    artist = data.get("artist")
    if artist is not None and not isinstance(artist, str):
        raise ValueError(f"{where}: artist {artist!r} is not a text")
    stems = tuple(Stem(name, tuple(sorted(set(found[name]))), name in bleeding) for name in sorted(found))
    try:
        return Track(folder.rpartition("/")[2], (artist or "").strip() or None, None, stems, None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _get(node: Any, key: str, kind: type, where: Path, at: str = "") -> Any:
    """node[key], which must be there and of this type."""
    dotted = f"{at}.{key}" if at else key
    if not isinstance(node, dict) or key not in node:
        raise ValueError(f"{where}: no key {dotted!r}")
    if not isinstance(node[key], kind):
        raise ValueError(f"{where}: {dotted!r} is {node[key]!r}, not a {kind.__name__}")
    return node[key]
