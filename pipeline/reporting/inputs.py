"""What the data stages left behind, counted for the report. A stage that was not run leaves None, never a guess."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from pipeline.core.runtime import read_json

SPLITS = ("train", "eval")
STAGES = (
    "scan",
    "resample",
    "sed",
    "pretrain_mae",
    "mine_anchors",
    "make_eval_pairs",
    "upstream",
    "train_separator",
    "evaluate",
    "probe",
    "index_music",
    "pretrain_performer",
    "train_mixit",
    "evaluate_mixit",
    "report",
)


@dataclass(frozen=True)
class Reason:
    """Why clips were put aside, how many, and the first few of them."""

    reason: str
    count: int
    clip_ids: list[str]


@dataclass(frozen=True)
class ThinClass:
    """A class of few distinct targets, or that lost most of its clips."""

    mid: str
    clips: int  # in the metadata
    anchors: int
    targets: int  # distinct ones among its pairs


@dataclass(frozen=True)
class SplitData:
    """One split, from its metadata to its pairs. None where a stage has left nothing."""

    split: str
    clips_missing: int | None = None  # listed in the metadata, no audio
    clips_kept: int | None = None
    clips_quarantined: int | None = None
    reasons: list[Reason] = field(default_factory=list)
    anchors: int | None = None
    classes_with_anchors: int | None = None
    classes_without_anchors: list[str] | None = None  # mids
    classes_without_pairs: list[str] | None = None  # mids: they have anchors, yet none makes a pair
    purity: Float[np.ndarray, " anchors"] | None = None
    pairs: int | None = None
    gain_clamped: int | None = None
    class_clips: Mapping[str, int] = field(default_factory=dict)  # clips of the metadata, by mid
    class_anchors: Mapping[str, int] | None = None  # by mid
    class_targets: Mapping[str, int] | None = None  # distinct target anchors of the pairs, by mid
    class_pairs: Mapping[str, int] | None = None  # by mid

    def thin_classes(self, *, min_targets: int, max_lost: float) -> list[ThinClass]:
        """Classes that the results rest on too little for, sorted by mid; none where a stage has left nothing.

        Such a class has fewer distinct targets than `min_targets` (and than pairs), or lost more than the share
        `max_lost` of its clips between the metadata and the anchors.
        """
        if self.class_anchors is None or self.class_targets is None or self.class_pairs is None:
            return []
        thin = list[ThinClass]()
        for mid, clips in sorted(self.class_clips.items()):
            anchors, targets = self.class_anchors.get(mid, 0), self.class_targets.get(mid, 0)
            few = targets < min(min_targets, self.class_pairs.get(mid, min_targets))
            if few or clips - anchors > max_lost * clips:
                thin.append(ThinClass(mid, clips, anchors, targets))
        return thin

    @property
    def without_pairs(self) -> list[str]:
        """Mids of the classes that no pair is of: for want of anchors, or of an interferer."""
        return sorted({*(self.classes_without_anchors or []), *(self.classes_without_pairs or [])})

    @property
    def clips_listed(self) -> int | None:
        """All clips of the metadata."""
        known = [self.clips_missing, self.clips_kept, self.clips_quarantined]
        return sum(n for n in known if n is not None) if self.clips_kept is not None else None

    def metrics(self) -> dict[str, int | float]:
        """The counts for metrics.json: data.<split>.<what>; those unknown are left out."""
        counts = {
            "clips_missing": self.clips_missing,
            "clips_kept": self.clips_kept,
            "clips_quarantined": self.clips_quarantined,
            "anchors": self.anchors,
            "classes_with_anchors": self.classes_with_anchors,
            "classes_without_anchors": _len(self.classes_without_anchors),
            "classes_without_pairs": _len(self.classes_without_pairs),
            "pairs": self.pairs,
            "gain_clamped": self.gain_clamped,
        }
        return {f"data.{self.split}.{name}": value for name, value in counts.items() if value is not None}


def read_split(split: str, *, manifest: Path, clips: Path, anchors: Path, pairs: Path) -> SplitData:
    """Count one split. Each argument is the directory above the splits: data/manifest, data/clips, ..."""
    found: dict[str, Any] = {}
    listed = _table(manifest / f"{split}.csv", ["labels"])
    missing = _table(manifest / "missing.csv", ["split", "labels"])
    if missing is not None:
        missing = missing[missing["split"] == split]
        found["clips_missing"] = len(missing)
    found["class_clips"] = Counter(
        mid for table in (listed, missing) if table is not None for labels in table["labels"] for mid in _split(labels)
    )
    clip_table = _table(clips / split / "manifest.csv", ["clip_id", "status"])
    if clip_table is not None:
        gone = clip_table["status"] == "missing"  # it was there when the manifest was made
        bad = clip_table[~gone & (clip_table["status"] != "ok")]
        found["clips_missing"] = found.get("clips_missing", 0) + int(gone.sum())
        found["clips_kept"] = len(clip_table) - int(gone.sum()) - len(bad)
        found["clips_quarantined"] = len(bad)
        found["reasons"] = [
            Reason(str(reason), len(rows), sorted(rows["clip_id"])[:3])
            for reason, rows in sorted(bad.groupby("status"), key=lambda item: (-len(item[1]), item[0]))
        ]
    with_anchors: set[str] | None = None
    if (index := anchors / split / "index.parquet").is_file():
        table = pd.read_parquet(index, columns=["mid", "purity"])
        with_anchors = set(table["mid"])
        found["anchors"] = len(table)
        found["class_anchors"] = table["mid"].value_counts().to_dict()
        found["classes_with_anchors"] = len(with_anchors)
        found["purity"] = table["purity"].to_numpy(dtype=float)
        header = read_json(anchors / split / "index.json")
        # A class whose clips are all missing or quarantined never came as far as the anchors' own list.
        named = set(found["class_clips"])
        found["classes_without_anchors"] = sorted((named - with_anchors) | set(header["empty_classes"]))
    if (path := pairs / split / "pairs.parquet").is_file():
        table = pd.read_parquet(path, columns=["mid", "target", "clamped"])
        found["pairs"] = len(table)
        found["class_pairs"] = table["mid"].value_counts().to_dict()
        found["class_targets"] = table.groupby("mid")["target"].nunique().to_dict()
        found["gain_clamped"] = int(table["clamped"].sum())
        if with_anchors is not None:
            found["classes_without_pairs"] = sorted(with_anchors - set(table["mid"]))
    return SplitData(split, **found)


def read_pairs(pairs: Path) -> pd.DataFrame | None:
    """The evaluation manifest, or None where there is none."""
    path = pairs / "eval" / "pairs.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def read_curve(path: Path, name: str) -> dict[str, pd.DataFrame]:
    """One training curve under a name; empty where there is none, or nothing in it."""
    curve = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    return {} if curve.empty else {name: curve}


def flat_scalars(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A summary as dotted key -> text, for showing.

    Lists become their length, as do tables of more than 20 entries (one per class); absolute paths are left out.
    """
    shown: dict[str, str] = {}
    for key, item in sorted(value.items()):
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and len(item) > 20:
            shown[name] = f"{len(item)} entries"
        elif isinstance(item, Mapping):
            shown |= flat_scalars(item, f"{name}.")
        elif isinstance(item, list):
            shown[name] = f"{len(item)} entries"
        elif isinstance(item, float):
            shown[name] = f"{item:.6g}"
        elif not (isinstance(item, str) and Path(item).is_absolute()):
            shown[name] = "none" if item is None else str(item)
    return shown


def read_timings(timings: Path, items: Iterable[str]) -> dict[str, dict[str, int | float]]:
    """Seconds and peak memory of every stage's last run that succeeded, by stage, in the order of the graph.

    `items` are the splits and models of this params.yaml: a stage of another one, stage@<item>, left its timing too.
    """
    known_items = set(items)

    def order(path: Path) -> tuple[int, str]:
        known = [stage for stage in STAGES if path.stem.startswith(stage)]
        return (STAGES.index(max(known, key=len)) if known else len(STAGES), path.stem)

    paths = [path for path in timings.glob("*.json") if path.stem.partition("@")[2] in {"", *known_items}]
    return {path.stem: read_json(path) for path in sorted(paths, key=order)}


def _table(path: Path, columns: list[str]) -> pd.DataFrame | None:
    # All as text: a clip may be called "nan" or "1e5". Only what is asked for: two million rows are 2 GB whole.
    return pd.read_csv(path, dtype=str, keep_default_na=False, usecols=columns) if path.is_file() else None


def _split(labels: str) -> set[str]:
    """The mids of one cell of a manifest, which are joined by ;."""
    return set(filter(None, labels.split(";")))


def _len(names: list[str] | None) -> int | None:
    return None if names is None else len(names)
