"""Separators without queries, trained on mixtures of mixtures: tables, charts by length, sounds of their outputs."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from pipeline.reporting import charts, page
from pipeline.reporting.blind import BlindResult, alarms, idlers, read_pretraining, read_results
from pipeline.reporting.blind_tables import (
    INTRODUCTION,
    PRETRAINING_RAN_OUT,
    blind_tables,
    cost_table,
    generated,
    markdown,
)
from pipeline.reporting.inputs import read_curve
from pipeline.reporting.mixit_intervals import read_intervals
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import db

log = logging.getLogger(__name__)

MAX_EXAMPLES = 2  # of an entry
MAX_OUTPUTS = 4  # of an example, the loudest
EXCERPT_SECONDS = 2.0
WITHHELD = frozenset({"moisesdb"})  # music.source whose licence lets nobody pass anything on
_MARKUP_BYTES = 700  # of a panel around its sound


@dataclass(frozen=True)
class Excerpt:
    """A piece of a test mixture of an unsupervised separator, and what that made of it."""

    entry: str
    name: str
    start: float  # seconds into the mixture
    seconds: float
    nyquist_khz: float
    sounds: list[page.Sound]


@dataclass(frozen=True)
class Unsupervised:
    """The results, their training curves by name, the numbers and curve of the pretraining, and where all of it lies.

    `source` is that of the music; None where there is none.
    """

    results: list[BlindResult]
    curves: dict[str, pd.DataFrame]
    pretraining: dict[str, int | float]
    pretraining_curve: dict[str, pd.DataFrame]
    scores: Path
    source: str | None

    @property
    def of_music(self) -> bool:
        """Whether any of them was trained on music."""
        return any(result.data == "music" for result in self.results)


class Section(Base[Unsupervised]):
    """The separators without queries."""

    title = "Unsupervised"
    place = 60
    template = """\
{% if shown %}
<p class="muted">{{ introduction }}</p>
{% if generated %}<p>{{ generated }}</p>{% endif %}
{% for text in alarms %}<p class="warning" role="note"><b>Warning: likely spurious optimum.</b> {{ text }}</p>
{% endfor %}
{% for text in idlers %}<p class="notice" role="note"><b>Not above doing nothing.</b> {{ text }}</p>
{% endfor %}
{% for table in tables %}
<h3>{{ table.title }}</h3>
{% if table.rows %}{{ table.html }}{% else %}<p>No entry.</p>{% endif %}
{% for note in table.notes %}<p class="muted">{{ note }}</p>
{% endfor %}
{% endfor %}
<h3>By length of the segments</h3>
{{ drawings.mixit_length }}
{{ drawings.mixit_memory }}
<p class="muted">Points of one length are drawn side by side. Bars: 95 % intervals. The line at 0 is doing nothing, with
every output an equal share of the input. Memory is the peak of this run's training.</p>
<h3>Training</h3>
{{ drawings.mixit_training }}
{% if pretrained %}<h3>Pretraining of the Performer</h3>
{% if ran_out %}<p>{{ ran_out }}</p>{% else %}{{ drawings.mixit_pretraining }}{% endif %}{% endif %}
{% if excerpts or withheld or excerpts_left_out %}
<h3>Listen to the outputs</h3>
{% if excerpts %}<p class="muted">The loudest {{ "%g" | format(excerpt_seconds) }} s of a test mixture, and the outputs
that are loudest in the whole of it; the level beside an output is its own to the mixture's. Brought to one loudness and
coded as above.</p>{% endif %}
{% if withheld %}<p class="muted">The licence of the music lets no excerpt of it into this page. Listen to
<code>data/mixit_scores/*/examples</code>.</p>{% endif %}
{% if excerpts_left_out %}<p class="muted">{{ excerpts_left_out }} more did not fit: they are in
<code>data/mixit_scores/*/examples</code>.</p>{% endif %}
{% for excerpt in excerpts %}
<div class="example">
<h4>{{ excerpt.entry }} <span class="muted">mixture {{ excerpt.name }}, from {{ "%.1f" | format(excerpt.start) }} s,
{{ "%g" | format(excerpt.seconds) }} s, 0 to {{ "%g" | format(excerpt.nyquist_khz) }} kHz</span></h4>
{{ panels(excerpt.sounds, excerpt.entry ~ ", mixture " ~ excerpt.name) }}</div>
{% endfor %}
{% endif %}
{% endif %}"""

    def read(self, run: Run) -> Unsupervised | None:
        """Read the results of the entries; None where params.yaml has no section of them."""
        settings, summaries = run.settings, run.places.summaries
        if not settings.has_blind:
            return None
        params = settings.report
        drawn = {"n_resamples": params.bootstrap_resamples, "seed": params.bootstrap_seed}
        intervals = read_intervals(run.places.mixit_scores, list(settings.blind), **drawn)
        results = read_results(summaries, settings.blind, run.timings, intervals)
        for text in [*alarms(results), *idlers(results)]:
            log.warning(text)
        curves: dict[str, pd.DataFrame] = {}
        for result in results:
            curves |= read_curve(summaries / f"train_mixit_{result.name}.csv", result.name)
        trained = bool(settings.blind)
        return Unsupervised(
            results,
            curves,
            read_pretraining(run.summary("pretrain_performer")) if trained else {},
            read_curve(summaries / "pretrain_performer.csv", "Performer") if trained else {},
            run.places.mixit_scores,
            settings.music_source,
        )

    def metrics(self, data: Unsupervised) -> dict[str, int | float]:
        """Numbers of the pretraining and of every entry."""
        numbers: dict[str, int | float] = {f"pretrain_performer.{key}": v for key, v in data.pretraining.items()}
        for result in data.results:
            numbers |= result.metrics()
        return numbers

    def drawings(self, data: Unsupervised, metrics: Metrics) -> dict[str, Drawing]:
        """Scores and memory by length, and both kinds of training."""
        by_length = "Stem SI-SNRi and MoM SNR above doing nothing by length of the segments"
        training = "Loss of the unsupervised separators by training step"
        pretraining = "Loss of the pretraining of the Performer by step"
        memory = "Peak memory by length of the segments"
        return {
            "mixit_length": Drawing(length_drawing(data.results), by_length),
            "mixit_training": Drawing(charts.training_chart(data.curves), training),
            "mixit_pretraining": Drawing(charts.training_chart(data.pretraining_curve), pretraining),
            "mixit_memory": Drawing(memory_drawing(data.results), memory, kept=False),
        }

    def files(self, data: Unsupervised, metrics: Metrics) -> dict[str, str | bytes]:
        """The tables as Markdown."""
        return {"mixit.md": markdown(data.results, blind_tables(data.results, data.pretraining), data.source)}

    def context(self, data: Unsupervised, metrics: Metrics) -> dict[str, Any]:
        """Tables, warnings and notes; without excerpts, which `fill` adds."""
        return {
            "shown": bool(data.curves) or any(result.status is not None for result in data.results),
            "introduction": INTRODUCTION,
            "generated": generated(data.results, data.source),
            "alarms": alarms(data.results),
            "idlers": idlers(data.results),
            "tables": [*blind_tables(data.results, data.pretraining), cost_table(data.results)],
            "pretrained": any(result.pretrained for result in data.results),
            "ran_out": PRETRAINING_RAN_OUT if "out_of_memory" in data.pretraining else "",
            "withheld": data.of_music and data.source in WITHHELD,
            "excerpt_seconds": EXCERPT_SECONDS,
            "excerpts": [],
            "excerpts_left_out": 0,
        }

    def fill(self, data: Unsupervised, n_bytes: int) -> dict[str, Any]:
        """Excerpts of as many examples as fit."""
        may_show = [r for r in data.results if not (r.data == "music" and data.source in WITHHELD)]
        excerpts, left_out = read_examples(data.scores, may_show, n_bytes)
        return {"excerpts": excerpts, "excerpts_left_out": left_out} if excerpts or left_out else {}


def _series(results: Sequence[BlindResult]) -> dict[str, str]:
    """A label for every signature, different ones for different signatures."""
    several = len({result.mixtures for result in results}) > 1
    labels: dict[str, str] = {}
    for result in results:
        label = ", ".join([result.architecture, *([result.mixtures] if several else []), result.extras])
        if result.signature not in labels:
            labels[result.signature] = f"{label} ({result.name})" if label in labels.values() else label
    return labels


def length_drawing(results: Sequence[BlindResult]) -> str:
    """Draw what the stems gain, and MoM SNR above doing nothing, against the length of the segments."""
    labels = _series(results)
    panels = {}
    for title, key in (
        ("stem SI-SNRi, dB", "stem_si_snri"),
        ("MoM SNR above doing nothing, dB", "snr_above_do_nothing"),
        ("MoM SI-SNR, dB", "si_snr"),
    ):
        panels[title] = [
            charts.Point(
                labels[result.signature],
                result.length,
                result.numbers[key],
                result.numbers.get(f"{key}_ci_lo"),
                result.numbers.get(f"{key}_ci_hi"),
            )
            for result in results
            if result.length is not None and key in result.numbers
        ]
    return charts.length_chart(panels, nothing=0.0)


def memory_drawing(results: Sequence[BlindResult]) -> str:
    """Peak memory of training against the length of the segments: of the GPU where one was used."""
    labels = _series(results)
    on_gpu = any(result.timing.get("cuda_allocated_bytes") for result in results)
    points = []
    for result in results:
        peak = result.timing.get("cuda_allocated_bytes") if on_gpu else result.process_peak
        peak = None if result.untrainable else peak
        if result.seconds is not None and (peak or result.untrainable):
            points.append(charts.Point(labels[result.signature], result.seconds, peak / 1e9 if peak else None))
    return charts.length_chart({f"{'GPU memory allocated' if on_gpu else 'memory of the process'}, GB": points})


def read_examples(scores: Path, results: Sequence[BlindResult], n_bytes: int) -> tuple[list[Excerpt], int]:
    """Examples whose data URIs fit into `n_bytes`, and how many did not.

    The first of every entry goes before the second of any. `scores` holds a folder per entry.
    """
    offered = [(result, rank, item) for result in results for rank, item in enumerate(result.examples[:MAX_EXAMPLES])]
    offered = [offer for offer in offered if (scores / offer[0].name / "examples").is_dir()]
    chosen: list[tuple[int, Excerpt]] = []
    spent = 0
    for result, _, item in sorted(offered, key=lambda offer: offer[1]):
        excerpt = _excerpt(scores / result.name / "examples", result, item)
        spent += sum(len(sound.audio) + len(sound.image) + _MARKUP_BYTES for sound in excerpt.sounds)
        if spent > n_bytes:
            break
        chosen.append((results.index(result), excerpt))
    return [excerpt for _, excerpt in sorted(chosen, key=lambda item: item[0])], len(offered) - len(chosen)


def _excerpt(folder: Path, result: BlindResult, item: Mapping[str, Any]) -> Excerpt:
    """The loudest seconds of the mixture, and the outputs that are loudest over the whole of it."""
    files = item["files"]
    outputs = [name for name in files if name != "mixture"]
    levels = dict(zip(outputs, item.get("outputs_db") or [], strict=False))
    outputs = sorted(outputs, key=lambda name: -_level(levels.get(name)))[:MAX_OUTPUTS]
    waveforms = []
    for name in ("mixture", *outputs):
        waveform, rate = soundfile.read(folder / Path(files[name]).name, dtype="float32")
        waveforms.append((name, waveform))
    mixture = waveforms[0][1]
    n_samples = min(len(mixture), round(EXCERPT_SECONDS * rate))
    energy = np.concatenate([[0.0], np.cumsum(np.square(mixture, dtype=np.float64))])
    starts = np.arange(0, len(mixture) - n_samples + 1, max(1, rate // 10))
    start = int(starts[np.argmax(energy[starts + n_samples] - energy[starts])])
    shown = [
        (
            name.replace("-", " "),
            f"{db(_relative_db(waveform, mixture), signed=True)} dB" if name != "mixture" else "",
            waveform[start : start + n_samples],
        )
        for name, waveform in waveforms
    ]
    sounds = page.panels(shown, rate)
    return Excerpt(result.name, str(item["name"]), start / rate, n_samples / rate, rate / 2000, sounds)


def _level(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def _relative_db(waveform: Any, mixture: Any) -> float | None:
    """Level of an output to that of the mixture; None where one of them is silent."""
    power, of_mixture = (float(np.mean(np.square(w, dtype=np.float64))) for w in (waveform, mixture))
    return 10 * math.log10(power / of_mixture) if power > 0 and of_mixture > 0 else None
