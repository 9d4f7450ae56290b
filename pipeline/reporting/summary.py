"""From scores per pair to the numbers of the report: aggregates, their intervals, paired differences.

Two aggregates, always named. Kong et al. (arXiv:2305.07447) report the mean over classes of the per-class
*median* (`class_median_mean`, the headline here); the mean over classes of the per-class *mean* is
`class_mean_mean`. Undefined (NaN) pairs are left out of their class, and counted.

Intervals are those of evaluation/statistics.py: over the recordings of the targets within each class and those of the
interferers over all, the classes held fixed. All models and queries share each draw, so differences are paired by
pair. What the interval does not cover: another training seed, and that a clip with two labels serves two classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from pipeline.evaluation.statistics import (
    AGGREGATES,
    Design,
    Statistic,
    class_intervals,
    finite_mean,
    mean_over_classes,
    resample,
)

METRICS = ("sdr", "sdri", "si_sdr", "si_sdri", "bss_sdr", "bss_sdri", "bss_sir", "bss_sar")
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
    models = list(dict.fromkeys(scores["model"]))
    queries = sorted(set(scores["query"]))
    class_of_pair = scores.drop_duplicates("pair").set_index("pair").sort_index()
    pairs = class_of_pair.index
    class_index = class_of_pair["class_index"].to_numpy(dtype=np.int64)
    clip = np.unique(class_of_pair["target_clip"].to_numpy(dtype=str), return_inverse=True)[1]
    classes = np.unique(class_index)
    tables = {
        (str(model), str(query)): rows.set_index("pair").reindex(pairs)
        for (model, query), rows in scores.groupby(["model", "query"], sort=False)
    }

    columns = {f"{m}.{q}": tables[m, q]["sdri"].to_numpy(float) for m in models for q in queries if (m, q) in tables}
    differences = {
        f"{m}.{q}": _paired(columns, f"{m}.{q}", f"{models[0]}.{q}")
        for m in models[1:]
        for q in queries
        if f"{m}.{q}" in columns and f"{models[0]}.{q}" in columns
    }
    design = Design.of(
        class_index.tolist(),
        class_of_pair["target_recording"].tolist(),
        class_of_pair["interferer_recording"].tolist(),
    )
    bootstrap = resample(columns, design, n_resamples=n_resamples, seed=seed)

    metrics: dict[str, int | float] = {"schema": SCHEMA}
    frames: list[pd.DataFrame] = []
    mixture = class_of_pair[["sdr_mixture", "si_sdr_mixture", "bss_sdr_mixture"]].rename(
        columns=lambda name: name.removesuffix("_mixture")
    )
    metrics |= {f"mixture.{key}": value for key, value in _aggregates(mixture, class_index).items()}
    half = pd.DataFrame(
        {"sdr": class_of_pair["sdr_half"], "sdri": class_of_pair["sdr_half"] - class_of_pair["sdr_mixture"]}
    )
    metrics |= {f"half_mixture.{key}": value for key, value in _aggregates(half, class_index).items()}
    metrics |= {
        "mixture.n_pairs": len(pairs),
        "mixture.n_classes": len(classes),
        "mixture.n_nan": int(mixture["sdr"].isna().sum()),
        # A class whose pairs all come from one clip has an interval of width 0: it says nothing of that class.
        "mixture.n_classes_with_one_clip": int((pd.Series(clip).groupby(class_index).nunique() == 1).sum()),
    }
    for (model, query), table in tables.items():
        key = f"{model}.{query}"
        metrics |= {f"{key}.{name}": value for name, value in _aggregates(table[list(METRICS)], class_index).items()}
        metrics[f"{key}.n_pairs"] = len(table)
        metrics[f"{key}.n_nan"] = int(table["sdri"].isna().sum())
        metrics[f"{key}.n_classes"] = int((~np.isnan(bootstrap[key, "median"].point)).sum())
        if table["bss_sdr"].notna().any():
            metrics[f"{key}.n_nan_bss"] = int(table["bss_sdr"].isna().sum())
        for kind in AGGREGATES:
            found = mean_over_classes([bootstrap[key, kind]], design)
            metrics[f"{key}.sdri_class_{kind}_mean_ci_lo"] = found.low
            metrics[f"{key}.sdri_class_{kind}_mean_ci_hi"] = found.high
        frame = _class_rows(table, class_index, clip, model, query)
        for kind in AGGREGATES:
            frame[f"sdri_{kind}_ci_lo"], frame[f"sdri_{kind}_ci_hi"] = class_intervals(bootstrap[key, kind], design)
        frame["versus"] = ""
        for name in ("delta_sdri_median", "delta_sdri_median_ci_lo", "delta_sdri_median_ci_hi"):
            frame[name] = np.nan
        if key in differences:
            delta = _differences(differences[key], bootstrap, design, n_resamples=n_resamples, seed=seed)
            prefix = f"{key}.vs_{models[0]}"
            for kind in AGGREGATES:
                found = mean_over_classes([delta[kind]], design)
                metrics[f"{prefix}.sdri_class_{kind}_mean"] = found.value
                metrics[f"{prefix}.sdri_class_{kind}_mean_ci_lo"] = found.low
                metrics[f"{prefix}.sdri_class_{kind}_mean_ci_hi"] = found.high
            point = delta["median"].point
            metrics[f"{prefix}.wilcoxon_p"] = wilcoxon_p(point)
            metrics[f"{prefix}.classes_better"] = int((point > 0).sum())
            metrics[f"{prefix}.classes_worse"] = int((point < 0).sum())
            metrics[f"{prefix}.classes_same"] = int((point == 0).sum())
            frame["versus"] = models[0]
            frame["delta_sdri_median"] = point
            frame["delta_sdri_median_ci_lo"], frame["delta_sdri_median_ci_hi"] = class_intervals(
                delta["median"], design
            )
        frames.append(frame)

    per_class = pd.concat(frames, ignore_index=True)
    names = [class_names.get(mid, mid) for mid in per_class["mid"]]
    per_class.insert(2, "class_name", names)
    return Summary(
        {key: _rounded(key, metrics[key]) for key in sorted(metrics) if np.isfinite(metrics[key])}, per_class
    )


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


def _class_rows(table: pd.DataFrame, class_index: np.ndarray, clip: np.ndarray, model: str, query: str) -> pd.DataFrame:
    """One row per class of one model and query, without its intervals."""
    grouped = table.assign(clip=clip).groupby(class_index)
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
    for metric in ("sdr_mixture", *METRICS):
        for kind in AGGREGATES:
            rows[f"{metric}_{kind}"] = grouped[metric].agg(kind)
    return rows.reset_index(drop=True)


def per_class_csv(per_class: pd.DataFrame) -> str:
    """per_class.csv: one row per model, query and class, 4 decimals, empty where undefined."""
    first = ["class_index", "mid", "class_name", "model", "query", "n_pairs", "n_nan", "n_clips"]
    numbers: Sequence[str] = [name for name in per_class.columns if name not in {*first, "versus"}]
    ordered = sorted(numbers, key=lambda name: (name.startswith("delta"), not name.startswith("sdri")))
    return per_class[[*first, *ordered, "versus"]].to_csv(index=False, float_format="%.4f", lineterminator="\n")
