"""From scores per pair to the numbers of the report: aggregates, their intervals, paired differences.

Two aggregates, always named. The mean over classes of the per-class *mean* is `class_mean_mean`, plain SDRi and SI-SDRi
on the page; Kong et al. (arXiv:2305.07447) report the mean over classes of the per-class *median*
(`class_median_mean`). Undefined (NaN) pairs are left out of their class, and counted.

Intervals are those of evaluation/statistics.py: over the recordings of the targets within each class and those of the
interferers over all, the classes held fixed. All models and queries share each draw, so differences are paired by
pair. What the interval does not cover: another training seed, and that a clip with two labels serves two classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from pipeline.evaluation.columns import of_estimates
from pipeline.evaluation.statistics import (
    AGGREGATES,
    Design,
    Statistic,
    class_intervals,
    finite_mean,
    mean_over_classes,
    resample,
)
from pipeline.reporting.scores import RECORDINGS

SCHEMA = 1  # of metrics.json; raised when a key changes its meaning


def wilcoxon_p(difference: Float[np.ndarray, " classes"]) -> float:
    """Two-sided Wilcoxon signed-rank p over the classes; 1 where no class differs (there the test is undefined)."""
    defined = difference[~np.isnan(difference)]
    if not np.any(defined):
        return 1.0
    from scipy.stats import wilcoxon  # half a second, which stages that only use the bootstrap need not spend

    return float(wilcoxon(defined[defined != 0]).pvalue)


@dataclass(frozen=True)
class Summary:
    """All numbers of the report that come from scores: flat ones for metrics.json, and one row per class."""

    metrics: dict[str, int | float]
    per_class: pd.DataFrame


def summarise(scores: pd.DataFrame, class_names: Mapping[str, str], *, n_resamples: int, seed: int) -> Summary:
    """Aggregate scores as `scores.read_scores` gives them (its first model is the one the others are compared with).

    `metrics`: keys <model>.<query>.<metric>_class_{median,mean}_mean, with _ci_lo and _ci_hi beside SDRi;
    mixture.*; <model>.<query>.vs_<first>.* for differences. A number that is undefined has no key.
    `per_class`: one row per model, query and class; `class_names` maps mid -> name.
    """
    first = str(scores["model"].iloc[0])
    pairs = _Pairs.of(scores)
    tables = {
        (str(model), str(query)): rows.set_index("pair").reindex(pairs.rows.index)
        for (model, query), rows in scores.groupby(["model", "query"], sort=False)
    }
    columns = {f"{model}.{query}": table["sdri"].to_numpy(float) for (model, query), table in tables.items()}
    bootstrap = resample(columns, pairs.design, n_resamples=n_resamples, seed=seed)

    metrics = {"schema": SCHEMA} | _of_mixtures(pairs)
    frames: list[pd.DataFrame] = []
    for (model, query), table in tables.items():
        key = f"{model}.{query}"
        statistics: dict[str, Statistic] = {kind: bootstrap[key, kind] for kind in AGGREGATES}
        metrics |= {f"{key}.{name}": value for name, value in _of_system(table, statistics, pairs).items()}
        frame = _class_rows(table, pairs, model, query)
        for kind in AGGREGATES:
            ends = class_intervals(statistics[kind], pairs.design)
            frame[f"sdri_{kind}_ci_lo"], frame[f"sdri_{kind}_ci_hi"] = ends
        frame["versus"] = ""
        frame[["delta_sdri_median", "delta_sdri_median_ci_lo", "delta_sdri_median_ci_hi"]] = np.nan
        if model != first and f"{first}.{query}" in columns:
            paired = _paired(columns, key, f"{first}.{query}")
            delta = _differences(paired, bootstrap, pairs.design, n_resamples=n_resamples, seed=seed)
            found = _of_difference(delta, pairs.design)
            metrics |= {f"{key}.vs_{first}.{name}": value for name, value in found.items()}
            frame["versus"] = first
            frame["delta_sdri_median"] = delta["median"].point
            ends = class_intervals(delta["median"], pairs.design)
            frame["delta_sdri_median_ci_lo"], frame["delta_sdri_median_ci_hi"] = ends
        frames.append(frame)

    per_class = pd.concat(frames, ignore_index=True)
    per_class.insert(2, "class_name", [class_names.get(mid, mid) for mid in per_class["mid"]])
    return Summary(
        {key: _rounded(key, metrics[key]) for key in sorted(metrics) if np.isfinite(metrics[key])}, per_class
    )


@dataclass(frozen=True)
class _Pairs:
    """The evaluation pairs, which all models and queries share."""

    rows: pd.DataFrame  # one per pair, in their order
    class_index: Int[np.ndarray, " pairs"]
    clip: Int[np.ndarray, " pairs"]  # of the target, as a number
    design: Design

    @classmethod
    def of(cls, scores: pd.DataFrame) -> "_Pairs":
        rows = scores.drop_duplicates("pair").set_index("pair").sort_index()
        class_index = rows["class_index"].to_numpy(dtype=np.int64)
        clip = np.unique(rows["target_clip"].to_numpy(dtype=str), return_inverse=True)[1]
        design = Design.of(class_index.tolist(), *(rows[name].tolist() for name in RECORDINGS))
        return cls(rows, class_index, clip, design)


def _of_mixtures(pairs: _Pairs) -> dict[str, int | float]:
    """Count the pairs, and aggregate what the mixture itself and half of it score."""
    rows = pairs.rows
    mixture = rows.filter(like="_mixture").rename(columns=lambda name: name.removesuffix("_mixture"))
    half = pd.DataFrame({"sdr": rows["sdr_half"], "sdri": rows["sdr_half"] - rows["sdr_mixture"]})
    counts = {
        "mixture.n_pairs": len(rows),
        "mixture.n_classes": len(np.unique(pairs.class_index)),
        "mixture.n_nan": int(mixture["sdr"].isna().sum()),
        # A class whose pairs all come from one clip has an interval of width 0: it says nothing of that class.
        "mixture.n_classes_with_one_clip": int((pd.Series(pairs.clip).groupby(pairs.class_index).nunique() == 1).sum()),
    }
    return (
        {f"mixture.{key}": value for key, value in _aggregates(mixture, pairs.class_index).items()}
        | {f"half_mixture.{key}": value for key, value in _aggregates(half, pairs.class_index).items()}
        | counts
    )


def _of_system(table: pd.DataFrame, statistics: Mapping[str, Statistic], pairs: _Pairs) -> dict[str, int | float]:
    """Aggregate the scores of one model under one query, SDRi with its intervals, and count what is undefined."""
    found = _aggregates(table[of_estimates(map(str, table))], pairs.class_index)
    found["n_pairs"] = len(table)
    found["n_nan"] = int(table["sdri"].isna().sum())
    found["n_classes"] = int((~np.isnan(statistics["median"].point)).sum())
    if "bss_sdr" in table and table["bss_sdr"].notna().any():
        found["n_nan_bss"] = int(table["bss_sdr"].isna().sum())
    for kind, statistic in statistics.items():
        estimate = mean_over_classes([statistic], pairs.design)
        found[f"sdri_class_{kind}_mean_ci_lo"], found[f"sdri_class_{kind}_mean_ci_hi"] = estimate.low, estimate.high
    return found


def _of_difference(delta: Mapping[str, Statistic], design: Design) -> dict[str, int | float]:
    """Both aggregates of a difference with intervals, and in how many classes it goes which way."""
    found: dict[str, int | float] = {}
    for kind, statistic in delta.items():
        estimate = mean_over_classes([statistic], design)
        found[f"sdri_class_{kind}_mean"] = estimate.value
        found[f"sdri_class_{kind}_mean_ci_lo"], found[f"sdri_class_{kind}_mean_ci_hi"] = estimate.low, estimate.high
    point = delta["median"].point
    return found | {
        "wilcoxon_p": wilcoxon_p(point),
        "classes_better": int((point > 0).sum()),
        "classes_worse": int((point < 0).sum()),
        "classes_same": int((point == 0).sum()),
    }


def _rounded(key: str, value: int | float) -> int | float:
    """A sum in another order differs in its last digits. At 1e-6 dB nobody hears it, and the bytes stay."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if key.endswith("wilcoxon_p") else round(value, 6) + 0.0


