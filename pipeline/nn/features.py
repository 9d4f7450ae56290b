"""Waveform to time-frequency features and back. No learned weights; everything here is float32, autocast or not.

Axes are frames then bins everywhere, as in PANNs, uss and AudioMAE. torch.stft has them the other way round;
this is the one place that turns it.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SILENT_POWER = 1e-12  # mean square of a mixture that is not made louder any more: -120 dBFS
MIN_WEIGHT = 1e-11  # of the windows over a sample, squared and summed, to divide by
SAMPLE_RATE = 32000  # Hz, of every network here: PANNs and uss were trained at it

# The log-mel front end of PANNs (Kong et al. 2020, arXiv:1912.10211, section IV).
MEL_N_FFT = 1024
MEL_HOP_LENGTH = 320  # samples: 10 ms
N_MELS = 64
MEL_F_MIN = 50.0  # Hz
MEL_F_MAX = 14000.0  # Hz
MEL_FLOOR = 1e-10  # power; log_mel is never below -100 dB


def stft(waveform: Float[Tensor, "batch time"], *, n_fft: int, hop_length: int) -> Complex[Tensor, "batch frames bins"]:
    """Short-time Fourier transform: periodic Hann of n_fft samples, centred with reflection, unnormalised.

    Gives time // hop_length + 1 frames of n_fft // 2 + 1 bins. Raises ValueError for a waveform that is too short
    to be reflected (n_fft // 2 samples or fewer).
    """
    if waveform.shape[-1] <= n_fft // 2:
        raise ValueError(f"a waveform of {waveform.shape[-1]} samples is too short to reflect {n_fft // 2} at its ends")
    with torch.autocast(waveform.device.type, enabled=False):
        waveform = waveform.float()
        window = torch.hann_window(n_fft, device=waveform.device)
        spectrum = torch.stft(waveform, n_fft, hop_length, window=window, center=True, return_complex=True)
    return spectrum.transpose(1, 2)


def istft(
    spectrum: Complex[Tensor, "batch frames bins"], *, n_fft: int, hop_length: int, length: int
) -> Float[Tensor, "batch time"]:
    """The first `length` samples of the least-squares inverse of `stft` (Griffin and Lim 1984, eq. 6).

    torch.istft's values and gradients (no second derivatives) in half of its time on a CPU: its own gradient
    transposes the whole spectrum. ValueError for hops above half a window, for bins of another n_fft, for no samples,
    for too few frames, and where the last sample hangs by the tip of one window.
    """
    frames, bins = spectrum.shape[1:]
    if not 0 < hop_length <= n_fft // 2:
        raise ValueError(f"hop_length {hop_length} is not between 1 and half of n_fft {n_fft}")
    if bins != n_fft // 2 + 1:
        raise ValueError(f"{bins} bins are not those of n_fft {n_fft}")
    if not 0 < length < frames * hop_length:
        raise ValueError(f"{length} samples are none, or have more than {frames} frames, one every {hop_length}")
    # Where the last one lies in the last window, the one before it, and so on. Hann's, squared, is a sine to the 4th.
    places = range(n_fft // 2 + length - 1 - (frames - 1) * hop_length, n_fft, hop_length)
    if sum(math.sin(math.pi * place / n_fft) ** 4 for place in places) < MIN_WEIGHT:
        raise ValueError(
            f"the last of {length} samples hangs by the tip of a window of {n_fft}, one every {hop_length}"
        )
    with torch.autocast(spectrum.device.type, enabled=False):
        window = torch.hann_window(n_fft, device=spectrum.device)
        total: Tensor = _OverlapAdd.apply(torch.fft.irfft(spectrum, n_fft) * window, hop_length)  # type: ignore[no-untyped-call]
        weight: Tensor = _OverlapAdd.apply(window.square().expand(1, frames, -1), hop_length)  # type: ignore[no-untyped-call]
        kept = slice(n_fft // 2, n_fft // 2 + length)
        return total[:, kept] / weight[:, kept]


class _OverlapAdd(torch.autograd.Function):
    """Each frame added `hop_length` samples behind the one before it; the gradient is cut back into frames, a view."""

    @staticmethod
    def forward(ctx: Any, frames: Float[Tensor, "batch frames size"], hop_length: int) -> Float[Tensor, "batch time"]:
        batch, count, size = frames.shape
        ctx.size, ctx.hop_length = size, hop_length
        # In rows of a hop, the parts of all frames that lie as far from their starts are added at once.
        rows = frames.new_zeros(batch, count + (size - 1) // hop_length, hop_length)
        for i, start in enumerate(range(0, size, hop_length)):
            part = frames[:, :, start : start + hop_length]
            rows[:, i : i + count, : part.shape[2]] += part
        return rows.flatten(1)[:, : (count - 1) * hop_length + size]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "batch time"]) -> tuple[Float[Tensor, "batch frames size"], None]:
        return gradient.unfold(1, ctx.size, ctx.hop_length), None


def magnitude(spectrum: Complex[Tensor, "*batch frames bins"]) -> Float[Tensor, "*batch frames bins"]:
    """|spectrum|, at least 1e-5: uss clamps the power at 1e-10, which keeps the root's gradient finite in silence."""
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-10).sqrt()


