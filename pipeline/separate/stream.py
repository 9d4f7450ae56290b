"""Separate audio of any length in blocks, without seams and in constant memory.

    input     |----context----|========core========|----context----|
    estimate                  |========core========|-fade-|
                                                   |========core========|-fade-|

Each block is separated with `context` on both sides, which is computed and thrown away but for the fade: near an edge
of what it is given, a network does not know what it would know further inside. What is left is cross-faded.
Blocks begin at multiples of the network's own grid, so that a block's estimate is what one pass over the whole gives,
as far as the context reaches. All else that is computed here depends on what lies near too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soxr
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.core.devices import exact_float32
from pipeline.nn.features import SAMPLE_RATE, istft, running_level, stft

CANCELLED = 0.05  # share of the loudest channel's power below which a down-mix is taken for cancelled
RATIO_N_FFT, RATIO_HOP = 2048, 512  # of the mask that carries a mono estimate over to the channels
RATIO_FLOOR = 1e-8  # of the mean power of a frame's bins, beside which a bin is taken for empty
RESAMPLER_SECONDS = 0.1  # that soxr may hold back, at 8 kHz and above
NEAR_SAMPLES = 1 << 16  # of the window under which a down-mix' power is compared with the channels'

Stereo = Literal["mid", "side", "channels"]
Estimate = Callable[[Tensor], Tensor]
"""Mono mixtures (rows, time) at the model's rate to the estimates of all targets (rows, targets, time)."""


@dataclass(frozen=True)
class Blocks:
    """Sizes in samples at the model's rate; core and context are multiples of the network's grid."""

    core: int
    context: int  # on either side; the cross-fade lies in the one behind
    fade: int
    sample_rate: int = SAMPLE_RATE
    batch: int = 1  # blocks that are separated at once

    @property
    def latency_seconds(self) -> float:
        """Longest time between a sample's input and its estimate's output, resamplers apart."""
        return (self.batch * self.core + self.context) / self.sample_rate