@dataclass(frozen=True)
class _Pair:
    """A model's SDRi and the first model's, as columns, and whether both are defined on the same pairs."""

    key: str
    reference: str
    values: Float[np.ndarray, " pairs"]
    reference_values: Float[np.ndarray, " pairs"]
    both: Bool[np.ndarray, " pairs"]


def _paired(columns: Mapping[str, np.ndarray], key: str, reference: str) -> _Pair:
    a, b = columns[key], columns[reference]
    return _Pair(key, reference, a, b, ~(np.isnan(a) | np.isnan(b)))


def _differences(
    pair: _Pair, bootstrap: Mapping[tuple[str, str], Statistic], design: Design, *, n_resamples: int, seed: int
) -> dict[str, Statistic]:
    """Per-class differences between two models, over the pairs that are defined for both."""
    key, reference = pair.key, pair.reference
    if not np.array_equal(np.isnan(pair.values), np.isnan(pair.reference_values)):
        masked = {
            key: np.where(pair.both, pair.values, np.nan),
            reference: np.where(pair.both, pair.reference_values, np.nan),
        }
        bootstrap = resample(masked, design, n_resamples=n_resamples, seed=seed)
    return {kind: bootstrap[key, kind] - bootstrap[reference, kind] for kind in AGGREGATES}


def _aggregates(table: pd.DataFrame, class_index: np.ndarray) -> dict[str, int | float]:
    """Both aggregates of each column that has a value at all."""
    grouped = table.groupby(class_index)
    return {
        f"{metric}_class_{kind}_mean": float(finite_mean(per_class[metric].to_numpy(float)))
        for kind, per_class in (("median", grouped.median()), ("mean", grouped.mean()))
        for metric in table.columns
        if table[metric].notna().any()
    }


def _class_rows(table: pd.DataFrame, pairs: _Pairs, model: str, query: str) -> pd.DataFrame:
    """One row per class of one model and query, without its intervals."""
    grouped = table.assign(clip=pairs.clip).groupby(pairs.class_index)
    rows = pd.DataFrame(
        {
            "class_index": grouped["class_index"].first().astype(int),
            "mid": grouped["mid"].first(),
            "model": model,
            "query": query,
            "n_pairs": grouped.size(),
            "n_nan": grouped["sdri"].apply(lambda x: int(x.isna().sum())),
            "n_clips": grouped["clip"].nunique(),
        }
    )
    for metric in ("sdr_mixture", *of_estimates(map(str, table))):
        for kind in AGGREGATES:
            rows[f"{metric}_{kind}"] = grouped[metric].agg(kind)
    return rows.reset_index(drop=True)


def per_class_csv(per_class: pd.DataFrame) -> str:
    """per_class.csv: one row per model, query and class, 4 decimals, empty where undefined."""
    first = ["class_index", "mid", "class_name", "model", "query", "n_pairs", "n_nan", "n_clips"]
    numbers: Sequence[str] = [name for name in per_class.columns if name not in {*first, "versus"}]
    ordered = sorted(numbers, key=lambda name: (name.startswith("delta"), not name.startswith("sdri")))
    return per_class[[*first, *ordered, "versus"]].to_csv(index=False, float_format="%.4f", lineterminator="\n")
