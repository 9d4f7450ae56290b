"""What separators share that mask a mixture brought to a level of 1: `bandsplit`, `gru`, `zipformer`.

The mixture's level is taken out before and put back after: an estimate scales with its mixture exactly. In a recording
longer than the mixtures of the training the level is that of what lies near (`running_level`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from pipeline.nn.features import SILENT_POWER, istft, running_level, stft
from pipeline.separators import QuerySeparator

BIN_FLOOR = 1e-6  # power of a bin beside one of the mixture's mean: 60 dB below
COMPRESSION = 0.3  # exponent of the magnitude beside the phase
N_FEATURES = 3  # of a bin: compressed real and imaginary part, log power


class Levelled(QuerySeparator):
    """Base class of separators that multiply the bins below Nyquist by a mask made from `planes`.

    ValueError for an n_fft that is odd, and for hops above half of it.
    """

    def __init__(self, *, query_dim: int, interferer_query: bool, n_fft: int, hop_length: int) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query)
        if n_fft % 2 or n_fft <= 0:
            raise ValueError(f"n_fft {n_fft} is not a positive multiple of 2")
        if not 0 < hop_length <= n_fft // 2:
            raise ValueError(f"hop_length {hop_length} is not between 1 and half of n_fft {n_fft}")
        self.n_fft, self.hop_length = n_fft, hop_length

    def through(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch *windows joint_dim"],
        mask: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "batch time"]:
        """The mixture through `mask(planes)`: (batch, frames, bins, 3) into factors of (batch, frames, bins)."""
        length = mixture.shape[-1]
        if len(query) != len(mixture):
            raise TypeError(f"query has {len(query)} rows, mixture {len(mixture)}")
        if self.is_long(length):
            assert self.segment_samples is not None
            level = running_level(mixture.float(), self.segment_samples, self.hop_length)
        else:
            # The root's gradient is infinite at 0, and 0 times infinity is not 0: hence the limit inside.
            level = mixture.float().square().mean(dim=-1, keepdim=True).clamp(min=SILENT_POWER).sqrt()
        # Up to a whole number of hops: the last sample then lies in the middle of a window, not under its tip.
        padded = max(length, self.n_fft // 2 + 1)
        padded += -padded % self.hop_length
        spectrum = stft(F.pad(mixture / level, (0, padded - length)), n_fft=self.n_fft, hop_length=self.hop_length)
        estimate = F.pad(spectrum[..., :-1] * mask(self.planes(spectrum[..., :-1])), (0, 1))  # Nyquist is silent
        return istft(estimate, n_fft=self.n_fft, hop_length=self.hop_length, length=padded)[:, :length] * level

    def planes(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch frames bins 3"]:
        """Compressed real and imaginary part of each bin, and its log power: near 1 all three, at the mean power."""
        mean_power = 3 / 8 * self.n_fft  # of a bin of white noise with an RMS of 1, under a Hann window
        spectrum = spectrum * mean_power**-0.5
        power = spectrum.real.square() + spectrum.imag.square() + BIN_FLOOR
        gain = power ** ((COMPRESSION - 1) / 2)
        return torch.stack([spectrum.real * gain, spectrum.imag * gain, 0.25 * power.log() + 1], dim=-1)

    def normed(self, query: Float[Tensor, "batch *windows joint_dim"]) -> Float[Tensor, "batch moments joint_dim"]:
        """Each embedding normed by itself, for a mean of several is shorter than each.

        There is one query of most mixtures, and one of each window of long ones.
        """
        batch = query.shape[0]  # which a trace can follow, as it cannot len
        normed = F.layer_norm(query.reshape(batch, -1, self.query_dim), (self.query_dim,))
        return normed.reshape(batch, -1, self.joint_dim)
