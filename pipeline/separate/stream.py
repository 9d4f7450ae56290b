"""Separate audio of any length in blocks, without seams and in constant memory.

    input     |----context----|========core========|-fade-|----context----|
    estimate                  |========core========|-fade-|
                                                   |========core========|-fade-|

Each block is separated with `context` on both sides, which is computed and thrown away: near an edge of what it is
given, a network does not know what it would know further inside. What is left of two blocks is cross-faded over `fade`.
Blocks begin at multiples of the network's own grid, so that a block's estimate is what one pass over the whole gives,
as far as the context reaches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.core.devices import exact_float32
from pipeline.nn.features import SAMPLE_RATE, istft, stft

CANCELLED = 0.05  # share of the loudest channel's power below which a down-mix is taken for cancelled
RATIO_N_FFT, RATIO_HOP = 2048, 512  # of the mask that carries a mono estimate over to the channels
RATIO_FLOOR = 1e-8  # of the mean power of a bin, beside which the bin is taken for empty

Estimate = Callable[[Tensor], Tensor]
"""Mono mixture (time,) at 32 kHz to the estimates of all targets (targets, time)."""


@dataclass(frozen=True)
class Blocks:
    """Sizes in samples at 32 kHz; core and context are multiples of the network's grid."""

    core: int
    context: int
    fade: int

    @property
    def latency_seconds(self) -> float:
        """Longest time between a sample's input and its estimate's output, resamplers apart."""
        return (self.core + self.fade + self.context) / SAMPLE_RATE


class Stream:
    """Separates audio that is pushed in pieces of any size; the estimates are those of the whole pushed at once.

    channels, sample_rate   of the input and of what comes out: a rate other than 32 kHz is resampled both ways (soxr)
    """

    def __init__(
        self,
        estimate: Estimate,
        n_targets: int,
        *,
        channels: int,
        sample_rate: int,
        blocks: Blocks,
        device: str = "cpu",
    ) -> None:
        self.estimate, self.n_targets, self.channels, self.blocks = estimate, n_targets, channels, blocks
        self.device = torch.device(device)
        same = sample_rate == SAMPLE_RATE
        self._enter = None if same else soxr.ResampleStream(sample_rate, SAMPLE_RATE, channels, dtype="float32")
        rows = n_targets * channels
        self._leave = None if same else soxr.ResampleStream(SAMPLE_RATE, sample_rate, rows, dtype="float32")
        self._buffer = np.zeros((channels, 0), np.float32)  # from `_start` on, at 32 kHz
        self._start = 0
        self._position = 0  # where the next core begins
        self._tail: Float[np.ndarray, "targets channels fade"] | None = None
        self._n_in = self._n_out = 0  # samples at the input's rate

    def push(self, audio: Float[np.ndarray, "channels time"]) -> Float[np.ndarray, "targets channels some"]:
        """Take the next samples; return the estimates that are ready, in order, which may be none."""
        if audio.shape[0] != self.channels:
            raise ValueError(f"{audio.shape[0]} channels, where the stream has {self.channels}")
        self._n_in += audio.shape[1]
        self._buffer = np.concatenate([self._buffer, self._entering(audio, last=False)], axis=1)
        ready = self.blocks.core + self.blocks.fade + self.blocks.context
        found = []
        while self._start + self._buffer.shape[1] >= self._position + ready:
            found.append(self._block(self._position + self.blocks.core, fade=self.blocks.fade))
        return self._leaving(found, last=False)

    def flush(self) -> Float[np.ndarray, "targets channels rest"]:
        """End the stream; return all estimates that are left: then as many samples have come out as went in."""
        empty = np.zeros((self.channels, 0), np.float32)
        self._buffer = np.concatenate([self._buffer, self._entering(empty, last=True)], axis=1)
        end = self._start + self._buffer.shape[1]
        found = [self._block(end, fade=0)] if end > self._position else []
        rest = self._leaving(found, last=True)
        # Both resamplers round their lengths.
        wanted = self._n_in - self._n_out
        return np.pad(rest, ((0, 0), (0, 0), (0, max(0, wanted - rest.shape[2]))))[:, :, :wanted]

    def _block(self, end: int, fade: int) -> Float[np.ndarray, "targets channels core"]:
        """Estimate from `_position` to `end`, and go on there."""
        first = max(0, self._position - self.blocks.context)
        last = end + fade + (self.blocks.context if fade else 0)
        window = self._buffer[:, first - self._start : last - self._start]
        kept = slice(self._position - first, end + fade - first)
        estimates = self._separated(window)[:, :, kept]
        if self._tail is not None:
            n = min(self._tail.shape[2], estimates.shape[2])
            rise = np.linspace(0, 1, self._tail.shape[2] + 2, dtype=np.float32)[1 : n + 1]
            estimates[:, :, :n] = rise * estimates[:, :, :n] + (1 - rise) * self._tail[:, :, :n]
        core = end - self._position
        self._tail = estimates[:, :, core:]
        self._position = end
        drop = max(0, end - self.blocks.context - self._start)
        self._buffer, self._start = self._buffer[:, drop:].copy(), self._start + drop
        return estimates[:, :, :core]

    def _separated(self, window: Float[np.ndarray, "channels time"]) -> Float[np.ndarray, "targets channels time"]:
        if not window.any():
            return np.zeros((self.n_targets, *window.shape), np.float32)
        audio = torch.from_numpy(window).to(self.device)
        with torch.inference_mode(), exact_float32():
            mono = down_mix(audio)
            estimates = self.estimate(mono).float()
            if self.channels == 1:
                spread = estimates[:, None]
            else:
                spread = spread_to_channels(estimates, mono, audio)
        return spread.cpu().numpy()

    def _entering(self, audio: np.ndarray, *, last: bool) -> np.ndarray:
        if self._enter is None:
            return audio.astype(np.float32)
        return self._enter.resample_chunk(np.ascontiguousarray(audio.T, np.float32), last=last).T.reshape(
            self.channels, -1
        )

    def _leaving(self, found: list[np.ndarray], *, last: bool) -> np.ndarray:
        shape = (self.n_targets, self.channels)
        estimates = np.concatenate([np.zeros((*shape, 0), np.float32), *found], axis=2)
        if self._leave is not None:
            rows = np.ascontiguousarray(estimates.reshape(self.n_targets * self.channels, -1).T)
            estimates = self._leave.resample_chunk(rows, last=last).T.reshape(*shape, -1)
        self._n_out += 0 if last else estimates.shape[2]
        return estimates


