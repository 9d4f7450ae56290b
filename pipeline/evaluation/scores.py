"""The scores of estimates of pairs, pair by pair, as the table that scores.parquet holds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluation import metrics
from pipeline.evaluation.columns import PAIR
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.metrics.sdr import sdr


def schema(chosen: Sequence[Metric]) -> pa.Schema:
    """Columns of scores.parquet: the pair, the kind of query, and the metrics in dB, NaN where undefined.

    sdr_half is the SDR of half of the mixture: what can be had without separating anything.
    """
    scores = ["sdr_half", *(column for metric in chosen for column in metrics.columns(metric))]
    types = {name: pa.int64() if kind is int else pa.string() for name, kind in PAIR.items()} | {"query": pa.string()}
    return pa.schema(types | dict.fromkeys(scores, pa.float64()))


def score(
    estimates: Float[Tensor, "batch estimates time"],
    mixture: Float[Tensor, "batch time"],
    target: Float[Tensor, "batch time"],
    interferer: Float[Tensor, "batch time"],
    chosen: Sequence[Metric],
) -> dict[str, Float[np.ndarray, "batch estimates"]]:
    """Score every estimate, and the mixture taken as the estimate, by every metric: the columns of `schema`, in dB."""
    signals = torch.cat([estimates, mixture[:, None]], dim=1)
    scores = {"sdr_half": sdr(mixture / 2, target)[:, None].expand(estimates.shape[:2])}
    for metric in chosen:
        for name, value in metric(signals, target, interferer).items():
            scores[name] = value[:, :-1]
            if name in metric.gains:
                scores[f"{name}_mixture"] = value[:, -1:].expand_as(scores[name])
                scores[f"{name}i"] = scores[name] - scores[f"{name}_mixture"]
    return {name: value.cpu().numpy() for name, value in scores.items()}


def table(
    pairs: pa.Table, scores: Mapping[str, Float[np.ndarray, "pairs kinds"]], kinds: tuple[str, ...], columns: pa.Schema
) -> pa.Table:
    """Rows sorted by pair, pairs being sorted, and in it by kind of query in the order of `kinds`."""
    each = np.repeat(np.arange(len(pairs)), len(kinds))
    found = {key: pairs[key].take(each) for key in PAIR}
    found["query"] = pa.array(kinds * len(pairs))
    found |= {name: pa.array(values.reshape(-1)) for name, values in scores.items()}
    return pa.table([found[name] for name in columns.names], schema=columns)
