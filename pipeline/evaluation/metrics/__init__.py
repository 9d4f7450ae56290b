"""Metrics of an estimate, one family per file; the folder is the registry: `evaluate.metrics` names its files.

Each file defines `Metric(**options)`, a subclass of the class below. Values are in dB, one per estimate. Everything is
computed in float64, whatever the waveforms come in, and nothing removes the mean. What has no value is NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pipeline.core.config import Params, Size
from pipeline.core.registry import Registry, params_of

# A ratio beyond this is made of rounding errors, even in float64: it would be 150 dB on one machine, infinite on
# another. Clamping also keeps the mean of a class finite.
LIMIT_DB = 100.0


class Metric:
    """Base class of metrics: one or more columns of scores.parquet."""

    columns: Sequence[str]  # what a call returns; a column's name, in capitals, heads it in Table I
    gains: Sequence[str] = ()  # of these, the mixture's own value <column>_mixture and the gain <column>i are kept too

    def __init__(self) -> None: ...

    def __call__(
        self,
        estimates: Float[Tensor, "batch estimates time"],
        target: Float[Tensor, "batch time"],
        interferer: Float[Tensor, "batch time"],
    ) -> dict[str, Float[Tensor, "batch estimates"]]:
        """Score estimates of the target, which is mixed with the interferer; one entry per column, in dB."""
        raise NotImplementedError


REGISTRY = Registry(__name__, __file__, "metric")
names = REGISTRY.names


def options(name: str) -> type[Params]:
    """Make the Params class of a metric's options: the arguments of its constructor."""
    return params_of(f"evaluate.metrics.{name}", REGISTRY.module(name).Metric.__init__, given=(), size=Size)


def build(name: str, options: Mapping[str, Any]) -> Metric:
    """Build the Metric of `pipeline/evaluation/metrics/<name>.py`; ValueError for an option that it does not have."""
    try:
        metric: Metric = REGISTRY.module(name).Metric(**options)
    except TypeError as error:
        raise ValueError(f"options of metric {name!r}: {error}") from error
    return metric


def columns(metric: Metric) -> list[str]:
    """List the columns that a metric has in scores.parquet."""
    gained = {name: [f"{name}_mixture", name, f"{name}i"] for name in metric.gains}
    return [column for name in metric.columns for column in gained.get(name, [name])]
