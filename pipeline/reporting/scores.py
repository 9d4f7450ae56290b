"""The scores of all models as one table, checked: every model on the same pairs, every pair there once."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.evaluation.columns import KEYS, PAIR

AVERAGE = "average"  # the query that a user has: the mean embedding of the class
WITH_INTERFERER = "average+interferer"  # of separators that also take the interferer's: the mean of its class
QUERIES = (AVERAGE, "oracle", WITH_INTERFERER)
NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a model: it names files
RECORDINGS = ["target_recording", "interferer_recording"]
SAME = [name for name in PAIR if name != "pair"]  # of a pair, for every model
REQUIRED = ["sdr_mixture", "sdr_half", "sdr", "sdri", "si_sdr_mixture", "si_sdr", "si_sdri"]
# How far two models' readings of the same mixture may lie apart: float32 sums on different devices.
TOLERANCE_DB = 0.01


def read_scores(scores: Path, models: Sequence[str], pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of scores/<model>/scores.parquet for each of `models`, in this order, with a `model` column.

    Sorted by model, query and pair; values in dB, NaN where undefined (an infinite one is undefined too).
    `pairs` is the evaluation manifest, where there is one: every model must have scored exactly its rows.
    ValueError, naming model and pair, where that does not hold or where two models disagree about a mixture.
    """
    if not models:
        raise ValueError(f"no model of params.yaml has scores under {scores}")
    tables = {model: _read(scores / model / "scores.parquet", model) for model in models}
    for model, table in tables.items():
        (query, rows), *rest = table.groupby("query", sort=True)
        for other, other_rows in rest:
            check_same_pairs(rows, other_rows, f"{model}, {query} query", f"{model}, {other} query")
        if pairs is not None:
            _check_manifest(rows, pairs, model)
    first, *others = models
    for model in others:
        check_same_pairs(_one_query(tables[first]), _one_query(tables[model]), first, model)
    return pd.concat([table.assign(model=model) for model, table in tables.items()], ignore_index=True)


def _read(path: Path, model: str) -> pd.DataFrame:
    if not NAME.fullmatch(model):
        raise ValueError(f"a model may be named with letters, digits, _ and -: not {model!r}")
    if not path.is_file():
        raise ValueError(f"{model} has no scores: {path} does not exist")
    table = pd.read_parquet(path)
    if missing := sorted(set(KEYS + REQUIRED) - set(table.columns)):
        older = "; it is of older code: `dvc repro` scores the pairs anew" if set(missing) & set(RECORDINGS) else ""
        raise ValueError(f"{path} lacks {', '.join(missing)}{older}")
    if table.empty:
        raise ValueError(f"{path} has no rows")
    if unknown := sorted(set(table["query"]) - set(QUERIES)):
        raise ValueError(f"{path}: no query {unknown[0]!r}; there are {list(QUERIES)}")
    numbers = [column for column in map(str, table) if column not in KEYS]  # REQUIRED, and other metrics of params.yaml
    for column in numbers:
        values = table[column].astype(float)
        table[column] = values.where(np.isfinite(values))
    table = table[KEYS + numbers].sort_values(["query", "pair"], kind="stable", ignore_index=True)
    twice = table.duplicated(["query", "pair"])
    if twice.any():
        row = table[twice].iloc[0]
        raise ValueError(f"{path} holds pair {row['pair']} with the {row['query']} query more than once")
    for metric in ("sdr", "si_sdr"):
        off = (table[f"{metric}i"] - (table[metric] - table[f"{metric}_mixture"])).abs() > TOLERANCE_DB
        if off.any():
            row = table[off].iloc[0]
            raise ValueError(
                f"{path}: pair {row['pair']} ({row['query']} query) improves its {metric} by "
                f"{row[f'{metric}i']:.2f} dB, yet goes from {row[f'{metric}_mixture']:.2f} to {row[metric]:.2f}"
            )
    return table


def _one_query(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first query: once all queries of a model are known to agree, it stands for them."""
    return table[table["query"] == table["query"].iloc[0]]


def _check_manifest(rows: pd.DataFrame, pairs: pd.DataFrame, what: str) -> None:
    """Hold the rows of one model and query against the evaluation manifest."""
    _same(set(pairs["pair"]), set(rows["pair"]), "the evaluation pairs", what)
    ours = rows.set_index("pair").loc[pairs["pair"]]
    for column in SAME:
        differs = ours[column].to_numpy() != pairs[column].to_numpy()
        if differs.any():
            at = int(np.argmax(differs))
            raise ValueError(
                f"{what}: pair {pairs['pair'].iloc[at]} has {column} {ours[column].iloc[at]}, "
                f"but {pairs[column].iloc[at]} in the evaluation pairs: the scores are of other pairs"
            )


def check_same_pairs(a: pd.DataFrame, b: pd.DataFrame, name_a: str, name_b: str) -> None:
    """ValueError, naming both, unless two tables of one query each are of the same pairs and mixtures."""
    a, b = a.set_index("pair"), b.set_index("pair")
    _same(set(a.index), set(b.index), name_a, name_b)
    b = b.loc[a.index]
    for column in SAME:
        differs = a[column].to_numpy() != b[column].to_numpy()
        if differs.any():
            at = a.index[int(np.argmax(differs))]
            raise ValueError(
                f"{name_a} and {name_b} were scored on different pairs: pair {at} has {column} "
                f"{a.loc[at, column]} and {b.loc[at, column]}"
            )
    differs = ~np.isclose(a["sdr_mixture"], b["sdr_mixture"], rtol=0, atol=TOLERANCE_DB, equal_nan=True)
    if differs.any():
        at = a.index[int(np.argmax(differs))]
        raise ValueError(
            f"{name_a} and {name_b} were scored on different mixtures: the input SDR of pair {at} is "
            f"{a.loc[at, 'sdr_mixture']:.3f} and {b.loc[at, 'sdr_mixture']:.3f} dB"
        )


def _same(a: set[int], b: set[int], name_a: str, name_b: str) -> None:
    if difference := sorted(a ^ b):
        shown = ", ".join(map(str, difference[:5])) + (", ..." if len(difference) > 5 else "")
        raise ValueError(
            f"{name_a} ({len(a)} pairs) and {name_b} ({len(b)} pairs) differ in {len(difference)} pairs: {shown}"
        )


def listed_models(scores: Path, params: Mapping[str, object]) -> tuple[list[str], list[str], list[str]]:
    """Names that `separators:` of params.yaml lists and that have scores, that have none, and scores of no entry.

    The order is that of params.yaml, whose first entry is the one the others are compared with. A folder
    left over from an entry since removed is not a model of this run.
    """
    found = {path.parent.name for path in scores.glob("[!.]*/scores.parquet")}  # .x.old is half a rename
    return [m for m in params if m in found], [m for m in params if m not in found], sorted(found - set(params))
