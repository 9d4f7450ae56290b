"""BSS Eval: ratios after the best filter on the reference, which forgives any equalisation (Vincent et al. 2006).

About half of the time of an evaluation on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from fast_bss_eval.torch import square_cosine_metrics
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import LIMIT_DB

# A reference this much quieter than the loudest one of its pair (80 dB) counts as silent. Relative, because BSS Eval
# does not depend on the level: sounds at an amplitude of 1e-8 have the same scores as at 1.
SILENCE_RATIO = 1e-4

# References that filter into each other up to this share of their energy (-100 dB) leave the joint projection to
# rounding errors: measured, SIR came out as 28 dB where it is infinite.
DEPENDENCE = 1 - 1e-10

# BSS Eval holds copies of a block-Toeplitz matrix of (sources x taps)^2 doubles per item: 80 MB in all at 2 sources of
# 2 s and 512 taps. More items at once are no faster on a CPU.
BSS_ITEMS_AT_ONCE = {"cpu": 4, "cuda": 64}


class Metric(metrics.Metric):
    """SDR, SIR and SAR of BSS Eval, of two sources; and the SDR's gain over the mixture's."""

    columns = ("bss_sdr", "bss_sir", "bss_sar")
    gains = ("bss_sdr",)

    def __init__(self, *, filter_samples: Annotated[int, Field(gt=1, le=4096)]) -> None:
        self.filter_samples = filter_samples

    def __call__(
        self,
        estimates: Float[Tensor, "batch estimates time"],
        target: Float[Tensor, "batch time"],
        interferer: Float[Tensor, "batch time"],
    ) -> dict[str, Float[Tensor, "batch estimates"]]:
        """Score all of them by `bss_eval`."""
        found = bss_eval(estimates, torch.stack([target, interferer], dim=1), filter_samples=self.filter_samples)
        return {"bss_sdr": found.sdr, "bss_sir": found.sir, "bss_sar": found.sar}


@dataclass(frozen=True)
class BssEval:
    """Scores of estimates of one source, in dB within ±100 dB: NaN where BSS Eval has no answer."""

    sdr: Float[Tensor, "batch estimates"]  # against the reference, filtered
    sir: Float[Tensor, "batch estimates"]  # how much of the other sources is left
    sar: Float[Tensor, "batch estimates"]  # how much is there that no source explains


def bss_eval(
    estimates: Float[Tensor, "batch estimates time"],
    references: Float[Tensor, "batch sources time"],
    *,
    filter_samples: int,
) -> BssEval:
    """BSS Eval (version 3, "sources") of several estimates of `references[:, 0]`; the other references interfere.

    Equals mir_eval.separation.bss_eval_sources(compute_permutation=False) of each estimate, to 1e-3 dB within
    the limits of ±100 dB. The projections depend on the references only, so they are factorised once for all
    estimates: the mixture and two estimates cost 1.1 times as much as one.

    fast_bss_eval alone is wrong or fails for a batch in these cases, each of which is kept to its own item here:
    a silent or non-finite reference (all NaN), a silent or non-finite estimate (NaN), references that are filtered
    copies of each other (NaN), and levels below 1e-6 (right, since everything is brought to unit RMS first).
    float32 is off by up to 0.8 dB, and conjugate gradients by up to 17 dB, on tonal sounds: neither is used.
    """
    to_each, to_all = _coherences(estimates, references, filter_samples)
    return _scores(to_each[:, 0], to_all)


def bss_eval_sources(
    estimates: Float[Tensor, "batch estimates time"],
    references: Float[Tensor, "batch sources time"],
    *,
    filter_samples: int,
) -> BssEval:
    """Score one estimate per reference, in their order; the other references are each one's interferers.

    One factorisation for all of an item's sources: of four, a quarter of the time of `bss_eval` for one by one.
    """
    if estimates.shape[1] != references.shape[1]:
        raise ValueError(f"{estimates.shape[1]} estimates of {references.shape[1]} sources: one of each is needed")
    to_each, to_all = _coherences(estimates, references, filter_samples)
    return _scores(to_each.diagonal(dim1=1, dim2=2), to_all)


def _scores(to_target: Float[Tensor, "batch estimates"], to_all: Float[Tensor, "batch estimates"]) -> BssEval:
    return BssEval(sdr=_decibels(to_target), sir=_decibels(to_target / to_all), sar=_decibels(to_all))


def _coherences(
    estimates: Float[Tensor, "batch estimates time"],
    references: Float[Tensor, "batch sources time"],
    filter_samples: int,
) -> tuple[Float[Tensor, "batch sources estimates"], Float[Tensor, "batch estimates"]]:
    """Shares of each estimate's energy in the shifts of each reference, and in those of all; NaN where undefined."""
    estimates, references = estimates.double(), references.double()
    loudness = _rms(references)
    audible = (loudness > SILENCE_RATIO * loudness.amax(dim=-1, keepdim=True)) & loudness.isfinite()
    valid_item = audible.all(dim=-1)
    valid = valid_item[:, None] & (_rms(estimates) > 0) & estimates.isfinite().all(dim=-1)

    to_each = estimates.new_full((len(estimates), references.shape[1], estimates.shape[1]), torch.nan)
    to_all = estimates.new_full(estimates.shape[:2], torch.nan)
    index = valid_item.nonzero()[:, 0]
    at_once = BSS_ITEMS_AT_ONCE[estimates.device.type]
    for start in range(0, len(index), at_once):
        items = index[start : start + at_once]
        # An estimate without a score is replaced by one that has one, for the solver's sake.
        stand_in = references[items, :1]
        estimate = torch.where(valid[items, :, None], estimates[items], stand_in)
        found = _coherence(_unit_rms(estimate), _unit_rms(references[items]), filter_samples)
        to_each[items], to_all[items] = found
    to_all = torch.where(valid, to_all, torch.nan)
    return torch.where(valid[:, None], to_each, torch.nan), to_all


