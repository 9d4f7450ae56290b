"""The charts of the report as SVG, and spectrograms as images. The same numbers give the same bytes.

Colours are fixed hex values in the files. `themed` exchanges them for the CSS variables of the page, so that one
drawing serves as a file under reports/ and, light or dark, in the page.
"""

import io
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Okabe and Ito's colours, told apart also with colour-blind eyes.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PAPER, INK, MUTED, GRID = "#fefefe", "#1f2329", "#6b7280", "#dfe3e8"
_VARIABLES = {PAPER: "var(--card)", INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
_VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report",  # element ids would be random otherwise
    "svg.fonttype": "none",  # text stays text: a tenth of the size, searchable, in the page's font
    "text.parse_math": False,  # a class may have a $ in its name
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
}
LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")  # the seventh series has the first one's colour again
MAX_LINES = 4  # of a chart of classes, or both queries of every model are too many dots
MAX_NAMED_CLASSES = 60  # more rows than this and the names no longer fit: a profile of ranks is drawn instead


def class_chart(per_class: pd.DataFrame, nothing: float | None = None) -> str:
    """Median SDRi of every class with its interval, per model and query, sorted by the first model's average query.

    `per_class` as of `bootstrap.summarise`. Up to 60 classes are named; beyond, the classes are ranks. Of more than
    four lines only those of the first query are drawn. `nothing` is what half of the mixture scores, in dB.
    """
    lines = list(dict.fromkeys(zip(per_class["model"], per_class["query"], strict=True)))
    if len(lines) > MAX_LINES:
        lines = [line for line in lines if line[1] == lines[0][1]]
    first = per_class[(per_class["model"] == lines[0][0]) & (per_class["query"] == lines[0][1])]
    order = first.sort_values(["sdri_median", "class_index"], na_position="first")["class_index"].tolist()
    names = dict(zip(first["class_index"], first["class_name"], strict=True))
    named = len(order) <= MAX_NAMED_CLASSES
    models = list(dict.fromkeys(per_class["model"]))
    with matplotlib.rc_context(_STYLE):
        height = 1.1 + (0.16 + 0.06 * len(lines)) * len(order) if named else 4.0
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        for i, (model, query) in enumerate(lines):
            rows = per_class[(per_class["model"] == model) & (per_class["query"] == query)]
            rows = rows.set_index("class_index").reindex(order)
            colour = SERIES[models.index(model) % len(SERIES)]
            label = f"{model}, {query} query"
            point, low, high = (rows[f"sdri_median{end}"].to_numpy(float) for end in ("", "_ci_lo", "_ci_hi"))
            filled = query == lines[0][1]
            if named:
                # Entries of one class lie below one another, the first on top.
                at = np.arange(len(order)) - 0.6 * ((i + 0.5) / len(lines) - 0.5)
                axes.hlines(at, low, high, color=colour, linewidth=1.4, alpha=0.55)
                face = colour if filled else PAPER
                axes.plot(point, at, "o", markersize=4.5, color=colour, markerfacecolor=face, label=label)
            else:
                rank = np.arange(len(order), 0, -1)
                axes.fill_between(rank, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(rank, point, color=colour, linewidth=1.1, linestyle="-" if filled else ":", label=label)
        line = axes.axvline if named else axes.axhline
        line(0, color=MUTED, linewidth=0.9)
        if nothing is not None:
            line(nothing, color=MUTED, linewidth=1.1, linestyle="--", label=f"half of the mixture, {nothing:.2f} dB")
        if named:
            axes.set_yticks(np.arange(len(order)), [plain(str(names[index])) for index in order])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.set_ylim(-0.7, len(order) - 0.3)
            axes.set_xlabel("SDRi, dB: median of the class and its 95 % interval")
        else:
            axes.set_xlabel("class, by rank of the first line")
            axes.set_ylabel("SDRi, dB: median of the class")
        _legend_above(axes)
        return _svg(figure)


def training_chart(curves: Mapping[str, pd.DataFrame]) -> str:
    """Loss against the step, per model: running median bold, every logged value faint, dots for `validation`.

    Of a curve of fewer than 50 rows the median is over one of them: that is every value, and drawn once.
    """
    # A path of 60,000 points would weigh megabytes; 400 are more than the eye resolves here.
    n_points = 400 if len(curves) <= 4 else 1600 // len(curves)
    validated = False
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2 + 0.18 * max(0, len(curves) // 2 - 2)), layout="constrained")
        axes = figure.add_subplot()
        drawn = 0
        for i, (model, curve) in enumerate(curves.items()):
            if curve.empty or not {"step", "loss"} <= set(curve.columns):
                continue
            colour, drawn = SERIES[i % len(SERIES)], drawn + 1
            thin = curve.iloc[:: max(1, len(curve) // n_points)]
            window = max(1, len(curve) // 25)
            smooth = curve["loss"].rolling(window, center=True, min_periods=1).median()
            if window > 1:
                axes.plot(thin["step"], thin["loss"], color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(thin["step"], smooth.loc[thin.index], _dash(i), color=colour, linewidth=1.6, label=plain(model))
            if "validation" in curve and (held := curve.dropna(subset=["validation"])).size:
                axes.plot(held["step"], held["validation"], "o", color=colour, markersize=3.5)
                validated = True
        if drawn == 0:
            _nothing(axes, "no training curve")
        else:
            if min(float(c[k].min()) for c in curves.values() for k in ("loss", "validation") if _any(c, k)) > 0:
                axes.set_yscale("log")
                # Plain numbers at 1, 2 and 5 of each decade: matplotlib's own labels are formulas.
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("loss (dots: validation)" if validated else "loss")
            _legend_above(axes)
        return _svg(figure)


def _any(curve: pd.DataFrame, column: str) -> bool:
    return column in curve and bool(curve[column].notna().any())


@dataclass(frozen=True)
class Point:
    """One model at one length of segments, with its interval; a value of None is one that ran out of memory."""

    series: str
    seconds: float
    value: float | None
    low: float | None = None
    high: float | None = None


def length_chart(panels: Mapping[str, Sequence[Point]], *, nothing: float | None = None) -> str:
    """One panel per quantity, side by side: values against the length of the segments, a line per series.

    `nothing` is what doing nothing scores by all quantities, drawn as a line.
    """
    series = list(dict.fromkeys(point.series for points in panels.values() for point in points))
    lengths = sorted({point.seconds for points in panels.values() for point in points})
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.8 + 0.18 * ((len(series) + 1) // 2)), layout="constrained")
        for column, (title, points) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), column + 1)
            if not points:
                _nothing(axes, "no numbers")
                axes.set_title(title)
                continue
            for i, name in enumerate(series):
                own = sorted((p for p in points if p.series == name), key=lambda p: p.seconds)
                _length_line(axes, own, i, 1.025 ** (i - (len(series) - 1) / 2))
            axes.axhline(0, color=MUTED, linewidth=0.9)
            if nothing is not None:
                axes.axhline(nothing, color=MUTED, linewidth=1.1, linestyle="--")
            if all((p.value or 0) >= 0 and (p.low or 0) >= 0 for p in points):
                axes.set_ylim(bottom=0)
            axes.set_xscale("log")
            axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
            axes.set_xticks(lengths, [f"{seconds:g}" for seconds in lengths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(title)
            axes.set_xlabel("length of a segment, s")
        handles = [
            Line2D([], [], color=SERIES[i % len(SERIES)], linestyle=_dash(i), marker="o", markersize=4.5)
            for i in range(len(series))
        ]
        if handles:
            names = [plain(name) for name in series]
            if nothing is not None:
                handles.append(Line2D([], [], color=MUTED, linewidth=1.1, linestyle="--"))
                names.append("doing nothing")
            figure.legend(handles, names, loc="outside upper left", ncols=2, handlelength=2.4)
        return _svg(figure)


def _length_line(axes: Axes, points: Sequence[Point], i: int, shift: float) -> None:
    """One series; `shift` moves it aside, so that equal values of two series can be told apart."""
    colour = SERIES[i % len(SERIES)]
    measured = [p for p in points if p.value is not None]
    axes.plot(
        [p.seconds * shift for p in measured],
        [float(p.value or 0) for p in measured],
        _dash(i),
        marker="o",
        markersize=4.5,
        color=colour,
        linewidth=1.4,
    )
    for p in measured:
        if p.low is not None and p.high is not None:
            axes.vlines(p.seconds * shift, p.low, p.high, color=colour, linewidth=1.4, alpha=0.55)
    for p in points:
        if p.value is None:
            over = axes.get_xaxis_transform()  # x in seconds, y from the bottom to the top of the panel
            axes.plot([p.seconds * shift], [0.95], "x", color=colour, markersize=7, transform=over)
            axes.text(p.seconds * shift, 0.87, "out of memory", color=MUTED, ha="center", fontsize=7.5, transform=over)


def _dash(i: int) -> Literal["-", "--", ":"]:
    return LINES[i // len(SERIES) % len(LINES)]


def flatness_chart(gains: pd.DataFrame, named: Collection[str]) -> str:
    """Draw what each class gains against how flat its spectrum is; the classes in `named` are named.

    `gains` as of `published.class_gains`: "gain" and "flatness" in dB, by name; rows that lack one are not drawn.
    """
    both = gains.dropna(subset=["gain", "flatness"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        if both.empty:
            _nothing(axes, "no gain or no flatness of a class is known")
        else:
            colours = [SERIES[1] if name in named else SERIES[0] for name in both.index]
            axes.scatter(both["flatness"], both["gain"], s=18, c=colours, alpha=0.75, linewidths=0)
            for name, row in both[both.index.isin(list(named))].iterrows():
                at = (row["flatness"], row["gain"])
                axes.annotate(plain(str(name)), at, xytext=(5, 3), textcoords="offset points", fontsize=8)
            axes.axhline(0, color=MUTED, linewidth=0.9)
            axes.margins(x=0.12, y=0.12)
            axes.set_xlabel("spectral flatness of the class, dB: lines at the left, noise at the right")
            axes.set_ylabel("gain in SDRi, dB")
        return _svg(figure)


def purity_chart(purity: Mapping[str, Float[np.ndarray, " anchors"]]) -> str:
    """Share of the anchors of each split by purity: 1 minus the best other label's score in the window."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        edges = np.linspace(0, 1, 21)
        present = {split: values[~np.isnan(values)] for split, values in purity.items()}
        present = {split: values for split, values in present.items() if values.size}
        for i, (split, values) in enumerate(present.items()):
            share = 100 * np.histogram(np.clip(values, 0, 1), edges)[0] / values.size
            axes.stairs(
                share, edges, color=SERIES[i % len(SERIES)], linewidth=1.6, label=f"{plain(split)} ({values.size})"
            )
        if present:
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("purity of the anchor")
            axes.set_ylabel("% of the anchors")
            _legend_above(axes)
        else:
            _nothing(axes, "no anchors")
        return _svg(figure)


def themed(svg: str, label: str) -> str:
    """The drawing as an inline element: colours by CSS variable, size by the page, `label` read to the blind.

    `label` must be free of markup; the names inside the drawing were escaped by matplotlib.
    """
    body = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    # ids are referenced inside each drawing, and several drawings share the page
    prefix = re.sub(r"\W", "", label)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', body, count=1
    )


def plain(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c for c in text if c.isprintable())


def _legend_above(axes: Axes) -> None:
    """From the left edge of the figure, in two columns, three entries in three, or in as many as there is room for."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    handles, names = axes.get_legend_handles_labels()
    for columns in range(len(names) if len(names) <= 3 else 2, 0, -1):
        legend = figure.legend(
            handles, names, loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=1.4
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().x1 <= figure.bbox.x1:
            return
        legend.remove()


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r' d="[^"]*"', _shorter, buffer.getvalue())
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _shorter(path: re.Match[str]) -> str:
    """A path with two decimals of a point in place of six: half the size, and nobody sees the difference."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[0])


# ------------------------------------------------------------------------------------------- spectrograms

N_BANDS = 112
RANGE_DB = 70.0


def log_spectrogram(waveform: Float[np.ndarray, " time"], sample_rate: int) -> Float[np.ndarray, "bands frames"]:
    """Power in dB, in bands spaced as on the mel scale from 0 to half the sample rate, 10 ms apart.

    For the eye: each band is the strongest bin in it, so that thin partials stay visible.
    """
    n_fft = 2048
    hop = max(1, sample_rate // 100)
    padded = np.pad(waveform.astype(np.float64), n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(n_fft), axis=1)) ** 2  # (frames, bins)
    mel = np.linspace(0, 2595 * np.log10(1 + sample_rate / 2 / 700), N_BANDS + 1)
    edges = np.round(700 * (10 ** (mel / 2595) - 1) * n_fft / sample_rate).astype(int)
    bands = [power[:, low : max(high, low + 1)].max(axis=1) for low, high in itertools.pairwise(edges)]
    return 10 * np.log10(np.maximum(np.stack(bands), 1e-12))


def spectrogram_images(spectrograms: Sequence[Float[np.ndarray, "bands frames"]]) -> list[bytes]:
    """WebP images, low bands at the bottom, on one scale: from the loudest point of them all 70 dB down."""
    top = max(float(s.max()) for s in spectrograms)
    images = []
    for spectrogram in spectrograms:
        buffer = io.BytesIO()
        # WebP takes 4 kB where PNG takes 25: noise does not compress without loss.
        imsave(
            buffer,
            spectrogram[::-1],
            vmin=top - RANGE_DB,
            vmax=top,
            cmap="magma",
            format="webp",
            pil_kwargs={"quality": 60, "method": 6},
        )
        images.append(buffer.getvalue())
    return images