def down_mix(audio: Float[Tensor, "channels time"]) -> Float[Tensor, " time"]:
    """Mix the channels to one: their mean, or the loudest channel where that mean has cancelled."""
    mean = audio.mean(dim=0)
    power = audio.square().mean(dim=1)
    return mean if mean.square().mean() > CANCELLED * power.max() else audio[power.argmax()]


def spread_to_channels(
    estimates: Float[Tensor, "targets time"], mono: Float[Tensor, " time"], audio: Float[Tensor, "channels time"]
) -> Float[Tensor, "targets channels time"]:
    """Carry mono estimates over to the channels by the complex ratio of their spectra to the down-mix's.

    Each channel goes through the same mask: level and phase between channels are kept.
    """
    length = mono.shape[0]
    padded = max(length, RATIO_N_FFT // 2 + 1)
    padded += -padded % RATIO_HOP

    def spectra(signals: Tensor) -> Tensor:
        signals = torch.nn.functional.pad(signals, (0, padded - length))
        return stft(signals, n_fft=RATIO_N_FFT, hop_length=RATIO_HOP)

    mixture, wanted, channels = spectra(mono[None]), spectra(estimates), spectra(audio)
    power = mixture.abs().square()
    ratio = wanted * mixture.conj() / (power + RATIO_FLOOR * power.mean() + 1e-20)
    masked = (ratio[:, None] * channels[None]).flatten(0, 1)
    spread = istft(masked, n_fft=RATIO_N_FFT, hop_length=RATIO_HOP, length=padded)[:, :length]
    return spread.view(estimates.shape[0], audio.shape[0], length)
