"""From the metadata to the pairs: what was kept, lost and why, the purity of the anchors, what the stages counted."""

from dataclasses import dataclass
from typing import Any

from pipeline.core import ontology
from pipeline.reporting import charts
from pipeline.reporting.inputs import SPLITS, SplitData, flat_scalars
from pipeline.reporting.run import Run, class_names
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import Cell, Row, Table, count, words


@dataclass(frozen=True)
class Data:
    """Both splits, the summaries of the stages (None: not run), and the bounds below which a class is named."""

    splits: list[SplitData]
    summaries: dict[str, dict[str, Any] | None]
    min_targets: int
    max_lost: float


class Section(Base[Data]):
    """The data of the run."""

    title = "Data"
    place = 80
    template = """\
{{ counts.html }}
{% if quarantined.rows %}<h3>Quarantined clips</h3>
{{ quarantined.html }}{% endif %}
{% for split in splits %}
{% if split.without_anchors %}
<h3>{{ split.name }}: classes left without anchors</h3><p>{{ split.without_anchors | join(", ") }}</p>
{% endif %}
{% if split.thin.rows %}
<h3>{{ split.name }}: classes with little behind them</h3>
<p class="muted">Fewer than {{ min_targets }} distinct targets, or more than {{ "%g" | format(100 * max_lost) }} % of
the clips lost on the way from the metadata to the anchors.</p>
{{ split.thin.html }}
{% endif %}
{% if split.without_pairs %}
<h3>{{ split.name }}: classes with anchors but without pairs</h3><p>{{ split.without_pairs | join(", ") }}</p>
{% endif %}
{% endfor %}
<h3>Purity of the anchors</h3>
<p class="muted">1 minus the detector's highest score for another of its classes in the same window.</p>
{{ drawings.purity }}
<h3>What the stages counted</h3>
{% for name, summary in summaries.items() if summary is not none %}
<details><summary>{{ name }}</summary><dl class="facts">{% for key, text in summary.items() %}<dt>{{ key }}</dt>\
<dd>{{ text }}</dd>{% endfor %}</dl></details>
{% endfor %}
{% if not_run %}<p class="muted">Not run: {{ not_run | join(", ") }}.</p>{% endif %}"""

    def read(self, run: Run) -> Data:
        """Read both splits, and the summaries of all stages but the report."""
        summaries = {name: run.summary(name) for name in stage_names(run)}
        return Data(run.splits, summaries, run.settings.report.min_targets, run.settings.report.max_lost)

    def metrics(self, data: Data) -> dict[str, int | float]:
        """Counts of both splits."""
        return {key: value for split in data.splits for key, value in split.metrics().items()}

    def drawings(self, data: Data, metrics: Metrics) -> dict[str, Drawing]:
        """The purity of the anchors."""
        purity = {split.split: split.purity for split in data.splits if split.purity is not None}
        return {"purity": Drawing(charts.purity_chart(purity), "Purity of the anchors")}

    def context(self, data: Data, metrics: Metrics) -> dict[str, Any]:
        """Tables of counts and lists of classes."""
        splits = [
            {
                "name": split.split,
                "without_anchors": class_names(split.classes_without_anchors),
                "without_pairs": class_names(split.classes_without_pairs),
                "thin": thin_table(split, data.min_targets, data.max_lost),
            }
            for split in data.splits
        ]
        return {
            "counts": count_table(data.splits),
            "quarantined": quarantine_table(data.splits),
            "splits": splits,
            "min_targets": data.min_targets,
            "max_lost": data.max_lost,
            "summaries": {n: None if s is None else flat_scalars(s) for n, s in data.summaries.items()},
            "not_run": [name for name, summary in data.summaries.items() if summary is None],
        }


def stage_names(run: Run) -> list[str]:
    """Names of the summaries that the stages of this params.yaml leave, in the order of the graph."""
    blind = run.settings.blind
    names = [f"resample_{split}" for split in SPLITS] + ["sed", "pretrain_mae"]
    names += [f"{stage}_{split}" for stage in ("mine_anchors", "pairs") for split in SPLITS]
    names += [f"evaluate_{model}" for model in run.models]
    names += [f"probe_{model}" for model in run.models if run.probe(model) is not None]
    names += ["index_music"] if run.summary("index_music") is not None else []
    names += ["pretrain_performer"] if any(entry.get("pretrained") for entry in blind.values()) else []
    return names + [f"evaluate_mixit_{name}" for name in blind]


def count_table(splits: list[SplitData]) -> Table:
    """A row for each split: clips, anchors, classes, pairs."""
    columns = ["Split", "Clips listed", "no audio", "quarantined", "kept", "Anchors", "Classes with anchors", "without"]
    rows = []
    for split in splits:
        without = None if split.classes_without_anchors is None else len(split.classes_without_anchors)
        clips = (split.clips_listed, split.clips_missing, split.clips_quarantined, split.clips_kept)
        numbers = (*clips, split.anchors, split.classes_with_anchors, without, split.pairs)
        rows.append(Row(words(split.split, *map(count, numbers))))
    return Table([*columns, "Pairs"], rows)


def quarantine_table(splits: list[SplitData]) -> Table:
    """A row for each reason why clips were put aside."""
    rows = [
        Row([*words(split.split, r.reason, count(r.count)), Cell(", ".join(r.clip_ids), code=True)])
        for split in splits
        for r in split.reasons
    ]
    return Table(["Split", "Reason", "Clips", "For example"], rows, n_text=-1)


def thin_table(split: SplitData, min_targets: int, max_lost: float) -> Table:
    """A row for each class of the split that the results rest on too little for."""
    names = {c.mid: c.name for c in ontology.classes()}
    rows = [
        Row(words(names.get(c.mid, c.mid), *map(count, (c.clips, c.anchors, c.targets))))
        for c in split.thin_classes(min_targets=min_targets, max_lost=max_lost)
    ]
    return Table(["Class", "Clips listed", "Anchors", "Distinct targets"], rows)
