"""headline.json: the few numbers of a run that `dvc metrics` shows and compares; all others are in metrics.json."""

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.reporting.scores import AVERAGE

IMPROVED_DB = 3.0  # what half of the mixture gains at 0 dB without separating anything
SHARE = "share_improved_3_db"
HALF_MIXTURE = "half_mixture"
HALF_SDRI = f"{HALF_MIXTURE}.sdri_class_mean_mean"

SHARES = {
    SHARE: "SDRi above 3 dB",
    "share_above_half": "better than half of the mixture",
    "share_si_sdri_above_0": "SI-SDRi above 0",
    "share_si_sdri_above_5_db": "SI-SDRi above 5 dB",
    "share_other_louder": "the interferer is the louder one (SIR below 0)",
}
"""Shares of the pairs, by their keys in metrics.json."""


def best_model(metrics: Mapping[str, int | float], models: Sequence[str]) -> str:
    """Name the model with the highest SDRi (mean of means) under the average query; the first one if none has any."""
    return max(models, key=lambda model: metrics.get(f"{model}.{AVERAGE}.sdri_class_mean_mean", float("-inf")))


def shares(scores: pd.DataFrame) -> dict[str, float]:
    """Shares of the pairs by <model>.<query>.<key of SHARES>, of those where the number is defined.

    `scores` as of `scores.read_scores`; a share without a defined pair has no key.
    """
    conditions = {
        SHARE: ("sdri", scores["sdri"] > IMPROVED_DB),
        "share_above_half": ("sdr", scores["sdr"] > scores["sdr_half"]),
        "share_si_sdri_above_0": ("si_sdri", scores["si_sdri"] > 0),
        "share_si_sdri_above_5_db": ("si_sdri", scores["si_sdri"] > 5),
    }
    if "bss_sir" in scores:
        conditions["share_other_louder"] = ("bss_sir", scores["bss_sir"] < 0)
    found = {}
    for name, (column, holds) in conditions.items():
        defined = holds.astype(float).where(scores[column].notna())
        by_model = pd.DataFrame({"model": scores["model"], "query": scores["query"], "share": defined})
        for row in by_model.groupby(["model", "query"], as_index=False)["share"].mean().dropna().itertuples():
            found[f"{row.model}.{row.query}.{name}"] = round(float(str(row.share)), 6)
    return found


def headline(metrics: Mapping[str, int | float], models: Sequence[str], n_failed_gates: int) -> dict[str, int | float]:
    """The headline numbers by short keys; those that a run lacks are left out.

    <model>.sdri, .si_sdri (dB, average query, mean over classes of the class means), .improved_3_db (share of pairs);
    half.sdri; <separator without queries>.stem_si_snri (dB); the A-MAE's gain in its probe; counts.
    """
    wanted = {
        "n_pairs": "mixture.n_pairs",
        "n_classes": "mixture.n_classes",
        "half.sdri": HALF_SDRI,
        "pretrain_mae.probe_gain_map": "pretrain_mae.probe_difference_map",
    }
    for model in models:
        ours = f"{model}.{AVERAGE}."
        wanted |= {f"{model}.{metric}": f"{ours}{metric}_class_mean_mean" for metric in ("sdri", "si_sdri")}
        wanted[f"{model}.improved_3_db"] = ours + SHARE
    blind = [key for key in metrics if key.startswith("mixit.") and key.endswith(".stem_si_snri")]
    wanted |= {key.removeprefix("mixit."): key for key in blind}
    found = {short: metrics[key] for short, key in wanted.items() if key in metrics}
    return {"gates_failed": n_failed_gates, **found}
