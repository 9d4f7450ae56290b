"""How well a separator without queries does: numbers per mixture of mixtures, per mixture of stems, and per pair.

    mixture of mixtures   its outputs, summed into two groups by the best assignment, against x1 and x2: what
                          mixture-invariant training sees. It says little: N copies of x / N score +3 dB (do-nothing),
                          and outputs that separate nothing can reach the top (losses.py, report)
    mixture of stems      outputs summed by the best assignment of each to one stem, against the stems. This is the
                          separation; it takes stems, which training never had
    evaluation pair       the same with target and interferer, of the chain's pairs

The best assignment looks at the references: these are upper bounds of what a user can pick out. Where there are more
than 2^20 assignments (12 outputs to 4 stems), it is that of least squares, which is a lower one.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.evaluation.masks import effective_sources, mask_energies, mask_overlap, signal_energies
from pipeline.evaluation.metrics.bss_eval import bss_eval_sources
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.evaluation.statistics import finite_mean
from pipeline.nn.losses import MAX_ASSIGNMENTS, Objective, Search, best_assignment, mixit_loss, remix

MAX_SNR_DB = 30.0  # of the mixture-of-mixtures SNR, as of the training loss
MAX_SI_SNR_DB = 100.0

# Names of the scores, in the order of a summary.
MOM_SCORES = ("snr", "si_snr", "do_nothing_snr", "do_nothing_si_snr", "snr_above_do_nothing")
MASK_SCORES = ("overlap", "ne_mask", "ne_energy")
STEM_SCORES = ("si_snri", "si_snr", "sdr", "sir", "sar")
PAIR_SCORES = (("sdri", "median"), ("sdri", "mean"), ("si_sdri", "median"), ("si_sdri", "mean"))


def mom_scores(
    estimates: Float[Tensor, "batch sources time"],
    masks: Float[Tensor, "batch sources bins frames"],
    mixtures: Float[Tensor, "batch 2 time"],
) -> dict[str, Float[np.ndarray, " batch"]]:
    """Scores of mixtures of mixtures in dB, those of doing nothing, and how the outputs share the work.

    `masks` are those of the same input, of any kind of bins; overlap 1 is no separation, ne_* are effective sources.
    """
    search = _search(estimates.shape[1], 2)
    found: dict[str, Tensor] = {}
    objectives: tuple[tuple[Objective, float], ...] = (("snr", MAX_SNR_DB), ("si_snr", MAX_SI_SNR_DB))
    for objective, limit in objectives:
        found[objective] = -mixit_loss(estimates, mixtures, objective=objective, max_snr_db=limit, search=search).loss
        found[f"do_nothing_{objective}"] = _do_nothing(mixtures, estimates.shape[1], objective, limit)
    found["snr_above_do_nothing"] = found["snr"] - found["do_nothing_snr"]
    found["overlap"] = mask_overlap(masks)
    found["ne_mask"] = effective_sources(mask_energies(masks))
    found["ne_energy"] = effective_sources(signal_energies(estimates))
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def _do_nothing(
    mixtures: Float[Tensor, "batch 2 time"], n_sources: int, objective: Objective, max_snr_db: float
) -> Float[Tensor, " batch"]:
    """Score of n copies of x / n by their best assignment, exactly for any n: only how many go to each side counts."""
    whole = mixtures.sum(dim=1, keepdim=True)
    losses = [
        mixit_loss(
            torch.cat([whole * (k / n_sources), whole * (1 - k / n_sources)], dim=1),
            mixtures,
            objective=objective,
            max_snr_db=max_snr_db,
        ).loss
        for k in range(n_sources // 2 + 1)
    ]
    return -torch.stack(losses).amin(dim=0)


def assigned(
    estimates: Float[Tensor, "batch sources time"], references: Float[Tensor, "batch references time"]
) -> Float[Tensor, "batch references time"]:
    """The sums of outputs that fit the references best by SI-SNR, every output going to one of them."""
    search = _search(estimates.shape[1], references.shape[1])
    assignment = best_assignment(estimates, references, objective="si_snr", max_snr_db=MAX_SI_SNR_DB, search=search)
    return remix(estimates, assignment, references.shape[1])


def _search(n_sources: int, n_references: int) -> Search:
    return "exact" if n_references**n_sources <= MAX_ASSIGNMENTS else "least_squares"


def stem_scores(
    estimates: Float[Tensor, "batch sources time"],
    stems: Float[Tensor, "batch stems time"],
    n_stems: Int[np.ndarray, " batch"],
    bss_filter_samples: int | None,
) -> dict[str, Float[np.ndarray, " batch"]]:
    """Mean over the stems of each mixture (their sum): SI-SNR, its gain over the mixture, and BSS Eval.

    An item has `n_stems` stems, two at least; silence lies behind them. NaN where a score is undefined, and for BSS
    Eval without filter length.
    """
    found = {name: np.full(len(estimates), np.nan) for name in STEM_SCORES}
    for count in np.unique(n_stems).tolist():
        rows = np.flatnonzero(n_stems == count)
        references = stems[torch.from_numpy(rows), :count]
        mixture = references.sum(dim=1, keepdim=True)
        outputs = assigned(estimates[torch.from_numpy(rows)], references)
        got, had = si_sdr(outputs, references), si_sdr(mixture.expand_as(references), references)
        found["si_snr"][rows] = finite_mean(got.cpu().numpy())
        found["si_snri"][rows] = finite_mean((got - had).cpu().numpy())
        if bss_filter_samples is None:
            continue
        bss = bss_eval_sources(outputs, references, filter_samples=bss_filter_samples)
        for name in ("sdr", "sir", "sar"):
            found[name][rows] = finite_mean(getattr(bss, name).cpu().numpy())
    return found


def pair_scores(
    estimates: Float[Tensor, "batch sources time"],
    target: Float[Tensor, "batch time"],
    interferer: Float[Tensor, "batch time"],
) -> dict[str, Float[np.ndarray, " batch"]]:
    """Scores of the chain's pairs: of the outputs that go to the target, in dB. Silence where none does: SDR 0."""
    references = torch.stack([target, interferer], dim=1)
    search = _search(estimates.shape[1], 2)
    assignment = best_assignment(estimates, references, objective="snr", max_snr_db=MAX_SNR_DB, search=search)
    output, mixture = remix(estimates, assignment, 2)[:, 0], target + interferer
    found = {"sdr": sdr(output, target), "sdr_mixture": sdr(mixture, target)}
    found |= {"si_sdr": si_sdr(output, target), "si_sdr_mixture": si_sdr(mixture, target)}
    found["sdri"] = found["sdr"] - found["sdr_mixture"]
    found["si_sdri"] = found["si_sdr"] - found["si_sdr_mixture"]
    return {name: value.cpu().numpy() for name, value in found.items()}
