"""Table I, ours beside the paper's; shares of pairs; and how far both can be compared."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pipeline.reporting import charts, published
from pipeline.reporting.blind import ISOLATED, WHOLE, read_results
from pipeline.reporting.comparability import comparison_table, comparisons
from pipeline.reporting.headline import HALF_MIXTURE, SHARES, shares
from pipeline.reporting.run import Run
from pipeline.reporting.scores import AVERAGE, QUERIES
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.sections.verdict import ONE_TRAINING
from pipeline.reporting.tables import DASH, Cell, Row, Table, count, db, markdown_escape, number, percent, words

log = logging.getLogger(__name__)

HALF = "half of the mixture, nothing separated"
UNSUPERVISED = {
    False: f"MixIT from clips {WHOLE['clips']}, best assignment",
    True: f"MixIT {ISOLATED}, best assignment",
}
BEST_ASSIGNMENT = (
    "MixIT, best assignment: the model learnt from mixtures of two mixtures, which are pieces of clips as they are, or "
    f"{ISOLATED} (sums of anchors). It has no query, and of the ways to sort its outputs the one that fits the "
    "references best is taken. Nobody who separates has those: an upper bound, and no competitor of a query."
)

# Means first: with few pairs a class the median is biased, and its interval one-sided.
COLUMNS = {
    "sdri_class_mean_mean": "SDRi",
    "si_sdri_class_mean_mean": "SI-SDRi",
    "sdri_class_median_mean": "SDRi, class median",
    "sdr_class_median_mean": "SDR, class median",
    "si_sdri_class_median_mean": "SI-SDRi, class median",
}
COUNTS = {"n_pairs": "pairs", "n_classes": "classes"}


@dataclass(frozen=True)
class System:
    """One system under one kind of query; `numbers` by the keys of its columns and SHARES, those unknown left out."""

    name: str
    query: str
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    ours: bool = True


@dataclass(frozen=True)
class Data:
    """The run, its separators without queries and what they learnt from, and what each class gains by features."""

    run: Run
    blind: dict[str, str]
    gains: pd.DataFrame  # of `published.class_gains`


class Section(Base[Data]):
    """Table I and its comparison with the paper's."""

    title = "Table I"
    place = 20
    template = """\
<p class="muted">dB. SDRi and SI-SDRi are means over classes of the mean over a class' pairs. <i>Class median</i> is
Kong et al.'s aggregate, the mean over classes of the class' median, which is biased where a class has few pairs. In
brackets the 95 % interval (over the recordings of targets and interferers, {{ n_resamples | count }} resamples). Grey
rows are doing nothing, and figures of Zhao et al.</p>
{{ table.html }}
{% for text in notes %}<p class="muted">{{ text }}</p>
{% endfor %}
{% if warnings %}<details class="warning"{% if warnings | length < 4 %} open{% endif %}>\
<summary>{{ warnings | length }} warning{{ "s" if warnings | length > 1 }}</summary>
<ul>{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul></details>{% endif %}
{% if shares.rows %}<h3>Shares of the pairs</h3>
{{ shares.html }}{% endif %}
<h3>Comparable with the paper?</h3>
{{ comparable.html }}
<h3>What the paper says of the classes</h3>
<p class="muted">{{ checks_are }}</p>
{{ checks.html }}
{{ drawings.gain_flatness }}"""

    def read(self, run: Run) -> Data:
        """Read the scores, and the spectra of the anchors."""
        results = read_results(run.places.summaries, run.settings.blind, {}, {})
        blind = {result.name: UNSUPERVISED[result.subsets] for result in results}
        flatness = published.flatness_by_class(run.places.anchors / "eval")
        frozen = published.as_published(run.settings.with_features)
        gains = published.class_gains(run.statistics.per_class, run.models[0], frozen, flatness)
        return Data(run, blind, gains)

    def metrics(self, data: Data) -> dict[str, int | float]:
        """Aggregates of the scores, and shares of the pairs."""
        return data.run.statistics.metrics | shares(data.run.scores)

    def drawings(self, data: Data, metrics: Metrics) -> dict[str, Drawing]:
        """Chart of what features gain, by the flatness of a class' spectrum."""
        chart = charts.flatness_chart(data.gains, published.figures()["classes"]["gain_most"])
        return {"gain_flatness": Drawing(chart, "Gain of each class by its spectral flatness")}

    def files(self, data: Data, metrics: Metrics) -> dict[str, str | bytes]:
        """The section as Markdown."""
        context = self.context(data, metrics)
        for text in context["warnings"]:
            log.warning(text)
        return {"table1.md": markdown(context)}

    def context(self, data: Data, metrics: Metrics) -> dict[str, Any]:
        """All tables of the section, its warnings and notes."""
        settings = data.run.settings
        rows = our_systems(metrics, data.run.models, QUERIES, data.blind)
        warnings = [*without_width(metrics), *below_half(rows)]
        checks_are = [published.CHECKS_ARE]
        checks_are += [published.GENERATED] if settings.document["data"]["source"] == "synthetic" else []
        return {
            "n_resamples": settings.report.bootstrap_resamples,
            "table": systems_table([*rows, *published_systems()]),
            "notes": [*([BEST_ASSIGNMENT] if any("(MixIT" in row.name for row in rows) else []), *data.run.notes],
            "warnings": warnings,
            "shares": shares_table(rows),
            "several": len(data.run.models) > 1,
            "comparable": comparison_table(comparisons(settings, metrics)),
            "checks_are": " ".join(checks_are),
            "checks": published.checks_table(published.class_checks(data.gains)),
        }


