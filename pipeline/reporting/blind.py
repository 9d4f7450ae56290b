"""What the stages have left of each separator without queries: its numbers, and whether they can be trusted.

Scores of mixtures of mixtures alone do not show separation. A mixture of mixtures given in equal shares to every output
is worth about 3 dB of SNR; and a model may add its outputs up to the mixtures without a source among them. Hence the
row that does nothing, the scores of stems, and the alarm.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.runtime import read_json
from pipeline.reporting.scores import NAME
from pipeline.reporting.tables import DASH, db

OUT_OF_MEMORY = "out of memory"
ISOLATED = "from isolated sources"
WHOLE = {"music": "full mixes", "clips": "as they are"}  # by data

# The overlap of the masks tells the optimum without separation (about 0.67) from the one with it (about 0.05), where
# the loss is the same for both.
ALARM_OVERLAP = 0.5
ALARM_ABOVE_DB = 3.0
IDLE_ABOVE_DB = 1.0


@dataclass(frozen=True)
class BlindResult:
    """One separator without queries, and what its stages have left. `status` is None where it was not evaluated."""

    name: str
    architecture: str
    data: str  # music | clips
    seconds: float | None  # of a segment
    pretrained: bool
    diversity: float
    sparsity: float
    sparsity_form: str
    signature: str  # the entry but for its length: those with one signature make a line of the charts
    status: str | None = None  # ok | out_of_memory
    numbers: dict[str, int | float] = field(default_factory=dict)  # as in metrics.json, without the prefix
    examples: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, int | float] = field(default_factory=dict)
    tested_seconds: float | None = None  # where it was trained on several lengths: the one of its numbers
    several: str = ""  # what it was trained and tested on, where `seconds` is not one length
    untried: bool = False  # memory ran out in the pretraining that it needs
    subsets: bool = False  # it learnt from sums of isolated sources, not from recordings as they are

    @property
    def segment(self) -> str:
        """The length of its segments as text."""
        return self.several or (DASH if self.seconds is None else f"{self.seconds:g} s")

    @property
    def length(self) -> float | None:
        """Seconds of the segments that its numbers are of."""
        return self.seconds or self.tested_seconds

    @property
    def mixtures(self) -> str:
        """Mixtures that it learnt from."""
        return f"{self.data}, {ISOLATED if self.subsets else WHOLE.get(self.data, DASH)}"

    @property
    def extras(self) -> str:
        """Terms that it was trained with besides the MixIT loss, if any."""
        terms = ["pretrained"] if self.pretrained else []
        terms += [f"diversity {self.diversity:g}"] if self.diversity > 0 else []
        terms += [f"sparsity {self.sparsity:g} ({self.sparsity_form})"] if self.sparsity > 0 else []
        return ", ".join(terms) or "MixIT alone"

    @property
    def above(self) -> float | None:
        """SNR above doing nothing, in dB."""
        if "snr" not in self.numbers or "do_nothing_snr" not in self.numbers:
            return None
        return self.numbers["snr"] - self.numbers["do_nothing_snr"]

    @property
    def alarm(self) -> bool | None:
        """Whether it likely solves the task without separating; None where its numbers do not show that."""
        if self.above is None or "overlap" not in self.numbers:
            return None
        return self.numbers["overlap"] > ALARM_OVERLAP and self.above > ALARM_ABOVE_DB

    @property
    def idle(self) -> bool:
        """Whether it is not clearly better than doing nothing."""
        return self.above is not None and self.above < IDLE_ABOVE_DB

    @property
    def untrainable(self) -> bool:
        """Whether memory ran out in its own training, and not only in evaluation."""
        return self.status == "out_of_memory" and not self.numbers.get("steps") and not self.untried

    @property
    def why(self) -> str:
        """Why it has no scores."""
        if self.status != "out_of_memory":
            return "not evaluated"
        return f"{OUT_OF_MEMORY} in pretraining" if self.untried else OUT_OF_MEMORY

    @property
    def flag(self) -> str:
        """A word of warning for the tables, or nothing."""
        return "likely spurious optimum" if self.alarm else "not above doing nothing" if self.idle else ""

    @property
    def process_peak(self) -> int | float | None:
        """Peak memory in bytes of the training where it is known, else of the whole stage."""
        return self.timing.get("training_peak_rss_bytes") or self.timing.get("peak_rss_bytes") or None

    def metrics(self) -> dict[str, int | float]:
        """The numbers for metrics.json: mixit.<name>.<what>; what is undefined or was not measured is left out."""
        if self.status is None:
            return {}
        numbers: dict[str, int | float] = {**self.numbers, "out_of_memory": int(self.status == "out_of_memory")}
        if self.alarm is not None:
            numbers["alarm"] = int(self.alarm)
        return {f"mixit.{self.name}.{key}": value for key, value in numbers.items()}


def read_results(
    summaries: Path,
    params: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, Mapping[str, int | float]],
    intervals: Mapping[str, Mapping[str, float]],
) -> list[BlindResult]:
    """Results of the entries of `mixit_music:` and `mixit_clips:`, each with its `data`, in their order.

    `intervals` are those of mixit_intervals.py, by entry. ValueError where the name of an entry cannot be a file's.
    """
    results = []
    for name, entry in params.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"an entry may be named with letters, digits, _ and -: not {name!r}")
        path = summaries / f"evaluate_mixit_{name}.json"
        summary = read_json(path) if path.is_file() else {}
        results.append(_result(name, entry, summary, dict(timings.get(f"train_mixit@{name}", {}))))
        # Trained on several lengths: once more for each of the others that it was tested at.
        for shorter in summary.get("shorter", []):
            shown = {**summary, "moms": None, "stems": None, "masks": None, "pairs": None, **shorter, "examples": []}
            results.append(_result(f"{name}@{shorter['segment_seconds']:g}s", entry, shown, {}))
    return [replace(result, numbers=_with(result.numbers, intervals.get(result.name, {}))) for result in results]


def _with(numbers: Mapping[str, int | float], intervals: Mapping[str, float]) -> dict[str, int | float]:
    """The numbers, and the ends of the intervals of those that are there."""
    known = {key: end for key, end in intervals.items() if re.sub(r"_ci_(lo|hi)$", "", key) in numbers}
    return {**numbers, **known}


def _result(
    name: str, entry: Mapping[str, Any], summary: Mapping[str, Any], timing: dict[str, int | float]
) -> BlindResult:
    known = {**entry, **summary}  # what was evaluated outweighs what params.yaml says now
    untried = summary.get("pretraining") == "out_of_memory"
    trained = known.get("trained_seconds") or known.get("segment_seconds")
    lengths = trained if isinstance(trained, list) else [] if trained is None else [trained]
    several = ""
    if len(lengths) > 1:
        several = " and ".join(f"{length:g}" for length in lengths) + " s"
        several += f", tested at {summary['segment_seconds']:g} s" if summary else ""
    return BlindResult(
        name,
        str(known.get("architecture", DASH)),
        str(known.get("data", DASH)),
        float(lengths[0]) if len(lengths) == 1 else None,
        bool(known.get("pretrained", False)),
        float(known.get("diversity", 0.0)),
        float(known.get("sparsity", 0.0)),
        str(known.get("sparsity_form", "report")),
        json.dumps(
            {key: entry[key] for key in sorted(entry) if key != "segment_seconds" or len(lengths) > 1}, default=str
        ),
        summary.get("status"),
        _numbers(summary),
        list(summary.get("examples") or []),
        {} if untried else timing,  # which is of no training
        float(summary["segment_seconds"]) if several and summary else None,
        several,
        untried,
        # Summaries from before there was a choice are all of sums.
        (summary if summary else entry).get("mixtures", "subsets") == "subsets",
    )


def _numbers(summary: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a summary, flat; what is null or not finite is undefined and left out."""
    numbers: dict[str, Any] = {key: summary.get(key) for key in ("n_parameters", "n_sources", "steps", "sample_rate")}
    for part, prefix in (("moms", ""), ("stems", "stem_"), ("masks", ""), ("pairs", "pairs_")):
        for key, value in (summary.get(part) or {}).items():
            numbers[f"n_{part}" if key == "n" else f"{prefix}{key}"] = value
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def read_pretraining(summary: Mapping[str, Any] | None) -> dict[str, int | float]:
    """The finite scalars of the summary of stage pretrain_performer; empty where it was not run.

    Where memory ran out in it, that is the one number.
    """
    if summary is None:
        return {}
    if summary.get("status") == "out_of_memory":
        return {"out_of_memory": 1}
    numbers = {key: summary.get(key) for key in ("loss", "loss_untrained", "validation_loss")}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def alarms(results: Sequence[BlindResult]) -> list[str]:
    """A sentence for every separator that likely solves the task without separating."""
    return [
        f"{result.name}: its masks overlap by {db(result.numbers['overlap'])}, and yet the MixIT SNR is "
        f"{db(result.above)} dB above doing nothing. Outputs that add up to both mixtures need not be sources: "
        "where both hold equally many, each output may be everything but one source, with its sign turned."
        for result in results
        if result.alarm
    ]


def idlers(results: Sequence[BlindResult]) -> list[str]:
    """A sentence for every separator that is not clearly better than doing nothing."""
    return [
        f"{result.name}: its MixIT SNR of {db(result.numbers['snr'])} dB is not {IDLE_ABOVE_DB:g} dB above doing "
        f"nothing, which has {db(result.numbers['do_nothing_snr'])} dB."
        for result in results
        if result.idle
    ]
