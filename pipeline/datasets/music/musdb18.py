"""MUSDB18 (Rafii et al. 2017, 2019) in both forms as published: 150 tracks, about 10 hours, stereo at 44.1 kHz.

    <root>/[musdb18hq/]{train,test}/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav      MUSDB18-HQ
    <root>/[musdb18hq/]{train,test}/<Artist - Title>.stem.mp4    AAC: mixture, drums, bass, other, vocals

Either form gives the same ids, artists and subsets; of a track that is there in both, the wav is taken and the other
counted. AAC has cut the second at 16 kHz and its mixture is coded by itself: the stems add up to it but nearly.

Fourteen of the hundred training tracks are the validation set that the field agreed on.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.music import STEM_MP4, Stem, Track, ids_of, in_order, inside, root_of, stream_path

STEMS = ("vocals", "drums", "bass", "other")
STREAMS = ("mixture", "drums", "bass", "other", "vocals")  # of a .stem.mp4, in order

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
    """The tracks by id, which is their name in letters of an id; the artist is what stands before " - "."""
    counts = Counter() if counts is None else counts
    root_of(root)
    prefix = "musdb18hq/" if (root / "musdb18hq").is_dir() and not (root / "musdb18hq").is_symlink() else ""
    listed = []
    for half in ("train", "test"):
        base = root / f"{prefix}{half}"
        if not base.is_dir() or base.is_symlink():
            continue
        folders, files = inside(base, counts)
        listed += [(half, name, False) for name in folders]
        for name in (file.removesuffix(STEM_MP4) for file in files if file.endswith(STEM_MP4)):
            if name in folders:
                counts["second_encodings"] += 1
            else:
                listed.append((half, name, True))
    if not listed:
        raise FileNotFoundError(
            f"music.root {str(root)!r}: no train/<track>/ or test/<track>/ of MUSDB18-HQ in there, "
            f"and no train/<track>{STEM_MP4} or test/<track>{STEM_MP4} of MUSDB18"
        )
    ids = ids_of([name for _, name, _ in listed])
    yield from in_order(_track(root, f"{prefix}{half}", name, ids[name], is_packed) for half, name, is_packed in listed)


def _track(root: Path, folder: str, name: str, track_id: str, is_packed: bool) -> Track:
    subset = folder.rpartition("/")[2]
    if subset == "train" and name in VALIDATION:
        subset = "validation"
    artist = name.partition(" - ")[0].strip() if " - " in name else None
    base = f"{folder}/{name}"
    if is_packed:
        path = {what: stream_path(f"{base}{STEM_MP4}", k) for k, what in enumerate(STREAMS)}
    else:
        path = {what: f"{base}/{what}.wav" for what in STREAMS}
    mixture = path["mixture"] if is_packed or (root / path["mixture"]).exists() else None
    return Track(track_id, artist, subset, tuple(Stem(stem, (path[stem],)) for stem in STEMS), mixture)
