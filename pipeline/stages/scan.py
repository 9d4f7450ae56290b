"""Stage scan: list every clip of the data set, and find its file.

The later stages read this list, never the folders: what is in train and in eval is decided here, once. A recording
listed in both is taken out of train, and counted. Audio that is missing is listed apart and is no error, but a split
without any audio is.
"""

import argparse
import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import ontology
from pipeline.core.config import DataParams, load_params
from pipeline.core.runtime import outside, publish, remove, run_command, running, write_atomic, write_json
from pipeline.datasets import Clip, load

logger = logging.getLogger(__name__)

SPLITS = ("train", "eval")
COLUMNS = ("clip_id", "subset", "labels", "path", "size_bytes", "start_seconds", "end_seconds", "recording")
MISSING_COLUMNS = ("split", "clip_id", "subset", "labels", "start_seconds", "end_seconds")
Listing = list[tuple[str, Clip]]  # (subset, clip)


def without_repeats(listing: Listing) -> tuple[Listing, int]:
    """The listing with each clip once, where it is listed first, sorted by clip_id; and how many were left out.

    Two subsets may hold the same clip, even under two ids where one of them has more of its recording. Within one
    subset equal places are no repetition: where nobody knows the place in the recording (ESC-50's takes), all begin at
    0 seconds.
    """
    kept: dict[str, tuple[str, Clip]] = {}
    first_subset: dict[tuple[str, float, float], str] = {}
    for subset, clip in listing:
        segment = clip.recording, clip.start_seconds, clip.end_seconds
        if clip.clip_id not in kept and first_subset.setdefault(segment, subset) == subset:
            kept[clip.clip_id] = subset, clip
    return [kept[clip_id] for clip_id in sorted(kept)], len(listing) - len(kept)


def without_recordings(listing: Listing, others: Listing) -> tuple[Listing, int]:
    """The listing without the clips whose recording, or file, is also in `others`; and how many were left out."""
    recordings = {clip.recording for _, clip in others}
    paths = {clip.path for _, clip in others} - {None}
    kept = [(subset, clip) for subset, clip in listing if clip.recording not in recordings and clip.path not in paths]
    return kept, len(listing) - len(kept)


def scan(out: Path, params: DataParams, dataset: ModuleType) -> dict[str, Any]:
    """Write train.csv, eval.csv, missing.csv and summary.json into the folder `out`; return the summary."""
    root = outside(params.root)
    listings: dict[str, Listing] = {}
    summary: dict[str, Any] = {"source": params.source}
    for split, subsets in zip(SPLITS, (params.train, params.eval), strict=True):
        met: dict[str, Counter[str]] = {subset: Counter() for subset in subsets}
        every = [(subset, clip) for subset in subsets for clip in dataset.clips(root, subset, met[subset])]
        listings[split], repeated = without_repeats(every)
        summary[split] = {
            "repeated_clips": repeated,
            "reader": {name: dict(sorted(c.items())) for name, c in met.items()},
        }
    listings["train"], shared = without_recordings(listings["train"], listings["eval"])
    summary["train"]["dropped_also_in_eval"] = shared
    if shared:
        logger.warning("%d clips of train are of recordings that are also in eval: taken out of train", shared)

    tables: dict[str, list[Sequence[object]]] = {"train": [], "eval": [], "missing": []}
    for split, listing in listings.items():
        n_bytes = 0
        for subset, clip in listing:
            head, times = (subset, ";".join(clip.labels)), (clip.start_seconds, clip.end_seconds)
            if clip.path is None:
                tables["missing"].append((split, clip.clip_id, *head, *times))
            else:
                size = os.lstat(root / clip.path).st_size
                tables[split].append((clip.clip_id, *head, clip.path, size, *times, clip.recording))
                n_bytes += size
        n_present = len(tables[split])
        if not n_present:
            raise ValueError(
                f"none of the {len(listing)} clips of {split} has a file under data.root {str(root.absolute())!r}; "
                f"the reader met {summary[split]}"
            )
        summary[split] |= {
            "listed": len(listing),
            "present": n_present,
            "missing": len(listing) - n_present,
            "bytes": n_bytes,
        }
        logger.info("%s: %d clips, %d without audio", split, len(listing), len(listing) - n_present)
    summary["classes"] = per_class(listings)

    folder = out.with_name(f".{out.name}.tmp")
    remove(folder)
    folder.mkdir(parents=True)
    tables["missing"].sort(key=lambda row: (row[1], row[0]))
    for name, rows in tables.items():
        write_atomic(folder / f"{name}.csv", _csv(MISSING_COLUMNS if name == "missing" else COLUMNS, rows))
    write_json(folder / "summary.json", summary)
    publish(folder, out)
    return summary


def per_class(listings: dict[str, Listing]) -> dict[str, dict[str, Any]]:
    """Clips listed and present in each split, by mid, of the classes that are listed at all."""
    listed = {split: Counter(mid for _, clip in rows for mid in clip.labels) for split, rows in listings.items()}
    present = {
        split: Counter(mid for _, clip in rows if clip.path is not None for mid in clip.labels)
        for split, rows in listings.items()
    }
    return {
        mid: {
            "index": ontology.class_of(mid).index,
            "name": ontology.class_of(mid).name,
            **{split: {"listed": listed[split][mid], "present": present[split][mid]} for split in listings},
        }
        for mid in set(chain.from_iterable(listed.values()))
    }


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    params = load_params("data", DataParams)
    dataset = load(params.source)
    with running("scan", args.out):
        if hasattr(dataset, "prepare"):
            dataset.prepare(Path(params.root), load_params(params.source, dataset.Options))
        scan(args.out, params, dataset)


if __name__ == "__main__":
    run_command(main)
