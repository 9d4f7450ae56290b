"""What models and stages cost: parameters, multiply-accumulates, time, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reporting.run import Run
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import DASH, Row, Table, count, duration, fixed, gigabytes, words

Timings = Mapping[str, Mapping[str, int | float]]


@dataclass(frozen=True)
class Cost:
    """The models' config.json by name, the baseline's first, and the timings of all stages."""

    models: Sequence[str]
    configs: dict[str, dict[str, Any]]
    timings: Timings


class Section(Base[Cost]):
    """Sizes, times and memory."""

    title = "Cost"
    place = 90
    template = """\
{% if models.rows %}{{ models.html }}
<p class="muted">Multiply-accumulates of convolutions and matrix products, the encoder's included; transforms and norms
are not counted. The time of a training is that of processors, whatever else ran beside it;
of one that was interrupted, since it went on.</p>
{% endif %}
{% if stages.rows %}<details><summary>Time and memory of every stage</summary>{{ stages.html }}</details>
{% else %}<p>No stage has left its timing.</p>{% endif %}"""

    def read(self, run: Run) -> Cost:
        """Read sizes and timings."""
        configs = {model: config for model in run.models if (config := run.config(model)) is not None}
        return Cost(run.models, configs, run.timings)

    def context(self, data: Cost, metrics: Metrics) -> dict[str, Any]:
        """Tables of models and of stages."""
        return {"models": model_table(data), "stages": stage_table(data.timings)}


def model_table(data: Cost) -> Table:
    """A row per model with a config; multiply-accumulates are relative to the first model's."""
    first = data.configs.get(data.models[0], {}).get("macs")
    rows = []
    for model, config in data.configs.items():
        macs, taken = config.get("macs"), data.timings.get(f"train_separator@{model}", {})
        rows.append(
            Row(
                words(
                    model,
                    count(config.get("n_parameters")),
                    count(config.get("n_trainable")),
                    fixed(macs / 1e9 if macs else None, 2),
                    fixed(macs / first if macs and first else None, 2),
                    duration(taken.get("cpu_seconds")),
                    gigabytes(taken.get("cuda_allocated_bytes") or taken.get("peak_rss_bytes")),
                )
            )
        )
    columns = ["Model", "Parameters", "of them learning", "GMACs for 2 s", "to the first", "CPU time of training"]
    return Table([*columns, "Peak memory of training"], rows)


def stage_table(timings: Timings) -> Table:
    """A row per stage, and their sum."""
    rows = []
    for stage, taken in timings.items():
        peak = max(taken.get("peak_rss_bytes") or 0, taken.get("peak_rss_child_bytes") or 0) or None
        times = (duration(taken["seconds"]), duration(taken.get("cpu_seconds")))
        rows.append(Row(words(stage, *times, count(taken.get("threads")), gigabytes(peak))))
    if rows:
        totals = (
            duration(sum(taken.get(key, 0.0) for taken in timings.values())) for key in ("seconds", "cpu_seconds")
        )
        rows.append(Row(words("sum; stages may have run side by side", *totals, DASH, DASH)))
    return Table(["Stage (last run that succeeded)", "Time", "CPU time", "Threads", "Peak memory of a process"], rows)
