"""What the report says of the separators that learn from mixtures of mixtures: the five tables of "Music Separation
Using Self-Supervised Learning" (below: the source report), ours beside its own, and what it did not measure.

Its tables cannot tell success from failure. A mixture of mixtures given in equal shares to every output is worth
about 3 dB of SNR; and a model may add its outputs up to the mixtures without a source among them. Hence the row that
does nothing, the stems, and the alarm.
"""

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from pipeline.core.runtime import read_json
from pipeline.reporting import charts, page, tables
from pipeline.reporting.published import figures
from pipeline.reporting.scores import NAME
from pipeline.reporting.tables import DASH

OUT_OF_MEMORY = "out of memory"
NOT_RUN = "(not run here)"
ITS_DATA = f"MoisesDB, {tables.ISOLATED}"  # sums of its stems

# Overlap of the masks tells the optimum without separation (about 0.67) from the one with it (about 0.05), where the
# loss is the same for both.
ALARM_OVERLAP = 0.5
ALARM_ABOVE_DB = 3.0
IDLE_ABOVE_DB = 1.0

MAX_EXAMPLES = 2  # of an entry
MAX_OUTPUTS = 4  # of an example, the loudest
EXCERPT_SECONDS = 2.0
WITHHELD = frozenset({"moisesdb"})  # music.source whose licence lets nobody pass anything on
_MARKUP_BYTES = 700  # of a panel around its sound


@dataclass(frozen=True)
class Entry:
    """One separator without queries, and what its stages have left. `status` is None where it was not evaluated."""

    name: str
    architecture: str
    data: str  # music | anchors
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
    untried: bool = False  # memory gave out in the pretraining that it needs

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
        """Sources that its training mixtures were made of."""
        return f"{self.data}, {tables.ISOLATED}"

    @property
    def auxiliary(self) -> bool:
        """Whether a loss besides MixIT's was used."""
        return self.diversity > 0 or self.sparsity > 0

    @property
    def extras(self) -> str:
        """Terms that it was trained with besides the MixIT loss, if any."""
        said = ["pretrained"] if self.pretrained else []
        said += [f"diversity {self.diversity:g}"] if self.diversity > 0 else []
        said += [f"sparsity {self.sparsity:g} ({self.sparsity_form})"] if self.sparsity > 0 else []
        return ", ".join(said) or "MixIT alone"

    @property
    def above(self) -> float | None:
        """SNR above doing nothing, in dB."""
        if "snr" not in self.numbers or "do_nothing_snr" not in self.numbers:
            return None
        return self.numbers["snr"] - self.numbers["do_nothing_snr"]

    @property
    def alarm(self) -> bool | None:
        """Whether it likely solves the task without separating; None where that cannot be told."""
        if self.above is None or "overlap" not in self.numbers:
            return None
        return self.numbers["overlap"] > ALARM_OVERLAP and self.above > ALARM_ABOVE_DB

    @property
    def idle(self) -> bool:
        """Whether it is not clearly better than doing nothing."""
        return self.above is not None and self.above < IDLE_ABOVE_DB

    @property
    def untrainable(self) -> bool:
        """Whether memory gave out in its own training, and not only in evaluation."""
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

    def metrics(self) -> dict[str, int | float]:
        """The numbers for metrics.json: mixit.<name>.<what>; what is undefined or was not measured is left out."""
        if self.status is None:
            return {}
        found: dict[str, int | float] = {**self.numbers, "out_of_memory": int(self.status == "out_of_memory")}
        if self.alarm is not None:
            found["alarm"] = int(self.alarm)
        return {f"mixit.{self.name}.{key}": value for key, value in found.items()}


@dataclass(frozen=True)
class Cell:
    """One cell of a table, its interval apart."""

    text: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()


@dataclass(frozen=True)
class Line:
    """One row: of our own entries, of the source report alone, or of what needs no model."""

    cells: list[Cell]
    kind: str = "ours"  # ours | report | baseline
    flag: str = ""


