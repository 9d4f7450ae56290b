"""Table I, ours beside the paper's: the rows for the page and for table1.md, from the numbers of metrics.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

AVERAGE = "average"
MINUS, DASH = "\u2212", "\u2013"
HALF_MIXTURE = "half of the mixture, nothing separated"
ISOLATED = "from isolated sources"
UNSUPERVISED = f"MixIT {ISOLATED}, best assignment"
BEST_ASSIGNMENT = (
    f"{UNSUPERVISED}: the model learnt from mixtures that were added up from isolated sources (anchors, stems), not "
    "from recordings of several at once. It has no query, and of the ways to sort its outputs the one that fits the "
    "references best is taken. Nobody who separates has those: an upper bound, and no competitor of a query."
)


@dataclass(frozen=True)
class Row:
    """One system under one kind of query; `numbers` by the column's key, those unknown left out."""

    system: str
    query: str
    numbers: dict[str, int | float] = field(default_factory=dict)
    ours: bool = True


@dataclass(frozen=True)
class Comparison:
    """Something that makes our numbers comparable with the paper's, or not."""

    what: str
    ours: str
    paper: str

    @property
    def same(self) -> bool:
        """Whether there is nothing to hold against the comparison here."""
        return self.ours == self.paper


# Means first: with few pairs a class the median is biased, and its interval one-sided.
COLUMNS = {
    "sdri_class_mean_mean": "SDRi, mean of means",
    "si_sdri_class_mean_mean": "SI-SDRi, mean of means",
    "sdri_class_median_mean": "SDRi",
    "sdr_class_median_mean": "SDR",
    "si_sdri_class_median_mean": "SI-SDRi",
    "bss_sdr_class_median_mean": "BSS SDR",
    "bss_sir_class_median_mean": "BSS SIR",
    "bss_sar_class_median_mean": "BSS SAR",
    "n_pairs": "pairs",
    "n_classes": "classes",
}

SHARES = {
    "share_improved_3_db": "SDRi above 3 dB",
    "share_above_half": "better than half of the mixture",
    "share_si_sdri_above_0": "SI-SDRi above 0",
    "share_si_sdri_above_5_db": "SI-SDRi above 5 dB",
    "share_other_louder": "the interferer is the louder one (SIR below 0)",
}
"""Shares of the pairs, by their keys in metrics.json."""

ONE_TRAINING = (
    "One training each is no verdict: the intervals are over recordings. Another seed moves a difference by more, and "
    "so does the same seed on another kind of processor, whose sums differ in their last bits. "
    "python -m pipeline seeds gives intervals over trainings."
)


def our_rows(
    metrics: Mapping[str, int | float],
    models: Sequence[str],
    queries: Sequence[str],
    unsupervised: Sequence[str] = (),
) -> list[Row]:
    """One row per model and query that has numbers, in this order; those of the separators without queries
    that were scored on the same pairs; then what half of the mixture scores.
    """
    rows = []
    for model in models:
        for query in queries:
            prefix = f"{model}.{query}."
            numbers = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
            if numbers:
                rows.append(Row(model, query, numbers))
    for name in unsupervised:
        prefix = f"mixit.{name}.pairs_"
        numbers = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        if numbers:
            n_pairs = {"n_pairs": metrics[f"mixit.{name}.n_pairs"]} if f"mixit.{name}.n_pairs" in metrics else {}
            rows.append(Row(f"{name} ({UNSUPERVISED})", DASH, numbers | n_pairs))
    half = "half_mixture."
    numbers = {key.removeprefix(half): value for key, value in metrics.items() if key.startswith(half)}
    if numbers:
        # SDR rewards turning down what one cannot separate: 3 dB at 0 dB. SI-SDR does not.
        nothing = {"si_sdri_class_median_mean": 0.0, "si_sdri_class_mean_mean": 0.0}
        rows.append(Row(HALF_MIXTURE, DASH, numbers | nothing))
    return rows


def difference_rows(metrics: Mapping[str, int | float], models: Sequence[str], queries: Sequence[str]) -> list[Row]:
    """One row per later model and query: its difference to the first model. Empty for a single model."""
    rows = []
    for model in models[1:]:
        for query in queries:
            prefix = f"{model}.{query}.vs_{models[0]}."
            numbers = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
            if numbers:
                rows.append(Row(f"{model} {MINUS} {models[0]}", query, numbers))
    return rows


