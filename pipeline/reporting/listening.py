"""The listening section: a good, a middling and a bad pair of the best model, chosen by rule, to hear and to see."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
from jaxtyping import Float
from matplotlib.figure import Figure

from pipeline.core.runtime import read_json
from pipeline.reporting import charts, page, tables
from pipeline.reporting.scores import QUERIES

Waveform = Float[np.ndarray, " time"]

# Where among all pairs of the best model, sorted by SI-SDRi, a kept pair is looked for, and what it is called.
RULE = (
    (0.95, "a good one: of the best tenth of the pairs"),
    (0.50, "the middle: half of the pairs are better"),
    (0.05, "a bad one: of the worst tenth of the pairs"),
)
OTHER = "the other sound"


def best_model(metrics: Mapping[str, Any], models: Sequence[str]) -> str:
    """Name the model with the highest SDRi (mean of means) under the average query; the first one if none has any."""
    return max(models, key=lambda model: metrics.get(f"{model}.{QUERIES[0]}.sdri_class_mean_mean") or -np.inf)


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


def read_examples(scores: Path, models: Sequence[str], best: str) -> tuple[list[page.Example], int, bytes | None]:
    """Read the chosen pairs: the examples, Hz of their sounds (0: there are none), and a picture of the first.

    Mixture and target are shared, each model adds its estimate under the average query.
    """
    items = {model: _listed(scores / model / "examples" / "examples.json") for model in models}
    if not items[best]:
        return [], 0, None
    frame = pd.read_parquet(scores / best / "scores.parquet", columns=["pair", "query", "si_sdri"])
    examples: list[page.Example] = []
    picture, rate = None, 0
    for pair, title in choose(frame, sorted(items[best])):
        waveforms, rate = _waveforms(scores, items, best, pair)
        item = items[best][pair]
        panels = page.panels([(name, caption, waveform) for name, caption, waveform in waveforms], rate)
        seconds = len(waveforms[0][2]) / rate
        examples.append(
            page.Example(pair, str(item["class_name"]), str(item["interferer_class_name"]), seconds, panels, title)
        )
        if picture is None:
            wanted = [w for w in waveforms if w[0] in ("mixture", "target", best)]
            picture = _picture(wanted, rate, str(item["class_name"]), str(item["interferer_class_name"]))
    return examples, rate, picture


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
    found = [("mixture", f"SDR {tables.db(level, signed=True)} dB", mixture), ("target", "", target)]
    for model in [best, *(model for model in items if model != best)]:
        item = items[model].get(pair)
        if item is None or QUERIES[0] not in item["files"]:
            continue
        estimate, _ = read(model, QUERIES[0])
        own = item.get(QUERIES[0], {})
        gains = [tables.db(own.get(name), signed=True) for name in ("si_sdri", "sdri")]
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
