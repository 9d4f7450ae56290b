"""Kaldi's log-mel filter bank as Audio-MAE takes it: 16 kHz, 128 mels, 25-ms windows every 10 ms; batched, any device.

Equal to torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type="hanning", num_mel_bins=128, dither=0,
use_energy=False), which takes one clip at a time. The order of operations is Kaldi's. It matters: the same arithmetic
folded into one matrix differs by 1e-2 in bins at the float32 noise floor.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchaudio.functional import resample

from pipeline.core.devices import exact_float32

SAMPLE_RATE = 16000  # Hz
N_MELS = 128
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
BLOCK_FRAMES = 512  # at once on a CPU, at least one clip: what more of them need between two steps outgrows its caches
N_FFT = 512
LOW_HZ, HIGH_HZ = 20.0, 8000.0
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps

# Of AudioSet's training set (Huang et al. 2022, arXiv:2207.06405, code); the factor of 2 is theirs too.
MEAN, STD = -4.2677393, 4.5689974
# What a value of 0 becomes. AudioMAE pads clips with zeros in the log domain: this is loud noise, not silence.
PADDING = -MEAN / (2 * STD)


def to_16k(waveform: Float[Tensor, "batch time"], sample_rate: int = 32000) -> Float[Tensor, "batch time_16k"]:
    """Resample to 16 kHz, exact float32 whatever the precision of the rest (torchaudio's windowed sinc, width 6)."""
    with torch.autocast(waveform.device.type, enabled=False), exact_float32():
        return resample(waveform.float(), sample_rate, SAMPLE_RATE)


def whole_frames(samples: int, hop_samples: int = HOP_SAMPLES) -> int:
    """Frames of a waveform of that many samples: only whole windows count."""
    return 0 if samples < WINDOW_SAMPLES else 1 + (samples - WINDOW_SAMPLES) // hop_samples


@lru_cache(maxsize=1)
def mel_banks() -> Float[Tensor, "bins mels"]:
    """Triangles that are linear in mel, 1127 ln(1 + f / 700), not in hertz; the Nyquist bin belongs to none.

    One of the 128 is empty: it lies between two bins of the transform, and is at the floor in every frame.
    """

    def mel(hz: float) -> float:
        return 1127.0 * math.log(1 + hz / 700)

    step = (mel(HIGH_HZ) - mel(LOW_HZ)) / (N_MELS + 1)
    left = mel(LOW_HZ) + torch.arange(N_MELS) * step
    centre, right = mel(LOW_HZ) + (torch.arange(N_MELS) + 1.0) * step, mel(LOW_HZ) + (torch.arange(N_MELS) + 2.0) * step
    bins = (1127.0 * (1.0 + SAMPLE_RATE / N_FFT * torch.arange(N_FFT // 2) / 700.0).log())[:, None]
    banks = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
    return F.pad(banks, (0, 0, 0, 1))


def fbank(
    waveform: Float[Tensor, "batch time"], *, hop_samples: int = HOP_SAMPLES
) -> Float[Tensor, "batch frames mels"]:
    """Natural logarithm of the mel-filtered power of 16-kHz waveforms in [-1, 1]; frames = 1 + (time - 400) // hop.

    ValueError for a waveform shorter than one window of 400 samples. Exact float32 whatever the precision of the rest:
    bfloat16 would move the features by 1.5 on average.
    """
    if waveform.shape[-1] < WINDOW_SAMPLES:
        raise ValueError(f"a waveform of {waveform.shape[-1]} samples has no window of {WINDOW_SAMPLES}")
    at_once = len(waveform)
    if waveform.device.type == "cpu":
        at_once = BLOCK_FRAMES // whole_frames(waveform.shape[-1], hop_samples)
    with torch.autocast(waveform.device.type, enabled=False), exact_float32():
        window = torch.hann_window(WINDOW_SAMPLES, periodic=False, device=waveform.device)
        banks = mel_banks().to(waveform.device)
        frames = waveform.float().unfold(-1, WINDOW_SAMPLES, hop_samples)
        return torch.cat([_log_mel(block, window, banks) for block in torch.split(frames, max(1, at_once))])


def _log_mel(
    frames: Float[Tensor, "batch frames samples"], window: Float[Tensor, " samples"], banks: Float[Tensor, "bins mels"]
) -> Float[Tensor, "batch frames mels"]:
    frames = frames - frames.mean(dim=-1, keepdim=True)
    padded = frames.new_zeros(*frames.shape[:-1], N_FFT)
    # Each sample less 0.97 of the one before it, the first less 0.97 of itself.
    emphasised = padded[..., :WINDOW_SAMPLES]
    emphasised[..., :1] = frames[..., :1]
    emphasised[..., 1:] = frames[..., :-1]
    emphasised.mul_(-PREEMPHASIS).add_(frames).mul_(window)
    # Kaldi takes the root and squares it again; so do we, for the sake of the last bits.
    power = torch.fft.rfft(padded).abs().square()
    return (power @ banks).clamp_(min=FLOOR).log_()


def normalise(features: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """By the statistics of AudioSet that Audio-MAE was trained with."""
    return (features - MEAN) / (2 * STD)
