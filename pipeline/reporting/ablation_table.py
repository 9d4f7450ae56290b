"""The table of ablations: reports/ablations.csv, which `make ablations` writes, and what the report shows of it."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.reporting.run import baseline
from pipeline.reporting.scores import AVERAGE
from pipeline.reporting.tables import Cell, Row, Table, count, number

ABLATION_COLUMNS = (
    *("name", "setting", "sdri", "interval", "difference", "difference_interval"),
    *("difference_of_medians", "difference_of_medians_interval", "parameters", "why"),
)
DIFFERENCES = {"difference": "sdri_class_mean_mean", "difference_of_medians": "sdri_class_median_mean"}


def ablated(document: Mapping[str, Any]) -> str:
    """Name of the model that ablations change: the first entry of `mae_separators:` that has the settings `model:`."""
    entries = document["mae_separators"]
    return next((name for name, entry in entries.items() if entry["settings"] == "model"), "")


def ablation_row(
    name: str, setting: str, why: str, metrics: Mapping[str, int | float], document: Mapping[str, Any]
) -> dict[str, str]:
    """A line of the table from the metrics.json of one experiment; `document` is its params.yaml."""
    model, key = ablated(document), DIFFERENCES["difference"]
    prefix = f"{model}.{AVERAGE}."
    ours = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    versus = f"vs_{baseline(document)}."
    gain = {k.removeprefix(versus): v for k, v in ours.items() if k.startswith(versus)}
    level = number(ours, key)
    differences: dict[str, str] = {}
    for column, aggregate in DIFFERENCES.items():
        cell = number(gain, aggregate, signed=True)
        differences |= {column: cell.text, f"{column}_interval": cell.interval}
    parameters = metrics.get(f"{model}.n_parameters")
    return {
        "name": name,
        "setting": setting,
        "sdri": level.text,
        "interval": level.interval,
        **differences,
        "parameters": "" if parameters is None else count(parameters),
        "why": why,
    }


def as_it_stands(metrics: Mapping[str, int | float], document: Mapping[str, Any]) -> dict[str, str]:
    """The first line of the table: the run that the ablations are ablations of."""
    return ablation_row("as it stands", "", "", metrics, document)


def read_ablations(path: Path, metrics: Mapping[str, int | float], document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of ablations.csv as text; none where there is none for this run.

    A table whose first line is not what `metrics` say belongs to another run, of another profile or of other code.
    ValueError names the columns that an older one, or an empty file, lacks.
    """
    if not path.is_file():
        return []
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), restval="")
    missing = [column for column in ABLATION_COLUMNS if column not in (table.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; delete it, or make it anew: `make ablations`")
    rows = list(table)
    return rows if rows[:1] == [as_it_stands(metrics, document)] else []


def ablation_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """The rows of ablations.csv as a table."""
    titles = ["experiment", "setting", "SDRi", "difference", "difference of class medians", "parameters", "why"]
    return Table(
        titles,
        [
            Row(
                [
                    Cell(row["name"]),
                    Cell(row["setting"], code=True),
                    *(Cell(row[key], row[interval]) for key, interval in _NUMBERS),
                    *(Cell(row[key]) for key in ("parameters", "why")),
                ]
            )
            for row in rows
        ],
        n_text=-1,
    )


_NUMBERS = (("sdri", "interval"), *((key, f"{key}_interval") for key in DIFFERENCES))


def about(document: Mapping[str, Any]) -> str:
    """A sentence on what the table compares."""
    return (
        f"{ablated(document)} with one setting changed, average query, dB, mean over classes of the mean over pairs; "
        f"the differences are to {baseline(document)} of the same experiment, by that and by the class medians."
    )
