"""headline.json: the few numbers of a run that `dvc metrics` shows and compares; all others are in metrics.json."""

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.reporting.tables import AVERAGE

IMPROVED_DB = 3.0  # what half of the mixture gains at 0 dB without separating anything
SHARE = "share_improved_3_db"


def shares(scores: pd.DataFrame) -> dict[str, float]:
    """Shares of the pairs by <model>.<query>.<key of tables.SHARES>, of those where the number is defined.

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


def headline(
    metrics: Mapping[str, int | float], models: Sequence[str], mixit: Sequence[str], n_failed_gates: int
) -> dict[str, int | float]:
    """The headline numbers by short keys; those that a run lacks are left out.

    <model>.sdri, .si_sdri (dB, average query, mean over classes of the class means), .improved_3_db (share of pairs);
    half.sdri; <entry of mixit>.stem_si_snri (dB); the A-MAE's gain in its probe; counts.
    """
    wanted = {
        "n_pairs": "mixture.n_pairs",
        "n_classes": "mixture.n_classes",
        "half.sdri": "half_mixture.sdri_class_mean_mean",
        "pretrain_mae.probe_gain_map": "pretrain_mae.probe_difference_map",
    }
    for model in models:
        ours = f"{model}.{AVERAGE}."
        wanted |= {f"{model}.{metric}": f"{ours}{metric}_class_mean_mean" for metric in ("sdri", "si_sdri")}
        wanted[f"{model}.improved_3_db"] = ours + SHARE
    wanted |= {f"{entry}.stem_si_snri": f"mixit.{entry}.stem_si_snri" for entry in mixit}
    found = {short: metrics[key] for short, key in wanted.items() if key in metrics}
    return {"gates_failed": n_failed_gates, **found}