@dataclass(frozen=True)
class Table:
    """A table for page and markdown; the first `n_text` columns hold words, the others numbers."""

    title: str
    columns: list[str]
    n_text: int
    lines: list[Line]
    notes: list[str]


def read_entries(
    summaries: Path,
    params: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, Mapping[str, int | float]],
    intervals: Mapping[str, Mapping[str, float]],
) -> list[Entry]:
    """The entries of `mixit_music:` and `mixit_anchors:`, each with its `data`, in their order.

    `intervals` are those of mixit_intervals.py, by entry. ValueError where one's name cannot be a file's.
    """
    entries = []
    for name, entry in params.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"an entry may be named with letters, digits, _ and -: not {name!r}")
        path = summaries / f"evaluate_mixit_{name}.json"
        summary = read_json(path) if path.is_file() else {}
        entries.append(_entry(name, entry, summary, dict(timings.get(f"train_mixit@{name}", {}))))
        # Trained on several lengths: once more for each of the others that it was tested at.
        for shorter in summary.get("shorter", []):
            shown = {**summary, "moms": None, "stems": None, "masks": None, "pairs": None, **shorter, "examples": []}
            entries.append(_entry(f"{name}@{shorter['segment_seconds']:g}s", entry, shown, {}))
    return [
        replace(
            entry,
            numbers=entry.numbers
            | {
                key: value
                for key, value in intervals.get(entry.name, {}).items()
                if key.removesuffix("_ci_lo").removesuffix("_ci_hi") in entry.numbers
            },
        )
        for entry in entries
    ]


def _entry(name: str, entry: Mapping[str, Any], summary: Mapping[str, Any], timing: dict[str, int | float]) -> Entry:
    said = {**entry, **summary}  # what was evaluated speaks for itself
    untried = summary.get("pretraining") == "out_of_memory"
    trained = said.get("trained_seconds") or said.get("segment_seconds")
    lengths = trained if isinstance(trained, list) else [] if trained is None else [trained]
    several = ""
    if len(lengths) > 1:
        several = " and ".join(f"{length:g}" for length in lengths) + " s"
        several += f", tested at {summary['segment_seconds']:g} s" if summary else ""
    return Entry(
        name,
        str(said.get("architecture", DASH)),
        str(said.get("data", DASH)),
        float(lengths[0]) if len(lengths) == 1 else None,
        bool(said.get("pretrained", False)),
        float(said.get("diversity", 0.0)),
        float(said.get("sparsity", 0.0)),
        str(said.get("sparsity_form", "report")),
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
    )