class Stream:
    """Separates audio that is pushed in pieces of any size; the estimates are those of the whole pushed at once.

    channels, sample_rate   of the input and of what comes out: a rate other than the model's is resampled both ways
    stereo    what the network is given. mid: the mean of the channels, and where that has cancelled their alternating
              sum; side: that sum; the estimate's mask is applied to every channel. channels: each of them by itself
    ordered   False: estimates come in no order, and those of a block are matched with the ones of the block before
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
        stereo: Stereo = "mid",
        ordered: bool = True,
    ) -> None:
        self.estimate, self.n_targets, self.channels, self.blocks = estimate, n_targets, channels, blocks
        self.device, self.stereo, self.ordered = torch.device(device), stereo, ordered
        same = sample_rate == blocks.sample_rate
        rate, rows = blocks.sample_rate, n_targets * channels
        self._enter = None if same else soxr.ResampleStream(sample_rate, rate, channels, dtype="float32")
        self._leave = None if same else soxr.ResampleStream(rate, sample_rate, rows, dtype="float32")
        self._buffer = np.zeros((channels, 0), np.float32)  # from `_start` on, at the model's rate
        self._start = 0
        self._position = 0  # where the next core begins
        self._tail: Float[np.ndarray, "targets channels fade"] | None = None
        self._before: Float[Tensor, "targets channels context"] | None = None  # of estimates that come in no order
        self._n_in = self._n_out = 0  # samples at the input's rate

    @property
    def latency_seconds(self) -> float:
        """Longest time between a sample's input and its estimate's output, both resamplers included."""
        resamplers = 0.0 if self._enter is None else 2 * RESAMPLER_SECONDS
        return self.blocks.latency_seconds + resamplers

    def push(self, audio: Float[np.ndarray, "channels time"]) -> Float[np.ndarray, "targets channels some"]:
        """Take the next samples; return the estimates that are ready, in order, which may be none."""
        if audio.shape[0] != self.channels:
            raise ValueError(f"{audio.shape[0]} channels, where the stream has {self.channels}")
        self._n_in += audio.shape[1]
        self._buffer = np.concatenate([self._buffer, self._entering(audio, last=False)], axis=1)
        blocks, found = self.blocks, []
        while self._start + self._buffer.shape[1] >= self._position + blocks.batch * blocks.core + blocks.context:
            found += self._next(blocks.batch)
        return self._leaving(found, last=False)

    def flush(self) -> Float[np.ndarray, "targets channels rest"]:
        """End the stream; return all estimates that are left: then as many samples have come out as went in."""
        empty = np.zeros((self.channels, 0), np.float32)
        self._buffer = np.concatenate([self._buffer, self._entering(empty, last=True)], axis=1)
        end, found = self._start + self._buffer.shape[1], []
        whole = max(0, (end - self._position - self.blocks.context) // self.blocks.core)
        found += self._next(whole) if whole else []
        if end > self._position:
            found += self._next(1, last=end)
        rest = self._leaving(found, last=True)
        # Both resamplers round their lengths.
        wanted = self._n_in - self._n_out
        return np.pad(rest, ((0, 0), (0, 0), (0, max(0, wanted - rest.shape[2]))))[:, :, :wanted]

    def _next(self, count: int, last: int | None = None) -> list[Float[np.ndarray, "targets channels core"]]:
        """Estimate the next blocks, or the one up to the end of the recording, and go on behind them."""
        core, context = self.blocks.core, self.blocks.context
        starts = [self._position + i * core for i in range(count)]
        ends = [start + core for start in starts] if last is None else [last]
        spans = [
            (max(0, start - context), end + (context if last is None else 0))
            for start, end in zip(starts, ends, strict=True)
        ]
        windows = [self._buffer[:, first - self._start : stop - self._start] for first, stop in spans]
        found = []
        for start, end, (first, _), estimates in zip(starts, ends, spans, self._separated(windows), strict=True):
            kept = estimates[:, :, start - first : end - first + (self.blocks.fade if last is None else 0)]
            found.append(self._joined(kept, end - start))
        self._position = ends[-1]
        drop = max(0, self._position - context - self._start)
        self._buffer, self._start = self._buffer[:, drop:].copy(), self._start + drop
        return found

    def _joined(
        self, estimates: Float[np.ndarray, "targets channels time"], core: int
    ) -> Float[np.ndarray, "targets channels core"]:
        """Cross-fade the last block's end with this one's beginning, and keep its end."""
        if self._tail is not None:
            n = min(self._tail.shape[2], estimates.shape[2])
            rise = np.linspace(0, 1, self._tail.shape[2] + 2, dtype=np.float32)[1 : n + 1]
            estimates[:, :, :n] = rise * estimates[:, :, :n] + (1 - rise) * self._tail[:, :, :n]
        self._tail = estimates[:, :, core:].copy()
        return estimates[:, :, :core]

    def _separated(
        self, windows: list[Float[np.ndarray, "channels _"]]
    ) -> list[Float[np.ndarray, "targets channels _"]]:
        """Estimate windows of the input, several at once where they are of one length."""
        if len({window.shape[1] for window in windows}) > 1:
            return [found for window in windows for found in self._separated([window])]
        if not any(window.any() for window in windows):
            self._before = None
            return [np.zeros((self.n_targets, *window.shape), np.float32) for window in windows]
        audio = torch.from_numpy(np.stack(windows)).to(self.device)
        with torch.inference_mode(), exact_float32():
            if self.channels == 1 or self.stereo == "channels":
                rows = self.estimate(audio.flatten(0, 1)).float()
                found = rows.reshape(*audio.shape[:2], self.n_targets, -1).transpose(1, 2)
            else:
                mono = down_mix(audio, self.stereo)
                estimates = self.estimate(mono).float()
                found = torch.stack([spread_to_channels(*some) for some in zip(estimates, mono, audio, strict=True)])
            if not self.ordered:
                found = torch.stack([self._matched(one) for one in found])
        return list(found.cpu().numpy())

    def _matched(self, found: Float[Tensor, "targets channels time"]) -> Float[Tensor, "targets channels time"]:
        """Put the estimates of a block in the order of the one before, as what both have estimated says."""
        from scipy.optimize import linear_sum_assignment  # 0.3 s that only a model without queries needs

        if self._before is not None:
            n = min(self._before.shape[2], found.shape[2])
            before, now = self._before[:, :, :n].flatten(1), found[:, :, :n].flatten(1)
            _, order = linear_sum_assignment((before @ now.T).cpu().numpy(), maximize=True)
            found = found[torch.from_numpy(order).to(found.device)]
        self._before = found[:, :, -2 * self.blocks.context :].clone()
        return found

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


def down_mix(audio: Float[Tensor, "rows channels time"], stereo: Stereo = "mid") -> Float[Tensor, "rows time"]:
    """Mix the channels to one: their mean, and their alternating sum where the mean has cancelled; or that sum alone.

    Whether it has is a matter of the power under a window around each place, and the change is gradual.
    """
    signs = 1 - 2 * (torch.arange(audio.shape[1], device=audio.device) % 2)
    side = (audio * signs[:, None]).mean(dim=1)
    if stereo == "side":
        return side
    mean = audio.mean(dim=1)

    def power(signals: Tensor) -> Tensor:
        return running_level(signals, NEAR_SAMPLES, RATIO_HOP).square()

    loudest = torch.stack([power(channel) for channel in audio.unbind(dim=1)]).amax(dim=0)
    share = power(mean) / loudest / CANCELLED
    weight = (share - 0.5).clamp(0, 1)
    return weight * mean + (1 - weight) * side


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

    mixture, channels = spectra(mono[None]), spectra(audio)
    power = mixture.real.square() + mixture.imag.square()
    inverse = mixture.conj() / (power + RATIO_FLOOR * power.mean(dim=-1, keepdim=True) + 1e-20)
    found = []
    for estimate in estimates:  # one by one: their spectra are eight times as large as they are
        masked = spectra(estimate[None]) * inverse * channels
        found.append(istft(masked, n_fft=RATIO_N_FFT, hop_length=RATIO_HOP, length=padded)[:, :length])
    return torch.stack(found)
