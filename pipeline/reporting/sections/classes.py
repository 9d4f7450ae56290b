"""Each class by itself: a chart and a sortable table of SDRi."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.reporting import charts
from pipeline.reporting.headline import HALF_SDRI
from pipeline.reporting.run import Run, class_names
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.summary import per_class_csv


@dataclass(frozen=True)
class Classes:
    """A row per class, model and query, as of `statistics.summarise`; names of the classes without numbers."""

    per_class: pd.DataFrame
    without: list[str]


@dataclass(frozen=True)
class ClassRow:
    """One class of the sortable table; `cells` in the order of the columns, None where undefined."""

    class_index: int
    name: str
    n_pairs: int
    n_clips: int
    sdr_mixture: float | None
    cells: list["ClassCell | None"]


@dataclass(frozen=True)
class ClassCell:
    """Median SDRi of a class with its interval, and its bar: from where to where, in percent of the cell."""

    median: float
    low: float
    high: float
    bar_from: float
    bar_to: float


class Section(Base[Classes]):
    """Chart and table of the scores by class."""

    title = "Classes"
    place = 30
    template = """\
<p class="muted">SDRi of each class: the median over its pairs, with its 95 % interval. Half of the mixture, with
nothing separated, has {{ half | db }} dB: of a class that does not reach that line nothing was separated.</p>
{{ drawings.class_sdri }}
<p><input type="search" id="filter" placeholder="Find a class" aria-label="Find a class"></p>
<div class="scroll tall"><table id="class-table">
<thead><tr><th><button>Class</button></th><th class="n"><button>Pairs</button></th><th class="n"><button>Clips</button>
</th><th class="n"><button>Input SDR</button></th>
{% for title in titles %}<th class="n"><button>SDRi, {{ title }}</button></th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th>{{ row.name }}</th><td class="n">{{ row.n_pairs }}</td><td class="n">{{ row.n_clips }}</td>\
<td class="n">{{ row.sdr_mixture | db }}</td>
{% for c in row.cells %}{% if c is none %}<td class="n">{{ none | db }}</td>{% else %}
<td class="n b{{ " neg" if c.median < 0 }}" style="--from:{{ "%g" | format(c.bar_from) }}%;\
--to:{{ "%g" | format(c.bar_to) }}%">{{ c.median | db }} <i>[{{ c.low | db }}, {{ c.high | db }}]</i></td>\
{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if without %}
<h3>Classes that no number above includes</h3>
<p>No pairs in the eval split ({{ without | length }}): {{ without | join(", ") }}.</p>
{% endif %}"""

    def read(self, run: Run) -> Classes:
        """Read the scores by class."""
        evaluation = next(split for split in run.splits if split.split == "eval")
        return Classes(run.statistics.per_class, class_names(evaluation.without_pairs))

    def drawings(self, data: Classes, metrics: Metrics) -> dict[str, Drawing]:
        """SDRi of every class, beside that of doing nothing."""
        return {"class_sdri": Drawing(charts.class_chart(data.per_class, metrics.get(HALF_SDRI)), "SDRi by class")}

    def files(self, data: Classes, metrics: Metrics) -> dict[str, str | bytes]:
        """The numbers of every class."""
        return {"per_class.csv": per_class_csv(data.per_class)}

    def context(self, data: Classes, metrics: Metrics) -> dict[str, Any]:
        """The rows of the sortable table."""
        titles, rows = class_table(data.per_class)
        return {"half": metrics.get(HALF_SDRI), "titles": titles, "rows": rows, "without": data.without}


def class_table(per_class: pd.DataFrame) -> tuple[list[str], list[ClassRow]]:
    """Column titles and rows of the table of classes, from `statistics.summarise`'s per_class."""
    columns = list(dict.fromkeys(zip(per_class["model"], per_class["query"], strict=True)))
    several = len({model for model, _ in columns}) > 1
    titles = [f"{model}, {query}" if several else query for model, query in columns]
    medians = per_class["sdri_median"].dropna()
    low_end, high_end = min(0.0, medians.min()), max(0.0, medians.max())
    span = high_end - low_end or 1.0

    def cell(row: "pd.Series[Any]") -> ClassCell | None:
        median = float(row["sdri_median"])
        if pd.isna(median):
            return None
        ends = [round(100 * (end - low_end) / span, 1) for end in sorted((0.0, median))]
        return ClassCell(median, float(row["sdri_median_ci_lo"]), float(row["sdri_median_ci_hi"]), *ends)

    rows = []
    for index, group in per_class.groupby("class_index", sort=True):
        first = group.iloc[0]
        by_column = {(row["model"], row["query"]): row for _, row in group.iterrows()}
        rows.append(
            ClassRow(
                int(str(index)),
                str(first["class_name"]),
                int(first["n_pairs"]),
                int(first["n_clips"]),
                None if pd.isna(first["sdr_mixture_median"]) else float(first["sdr_mixture_median"]),
                [cell(by_column[column]) if column in by_column else None for column in columns],
            )
        )
    return titles, rows