def _numbers(summary: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a summary, flat; what is null or not finite is undefined and left out."""
    found: dict[str, Any] = {key: summary.get(key) for key in ("n_parameters", "n_sources", "steps", "sample_rate")}
    for part, prefix in (("moms", ""), ("stems", "stem_"), ("masks", ""), ("pairs", "pairs_")):
        for key, value in (summary.get(part) or {}).items():
            found[f"n_{part}" if key == "n" else f"{prefix}{key}"] = value
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def read_pretraining(summaries: Path) -> dict[str, int | float]:
    """The scalars that stage pretrain_performer left, finite ones; empty where it was not run.

    Where memory gave out in it, that is the one number.
    """
    path = summaries / "pretrain_performer.json"
    found = read_json(path) if path.is_file() else {}
    if found.get("status") == "out_of_memory":
        return {"out_of_memory": 1}
    numbers = {key: found.get(key) for key in ("loss", "loss_untrained", "validation_loss")}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def metrics(entries: Sequence[Entry], pretraining: Mapping[str, int | float]) -> dict[str, int | float]:
    """All of it that goes into metrics.json."""
    found: dict[str, int | float] = {f"pretrain_performer.{key}": value for key, value in pretraining.items()}
    for entry in entries:
        found |= entry.metrics()
    return found


# --------------------------------------------------------------------------------------------- warnings


def alarms(entries: Sequence[Entry]) -> list[str]:
    """A sentence for every entry that likely solves the task without separating."""
    return [
        f"{entry.name}: its masks overlap by {tables.db(entry.numbers['overlap'])}, and yet the MixIT SNR is "
        f"{tables.db(entry.above)} dB above doing nothing. Outputs that add up to both mixtures need not be sources: "
        "where both hold equally many, each output may be everything but one source, with its sign turned."
        for entry in entries
        if entry.alarm
    ]


def idlers(entries: Sequence[Entry]) -> list[str]:
    """A sentence for every entry that is not clearly better than doing nothing."""
    return [
        f"{entry.name}: its MixIT SNR of {tables.db(entry.numbers['snr'])} dB is not {IDLE_ABOVE_DB:g} dB above doing "
        f"nothing, which has {tables.db(entry.numbers['do_nothing_snr'])} dB."
        for entry in entries
        if entry.idle
    ]


# ----------------------------------------------------------------------------------------------- tables


def report_tables(entries: Sequence[Entry], pretraining: Mapping[str, int | float]) -> list[Table]:
    """All that the same inputs give again: tables 1, 3, 4 and 5, and what the source report did not measure."""
    performers = [entry for entry in entries if entry.architecture == "performer"]
    plain = [entry for entry in entries if not entry.auxiliary]
    printed = figures()["music"]
    return [
        _table_1(entries),
        _table_3([entry for entry in performers if not entry.auxiliary], pretraining),
        _auxiliary_table("Table 4: without auxiliary losses", plain, printed["table_4"], "MixIT alone", _TABLE_4_NOTES),
        _auxiliary_table(
            "Table 5: with auxiliary losses",
            [entry for entry in entries if entry.auxiliary],
            printed["table_5"],
            "diversity 0.1, sparsity 0.1",
            _TABLE_5_NOTES,
        ),
        _stem_table(entries),
    ]


_TABLE_4_NOTES = [
    "The source report has 3.87 at 10 s here and 3.52 for the same run in its Table 3. How it reckons overlaps and "
    "effective numbers it does not say.",
    "Overlap: mean cosine between two masks; identical masks have 1. N_E: how many outputs are in use, exp of the "
    'entropy of their shares of the energy; "energy of the mask" can be read as that of the mask or of the signal '
    "that it lets through, so both are given.",
]
_TABLE_5_NOTES = [
    "The source report finds that the losses help: its overlaps and effective numbers fall. Its SI-SNR rises at 5 s "
    "alone, from 3.16 to 3.32 dB, and falls at 10 s from 3.87 to 2.26.",
    "Its sparsity loss (report) is as low for copies of the mixture as for one active output: it rewards not "
    "separating. The ratio of norms (l1l2) does not.",
]


def _table_1(entries: Sequence[Entry]) -> Table:
    def key(entry: Entry) -> Hashable:
        # The source report's Performer of this table is the pretrained one: its Table 3 repeats the figures.
        alike = not entry.auxiliary and entry.pretrained == (entry.architecture == "performer")
        return (entry.architecture, entry.seconds) if alike else None

    def cells(entry: Entry) -> list[Cell]:
        return [
            *_said(entry.name, entry.architecture, entry.mixtures, entry.segment, entry.extras),
            _count(entry, "n_parameters"),
            *_measured(entry, "snr", "si_snr", "snr_above_do_nothing"),
        ]

    def nothing(name: str, of: Entry) -> list[Cell]:
        mixtures = (_cell(of, "do_nothing_snr"), _cell(of, "do_nothing_si_snr"))
        return [*_said(name, "equal shares", of.mixtures, of.segment, DASH, DASH), *mixtures, *_said("0.00", DASH)]

    notes = [
        "Doing nothing: every output is an equal share of the input. The best assignment makes of it about 3 dB of SNR "
        "and 0 dB of SI-SNR. The source report's column is headed SNR, its text says SI-SNR; the reference is not "
        "stated.",
        "Its Conv-TasNet is worse than doing nothing; the text gives it 3 to 4 dB in training, and far below 0 on what "
        "was held out. Its 3.52 at 30 s stands in its Table 3 for 10 s as well.",
    ]
    sizes = {
        name: sorted({int(e.numbers["n_parameters"]) for e in entries if e.architecture == name and _has_size(e)})
        for name in sorted({entry.architecture for entry in entries})
    }
    sizes = {name: found for name, found in sizes.items() if found}
    if len({size for found in sizes.values() for size in found}) > 1 and len(sizes) > 1:
        said = "; ".join(f"{name} {' and '.join(f'{n:,}' for n in found)}" for name, found in sizes.items())
        notes.append(
            f"The models differ in size ({said} parameters): what sets them apart is not the architecture alone."
        )
    steps = {e.name: int(e.numbers["steps"]) for e in entries if e.numbers.get("steps")}
    if len(set(steps.values())) > 1:
        said = ", ".join(f"{name} {n:,}" for name, n in steps.items())
        notes.append(f"They differ in training, too: {said} steps.")
    columns = ["Entry", "Architecture", "Data", "Segment", "Trained with", "Parameters", "MoM SNR", "MoM SI-SNR"]
    return Table(
        "Table 1: Conv-TasNet and Performer by segment length",
        [*columns, "SNR above doing nothing", "Source report"],
        5,
        _beside(
            entries,
            key,
            _by_architecture(figures()["music"]["table_1"]),
            cells,
            lambda at: [at[0], ITS_DATA, f"{at[1]:g} s", "pretrained" if at[0] == "performer" else "MixIT alone"],
            _do_nothing(entries, nothing),
        ),
        notes,
    )


def _has_size(entry: Entry) -> bool:
    return "n_parameters" in entry.numbers


def _do_nothing(
    entries: Sequence[Entry], cells: Callable[[str, Entry], list[Cell]]
) -> list[tuple[tuple[Any, ...], Line]]:
    """One row, `cells(name, entry)`, for every set of mixtures: entries of the same data, length and number of
    outputs share theirs.
    """
    groups: dict[tuple[str, float | None], dict[tuple[str, ...], list[Entry]]] = {}
    for entry in entries:
        if "do_nothing_snr" in entry.numbers:
            numbers = (str(_cell(entry, "do_nothing_snr")), str(_cell(entry, "do_nothing_si_snr")), _outputs(entry))
            groups.setdefault((entry.data, entry.length), {}).setdefault(numbers, []).append(entry)
    rows = []
    for (data, seconds), found in groups.items():
        for of in found.values():
            name = "doing nothing" + (f" ({', '.join(e.name for e in of)})" if len(found) > 1 else "")
            rows.append(((*_order(data, seconds), 2), Line(cells(name, of[0]), "baseline")))
    return rows


def cost_table(entries: Sequence[Entry]) -> Table:
    """Table 2, of what changes from run to run: for the page alone."""

    def cells(entry: Entry) -> list[Cell]:
        taken = entry.timing
        failed = entry.untrainable or entry.untried
        minutes = entry.why if failed else _fixed(taken.get("minutes_per_epoch"), 1)
        return _said(
            entry.name,
            entry.architecture,
            entry.mixtures,
            entry.segment,
            minutes,
            _fixed(taken.get("seconds_per_audio_hour"), 0),
            _gigabytes(taken.get("cuda_allocated_bytes")),
            _gigabytes(taken.get("cuda_reserved_bytes")),
            _gigabytes(_process_peak(taken)),
        )

    columns = ["Entry", "Architecture", "Data", "Segment", "Minutes per epoch", "s per hour of audio"]
    memory = ["GPU memory, allocated", "GPU memory, reserved", "Memory of the process"]
    return Table(
        "Table 2: time and memory of training",
        [*columns, *memory, "Source report, minutes per epoch"],
        4,
        _beside(
            entries,
            lambda e: None if e.auxiliary else (e.architecture, e.seconds),
            _by_architecture(figures()["music"]["table_2"]),
            cells,
            lambda at: [at[0], ITS_DATA, f"{at[1]:g} s"],
            [],
        ),
        [
            "Peaks of the whole training. The source report's minutes are of its own machine, and what an epoch holds "
            "is not said there: of a fixed corpus it should take a convolutional network the same time at any length. "
            "Seconds per hour of audio can be compared, where no other stage ran beside one of them.",
            "It says that training takes 20 to 30 % less time; its figures give 26, 21 and 18 %. That memory falls by "
            "up to 4 GB stands in no table. A Conv-TasNet of the usual 16-sample window needs 35 GiB for its batch of "
            "4 at 5 s already; that it ran up to 10 s and not at 30 s fits a window of about 2.5 ms.",
        ],
    )


def _table_3(entries: Sequence[Entry], pretraining: Mapping[str, int | float]) -> Table:
    def cells(entry: Entry) -> list[Cell]:
        return [
            *_said(entry.name, entry.mixtures, entry.segment, "yes" if entry.pretrained else "no"),
            *_measured(entry, "snr", "si_snr", "snr_above_do_nothing", "stem_si_snri"),
        ]

    def nothing(name: str, of: Entry) -> list[Cell]:
        mixtures = (_cell(of, "do_nothing_snr"), _cell(of, "do_nothing_si_snr"))
        return [*_said(name, of.mixtures, of.segment, DASH), *mixtures, *_said("0.00", "0.00", DASH)]

    notes = [
        "The source report trains 30 s only with pretraining and calls that a gain in memory. Initial weights do not "
        "change memory: another architecture or batch must have. At the lengths of both columns its pretraining costs "
        "0.94 to 1.19 dB."
    ]
    if "out_of_memory" in pretraining:
        notes.append(PRETRAINING_RAN_OUT)
    elif pretraining:
        names = {"loss": "loss", "loss_untrained": "untrained", "validation_loss": "validation"}
        said = ", ".join(f"{names[key]} {value:.4g}" for key, value in pretraining.items())
        notes.append(f"Pretraining of the Performer here, by what it fills in: {said}.")
    numbers = ["MoM SNR", "MoM SI-SNR", "SNR above doing nothing", "Stem SI-SNRi", "Source report"]
    return Table(
        "Table 3: the Performer without and with pretraining",
        ["Entry", "Data", "Segment", "Pretrained", *numbers],
        4,
        _beside(
            entries,
            lambda e: (e.pretrained, e.seconds),
            _by_architecture(figures()["music"]["table_3"]),
            cells,
            lambda at: [ITS_DATA, f"{at[1]:g} s", "yes" if at[0] else "no"],
            _do_nothing(entries, nothing),
        ),
        notes,
    )


def _auxiliary_table(
    title: str, entries: Sequence[Entry], printed: Mapping[int, Sequence[float]], trained: str, notes: Sequence[str]
) -> Table:
    def cells(entry: Entry) -> list[Cell]:
        return [
            *_said(entry.name, entry.architecture, entry.mixtures, entry.segment, entry.extras),
            *_measured(entry, "si_snr", "overlap", "ne_mask", "ne_energy", "stem_si_snri"),
        ]

    def nothing(name: str, of: Entry) -> list[Cell]:
        # Equal shares: all masks are the same one, and all outputs are in use.
        used = _outputs(of)
        said = _said(name, "equal shares", of.mixtures, of.segment, DASH)
        return [*said, _cell(of, "do_nothing_si_snr"), *_said("1.00", used, used, "0.00", *[DASH] * 3)]

    numbers = ["MoM SI-SNR", "Overlap", "N_E of masks", "N_E of signals", "Stem SI-SNRi"]
    theirs = [f"Source report, {what}" for what in ("SI-SNR", "overlap", "effective masks")]
    return Table(
        title,
        ["Entry", "Architecture", "Data", "Segment", "Trained with", *numbers, *theirs],
        5,
        _beside(
            entries,
            lambda e: e.seconds if e.architecture == "performer" and not e.pretrained else None,
            printed,
            cells,
            lambda seconds: ["performer", ITS_DATA, f"{seconds:g} s", trained],
            _do_nothing(entries, nothing),
        ),
        list(notes),
    )


def _stem_table(entries: Sequence[Entry]) -> Table:
    measured = [entry for entry in entries if "n_stems" in entry.numbers]

    def nothing(name: str, of: Entry) -> list[Cell]:
        return _said(name, "equal shares", of.mixtures, of.segment, DASH, "0.00", *[DASH] * 5)

    rows = [
        (
            (*_order(entry.data, entry.seconds), 0, entry.architecture),
            Line(
                [
                    *_said(entry.name, entry.architecture, entry.mixtures, entry.segment),
                    _count(entry, "n_stems"),
                    *_measured(entry, "stem_si_snri", "stem_si_snr", "stem_sdr", "stem_sir", "stem_sar"),
                    _count(entry, "stem_n_undefined"),
                ],
                flag=entry.flag,
            ),
        )
        for entry in measured
    ]
    placed = [*rows, *_do_nothing(measured, nothing)]
    lines = [line for _, line in sorted(placed, key=lambda row: row[0])]
    return Table(
        "What the source report did not measure: the stems",
        ["Entry", "Architecture", "Data", "Segment", "n", "SI-SNRi", "SI-SNR", "SDR", "SIR", "SAR", "Undefined"],
        4,
        lines,
        [
            "Of single mixtures, against their true stems. Each output is given to the stem that it helps most, for "
            "which the stems must be known: an upper bound. SI-SNRi is what is gained over the mixture itself, so that "
            "doing nothing has 0."
        ],
    )


def _by_architecture(printed: Mapping[Any, Mapping[int, float | str]]) -> dict[tuple[Any, int], list[float | str]]:
    """A table of published.yaml by (row, seconds), in the order of its lengths."""
    lengths = sorted({seconds for row in printed.values() for seconds in row})
    return {(name, seconds): [printed[name][seconds]] for seconds in lengths for name in printed}


def _beside(
    entries: Sequence[Entry],
    key: Callable[[Entry], Hashable],
    printed: Mapping[Any, Sequence[float | str]],
    cells: Callable[[Entry], list[Cell]],
    known: Callable[[Any], list[str]],
    more: Sequence[tuple[tuple[Any, ...], Line]],
) -> list[Line]:
    """Our rows, each with the source report's figures for the same, and the rest of its rows, by data and length.

    `key` says which figures an entry is held against: None, and every entry not of music or trained on several
    lengths, against none. `known` gives the words of a row that is the source report's alone.
    """
    keys = [key(entry) if entry.data == "music" and entry.seconds is not None else None for entry in entries]
    width = len(next(iter(printed.values())))
    texts = {at: _said(*(x if isinstance(x, str) else tables.db(x) for x in row)) for at, row in printed.items()}
    ours = [[*cells(entry), *texts.get(at, _said(*[DASH] * width))] for entry, at in zip(entries, keys, strict=True)]
    n_columns = len(cells(_NOBODY)) + width
    rows = list(more)
    for entry, row in zip(entries, ours, strict=True):
        rows.append(((*_order(entry.data, entry.seconds), 0), Line(row, flag=entry.flag)))
    for at, figures_of in texts.items():
        if at not in keys:
            said = _said(NOT_RUN, *known(at))
            said += _said(*[DASH] * (n_columns - len(said) - width))
            seconds = at[-1] if isinstance(at, tuple) else at
            rows.append(((*_order("music", float(seconds)), 1), Line([*said, *figures_of], "report")))
    return [line for _, line in sorted(rows, key=lambda row: row[0])]


_NOBODY = Entry("", "", "", None, False, 0.0, 0.0, "", "")  # whose row has as many cells as any


def _order(data: str, seconds: float | None) -> tuple[Any, ...]:
    return (data != "music", data, math.inf if seconds is None else seconds)


def _said(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def _cell(entry: Entry, key: str) -> Cell:
    return Cell(tables.db(entry.numbers.get(key)), tables.interval(entry.numbers, key))


def _measured(entry: Entry, *keys: str) -> list[Cell]:
    """The numbers, or why there are none."""
    if entry.status == "ok":
        return [_cell(entry, key) for key in keys]
    return _said(entry.why, *[DASH] * (len(keys) - 1))


def _count(entry: Entry, key: str) -> Cell:
    return Cell(page.count(entry.numbers.get(key)))


def _fixed(value: int | float | None, digits: int) -> str:
    return DASH if value is None else f"{value:,.{digits}f}"


def _outputs(entry: Entry) -> str:
    """How many outputs it has, written as an effective number of them."""
    return _fixed(entry.numbers.get("n_sources"), 2)


def _process_peak(timing: Mapping[str, int | float]) -> int | float | None:
    """Peak memory of the training where it is known, else of the whole stage."""
    return timing.get("training_peak_rss_bytes") or timing.get("peak_rss_bytes") or None


def _gigabytes(value: int | float | None) -> str:
    return DASH if value is None else f"{value / 1e9:.2f} GB"


INTRODUCTION = (
    "These separators have no query and learn from mixtures of mixtures (MixIT, Wisdom et al. 2020). The mixtures are "
    f"added up {tables.ISOLATED}, stems or anchors, which stay hidden in training: nothing here was learnt from "
    "recordings of several sources at once. MoM SNR and SI-SNR are of such test mixtures: the outputs are sorted into "
    "the two mixtures in the way that fits best. dB, means over the mixtures; in brackets the 95 % interval. The last "
    'columns hold the figures of "Music Separation Using Self-Supervised Learning", beside entries of music alone.'
)
PRETRAINING_RAN_OUT = (
    "Pretraining of the Performer here: out of memory. The entries that need it were not trained; whether they would "
    "have fitted is not known. To try again: dvc repro -s --force pretrain_performer, then dvc repro."
)
GENERATED = "The music is generated by rule: the numbers are not comparable with any on recordings."


def markdown(entries: Sequence[Entry], shown: Sequence[Table], source: str | None) -> str:
    """mixit.md: every table but that of time and memory, which changes from run to run."""
    lines = ["# Unsupervised separators", ""]
    if all(entry.status is None for entry in entries):
        return "\n".join([*lines, "None was evaluated."]) + "\n"
    lines += [tables.escape(INTRODUCTION)]
    if source == "synthetic_stems":
        lines += ["", GENERATED]
    for text in alarms(entries):
        lines += ["", f"**Warning: likely spurious optimum.** {tables.escape(text)}"]
    for text in idlers(entries):
        lines += ["", f"**Not above doing nothing.** {tables.escape(text)}"]
    for table in shown:
        rows = [
            [f"{line.cells[0]} ({line.flag})" if line.flag else str(line.cells[0]), *map(str, line.cells[1:])]
            for line in table.lines
        ]
        lines += ["", f"## {table.title}", ""]
        lines += tables.markdown_table(table.columns, rows) if rows else ["No entry."]
        lines += ["", *(f"- {tables.escape(note)}" for note in table.notes)]
    lines += ["", "Table 2, time and memory, changes from run to run: it is in report.html."]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------- charts


def _series(entries: Sequence[Entry]) -> dict[str, str]:
    """A label for every signature, different ones for different signatures."""
    several = len({entry.data for entry in entries}) > 1
    labels: dict[str, str] = {}
    for entry in entries:
        label = ", ".join([entry.architecture, *([entry.data] if several else []), entry.extras])
        if entry.signature not in labels:
            labels[entry.signature] = f"{label} ({entry.name})" if label in labels.values() else label
    return labels


def length_drawing(entries: Sequence[Entry]) -> str:
    """Draw what the stems gain, and MoM SNR above doing nothing, against the length of the segments."""
    labels = _series(entries)
    panels = {}
    for title, key in (
        ("stem SI-SNRi, dB", "stem_si_snri"),
        ("MoM SNR above doing nothing, dB", "snr_above_do_nothing"),
        ("MoM SI-SNR, dB", "si_snr"),
    ):
        panels[title] = [
            charts.Point(
                labels[entry.signature],
                entry.length,
                entry.numbers[key],
                entry.numbers.get(f"{key}_ci_lo"),
                entry.numbers.get(f"{key}_ci_hi"),
            )
            for entry in entries
            if entry.length is not None and key in entry.numbers
        ]
    return charts.length_chart(panels)


def memory_drawing(entries: Sequence[Entry]) -> str:
    """Peak memory of training against the length of the segments: of the GPU where one was used."""
    labels = _series(entries)
    on_gpu = any(entry.timing.get("cuda_allocated_bytes") for entry in entries)
    points = []
    for entry in entries:
        peak = entry.timing.get("cuda_allocated_bytes") if on_gpu else _process_peak(entry.timing)
        peak = None if entry.untrainable else peak
        if entry.seconds is not None and (peak or entry.untrainable):
            points.append(charts.Point(labels[entry.signature], entry.seconds, peak / 1e9 if peak else None))
    return charts.length_chart({f"{'GPU memory allocated' if on_gpu else 'memory of the process'}, GB": points})


def read_curves(summaries: Path, entries: Sequence[Entry]) -> dict[str, pd.DataFrame]:
    """The training curves that are there and not empty, by entry."""
    paths = {entry.name: summaries / f"train_mixit_{entry.name}.csv" for entry in entries}
    curves = {name: pd.read_csv(path) for name, path in paths.items() if path.is_file()}
    return {name: curve for name, curve in curves.items() if not curve.empty}


# --------------------------------------------------------------------------------------------- examples


def read_examples(scores: Path, entries: Sequence[Entry], budget: int) -> tuple[list[page.Excerpt], int]:
    """Examples whose data URIs fit into `budget` bytes, and how many did not.

    The first of every entry goes before the second of any. `scores` holds a folder per entry.
    """
    offered = [(entry, rank, item) for entry in entries for rank, item in enumerate(entry.examples[:MAX_EXAMPLES])]
    offered = [offer for offer in offered if (scores / offer[0].name / "examples").is_dir()]
    found: list[tuple[int, page.Excerpt]] = []
    spent = 0
    for entry, _, item in sorted(offered, key=lambda offer: offer[1]):
        excerpt = _excerpt(scores / entry.name / "examples", entry, item)
        spent += sum(len(sound.audio) + len(sound.image) + _MARKUP_BYTES for sound in excerpt.sounds)
        if spent > budget:
            break
        found.append((entries.index(entry), excerpt))
    return [excerpt for _, excerpt in sorted(found, key=lambda item: item[0])], len(offered) - len(found)


def _excerpt(folder: Path, entry: Entry, item: Mapping[str, Any]) -> page.Excerpt:
    """The loudest seconds of the mixture, and the outputs that are loudest over the whole of it."""
    files = item["files"]
    outputs = [name for name in files if name != "mixture"]
    levels = dict(zip(outputs, item.get("outputs_db") or [], strict=False))
    outputs = sorted(outputs, key=lambda name: -_level(levels.get(name)))[:MAX_OUTPUTS]
    waveforms = []
    for name in ("mixture", *outputs):
        waveform, rate = soundfile.read(folder / Path(files[name]).name, dtype="float32")
        waveforms.append((name, waveform))
    n_samples = min(len(waveforms[0][1]), round(EXCERPT_SECONDS * rate))
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveforms[0][1], dtype=np.float64))])
    starts = np.arange(0, len(waveforms[0][1]) - n_samples + 1, max(1, rate // 10))
    start = int(starts[np.argmax(energy[starts + n_samples] - energy[starts])])
    sounds = page.panels(
        [
            (
                name.replace("-", " "),
                f"{tables.db(_relative_db(waveform, waveforms[0][1]), signed=True)} dB" if name != "mixture" else "",
                waveform[start : start + n_samples],
            )
            for name, waveform in waveforms
        ],
        rate,
    )
    return page.Excerpt(entry.name, str(item["name"]), start / rate, n_samples / rate, rate / 2000, sounds)


def _level(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def _relative_db(waveform: Any, mixture: Any) -> float | None:
    """Level of an output to that of the mixture; None where one of them is silent."""
    power, of_mixture = (float(np.mean(np.square(w, dtype=np.float64))) for w in (waveform, mixture))
    return 10 * math.log10(power / of_mixture) if power > 0 and of_mixture > 0 else None