def running_level(mixture: Float[Tensor, "batch time"], width: int, hop: int) -> Float[Tensor, "batch time"]:
    """RMS under a Hann window of `width` samples around each place, at least -120 dBFS.

    The power is that of whole hops, and the level between their middles a straight line. At the ends the window is cut.
    """
    length = mixture.shape[1]
    power = F.pad(mixture.square(), (0, -length % hop)).reshape(len(mixture), -1, hop).mean(dim=2)
    half = max(1, width // (2 * hop))
    window = torch.hann_window(2 * half + 1, periodic=False, device=mixture.device)[None, None]
    weight = F.conv1d(torch.ones_like(power[:1, None]), window, padding=half)
    near = (F.conv1d(power[:, None], window, padding=half) / weight).clamp(min=SILENT_POWER).sqrt()
    return F.interpolate(near, scale_factor=hop, mode="linear")[:, 0, :length]


def _hz_to_mel(hz: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Slaney's mel scale (Auditory Toolbox, 1998): 3 mel per 200 Hz up to 1 kHz, then 27 mel per factor of 6.4."""
    return torch.where(
        hz < 1000, 3 * hz / 200, 15 + 27 * torch.log(hz.clamp(min=1e-9) / 1000) / torch.tensor(6.4).log()
    )


def _mel_to_hz(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@lru_cache(maxsize=8)
def mel_filters(*, n_fft: int, n_mels: int, f_min: float, f_max: float, sample_rate: int) -> Float[Tensor, "bins mels"]:
    """Triangles of unit area (per Hz) between neighbouring points of the mel scale: librosa's default filter bank.

    Computed in float64 and returned in float32, on the CPU. The tensor is shared between calls: do not write to it.
    """
    ends = _hz_to_mel(torch.tensor([f_min, f_max], dtype=torch.float64))
    corners = _mel_to_hz(torch.linspace(float(ends[0]), float(ends[1]), n_mels + 2, dtype=torch.float64))
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def log_mel(waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames mels"]:
    """PANNs' features at 32 kHz, in dB: 10 log10 of the mel-filtered power, 100 frames a second, 64 mels.

    Equal to torchlibrosa's Spectrogram and LogmelFilterBank (top_db None), which do the transform as a convolution.
    """
    spectrum = stft(waveform, n_fft=MEL_N_FFT, hop_length=MEL_HOP_LENGTH)
    with torch.autocast(waveform.device.type, enabled=False):
        filters = mel_filters(
            n_fft=MEL_N_FFT, n_mels=N_MELS, f_min=MEL_F_MIN, f_max=MEL_F_MAX, sample_rate=SAMPLE_RATE
        ).to(waveform.device)
        power = spectrum.real.square() + spectrum.imag.square()
        return 10 * torch.log10((power @ filters).clamp(min=MEL_FLOOR))


def pad_to(waveform: Float[Tensor, "batch time"], samples: int) -> Float[Tensor, "batch padded"]:
    """Silence appended up to `samples`; a waveform that is long enough comes back as it is."""
    return F.pad(waveform, (0, max(0, samples - waveform.shape[-1])))