def _coherence(
    estimates: Float[Tensor, "batch estimates time"],
    references: Float[Tensor, "batch sources time"],
    filter_samples: int,
) -> tuple[Float[Tensor, "batch sources estimates"], Float[Tensor, "batch estimates"]]:
    """Those of items whose signals all sound; NaN for an item whose references are copies of each other."""
    n_estimates = estimates.shape[1]
    # The references are projected too, as further estimates, to see whether one is a filtered copy of another.
    signals = torch.cat([estimates, references], dim=1)
    try:
        with _one_thread():
            to_each, to_all = square_cosine_metrics(references, signals, filter_length=filter_samples)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # Singular: of which item, it does not say.
        if len(references) == 1:
            to_all = estimates.new_full((1, n_estimates), torch.nan)
            return to_all[:, None].expand(-1, references.shape[1], -1), to_all
        found = [_coherence(e[None], r[None], filter_samples) for e, r in zip(estimates, references, strict=True)]
        return torch.cat([each for each, _ in found]), torch.cat([every for _, every in found])
    kinship = to_each[:, :, n_estimates:] - torch.eye(references.shape[1], dtype=to_each.dtype, device=to_each.device)
    independent = (kinship < DEPENDENCE).all(dim=(1, 2))
    return (
        torch.where(independent[:, None, None], to_each[:, :, :n_estimates], torch.nan),
        torch.where(independent[:, None], to_all[:, 0, :n_estimates], torch.nan),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's batched LU on the CPU is wrong with several threads, with or without an error (pytorch#142815)."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _rms(waveform: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
    return waveform.square().mean(dim=-1).sqrt()


def _unit_rms(waveform: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    return waveform / _rms(waveform)[..., None]


def _decibels(share: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """A share of the energy as its ratio to the rest, in dB."""
    share = share.clamp(0, 1)
    return (10 * torch.log10(share / (1 - share))).clamp(-LIMIT_DB, LIMIT_DB)
