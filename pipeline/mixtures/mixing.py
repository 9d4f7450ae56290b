"""How two anchors become a mixture, in training and in evaluation alike.

    target ─────────────────────────┐
                                    + ──> mixture ──┐
    interferer ── x gain ───────────┘               ├── normalize ──> mixture, target, interferer
                  sqrt(E target / E interferer)     │
    target ─────────────────────────────────────────┘

At equal energies the mixture has a signal-to-noise ratio of 0 dB (Kong et al., arXiv:2305.07447, sec. 3.3, "energy
augmentation"). The functions take NumPy arrays and Torch tensors, any batch shape in front of time, and return
what they were given: same library, device and precision.
"""

from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.core.config import Params

Normalize = Literal["none", "joint", "declip", "separate"]
Array = TypeVar("Array", np.ndarray, Tensor)

# Energies below this are silence: it bounds the gain's denominator (Kong et al.'s code). -100 dBFS, a tenth of one
# int16 step squared.
SILENT_ENERGY = 1e-10
SILENT_PEAK = 1e-8
# Liu et al. (AudioSep): a mixture that would clip is brought down to this peak, its target with it.
DECLIPPED_PEAK = 0.9


class PairsParams(Params):
    """Section `pairs:` of params.yaml."""

    exclude: Literal["none", "label", "ontology"]
    normalize: Normalize
    match_energy: bool
    min_gain: float = Field(gt=0, le=10**6)
    max_gain: float = Field(gt=0, le=10**6)

    @model_validator(mode="after")
    def _ordered(self) -> "PairsParams":
        if self.min_gain > self.max_gain:
            raise ValueError(f"min_gain {self.min_gain} is above max_gain {self.max_gain}")
        return self


def energy(waveform: Float[Array, "*batch time"]) -> Float[Array, "*batch"]:
    """Mean square over time; full scale is 1."""
    return (waveform * waveform).mean(-1)


def level_ratio(
    target_energy: Float[Array, "*batch"], interferer_energy: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The gain that brings the interferer to the target's energy, before it is bounded."""
    return _library(target_energy).sqrt(target_energy / interferer_energy.clip(SILENT_ENERGY))


def energy_gain(
    target_energy: Float[Array, "*batch"],
    interferer_energy: Float[Array, "*batch"],
    *,
    match_energy: bool,
    min_gain: float,
    max_gain: float,
) -> Float[Array, "*batch"]:
    """The interferer's gain: `level_ratio` within [min_gain, max_gain]; one everywhere if `match_energy` is off.

    A silent target gives min_gain, not zero: the mixture is then the faint interferer, and the right answer silence.
    """
    ratio = level_ratio(target_energy, interferer_energy)
    return ratio.clip(min_gain, max_gain) if match_energy else _library(ratio).ones_like(ratio)


def mix(
    target: Float[Array, "*batch time"],
    interferer: Float[Array, "*batch time"],
    gain: Float[Array, "*batch"],
    normalize: Normalize,
) -> tuple[Float[Array, "*batch time"], Float[Array, "*batch time"], Float[Array, "*batch time"]]:
    """Mixture, target and interferer, as the separator and the metrics are to see them.

    none      mixture = target + gain * interferer, whatever its peak
    joint     all three divided by the mixture's peak
    declip    all three times 0.9 / peak, only where the mixture's peak is above 1 (AudioSep)
    separate  each divided by its own peak: Zhao et al. (arXiv:2407.11745) eq. 2 read literally

    Under all but `separate`, mixture - target = interferer: the target is contained in the mixture at the level the
    loss asks for. Under `separate` it is not, by up to 6 dB, so that SDR(mixture) is no longer the SNR of the mix.
    Silence stays silence: nothing is divided by a peak below 1e-8.
    """
    interferer = gain[..., None] * interferer
    mixture = target + interferer
    if normalize == "none":
        return mixture, target, interferer
    if normalize == "separate":
        return _unit_peak(mixture) * mixture, _unit_peak(target) * target, _unit_peak(interferer) * interferer
    scale = _unit_peak(mixture) if normalize == "joint" else _declip(mixture)
    return scale * mixture, scale * target, scale * interferer


def _peak(waveform: Float[Array, "*batch time"]) -> Float[Array, "*batch 1"]:
    return _library(waveform).amax(abs(waveform), -1)[..., None]


def _unit_peak(waveform: Float[Array, "*batch time"]) -> Float[Array, "*batch 1"]:
    peak = _peak(waveform)
    return _library(peak).where(peak > SILENT_PEAK, 1 / peak.clip(SILENT_PEAK), 1.0)


def _declip(waveform: Float[Array, "*batch time"]) -> Float[Array, "*batch 1"]:
    peak = _peak(waveform)
    return _library(peak).where(peak > 1, DECLIPPED_PEAK / peak.clip(SILENT_PEAK), 1.0)


def _library(array: Array) -> ModuleType:
    return torch if isinstance(array, Tensor) else np