def below_half(rows: Sequence[Row]) -> list[str]:
    """A sentence for each of our rows that does not reach what half of the mixture scores by SDRi."""
    key = "sdri_class_mean_mean"
    half = next((row.numbers[key] for row in rows if row.system == HALF_MIXTURE), None)
    if half is None:
        return []
    return [
        f"{row.system}, {row.query} query: its SDRi of {db(row.numbers[key])} dB is below the {db(half)} dB of half of "
        "the mixture, with which nothing is separated."
        for row in rows
        if key in row.numbers and row.numbers[key] < half
    ]


def without_width(n_classes_with_one_clip: int, n_classes: int) -> list[str]:
    """A sentence where no class has more than one target clip, so that the intervals, drawn over clips, are points."""
    if not n_classes or n_classes_with_one_clip < n_classes:
        return []
    return [
        "No class has pairs of more than one target clip, so that there is nothing to draw from: the intervals are "
        "points, and neither they nor p say how sure a number is."
    ]


def db(value: int | float | None, *, signed: bool = False) -> str:
    """A number of dB with two decimals and a true minus; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:.2f}"
    if float(text) == 0:
        return "0.00"
    return ("+" if signed and value > 0 else "") + text.replace("-", MINUS)


def p_value(value: int | float) -> str:
    """A p with two digits; below 0.0001 its size is no news."""
    return "< 0.0001" if value < 1e-4 else f"{value:#.2g}"


def interval(numbers: Mapping[str, int | float], key: str, *, signed: bool = False) -> str:
    """The 95 % interval beside `key`, or nothing where there is none."""
    low, high = numbers.get(f"{key}_ci_lo"), numbers.get(f"{key}_ci_hi")
    return "" if low is None or high is None else f"[{db(low, signed=signed)}, {db(high, signed=signed)}]"


def cell(row: Row, column: str) -> str:
    """A number of Table I as text, with its interval where it has one."""
    value = row.numbers.get(column)
    if value is not None and column.startswith("n_"):
        return f"{value:,.0f}"
    return f"{db(value)} {interval(row.numbers, column)}".strip()


def share(row: Row, key: str) -> str:
    """A share of the pairs in percent, or a dash."""
    value = row.numbers.get(key)
    return DASH if value is None else f"{100 * value:.0f} %"


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows that have a share of pairs."""
    return [row for row in rows if any(key in row.numbers for key in SHARES)]


def table1_markdown(
    ours: Sequence[Row],
    paper: Sequence[Row],
    comparisons: Sequence[Comparison],
    notes: Sequence[str],
    *,
    several: bool,
) -> str:
    """table1.md: our rows, the paper's, shares of pairs, and what must be borne in mind in comparing them."""
    lines = [
        "# Table I",
        "",
        "In dB: the mean over classes of the per-class median, but where the column says otherwise; "
        "in brackets the 95 % interval.",
        "",
    ]
    lines += markdown_table(
        ["", "query", *COLUMNS.values()],
        [[row.system, row.query, *(cell(row, column) for column in COLUMNS)] for row in ours]
        + [[f"paper: {row.system}", row.query, *(cell(row, column) for column in COLUMNS)] for row in paper],
    )
    if shares := with_shares(ours):
        lines += ["", "## Shares of the pairs", ""]
        lines += markdown_table(
            ["", "query", *SHARES.values()], [[r.system, r.query, *(share(r, key) for key in SHARES)] for r in shares]
        )
    if several:
        lines += ["", ONE_TRAINING]
    lines += ["", "## Comparability", ""]
    lines += markdown_table(
        ["", "here", "paper", ""],
        [[c.what, c.ours, c.paper, "same" if c.same else "**differs**"] for c in comparisons],
        escape_last=False,
    )
    if notes:
        lines += ["", *(f"- {escape(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, escape_last: bool = True) -> list[str]:
    """The lines of a table; cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [escape(text) if escape_last or i + 1 < len(row) else text for i, text in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def escape(text: str) -> str:
    """Names are data: none may open a cell, code or a tag."""
    for character in "\\`*<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
