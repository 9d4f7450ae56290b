"""A good, a middling and a bad pair of the best model, chosen by rule, to hear and to see."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
from jaxtyping import Float
from matplotlib.figure import Figure

from pipeline.core.runtime import read_json
from pipeline.reporting import charts, page, sounds
from pipeline.reporting.headline import best_model
from pipeline.reporting.run import Run
from pipeline.reporting.scores import QUERIES
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import db

Waveform = Float[np.ndarray, " time"]

# Where among all pairs of the best model, sorted by SI-SDRi, a kept pair is looked for, and what it is called.
RULE = (
    (0.95, "a good one: of the best tenth of the pairs"),
    (0.50, "the middle: half of the pairs are better"),
    (0.05, "a bad one: of the worst tenth of the pairs"),
)
OTHER = "the other sound"


@dataclass(frozen=True)
class Example:
    """One evaluation pair to look at and listen to."""

    pair: int
    class_name: str
    interferer_name: str
    seconds: float
    sounds: list[page.Sound]
    title: str  # why this pair is shown


@dataclass(frozen=True)
class Examples:
    """The chosen pairs, Hz of their sounds (0: there are none), and a picture of the first as WebP."""

    best: str
    examples: list[Example]
    rate: int
    picture: bytes | None


class Section(Base[Examples]):
    """Sounds and spectrograms of three pairs."""

    title = "Listen"
    place = 10
    template = """\
{% if examples %}
<p class="muted">Three mixtures of two sounds, chosen by rule from the scores of <b>{{ best }}</b>, the model with the
highest SDRi: one of the best tenth by SI-SDRi, one in the middle, one of the worst tenth. Each model is given the
average query of the class and should give back the target alone. An estimate that is nearer to the interferer is marked
<b>{{ other_sound }}</b>. Press a spectrogram to hear it.</p>
{% for example in examples %}
<div class="example">
<h3>{{ example.class_name }} <span class="muted">out of {{ example.class_name }} and {{ example.interferer_name }}:
{{ example.title }} (pair {{ example.pair }})</span></h3>
{{ panels(example.sounds, "pair %d" % example.pair) }}</div>
{% endfor %}
<details><summary>How the sounds and pictures are made</summary><p class="muted">All sounds are brought to one loudness
({{ loudness_db | int }} dB RMS; the gain is given) and coded as MP3. Spectrograms are at their true levels, on one
scale of 70 dB per pair, 0 to {{ "%g" | format(nyquist_khz) }} kHz (mel), {{ "%g" | format(examples[0].seconds) }} s.
More
examples are in <code>data/scores/*/examples</code>.</p></details>
{% else %}<p>The evaluation kept no sounds (<code>evaluate.n_examples</code>).</p>{% endif %}"""

    def read(self, run: Run) -> Examples:
        """Read the pairs that the evaluation of the best model has kept."""
        return read_examples(run.places.scores, run.models, best_model(run.statistics.metrics, run.models))

    def files(self, data: Examples, metrics: Metrics) -> dict[str, str | bytes]:
        """The picture that the README shows."""
        return {} if data.picture is None else {"example.webp": data.picture}

    def context(self, data: Examples, metrics: Metrics) -> dict[str, Any]:
        """The examples and how they are to be read."""
        return {
            "best": data.best,
            "examples": data.examples,
            "other_sound": OTHER,
            "loudness_db": sounds.LOUDNESS_DB,
            "nyquist_khz": data.rate / 2000,
        }


def choose(scores: pd.DataFrame, kept: Sequence[int]) -> list[tuple[int, str]]:
    """Choose a pair of `kept` for each place of RULE, by its rank among all pairs; each pair at most once.

    `scores` has a row per pair and query of one model. Pairs without a defined SI-SDRi are left out.
    """
    own = scores[(scores["query"] == QUERIES[0]) & np.isfinite(scores["si_sdri"])].set_index("pair")["si_sdri"]
    rank = own.rank(pct=True)
    free = [pair for pair in kept if pair in rank.index]
    chosen: list[tuple[int, str]] = []
    for place, title in RULE:
        if free:
            pair = min(free, key=lambda pair: (abs(rank[pair] - place), pair))
            free.remove(pair)
            chosen.append((pair, title))
    return chosen


def read_examples(scores: Path, models: Sequence[str], best: str) -> Examples:
    """Read the chosen pairs: mixture and target are shared, each model adds its estimate under the average query."""
    items = {model: _listed(scores / model / "examples" / "examples.json") for model in models}
    if not items[best]:
        return Examples(best, [], 0, None)
    frame = pd.read_parquet(scores / best / "scores.parquet", columns=["pair", "query", "si_sdri"])
    examples: list[Example] = []
    picture, rate = None, 0
    for pair, title in choose(frame, sorted(items[best])):
        waveforms, rate = _waveforms(scores, items, best, pair)
        item = items[best][pair]
        panels = page.panels(waveforms, rate)
        names = (str(item["class_name"]), str(item["interferer_class_name"]))
        examples.append(Example(pair, *names, len(waveforms[0][2]) / rate, panels, title))
        if picture is None:
            picture = _picture([w for w in waveforms if w[0] in ("mixture", "target", best)], rate, *names)
    return Examples(best, examples, rate, picture)


def is_other(estimate: Waveform, mixture: Waveform, target: Waveform) -> bool:
    """Whether an estimate is nearer to the interferer (mixture less target) than to the target, at any level."""

    def correlation(reference: Waveform) -> float:
        power = float(np.dot(reference, reference)) * float(np.dot(estimate, estimate))
        return abs(float(np.dot(estimate, reference))) / math.sqrt(power) if power > 0 else 0.0

    return correlation(mixture - target) > correlation(target)


def _listed(path: Path) -> dict[int, dict[str, Any]]:
    return {item["pair"]: item for item in read_json(path)} if path.is_file() else {}


def _waveforms(
    scores: Path, items: Mapping[str, Mapping[int, Mapping[str, Any]]], best: str, pair: int
) -> tuple[list[tuple[str, str, Waveform]], int]:
    """Name, caption and samples of mixture, target and each model's estimate, the best model's first; and their Hz."""

    def read(model: str, sound: str) -> tuple[Waveform, int]:
        # Only the name is taken from the listing: it cannot lead elsewhere.
        path = scores / model / "examples" / Path(items[model][pair]["files"][sound]).name
        waveform, rate = soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")
        return waveform, rate

    (mixture, rate), (target, _) = read(best, "mixture"), read(best, "target")
    level = items[best][pair].get("sdr_mixture")
    found = [("mixture", f"SDR {db(level, signed=True)} dB", mixture), ("target", "", target)]
    for model in [best, *(model for model in items if model != best)]:
        item = items[model].get(pair)
        if item is None or QUERIES[0] not in item["files"]:
            continue
        estimate, _ = read(model, QUERIES[0])
        own = item.get(QUERIES[0], {})
        gains = [db(own.get(name), signed=True) for name in ("si_sdri", "sdri")]
        caption = f"SI-SDRi {gains[0]} dB, SDRi {gains[1]} dB"
        if is_other(estimate, mixture, target):
            caption = f"{OTHER}, SI-SDRi {gains[0]} dB"
        found.append((model, caption, estimate))
    return found, rate


def _picture(waveforms: Sequence[tuple[str, str, Waveform]], rate: int, wanted: str, other: str) -> bytes:
    """Draw spectrograms of mixture, target and estimate side by side, as WebP."""
    titles = {"mixture": f"{wanted} and {other}", "target": f"{wanted}, as it was"}
    spectrograms = [charts.log_spectrogram(waveform, rate) for _, _, waveform in waveforms]
    top = max(float(s.max()) for s in spectrograms)
    figure = Figure(figsize=(10, 2.6), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(waveforms))
    for axis, (name, _, waveform), spectrogram in zip(axes, waveforms, spectrograms, strict=True):
        axis.imshow(
            spectrogram, origin="lower", aspect="auto", cmap="magma", vmin=top - charts.RANGE_DB, vmax=top,
            extent=(0, len(waveform) / rate, 0, 1),
        )  # fmt: skip
        axis.set_title(titles.get(name, f"{wanted}, separated"), fontsize=11, parse_math=False)
        axis.set_yticks([])
        axis.set_xlabel("s")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", pil_kwargs={"quality": 80, "method": 6})
    return buffer.getvalue()
