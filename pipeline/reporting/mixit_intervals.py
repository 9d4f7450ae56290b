"""95 % intervals of the numbers of separators without queries, from the tables that stage evaluate_mixit leaves.

Two mixtures depend on one another where they have a recording in common; evaluation pairs by their target's and by
their interferer's recording. All by evaluation/statistics.py, as every other interval of the report.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import AGGREGATES, Design, Estimate, mean_over_classes, resample

PAIR_METRICS = ("sdri", "si_sdri")
RECORDINGS = ("target_recording", "interferer_recording")


def read_intervals(scores: Path, names: Sequence[str], *, n_resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """<key>_ci_lo and <key>_ci_hi by entry, with the keys of metrics.json; `name@5s` is an entry at a shorter length.

    `scores` holds a folder per entry; an entry without scores has no intervals.
    """
    folders = {name: scores / name for name in names}
    folders |= {f"{name}@{path.name}": path for name in names for path in sorted((scores / name).glob("[0-9]*s"))}
    return {
        name: _of_folder(folder, n_resamples=n_resamples, seed=seed)
        for name, folder in folders.items()
        if (folder / "moms.parquet").is_file()
    }


def _of_folder(folder: Path, *, n_resamples: int, seed: int) -> dict[str, float]:
    found: dict[str, Estimate] = {}
    for file, prefix in (("moms.parquet", ""), ("mixtures.parquet", "stem_")):
        table = pd.read_parquet(folder / file)
        if table.empty:
            continue
        columns = {str(name): table[name].to_numpy(float) for name in table.select_dtypes("float").columns}
        recordings = table[[name for name in RECORDINGS if name in table]].agg("+".join, axis=1).str.split("+")
        design = Design.overlapping(recordings.tolist())
        drawn = resample(columns, design, n_resamples=n_resamples, seed=seed, kinds=["mean"])
        found |= {prefix + name: mean_over_classes([drawn[name, "mean"]], design) for name in columns}
    if (folder / "pairs.parquet").is_file():
        table = pd.read_parquet(folder / "pairs.parquet")
        design = Design.of(table["class_index"].tolist(), *(table[name].tolist() for name in RECORDINGS))
        columns = {name: table[name].to_numpy(float) for name in PAIR_METRICS}
        drawn = resample(columns, design, n_resamples=n_resamples, seed=seed)
        found |= {
            f"pairs_{name}_class_{kind}_mean": mean_over_classes([drawn[name, kind]], design)
            for name in PAIR_METRICS
            for kind in AGGREGATES
        }
    return _flat(found)


def _flat(found: Mapping[str, Estimate]) -> dict[str, float]:
    """Both ends of every interval by key; one that is undefined has no key, as everywhere in metrics.json."""
    ends = {f"{key}_ci_lo": e.low for key, e in found.items()} | {f"{key}_ci_hi": e.high for key, e in found.items()}
    return {key: round(value, 6) + 0.0 for key, value in ends.items() if np.isfinite(value)}
