"""MUSDB18-HQ (Rafii et al. 2019) as published: 150 tracks, about 10 hours, stereo wav at 44.1 kHz.

    <root>/[musdb18hq/]{train,test}/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav

Fourteen of the hundred training tracks are the validation set that the field agreed on. The compressed form of the
set (.stem.mp4) is refused: it has to be converted first.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.music import Stem, Track, ids_of, in_order, inside, root_of

STEMS = ("vocals", "drums", "bass", "other")

VALIDATION = frozenset(
    (
        "ANiMAL - Rockshow",
        "Actions - One Minute Smile",
        "Alexander Ross - Goodbye Bolero",
        "Clara Berry And Wooldog - Waltz For My Victims",
        "Fergessen - Nos Palpitants",
        "James May - On The Line",
        "Johnny Lokke - Promises & Lies",
        "Leaf - Summerghost",
        "Meaxic - Take A Step",
        "Patrick Talbot - A Reason To Leave",
        "Skelpolu - Human Mistakes",
        "Traffic Experiment - Sirens",
        "Triviul - Angelsaint",
        "Young Griffo - Pennies",
    )
)


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """The tracks by id, which is the folder's name in letters of an id; the artist is what stands before " - "."""
    counts = Counter() if counts is None else counts
    root_of(root)
    prefix = "musdb18hq/" if (root / "musdb18hq").is_dir() and not (root / "musdb18hq").is_symlink() else ""
    listed = []
    for half in ("train", "test"):
        base = root / f"{prefix}{half}"
        if not base.is_dir() or base.is_symlink():
            continue
        folders, files = inside(base, counts)
        if packed := [name for name in files if name.endswith(".stem.mp4")]:
            raise ValueError(
                f"{base / packed[0]}: MUSDB18 in its compressed form; convert it to wav "
                "(<track>/{mixture,vocals,drums,bass,other}.wav), or use MUSDB18-HQ"
            )
        listed += [(half, name) for name in folders]
    if not listed:
        raise FileNotFoundError(f"music.root {str(root)!r}: no train/<track>/ or test/<track>/ of MUSDB18-HQ in there")
    ids = ids_of([name for _, name in listed])
    yield from in_order(_track(root, f"{prefix}{half}", name, ids[name]) for half, name in listed)


def _track(root: Path, folder: str, name: str, track_id: str) -> Track:
    subset = folder.rpartition("/")[2]
    if subset == "train" and name in VALIDATION:
        subset = "validation"
    artist = name.partition(" - ")[0].strip() if " - " in name else None
    base = f"{folder}/{name}"
    mixture = f"{base}/mixture.wav" if (root / base / "mixture.wav").exists() else None
    return Track(track_id, artist, subset, tuple(Stem(stem, (f"{base}/{stem}.wav",)) for stem in STEMS), mixture)
