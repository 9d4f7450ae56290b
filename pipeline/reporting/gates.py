"""Gates: bounds on the numbers of metrics.json, from the `gate:` section of params.yaml.

Needs neither torch nor matplotlib, so that CI has its answer in under a second.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.config import Params


class Bound(Params):
    """The range a number may lie in, ends included. Leaving out an end leaves it open, hence the two defaults."""

    largest: ClassVar[float] = sys.float_info.max  # of metrics, some of which count operations

    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounds_something(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def __str__(self) -> str:
        ends = [f">= {self.min:g}" if self.min is not None else "", f"<= {self.max:g}" if self.max is not None else ""]
        return " and ".join(end for end in ends if end)


class GateParams(Params):
    """`gate:` in params.yaml: a key of metrics.json -> its bound."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Bound]

    @property
    def bounds(self) -> dict[str, Bound]:
        """The gates, in the order of params.yaml."""
        return dict(self.__pydantic_extra__)


@dataclass(frozen=True)
class Gate:
    """One bound held against one number; `value` is None where metrics.json lacks the key."""

    key: str
    bound: Bound
    value: int | float | None
    passed: bool
    why: str


def evaluate_gates(metrics: Mapping[str, int | float], bounds: Mapping[str, Bound]) -> list[Gate]:
    """Hold each bound against its number. A number that is not there does not pass."""
    gates = []
    for key, bound in bounds.items():
        value = metrics.get(key)
        if value is None:
            passed, why = False, "no such number in the metrics"
        elif bound.min is not None and value < bound.min:
            passed, why = False, f"{value:g} is below the minimum of {bound.min:g} by {bound.min - value:.3g}"
        elif bound.max is not None and value > bound.max:
            passed, why = False, f"{value:g} is above the maximum of {bound.max:g} by {value - bound.max:.3g}"
        else:
            passed, why = True, "within the bound"
        gates.append(Gate(key, bound, value, passed, why))
    return gates


def read_metrics(path: Path) -> dict[str, int | float]:
    """Read a flat metrics.json. Anything that is not finite numbers under string keys is refused, by name."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{path} holds {constant}, which is not JSON")

    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of numbers")
    for key, value in content.items():
        # 1e999 is valid JSON and reads as infinity; True is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path}: {key} is {value!r}, not a finite number")
    return content
