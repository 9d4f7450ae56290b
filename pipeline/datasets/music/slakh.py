"""Slakh2100 (Manilow et al. 2019), flac "redux": 145 hours of synthesised music, a file for each instrument.

    <root>/[slakh2100_flac_redux/]{train,validation,test,omitted}/TrackXXXXX/{mix.flac,metadata.yaml,stems/SXX.flac}
    <root>/[babyslakh_16k/]TrackXXXXX/{mix.wav,metadata.yaml,stems/SXX.wav}          the excerpt: flat, no split

A stem is called by its inst_class: piano, piano_2, ... in the order of the S numbers, some of which are missing.
`omitted` holds what the authors found to be a duplicate, and is passed over.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.datasets.music import SUBSETS, Stem, Track, audio_files, in_order, inside, root_of, slug

_PLACES = ("", "slakh2100_flac_redux", "babyslakh_16k")
_TRACK = re.compile(r"Track\d+", re.ASCII)


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """The tracks by id (Track00001). The artist is the MIDI file: two renderings of one never part."""
    counts = Counter() if counts is None else counts
    root_of(root)
    for place in _PLACES:
        base = root / place
        if (base.is_symlink() and place) or not base.is_dir():
            continue
        folders, _ = inside(base, counts)
        listed: list[tuple[str | None, str]] = [(None, name) for name in folders if _TRACK.fullmatch(name)]
        for subset in SUBSETS:
            if subset in folders:
                names, _ = inside(base / subset, counts)
                listed += [(subset, f"{subset}/{name}") for name in names if _TRACK.fullmatch(name)]
        if listed:
            if "omitted" in folders:
                counts["omitted_tracks"] += len(inside(base / "omitted", counts)[0])
            prefix = f"{place}/" if place else ""
            yield from in_order(_track(root, f"{prefix}{folder}", subset, counts) for subset, folder in listed)
            return
    raise FileNotFoundError(f"music.root {str(root)!r}: no {{train,validation,test}}/TrackXXXXX of Slakh2100 in there")


def _track(root: Path, folder: str, subset: str | None, counts: Counter[str]) -> Track:
    where = root / folder / "metadata.yaml"
    try:
        data: Any = yaml.safe_load(where.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{where}: is not there") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from None
    listed = data.get("stems") if isinstance(data, dict) else None
    if not isinstance(listed, dict):
        raise ValueError(f"{where}: no table 'stems'")

    names, others = inside(root / folder, counts)
    files = audio_files(inside(root / folder / "stems", counts)[1] if "stems" in names else [], counts)
    counts["stems_without_file"] += len(set(listed) - set(files))
    stems = []
    kinds: Counter[str] = Counter()
    for number, file in files.items():
        entry = listed.get(number)
        kind = entry.get("inst_class") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not kind:
            raise ValueError(f"{where}: no key 'stems.{number}.inst_class' for stems/{file}")
        name = slug(kind).lower()
        kinds[name] += 1
        stems.append(Stem(name if kinds[name] == 1 else f"{name}_{kinds[name]}", (f"{folder}/stems/{file}",)))
    mixture = audio_files(others, counts).get("mix")
    uuid = data.get("UUID")
    try:
        return Track(
            folder.rpartition("/")[2],
            str(uuid) if uuid else None,
            subset,
            tuple(stems),
            f"{folder}/{mixture}" if mixture else None,
        )
    except ValueError as error:
        raise ValueError(f"{root / folder}: {error}") from None
