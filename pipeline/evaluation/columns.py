"""Columns of scores.parquet: the pair, the kind of query, what its mixture scores, and what an estimate scores."""

from collections.abc import Iterable

PAIR = {
    "pair": int,
    "class_index": int,
    "mid": str,
    "target_clip": str,
    "target_recording": str,
    "interferer_recording": str,
    "interferer_class_index": int,
}
KEYS = [*PAIR, "query"]  # what a row is of
MIXTURES = ("_mixture", "_half")  # ends of columns that no estimate has a part in


def of_estimates(columns: Iterable[str]) -> list[str]:
    """List the columns that score an estimate, in their order."""
    return [name for name in columns if name not in (*KEYS, "model") and not name.endswith(MIXTURES)]
