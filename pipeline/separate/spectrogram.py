"""A picture of a stem: its spectrogram, in as many columns for an hour as for a second."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

N_FFT, MAX_COLUMNS = 2048, 1200
RANGE_DB = 90.0


def draw(blocks: Iterable[Float[np.ndarray, "channels time"]], sample_rate: int, path: Path) -> None:
    """Write the spectrogram of a sound that comes in blocks as a PNG file, whole or not at all."""
    from matplotlib.figure import Figure

    power, frames = _columns(blocks)
    seconds = frames * N_FFT / 2 / sample_rate
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    decibels = 10 * np.log10(power.T + 1e-12)
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, sample_rate / 2000),
        vmin=decibels.max() - RANGE_DB,
        cmap="magma",
    )
    axes.set(xlabel="time (s)", ylabel="frequency (kHz)", title=path.stem)
    figure.colorbar(image, label="power (dB)")
    temporary = path.with_name(f".separate-{os.getpid()}-{path.name}")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(blocks: Iterable[Float[np.ndarray, "channels time"]]) -> tuple[Float[np.ndarray, "columns bins"], int]:
    """Average the power of frames into columns, a power of two of them each, and count the frames."""
    window = np.hanning(N_FFT).astype(np.float32) / (N_FFT / 4)
    columns: list[np.ndarray] = []
    waiting, per_column, frames = np.zeros(0, np.float32), 1, 0
    held: list[np.ndarray] = []  # of the column that is not full
    for block in blocks:
        waiting = np.concatenate([waiting, block.mean(axis=0)])
        n = max(0, (len(waiting) - N_FFT) // (N_FFT // 2) + 1)
        if not n:
            continue
        cut = np.lib.stride_tricks.sliding_window_view(waiting, N_FFT)[:: N_FFT // 2][:n]
        held += list(np.abs(np.fft.rfft(cut * window)) ** 2)
        waiting, frames = waiting[n * N_FFT // 2 :], frames + n
        while len(held) >= per_column:
            columns.append(np.mean(held[:per_column], axis=0))
            held = held[per_column:]
            if len(columns) == 2 * MAX_COLUMNS:
                columns = list(np.stack(columns).reshape(MAX_COLUMNS, 2, -1).mean(axis=1))
                per_column *= 2
    if held or not columns:
        columns.append(np.mean(held or [np.zeros(N_FFT // 2 + 1)], axis=0))
    return np.stack(columns).astype(np.float32), max(frames, 1)
