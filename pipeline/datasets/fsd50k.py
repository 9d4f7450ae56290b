"""FSD50K (Fonseca et al. 2022) as published: Freesound clips of 0.3 to 30 s with AudioSet's labels.

    <root>/FSD50K.ground_truth/{dev,eval}.csv   fname,labels,mids[,split]
    <root>/FSD50K.{dev,eval}_audio/<fname>.wav  44.1 kHz, mono, 16 bit

Subsets: `dev`, its parts `train` and `val`, and `eval`. Labels are taken from the mids; its abstract classes
(Human sounds, Domestic sounds) are no classes of AudioSet's 527 and are left out, and counted.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets import Clip, clip_id_of, files_by_name, labels_of, read_table, root_of

_FILES = {"dev": "dev", "train": "dev", "val": "dev", "eval": "eval"}


def clips(root: Path, subset: str, counts: Counter[str] | None = None) -> Iterator[Clip]:
    """The clips of a subset sorted by clip_id, which is the Freesound id. Those with no label left are dropped and
    counted. In copies of other data laid out like this, names of any letters have an id made of them.

    A clip is a whole recording, whose length the lists do not tell: it ends at infinity.
    """
    counts = Counter() if counts is None else counts
    if subset not in _FILES:
        raise ValueError(f"FSD50K has no subset {subset!r}; there are {sorted(_FILES)}")
    root_of(root, "FSD50K.ground_truth, FSD50K.dev_audio and FSD50K.eval_audio")
    half = _FILES[subset]
    present = files_by_name(root, counts, f"FSD50K.{half}_audio")

    found: dict[str, Clip] = {}
    columns = ("fname", "mids", "split") if half == "dev" else ("fname", "mids")
    for where, row in read_table(root / "FSD50K.ground_truth" / f"{half}.csv", columns):
        fname = unicodedata.normalize("NFC", row["fname"])
        if half == "dev" and row["split"] not in ("train", "val"):
            raise ValueError(f"{where}: split {row['split']!r} is neither 'train' nor 'val'")
        if subset in ("train", "val") and row["split"] != subset:
            continue
        clip_id = clip_id_of(fname, counts)
        if clip_id in found:
            raise ValueError(f"{where}: clip {fname!r} a second time")
        labels = labels_of(filter(None, row["mids"].split(",")), where, counts)
        if not labels:
            counts["segments_without_label"] += 1
            continue
        path = present.get(f"FSD50K.{half}_audio/{fname}.wav")
        found[clip_id] = Clip(clip_id, labels, path, 0.0, math.inf, clip_id)
    yield from (found[clip_id] for clip_id in sorted(found))
