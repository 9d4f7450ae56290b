"""report.html: one file that shows everything and fetches nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from jaxtyping import Float

from pipeline.reporting import charts, sounds

TEMPLATE = "page.html.j2"
DASH = "\u2013"


@dataclass(frozen=True)
class Sound:
    """One panel of an example: its spectrogram and player, both as data URIs."""

    name: str  # "mixture", "target", or what made it
    image: str
    audio: str
    gain_db: float  # applied for listening
    caption: str


@dataclass(frozen=True)
class Example:
    """One evaluation pair to look at and listen to."""

    pair: int
    class_name: str
    interferer_name: str
    seconds: float
    sounds: list[Sound]
    title: str  # why this pair is shown


@dataclass(frozen=True)
class Excerpt:
    """A piece of a test mixture of an unsupervised separator, and what that made of it."""

    entry: str
    name: str
    start: float  # seconds into the mixture
    seconds: float
    nyquist_khz: float
    sounds: list[Sound]


def panels(waveforms: Sequence[tuple[str, str, Float[np.ndarray, " _"]]], sample_rate: int) -> list[Sound]:
    """Panels of (name, caption, samples): spectrograms on one scale, sounds at one loudness."""
    images = charts.spectrogram_images([charts.log_spectrogram(w, sample_rate) for _, _, w in waveforms])
    found = []
    for (name, caption, waveform), image in zip(waveforms, images, strict=True):
        gain = sounds.listening_gain(waveform)
        found.append(
            Sound(
                name,
                sounds.data_uri(image, "image/webp"),
                sounds.data_uri(sounds.encode(waveform * np.float32(gain), sample_rate), "audio/mpeg"),
                20 * float(np.log10(gain)),
                caption,
            )
        )
    return found


@dataclass(frozen=True)
class ClassRow:
    """One class of the sortable table; `cells` in the order of the columns, None where undefined."""

    class_index: int
    name: str
    n_pairs: int
    n_clips: int
    sdr_mixture: float | None
    cells: list["ClassCell | None"]


@dataclass(frozen=True)
class ClassCell:
    """Median SDRi of a class with its interval, and its bar: from where to where, in percent of the cell."""

    median: float
    low: float
    high: float
    bar_from: float
    bar_to: float


def class_table(per_class: pd.DataFrame) -> tuple[list[str], list[ClassRow]]:
    """Column titles and rows of the table of classes, from `statistics.summarise`'s per_class."""
    columns = list(dict.fromkeys(zip(per_class["model"], per_class["query"], strict=True)))
    several = len({model for model, _ in columns}) > 1
    titles = [f"{model}, {query}" if several else query for model, query in columns]
    medians = per_class["sdri_median"].dropna()
    low_end, high_end = min(0.0, medians.min()), max(0.0, medians.max())
    span = high_end - low_end or 1.0

    def cell(row: "pd.Series[Any]") -> ClassCell | None:
        median = float(row["sdri_median"])
        if pd.isna(median):
            return None
        start, end = sorted((0.0, median))
        return ClassCell(
            median,
            float(row["sdri_median_ci_lo"]),
            float(row["sdri_median_ci_hi"]),
            round(100 * (start - low_end) / span, 1),
            round(100 * (end - low_end) / span, 1),
        )

    rows = []
    for index, group in per_class.groupby("class_index", sort=True):
        first = group.iloc[0]
        by_column = {(row["model"], row["query"]): row for _, row in group.iterrows()}
        rows.append(
            ClassRow(
                int(str(index)),
                str(first["class_name"]),
                int(first["n_pairs"]),
                int(first["n_clips"]),
                None if pd.isna(first["sdr_mixture_median"]) else float(first["sdr_mixture_median"]),
                [cell(by_column[column]) if column in by_column else None for column in columns],
            )
        )
    return titles, rows


def duration(seconds: int | float) -> str:
    """Seconds for people: "4.2 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def count(number: int | float | None) -> str:
    """A whole number with thousands separators; a dash for None."""
    return DASH if number is None else f"{number:,.0f}"


def render(context: Mapping[str, Any], filters: Mapping[str, Any]) -> str:
    """Fill the template. Every string is escaped, but for drawings passed as `markupsafe.Markup`; a name that the
    template asks for and the context lacks is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"duration": duration, "count": count, **filters})
    return environment.get_template(TEMPLATE).render(context) + "\n"


def limitations(source: str, normalize: str, one_clip_classes: int) -> list[str]:
    """List what the numbers of this run do not say."""
    said = [
        "The mixtures are two 2-s sounds at 0 dB (mono). They say little of dense scenes, of other levels, of music "
        "with many sources, and nothing of the joins between segments of a long recording.",
        "Labels are weak: an anchor is where a detector is surest of a class, and may hold other sounds as well. What "
        "the target holds besides its class counts against a separator that leaves it out.",
        "The oracle query is the embedding of the clean target: an upper bound that no user has.",
        "Intervals are over the recordings of the given classes. They do not cover another training seed or other "
        "classes.",
    ]
    if one_clip_classes:
        said.append(
            f"{one_clip_classes} classes have all their pairs from a single clip: their own interval has no width, "
            "and they make the overall one too narrow."
        )
    if source == "synthetic":
        said.insert(
            0,
            "The corpus is generated: tones, noises, pulses. The numbers show that the chain works; they are not "
            "comparable with any number on recordings.",
        )
    if normalize == "separate":
        said.append(
            "Mixture and target were normalised separately, as the paper's Eq. 2 reads: the target's level in the "
            "mixture is unknown to the separator, and SDR counts that against it."
        )
    return said


_CORPUS_LICENCES = {
    "synthetic": "The corpus was generated by this project's code; nobody else has rights in it.",
    "audioset": "AudioSet's labels are CC BY 4.0. The recordings belong to those who made them, or are under the "
    "licence that came with the local copy; the excerpts in this page are theirs too.",
    "fsd50k": "FSD50K is CC BY 4.0 as a whole; each clip has its own licence (CC0, CC BY, CC BY-NC, Sampling+), which "
    "holds for the excerpts in this page.",
    "esc50": "ESC-50 is CC BY-NC (its subset ESC-10 CC BY), with the recordists' names in its LICENSE file; this "
    "holds for the excerpts in this page.",
}


def licences(source: str, published_weights: Sequence[str]) -> list[str]:
    """Whose rights touch this page."""
    said = [
        "Code: Apache-2.0.",
        "Class names: AudioSet, CC BY 4.0; ontology: CC BY-SA 4.0.",
        _CORPUS_LICENCES.get(source, "The corpus has its own licence, which holds for the excerpts in this page."),
    ]
    if published_weights:
        said.append(f"Published weights were used, under their own licence: {', '.join(published_weights)}.")
    return said


_MUSIC_LICENCES = {
    "synthetic_stems": "The music was generated by this project's code; nobody else has rights in it.",
    "musdb18": "MUSDB18 is for academic use; each track has its own licence, which holds for its excerpts too.",
    "moisesdb": "MoisesDB is CC BY-NC-SA 4.0, and its terms let nobody pass it on: no excerpt of it is in this page.",
    "slakh": "Slakh2100 is CC BY 4.0, and so are its excerpts in this page.",
    "fuss": "FUSS is CC BY 4.0, its clips CC0.",
}


def music_licence(source: str) -> str:
    """Whose rights touch the excerpts of music in this page."""
    return _MUSIC_LICENCES.get(source, "The music has its own licence, which holds for its excerpts in this page.")
