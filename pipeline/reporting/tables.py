"""Tables of words and numbers, each written as HTML and as Markdown from the same cells; and numbers as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

MINUS, DASH = "\u2212", "\u2013"
NO_BREAK = "\u2011"  # a hyphen at which no line ends

MANY_COLUMNS = 8  # a table of more is set closer

Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: text, its interval apart, and how it is set."""

    text: str
    interval: str = ""
    tone: Tone = ""
    code: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()

    @property
    def markdown(self) -> str:
        """The cell as Markdown; a bad one is bold."""
        text = markdown_escape(self.text)
        if self.code and text:
            text = f"`{' '.join(self.text.split()).replace('`', '').replace('|', chr(92) + '|')}`"
        if self.tone == "bad":
            text = f"**{text}**"
        return f"{text} {self.interval}".strip()

    @property
    def html(self) -> Markup:
        """The inside of the cell as HTML, the interval on a line of its own."""
        text = escape(self.text)
        if self.code and self.text:
            text = Markup("<code>{}</code>").format(text)
        if self.tone:
            text = Markup('<span class="{}">{}</span>').format(self.tone, text)
        return text + Markup('<br><span class="ci">{}</span>').format(self.interval) if self.interval else text


@dataclass(frozen=True)
class Row:
    """One row of a table; a reference (another's numbers, or doing nothing) is set apart from ours."""

    cells: Sequence[Cell]
    reference: bool = False
    flag: str = ""  # a word of warning behind the name

    @property
    def markdown(self) -> str:
        """The row as a line of Markdown."""
        first, *others = (cell.markdown for cell in self.cells)
        return "| " + " | ".join([f"{first} ({markdown_escape(self.flag)})" if self.flag else first, *others]) + " |"


@dataclass(frozen=True)
class Table:
    """A table whose first `n_text` columns hold words and the others numbers; `n_text` -1: all hold words."""

    columns: Sequence[str]
    rows: Sequence[Row]
    n_text: int = 1
    title: str = ""
    notes: Sequence[str] = ()

    @property
    def markdown(self) -> list[str]:
        """The lines of the table as Markdown, without title and notes; every text is escaped."""
        header = "| " + " | ".join(map(markdown_escape, self.columns)) + " |"
        return [header, "|" + " --- |" * len(self.columns), *(row.markdown for row in self.rows)]

    @property
    def html(self) -> Markup:
        """The table as HTML, without title and notes; every text is escaped."""
        titles = [title.replace("SI-", f"SI{NO_BREAK}") for title in self.columns]
        head = Markup("").join(self._cell("th", i, escape(title)) for i, title in enumerate(titles))
        wide = Markup(' class="wide"') if len(self.columns) > MANY_COLUMNS else ""
        lines = [Markup('<div class="scroll"><table{}><thead><tr>{}</tr></thead><tbody>').format(wide, head)]
        for row in self.rows:
            flag = Markup(' <span class="flag">{}</span>').format(row.flag) if row.flag else ""
            cells = [
                self._cell("td" if i else "th", i, cell.html + flag if i == 0 else cell.html)
                for i, cell in enumerate(row.cells)
            ]
            kind = Markup(' class="reference"') if row.reference else ""
            lines.append(Markup("<tr{}>{}</tr>").format(kind, Markup("").join(cells)))
        return Markup("\n").join([*lines, Markup("</tbody></table></div>")])

    def _cell(self, tag: str, column: int, content: Markup) -> Markup:
        number = Markup(' class="n"') if 0 <= self.n_text <= column else ""
        return Markup("<{0}{1}>{2}</{0}>").format(tag, number, content)

    def section(self) -> list[str]:
        """Title, table and notes as the lines of a section of Markdown."""
        body = self.markdown if self.rows else ["No entry."]
        notes = [f"- {markdown_escape(note)}" for note in self.notes]
        return [f"## {markdown_escape(self.title)}", "", *body, *(["", *notes] if notes else [])]


def markdown_escape(text: str) -> str:
    """A text that opens no cell, code or tag in Markdown: names are data."""
    for character in "\\`*<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def words(*texts: str) -> list[Cell]:
    """One plain cell for each text."""
    return [Cell(text) for text in texts]


def number(numbers: Mapping[str, int | float], key: str, *, signed: bool = False) -> Cell:
    """A number of dB with its interval, where it has one; a dash where there is no such number."""
    return Cell(db(numbers.get(key), signed=signed), interval(numbers, key, signed=signed))


def db(value: int | float | None, *, signed: bool = False) -> str:
    """A number of dB with two decimals and a true minus; a dash for None."""
    if value is None:
        return DASH
    text = f"{value:.2f}"
    if float(text) == 0:
        return "0.00"
    return ("+" if signed and value > 0 else "") + text.replace("-", MINUS)


def interval(numbers: Mapping[str, int | float], key: str, *, signed: bool = False) -> str:
    """The 95 % interval beside `key`, or nothing where there is none."""
    low, high = numbers.get(f"{key}_ci_lo"), numbers.get(f"{key}_ci_hi")
    return "" if low is None or high is None else f"[{db(low, signed=signed)}, {db(high, signed=signed)}]"


def count(value: int | float | None) -> str:
    """A whole number with thousands separators; a dash for None."""
    return fixed(value, 0)


def fixed(value: int | float | None, digits: int) -> str:
    """A number with so many decimals, thousands separators and a true minus; a dash for None."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def percent(value: int | float | None) -> str:
    """A share as whole percent; a dash for None."""
    return DASH if value is None else f"{100 * value:.0f} %"


def gigabytes(value: int | float | None) -> str:
    """A number of bytes as gigabytes; a dash for None."""
    return DASH if value is None else f"{value / 1e9:.2f} GB"


def duration(seconds: int | float | None) -> str:
    """Seconds for people ("4.2 s", "3 min 5 s", "2 h 10 min"); a dash for None."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
