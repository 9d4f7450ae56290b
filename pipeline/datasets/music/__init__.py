"""Where music comes from. The folder is the registry: `music.source: slakh` in params.yaml is datasets/music/slakh.py.

A source is a module with

    def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]

which yields its tracks sorted by track_id, and opens no audio: what its lists promise may be missing or damaged on
disk, and whoever reads it finds out. A mistake in the metadata raises ValueError naming the file and the key or line.
Links are not followed. What was met and passed over is added to `counts`.

A source that makes its own files has, besides, `class Options(Params)`, its own section of params.yaml, and

    def prepare(root: Path, options: Options) -> None

which brings them about under `root`: it does nothing when they are there, and continues after a kill.
"""

import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from pipeline.core.registry import Registry
from pipeline.datasets import AUDIO_SUFFIXES

NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

# Native Instruments' Stems: a mixture and its parts as audio streams of one file.
STEM_MP4 = ".stem.mp4"

Subset = Literal["train", "validation", "test"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)

View = Literal["all", "vdbo"]
"""`all`: the stems as the source has them. `vdbo`: vocals, drums, bass, and the sum of everything else as other."""


@dataclass(frozen=True, slots=True)
class Stem:
    """One part of a track, or several that count as one."""

    name: str
    """[A-Za-z0-9_-]+, unique in its track."""

    paths: tuple[str, ...]
    """Relative to the root, with /; the stem is the sum of these files, of any lengths. `x.stem.mp4#2` is the third
    audio stream of x.stem.mp4: stream_path and split_stream."""

    has_bleed: bool = False
    """Other instruments of the session are heard in it, so that it is no clean reference."""


