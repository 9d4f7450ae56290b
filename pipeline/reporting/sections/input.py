"""What the evaluation's mixtures are: their levels, repeats, and what makes a pair less than it seems."""

from typing import Any

from pipeline.reporting.inputs import SPLITS
from pipeline.reporting.run import Run
from pipeline.reporting.scores import QUERIES
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import count, db

OVERLAPS = {
    "target_label": "the target's label",
    "target_kin": "that or its kin",
    "any_label": "any label of the target's clip",
}


class Section(Base[Run]):
    """Checks of the input."""

    title = "Input check"
    place = 40
    template = """\
<dl class="facts">{% for what, text in facts %}<dt>{{ what }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>"""

    def read(self, run: Run) -> Run:
        """Read the counts of the data stages."""
        return run

    def context(self, data: Run, metrics: Metrics) -> dict[str, Any]:
        """The facts, each with its name."""
        return {"facts": facts(data, metrics)}


def facts(run: Run, metrics: Metrics) -> list[tuple[str, str]]:
    """List what the mixtures are, by name; what no stage has counted is left out."""
    level = {kind: db(metrics.get(f"mixture.sdr_class_{kind}_mean"), signed=True) for kind in ("median", "mean")}
    summaries = {split: run.summary(f"pairs_{split}") or {} for split in SPLITS}
    rows = [
        (
            "SDR of the mixture",
            f"{level['median']} dB (class medians), {level['mean']} dB (class means); energy matching aims at 0",
        )
    ]
    for split in run.splits:
        if split.pairs is not None:
            share = 100 * (split.gain_clamped or 0) / (split.pairs or 1)
            text = f"{count(split.gain_clamped)} of {count(split.pairs)} pairs ({share:.2f} %)"
            rows.append((f"Gain clamps, {split.split}", text))
    rows += _repeats({split: summary.get("repeats_by_class") for split, summary in summaries.items()})
    rows.append(("Undefined (NaN)", _undefined(run, metrics)))
    if overlap := summaries["eval"].get("overlap"):
        rows.append(("Interferer's clip carries", _overlaps(overlap, summaries["eval"])))
    one_clip = count(metrics["mixture.n_classes_with_one_clip"])
    rows.append(("Classes of a single target clip", f"{one_clip} of {count(metrics['mixture.n_classes'])}"))
    precision = (run.summary("sed") or {}).get("mean_average_precision")
    if precision is not None:
        rows.append(("Detector", f"mean average precision {precision:.3f} on eval"))
    return rows


def _repeats(classes_of: dict[str, dict[str, int] | None]) -> list[tuple[str, str]]:
    rows = []
    for split, classes in classes_of.items():
        if classes is not None:
            text = count(sum(classes.values()))
            if classes:
                named = ", ".join(f"{name} {n}" for name, n in classes.items())
                text += f" (the same two sounds as an earlier pair of the class): {named}"
            rows.append((f"Repeated pairs, {split}", text))
    return rows


def _undefined(run: Run, metrics: Metrics) -> str:
    """Which scores are undefined of how many pairs; those without any are not named."""
    scores = {"mixture SDR": metrics["mixture.n_nan"]}
    for start in (f"{model}.{query}" for model in run.models for query in QUERIES):
        name = start.replace(".", ", ")
        scores[f"SDRi of {name}"] = metrics.get(f"{start}.n_nan", 0)
        scores[f"BSS Eval of {name}"] = metrics.get(f"{start}.n_nan_bss", 0)
    parts = [f"{name} {count(n)}" for name, n in scores.items() if n]
    return f"{'; '.join(parts) or 'none'} of {count(metrics['mixture.n_pairs'])} pairs"


def _overlaps(overlap: dict[str, float], summary: dict[str, Any]) -> str:
    free = summary.get("overlap_without_exclusion") or {}
    parts = []
    for key, text in OVERLAPS.items():
        if key in overlap:
            without = f" ({100 * free[key]:.2f} % if nothing were excluded)" if key in free else ""
            parts.append(f"{text}: {100 * overlap[key]:.2f} %{without}")
    return "; ".join(parts)
