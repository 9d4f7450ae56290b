"""How the separators were trained: their curves, steps and batches."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.reporting import charts
from pipeline.reporting.inputs import read_curve
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base


@dataclass(frozen=True)
class Training:
    """Training curves by model, and a word on each model's training."""

    curves: dict[str, pd.DataFrame]
    notes: dict[str, str]


class Section(Base[Training]):
    """Training curves of the separators."""

    title = "Training"
    place = 45
    template = """\
{{ drawings.training }}
<ul class="muted">{% for model, text in notes.items() %}<li>{{ model }}: {{ text }}</li>{% endfor %}</ul>"""

    def read(self, run: Run) -> Training:
        """Read the curves of the models that were trained here (a published checkpoint has none)."""
        curves: dict[str, pd.DataFrame] = {}
        for model in run.models:
            curves |= read_curve(run.places.summaries / f"train_{model}.csv", model)
        return Training(curves, {model: _note(run, model, model in curves) for model in run.models})

    def drawings(self, data: Training, metrics: Metrics) -> dict[str, Drawing]:
        """The loss of every model."""
        return {"training": Drawing(charts.training_chart(data.curves), "Loss by training step")}

    def context(self, data: Training, metrics: Metrics) -> dict[str, Any]:
        """A word on each model's training."""
        return {"notes": data.notes}


def _note(run: Run, model: str, has_curve: bool) -> str:
    entry = run.settings.models[model]
    if entry.get("weights") is not None:
        return "published weights, not trained here"
    if not has_curve:
        return "no training curve was left"
    train = {**run.settings.document["train"], **entry.get("train", {})}
    return f"{train['steps']:,} steps of {train['batch_size']} mixtures"
