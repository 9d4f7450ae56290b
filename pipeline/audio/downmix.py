"""Several channels -> one: their mean, and where that cancels a channel that sounds.

Channels that are each other's opposite (wideners, a cable with its wires swapped) have a mean of zero. It is decided in
every tenth of a second by itself, by the power of all samples of all channels, so that a tone, a pair of surround
channels or half of a recording is noticed too. The windows lie at fixed places of a recording: a piece of it is the
same samples, whatever was read before.
"""

import numpy as np
from jaxtyping import Float32, Int16

WINDOW_SECONDS = 0.1
FADE_SECONDS = 0.005  # from the mean to a channel, and back
CANCELLED = 0.02  # power of the mean over that of unrelated channels as loud (-17 dB); lossy codecs leave -27 dB
SOUNDING = 0.5  # of the power of the loudest channel

Block = Int16[np.ndarray, "time channels"] | Float32[np.ndarray, "time channels"]


class Downmix:
    """Makes one channel of blocks that follow each other, each a number of whole windows, or up to the end of one."""

    def __init__(self, window: int, fade: int) -> None:
        self.window = window
        self.cancelled = False
        """Whether some window was not the mean."""
        self._ramp = (np.arange(fade, dtype=np.float32) + np.float32(0.5)) / np.float32(max(1, fade))
        self._channel: int | None = None  # of the window before; -1: the mean, None: there was no window

    def mix(self, frames: Block, full_scale: float, out: Float32[np.ndarray, " time"]) -> None:
        """Write one channel of a block, as parts of full scale."""
        n_channels = frames.shape[1]
        if n_channels == 1:
            np.divide(frames[:, 0], np.float32(full_scale), out=out, dtype=np.float32)
            return
        samples = frames.astype(np.float32, copy=False)
        _mean(samples, np.float32(full_scale), out)
        power = _powers(samples.reshape(-1), self.window * n_channels)
        is_cancelled = _powers(out, self.window) * (n_channels * full_scale) ** 2 < CANCELLED * power
        if not is_cancelled.any() and self._channel in (None, -1):
            self._channel = -1
            return
        for place in range(len(is_cancelled)):
            inside = slice(place * self.window, (place + 1) * self.window)
            channel = _sounding(samples[inside]) if is_cancelled[place] else -1
            self._replace(samples[inside], np.float32(full_scale), channel, out[inside])

    def _replace(
        self,
        samples: Float32[np.ndarray, "time channels"],
        full_scale: np.float32,
        channel: int,
        out: Float32[np.ndarray, " time"],
    ) -> None:
        before, self._channel = self._channel, channel
        self.cancelled = self.cancelled or channel >= 0
        fade = 0 if before is None or before == channel else min(len(self._ramp), len(out))
        is_mean = before is None or not 0 <= before < samples.shape[1]
        old = out[:fade].copy() if is_mean else samples[:fade, before] / full_scale
        if channel >= 0:
            np.divide(samples[:, channel], full_scale, out=out)
        out[:fade] = old + self._ramp[:fade] * (out[:fade] - old)


def _powers(samples: Float32[np.ndarray, " n"], window: int) -> Float32[np.ndarray, " windows"]:
    """Sum of squares in each window; the last one may be shorter."""
    whole = len(samples) // window
    inside = samples[: whole * window].reshape(whole, window)
    powers = np.vecdot(inside, inside)
    rest = samples[whole * window :]
    return np.append(powers, np.dot(rest, rest)).astype(np.float32) if len(rest) else powers


def _sounding(samples: Float32[np.ndarray, "time channels"]) -> int:
    """The first channel that is about as loud as the loudest: of a pair, the left one."""
    powers = np.einsum("tc,tc->c", samples, samples)
    return int(np.argmax(powers >= SOUNDING * powers.max()))


def _mean(
    samples: Float32[np.ndarray, "time channels"], full_scale: np.float32, out: Float32[np.ndarray, " time"]
) -> None:
    """Write the mean of two or more channels, as parts of full scale."""
    n_channels = samples.shape[1]
    scale = 1 / (full_scale * np.float32(n_channels))
    if n_channels > 2:
        np.matmul(samples, np.full(n_channels, scale), out=out)
    elif full_scale > 1:  # of integers, whose sum is exact
        np.add(samples[:, 0], samples[:, 1], out=out)
        np.multiply(out, scale, out=out)
    else:
        np.multiply(samples[:, 0], scale, out=out)  # before they are added: their sum may be more than a float holds
        out += samples[:, 1] * scale