def our_systems(
    metrics: Metrics, models: Sequence[str], queries: Sequence[str], blind: Mapping[str, str] | None = None
) -> list[System]:
    """One row per model and query that has numbers, in this order; those of the separators without queries
    that were scored on the same pairs, `blind` with what they learnt from; then what half of the mixture scores.
    """

    def below(prefix: str) -> dict[str, int | float]:
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    rows = [System(model, query, below(f"{model}.{query}.")) for model in models for query in queries]
    for name, learnt in (blind or {}).items():
        if numbers := below(f"mixit.{name}.pairs_"):
            if (n_pairs := metrics.get(f"mixit.{name}.n_pairs")) is not None:
                numbers["n_pairs"] = n_pairs
            rows.append(System(f"{name} ({learnt})", DASH, numbers))
    if numbers := below(f"{HALF_MIXTURE}."):
        # SDR rewards turning down what one cannot separate: 3 dB at 0 dB. SI-SDR does not.
        numbers |= {"si_sdri_class_median_mean": 0.0, "si_sdri_class_mean_mean": 0.0}
        rows.append(System(HALF, DASH, numbers, ours=False))
    return [row for row in rows if row.numbers]


def published_systems() -> list[System]:
    """Zhao et al.'s Table I, in the columns of ours: Kong et al.'s aggregate, the class median, for it names none."""
    return [
        System(
            f"paper: {printed['system']}",
            printed["query"],
            {f"{key}_class_median_mean": printed[key] for key in ("sdr", "sdri") if key in printed},
            ours=False,
        )
        for printed in published.figures()["table_1"]
    ]


def cell(system: System, column: str) -> Cell:
    """A number of Table I, with its interval where it has one."""
    if column.startswith("n_"):
        return Cell(count(system.numbers.get(column)))
    return number(system.numbers, column)


def systems_table(systems: Sequence[System]) -> Table:
    """Table I, a row per system; others' are set apart."""
    keys = columns(systems)
    rows = [
        Row([*words(row.name, row.query), *(cell(row, key) for key in keys)], reference=not row.ours) for row in systems
    ]
    return Table(["System", "query", *keys.values()], rows, n_text=2)


def columns(systems: Sequence[System]) -> dict[str, str]:
    """Keys and titles of Table I: SDR and SI-SDR, class medians of other metrics that a system has, counts."""
    end = "_class_median_mean"
    keys = dict.fromkeys(key.removesuffix(end) for row in systems for key in row.numbers if key.endswith(end))
    others = {
        f"{key}{end}": f"{key.replace('_', ' ').upper()}, class median"
        for key in keys
        if f"{key}{end}" not in COLUMNS and key != "si_sdr" and not (key.endswith("i") and key[:-1] in keys)
        if "." not in key  # a difference to the first model
    }
    return COLUMNS | others | COUNTS


def shares_table(systems: Sequence[System]) -> Table:
    """Shares of the pairs, for the rows that have any."""
    rows = [
        Row(words(row.name, row.query, *(percent(row.numbers.get(key)) for key in SHARES)))
        for row in systems
        if any(key in row.numbers for key in SHARES)
    ]
    return Table(["System", "query", *SHARES.values()], rows, n_text=2, title="Shares of the pairs")


def below_half(systems: Sequence[System]) -> list[str]:
    """A sentence for each of our rows that does not reach what half of the mixture scores by SDRi."""
    key = "sdri_class_mean_mean"
    half = next((row.numbers[key] for row in systems if row.name == HALF), None)
    if half is None:
        return []
    return [
        f"{row.name}, {row.query} query: its SDRi of {db(row.numbers[key])} dB is below the {db(half)} dB of half of "
        "the mixture, with which nothing is separated."
        for row in systems
        if key in row.numbers and row.numbers[key] < half
    ]


def without_width(metrics: Metrics) -> list[str]:
    """A sentence where no class has more than one target clip, so that the intervals, drawn over clips, are points."""
    n_classes = metrics.get("mixture.n_classes", 0)
    if not n_classes or metrics["mixture.n_classes_with_one_clip"] < n_classes:
        return []
    return [
        "No class has pairs of more than one target clip, so that there is nothing to draw from: the intervals are "
        "points, and neither they nor p say how sure a number is."
    ]


def markdown(context: Mapping[str, Any]) -> str:
    """table1.md: our rows, the paper's, shares of pairs, and what must be borne in mind in comparing them."""
    lines = [
        "# Table I",
        "",
        f"In dB, {AVERAGE} and oracle query: the mean over classes of the mean over a class' pairs or, where the "
        "column says so, of the class' median; in brackets the 95 % interval.",
        "",
        *context["table"].markdown,
    ]
    if context["shares"].rows:
        lines += ["", *context["shares"].section()]
    if context["several"]:
        lines += ["", ONE_TRAINING]
    lines += ["", "## Comparability", "", *context["comparable"].markdown]
    if notes := [*context["notes"], *context["warnings"]]:
        lines += ["", *(f"- {markdown_escape(note)}" for note in notes)]
    lines += ["", "## What the paper says of the classes", "", context["checks_are"], "", *context["checks"].markdown]
    return "\n".join(lines) + "\n"
