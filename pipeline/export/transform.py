"""Waveform to time-frequency features and back in real arithmetic, as convolutions that any runtime has.

The values are those of `pipeline.nn.features` and `pipeline.nn.fbank` up to the rounding of float32. The matrices of a
transform of 1024 take 8 MB. Nothing here looks at a length, so that a trace of it holds for all lengths.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn import fbank
from pipeline.nn.features import SAMPLE_RATE, SILENT_POWER
from pipeline.upstreams import mae


class Transform(nn.Module):
    """The short-time Fourier transform of `features.stft`, and its inverse, with real and imaginary part apart.

    A waveform is longer than half a window: shorter ones cannot be reflected at their ends.
    """

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        cosine, sine = _waves(n_fft, n_fft)
        window = torch.hann_window(n_fft, dtype=torch.float64)
        share = torch.full((n_fft // 2 + 1, 1), 2 / n_fft, dtype=torch.float64)
        share[0] = share[-1] = 1 / n_fft
        self.analysis: Tensor
        self.synthesis: Tensor
        self.weight: Tensor
        self.register_buffer("analysis", (torch.cat([cosine, -sine]) * window)[:, None].float())
        self.register_buffer("synthesis", (torch.cat([share * cosine, -share * sine]) * window)[:, None].float())
        self.register_buffer("weight", window.square()[None, None].float())

    def forward(
        self, waveform: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch frames bins"], Float[Tensor, "batch frames bins"]]:
        """Transform into real and imaginary parts, of time // hop_length + 1 frames."""
        half = self.n_fft // 2
        reflected = F.pad(waveform[:, None], (half, half), mode="reflect")
        real, imaginary = F.conv1d(reflected, self.analysis, stride=self.hop_length).transpose(1, 2).chunk(2, dim=2)
        return real, imaginary

    def inverse(
        self, real: Float[Tensor, "batch frames bins"], imaginary: Float[Tensor, "batch frames bins"], length: int
    ) -> Float[Tensor, "batch time"]:
        """Take the first `length` samples of the least-squares inverse, as `features.istft` does."""
        both = torch.cat([real, imaginary], dim=2).transpose(1, 2)
        total = F.conv_transpose1d(both, self.synthesis, stride=self.hop_length)[:, 0]
        weight = F.conv_transpose1d(torch.ones_like(both[:1, :1]), self.weight, stride=self.hop_length)[:, 0]
        kept = slice(self.n_fft // 2, self.n_fft // 2 + length)
        return total[:, kept] / weight[:, kept]


class RunningLevel(nn.Module):
    """RMS under a window around each place: `features.running_level`, with the interpolation as a product."""

    def __init__(self, width: int, hop_length: int) -> None:
        super().__init__()
        self.reach = max(1, width // (2 * hop_length))
        self.hop_length = hop_length
        place = (torch.arange(hop_length) + 0.5) / hop_length - 0.5  # of each sample of a hop, from the hop's middle
        self.window: Tensor
        self.shares: Tensor
        self.register_buffer("window", torch.hann_window(2 * self.reach + 1, periodic=False)[None, None])
        self.register_buffer("shares", torch.stack([(-place).clamp(min=0), 1 - place.abs(), place.clamp(min=0)]))

    def forward(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        """Compute the level of each sample."""
        length = mixture.shape[1]
        padded = F.pad(mixture.square(), (0, -length % self.hop_length))
        power = padded.reshape(mixture.shape[0], -1, self.hop_length).mean(dim=2)
        weight = F.conv1d(torch.ones_like(power[:1, None]), self.window, padding=self.reach)
        near = F.conv1d(power[:, None], self.window, padding=self.reach) / weight
        near = F.pad(near.clamp(min=SILENT_POWER).sqrt(), (1, 1), mode="replicate")[:, 0]
        beside = torch.stack([near[:, :-2], near[:, 1:-1], near[:, 2:]], dim=2)
        return (beside @ self.shares).flatten(1)[:, :length]


class FilterBank(nn.Module):
    """The normalised filter bank that an A-MAE's encoder is given of mixtures of one length: `mae.Upstream.features`.

    ValueError for mixtures of more frames than the encoder takes at once.
    """

    def __init__(self, mae_input: mae.MaeInput, samples: int) -> None:
        super().__init__()
        self.low_samples = math.ceil(samples * fbank.SAMPLE_RATE / SAMPLE_RATE)
        self.frames = mae.n_frames(mae_input, self.low_samples)
        if self.frames > mae.MAX_FRAMES:
            raise ValueError(f"the encoder takes {mae.MAX_FRAMES} frames at once, and mixtures have {self.frames}")
        self.hop = 35 if mae_input == "hop35" else fbank.HOP_SAMPLES
        self.padded_samples = fbank.WINDOW_SAMPLES + (self.frames - 1) * self.hop
        if mae_input == "pad1024":  # behind the end, features are padded and not samples
            self.padded_samples = max(fbank.WINDOW_SAMPLES, self.low_samples)
        cosine, sine = _waves(fbank.N_FFT, fbank.WINDOW_SAMPLES)
        window = torch.hann_window(fbank.WINDOW_SAMPLES, periodic=False)
        self.window: Tensor
        self.waves: Tensor
        self.cut: Tensor
        self.banks: Tensor
        self.register_buffer("window", window)
        self.register_buffer("waves", torch.cat([cosine, sine]).T.float())
        self.register_buffer("cut", torch.eye(fbank.WINDOW_SAMPLES)[:, None])
        self.register_buffer("banks", fbank.mel_banks())

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames mels"]:
        """Compute the features of mixtures at 32 kHz."""
        low = fbank.to_16k(waveform, SAMPLE_RATE)
        low = low - low.mean(dim=1, keepdim=True)
        low = F.pad(low, (0, max(0, self.padded_samples - self.low_samples)))[:, : self.padded_samples]
        frames = F.conv1d(low[:, None], self.cut, stride=self.hop).transpose(1, 2)
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        real, imaginary = ((frames - fbank.PREEMPHASIS * before) * self.window @ self.waves).chunk(2, dim=2)
        found = ((real.square() + imaginary.square()) @ self.banks).clamp(min=fbank.FLOOR).log()
        found = fbank.normalise(found)
        n = (self.padded_samples - fbank.WINDOW_SAMPLES) // self.hop + 1
        return F.pad(found, (0, 0, 0, self.frames - n), value=fbank.PADDING)


def _waves(n_fft: int, samples: int) -> tuple[Float[Tensor, "bins samples"], Float[Tensor, "bins samples"]]:
    """Cosines and sines of a transform's bins over its first samples, float64."""
    turns = torch.arange(n_fft // 2 + 1)[:, None] * torch.arange(samples) % n_fft
    angle = turns.double() * (2 * math.pi / n_fft)
    return angle.cos(), angle.sin()