@dataclass(frozen=True, slots=True)
class Track:
    """A piece of music, with its stems where they are known."""

    track_id: str
    """[A-Za-z0-9_-]+, unique in its source."""

    artist: str | None
    """Tracks of one artist never lie in two splits. None: nobody knows, or it does not matter."""

    subset: str | None
    """The source's own split, if it has one: train, validation or test."""

    stems: tuple[Stem, ...]
    """Empty for a plain recording."""

    mixture: str | None
    """Path of a ready mixture, as those of a stem; None: it is the sum of the stems."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.track_id):
            raise ValueError(f"track id {self.track_id!r} holds other than letters, digits, _ and -")
        if self.subset is not None and self.subset not in SUBSETS:
            raise ValueError(f"track {self.track_id!r}: subset {self.subset!r} is none of {SUBSETS}")
        if not self.stems and self.mixture is None:
            raise ValueError(f"track {self.track_id!r} has neither stems nor a mixture")
        names = [stem.name for stem in self.stems]
        for stem in self.stems:
            if not NAME.fullmatch(stem.name):
                raise ValueError(f"track {self.track_id!r}: stem {stem.name!r} holds other than letters, digits, _, -")
            if names.count(stem.name) > 1 or not stem.paths:
                raise ValueError(f"track {self.track_id!r}: stem {stem.name!r} is there twice, or without a file")
        for path in [path for stem in self.stems for path in stem.paths] + ([self.mixture] if self.mixture else []):
            if path.startswith("/") or ".." in PurePosixPath(path).parts or not path.isprintable():
                raise ValueError(f"track {self.track_id!r}: {path!r} is not a path inside the root")


REGISTRY = Registry(__name__, __file__, "source")  # of music.source
load = REGISTRY.module


def tracks_of(source: str, root: Path, view: View = "all", counts: Counter[str] | None = None) -> list[Track]:
    """All tracks of a source under `root`, by track_id, in this view. ValueError if there are none."""
    counts = Counter() if counts is None else counts
    found: list[Track] = in_order(load(source).tracks(root_of(root), counts))
    if not found:
        raise ValueError(f"music.root {str(root)!r}: no track of source {source!r} in there")
    return [four_stems(track) for track in found] if view == "vdbo" else found


def four_stems(track: Track) -> Track:
    """Reduce a track to at most the stems vocals, drums, bass and other, in this order; other sums what is left.

    A second part of a kind (bass_2) counts as that kind.
    """
    parts: dict[str, list[Stem]] = {"vocals": [], "drums": [], "bass": [], "other": []}
    for stem in track.stems:
        kind = re.sub(r"_\d+$", "", stem.name.lower())
        parts[kind if kind in parts else "other"].append(stem)
    stems = tuple(
        Stem(name, tuple(path for stem in some for path in stem.paths), any(stem.has_bleed for stem in some))
        for name, some in parts.items()
        if some
    )
    return replace(track, stems=stems)


# ------------------------------------------------------------------------------------------------ help for the sources


def in_order(tracks: Iterable[Track]) -> list[Track]:
    """The tracks by track_id; ValueError for an id that is there twice."""
    found = sorted(tracks, key=lambda track: track.track_id)
    for first, second in itertools.pairwise(found):
        if first.track_id == second.track_id:
            raise ValueError(f"track {first.track_id!r} is there twice")
    return found


def root_of(root: Path) -> Path:
    """`root`, if it is a folder; otherwise FileNotFoundError or NotADirectoryError."""
    if not root.exists():
        raise FileNotFoundError(f"music.root {str(root)!r} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"music.root {str(root)!r} is not a folder")
    return root


def inside(folder: Path, counts: Counter[str]) -> tuple[list[str], list[str]]:
    """Names of the folders and of the regular files in a folder, sorted.

    Links are counted and left out, and so are names that cannot be written down. Hidden entries are not looked at.
    """
    folders, files = [], []
    with os.scandir(folder) as scan:
        for entry in sorted(scan, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                counts["links_not_followed"] += 1
            elif not entry.name.isprintable():
                counts["unprintable_names"] += 1
            elif entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file():
                files.append(entry.name)
    return folders, files


def audio_files(names: Iterable[str], counts: Counter[str]) -> dict[str, str]:
    """Those of the file names that are audio, by their name without suffix; one for each.

    Of x.wav and x.mp3 the first by AUDIO_SUFFIXES is taken, the other counted: a sum of both would be twice as loud.
    """
    chosen: dict[str, str] = {}
    ranked = [(os.path.splitext(name), name) for name in names]
    # A .stem.mp4 is several sounds, their sum among them.
    known = [
        (AUDIO_SUFFIXES.index(suffix.lower()), base, name)
        for (base, suffix), name in ranked
        if suffix.lower() in AUDIO_SUFFIXES and not name.lower().endswith(STEM_MP4)
    ]
    for _, base, name in sorted(known):
        if base in chosen:
            counts["second_encodings"] += 1
        else:
            chosen[base] = name
    return dict(sorted(chosen.items()))


def stream_path(file: str, stream: int) -> str:
    """How a path says which audio stream of a .stem.mp4 it means: the number, from 0, behind the file and a #."""
    return f"{file}#{stream}"


def split_stream(path: str) -> tuple[str, int | None]:
    """The file of a path and the number of its audio stream; None for a file that is one sound.

    Only what follows .stem.mp4 at the end is a number: names may hold a # of their own.
    """
    file, mark, number = path.rpartition("#")
    if mark and file.endswith(STEM_MP4) and number.isascii() and number.isdigit():
        return file, int(number)
    return path, None


def slug(name: str) -> str:
    """The name in the letters of an id: "Bob's – Café #2" is Bob_s_Cafe_2. Different names may become the same."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9-]+", "_", plain).strip("_") or "track"


def ids_of(names: Sequence[str]) -> dict[str, str]:
    """A slug for each of these names; those that would share one get eight digits of their hash behind it."""
    shared = Counter(map(slug, names))
    return {
        name: slug(name) if shared[slug(name)] == 1 else f"{slug(name)}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name in names
    }
