"""The scores behind a table over training seeds, kept beside it: scores.parquet and params.yaml in the table's folder.

A table that nobody can make again cannot be checked. One row per seed, model and pair of the average query, numbers as
float32 (1e-6 dB): 1,000 pairs of nine models and three seeds take about a megabyte.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.runtime import write_atomic
from pipeline.evaluation.columns import KEYS
from pipeline.reporting.scores import AVERAGE

SCORES, PARAMS = "scores.parquet", "params.yaml"
_EQUIVALENT = b"equivalent"


def keep(
    runs: Mapping[int, Mapping[str, pd.DataFrame]], folder: Path, params: Path, equivalent: Sequence[tuple[str, str]]
) -> None:
    """Write <folder>/scores.parquet of seed -> model -> scores, and a copy of `params`, the runs' params.yaml.

    `equivalent` are the pairs of models that the table compares besides; they are kept as well. The same runs give the
    same bytes. ValueError where there are no runs.
    """
    tables = [runs[seed][model].assign(seed=seed, model=model) for seed in sorted(runs) for model in sorted(runs[seed])]
    if not tables:
        raise ValueError("there are no runs to keep")
    table = pd.concat(tables, ignore_index=True).drop(columns="query")
    floats = table.select_dtypes("float64").columns
    table = table.astype(dict.fromkeys(floats, "float32"))
    first = ["seed", "model", *(key for key in KEYS if key in table)]
    table = table[[*first, *sorted(set(table.columns) - set(first))]].sort_values(["seed", "model", "pair"])
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({_EQUIVALENT: json.dumps([list(pair) for pair in equivalent])})
    buffer = pa.BufferOutputStream()
    pq.write_table(arrow, buffer, compression="zstd")
    write_atomic(folder / SCORES, buffer.getvalue().to_pybytes())
    if not (folder / PARAMS).is_file() or not params.samefile(folder / PARAMS):
        shutil.copyfile(params, folder / PARAMS)


def read_kept(folder: Path) -> tuple[dict[int, dict[str, pd.DataFrame]], list[tuple[str, str]]]:
    """(seed -> model -> scores, the pairs of models that the table compares besides), as `keep` wrote them.

    ValueError where the folder lacks one of the two files, or scores.parquet is another's.
    """
    for name in (SCORES, PARAMS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: its table was made without, and cannot be made again from it")
    arrow = pq.read_table(folder / SCORES)
    metadata = arrow.schema.metadata or {}
    if _EQUIVALENT not in metadata or not {"seed", "model", "pair"} <= set(arrow.column_names):
        raise ValueError(
            f"{folder / SCORES} is not the scores of a table over seeds: `python -m pipeline seeds` writes those"
        )
    equivalent = [(a, b) for a, b in json.loads(metadata[_EQUIVALENT])]
    table = arrow.to_pandas()
    table = table.astype(dict.fromkeys(table.select_dtypes("float32").columns, "float64")).assign(query=AVERAGE)
    runs: dict[int, dict[str, pd.DataFrame]] = {}
    for key, rows in table.groupby(["seed", "model"], sort=True):
        seed, model = key
        runs.setdefault(int(seed), {})[str(model)] = rows.drop(columns=["seed", "model"]).reset_index(drop=True)
    return runs, equivalent
