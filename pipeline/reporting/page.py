"""report.html: one file that shows everything and fetches nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from pipeline.reporting import charts, sounds, tables
from pipeline.reporting.sections import Drawing, Metrics, Section

# Of report.html, which shall be fit to lie in git. What a section's `fill` adds takes what the rest leaves.
MAX_BYTES = 950_000


@dataclass(frozen=True)
class Sound:
    """One panel of an example: its spectrogram and player, both as data URIs."""

    name: str  # "mixture", "target", or what made it
    image: str
    audio: str
    gain_db: float  # applied for listening
    caption: str


def panels(waveforms: Sequence[tuple[str, str, Float[np.ndarray, " _"]]], sample_rate: int) -> list[Sound]:
    """Panels of (name, caption, samples): spectrograms on one scale, sounds at one loudness."""
    images = charts.spectrogram_images([charts.log_spectrogram(w, sample_rate) for _, _, w in waveforms])
    made = []
    for (name, caption, waveform), image in zip(waveforms, images, strict=True):
        gain = sounds.listening_gain(waveform)
        audio = sounds.encode(waveform * np.float32(gain), sample_rate)
        uris = (sounds.data_uri(image, "image/webp"), sounds.data_uri(audio, "audio/mpeg"))
        made.append(Sound(name, *uris, 20 * float(np.log10(gain)), caption))
    return made


@dataclass(frozen=True)
class Piece:
    """One section as HTML; nothing to show where that is blank."""

    name: str
    title: str
    html: Markup


def _environment() -> jinja2.Environment:
    """Templates whose every string is escaped, but for `Markup`; a name that the context lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"count": tables.count, "db": tables.db})
    environment.globals["panels"] = environment.get_template("panels.html.j2").module.panels  # type: ignore[attr-defined]
    return environment


def piece(
    name: str, section: Section[Any], drawings: Mapping[str, Drawing], metrics: Metrics, context: Mapping[str, Any]
) -> Piece:
    """Fill a section's template."""
    shown = {key: _figure(drawing) for key, drawing in drawings.items()}
    html = _environment().from_string(section.template).render(context, drawings=shown, metrics=metrics)
    return Piece(name, section.title, Markup(html.strip()))


def _figure(drawing: Drawing) -> Markup:
    return Markup('<div class="chart">{}</div>').format(Markup(charts.themed(drawing.svg, drawing.label)))


def page(pieces: Sequence[Piece]) -> str:
    """The whole page of the pieces, in their order; those without a title stand above the navigation."""
    return _environment().get_template("page.html.j2").render(pieces=[p for p in pieces if p.html]) + "\n"
