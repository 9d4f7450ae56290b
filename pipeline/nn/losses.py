"""Training objectives: one value per item of the batch, lower is better.

Those of `SEPARATION` compare an estimate with its target. The others train without targets, on mixtures of mixtures:
the network is given the sum x of several mixtures x_m and returns N estimates s_n, which `mixit_loss` sorts back into
the mixtures (Wisdom et al., "Unsupervised sound separation using mixture invariant training", arXiv:2006.12701):

    loss = min_A mean_m l(x_m, [A s]_m),   A in {0, 1}^(M x N) with a single 1 per column: M^N assignments

Written out, the remixes are a tensor of M^N x M x time. The objectives below depend on a remix only through inner
products, though, and these on nothing but the Gram matrix of the M + N signals. With g = |x_m|^2, c = <x_m, s_n>,
G = <s_n, s_k> and a the 0/1 vector of the sources that go to mixture m:

    <x_m, a s> = a . c_m     |a s|^2 = a G a     |x_m - a s|^2 = g_m - 2 a . c_m + a G a

So the search reads the waveforms once, takes no gradient, and evaluates M 2^N subsets instead of M^N remixes. The
assignment it finds is then evaluated directly, and only that is differentiated: differences of Gram entries would
cancel. Value and gradient are those of the brute force.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from pipeline.nn.features import pad_to, stft

Objective = Literal["snr", "si_snr", "mse"]
Search = Literal["exact", "least_squares"]

CHUNK_SAMPLES = 65_536  # of a Gram matrix at once: the float64 copy stays small, however long the waveforms
MAX_ASSIGNMENTS = 2**20  # of an exact search: 8 MiB per item and table. 20 sources for 2 mixtures, 10 for 4

# Energies are sums over time of squared samples. An energy of 1e-8 is far below any recording: it only keeps
# logarithms and quotients of silence finite.
ENERGY_EPSILON = 1e-8
RATIO_EPSILON = 1e-8  # of SI-SNR: a remix without a trace of its mixture, silence included, costs 80 dB
SILENCE_RATIO = 1e-3  # a mixture 30 dB below the sum of all is measured against that level, not against its own

ERROR_FLOOR = 1e-3  # of an error's power beside its mixture's: what is 30 dB below is good enough

# Of least squares, relative to each source's own energy. Small enough to leave float64 solutions of distinct sources
# alone; equal sources share their weight because of it, where the plain normal equations have no solution.
RIDGE = 1e-10


class MixIT(NamedTuple):
    """The loss of the best assignment, and that assignment."""

    loss: Float[Tensor, " batch"]  # in dB for "snr" and "si_snr", a mean square for "mse"
    assignment: Int[Tensor, "batch sources"]  # the mixture each source went to


def l1_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean absolute difference of the waveforms, per item (Kong et al., arXiv:2305.07447, eq. 9).

    In the unit of the waveforms. Call it outside autocast: bfloat16 rounds a waveform to 8 bits.
    """
    return (estimate - target).abs().mean(dim=-1)


def level(mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch 1"]:
    """Measure the RMS of each mixture; silence has 1e-6, -120 dBFS, so that nothing is divided by nothing."""
    return mixture.square().mean(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()


def rms_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Root mean square of the difference, of signals in units of their mixture's level, down to 30 dB below it.

    Between a mean square, which the worst items of a batch rule, and its logarithm, which near-silent ones do.
    """
    return ((estimate - target).square().mean(dim=-1) + ERROR_FLOOR).sqrt()


def snr_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Power of the difference in dB, of signals in units of their mixture's level, down to 30 dB below it.

    The negative SNR up to a constant of the target. A silent target is no worse than another: its error is measured
    against the mixture.
    """
    return 10 * torch.log10((estimate - target).square().mean(dim=-1) + ERROR_FLOOR)


def si_snr_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Negative SI-SNR in dB (Le Roux et al. 2019, means kept), of signals in units of their mixture's level.

    Both powers have a floor 30 dB below the mixture: an estimate of silence, right or wrong, is about 0 dB.
    """
    scale = (estimate * target).sum(dim=-1, keepdim=True) / (target.square().sum(dim=-1, keepdim=True) + ENERGY_EPSILON)
    wanted = scale * target
    error = (estimate - wanted).square().mean(dim=-1)
    return -10 * torch.log10((wanted.square().mean(dim=-1) + ERROR_FLOOR) / (error + ERROR_FLOOR))


def spectral_loss(
    estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """Mean square difference of compressed spectra, of magnitudes and, weighing half, of complex numbers.

    |X|^0.3 and its phase in windows of 1,024 samples (Ephrat et al. 2018; Braun and Tashev 2021), of signals in units
    of their mixture's level.
    """
    pairs = [_compressed(signal, n_fft=1024, exponent=0.3) for signal in (estimate, target)]
    (magnitude, spectrum), (wanted_magnitude, wanted_spectrum) = pairs
    difference = spectrum - wanted_spectrum
    terms = (magnitude - wanted_magnitude).square() + 0.5 * (difference.real.square() + difference.imag.square())
    return terms.mean(dim=(1, 2))


def mrstft_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean magnitude of the spectra of the difference in windows of 512, 1,024 and 2,048 samples, in units of noise."""
    spectra = [_spectrum(estimate - target, n_fft) for n_fft in (512, 1024, 2048)]
    return torch.stack([spectrum.abs().mean(dim=(1, 2)) for spectrum in spectra]).mean(dim=0)


def _spectrum(waveform: Float[Tensor, "batch time"], n_fft: int) -> Complex[Tensor, "batch frames bins"]:
    """STFT at a quarter of a window, in units of white noise with an RMS of 1; short waveforms get silence behind."""
    padded = pad_to(waveform, n_fft // 2 + 1)
    return stft(padded, n_fft=n_fft, hop_length=n_fft // 4) * (3 / 8 * n_fft) ** -0.5


def _compressed(
    waveform: Float[Tensor, "batch time"], *, n_fft: int, exponent: float
) -> tuple[Float[Tensor, "batch frames bins"], Complex[Tensor, "batch frames bins"]]:
    """|X|^exponent, and the same with X's phase; bins 60 dB below noise count as silent."""
    spectrum = _spectrum(waveform, n_fft)
    power = spectrum.real.square() + spectrum.imag.square() + 1e-6
    return power ** (exponent / 2), spectrum * power ** ((exponent - 1) / 2)


def separation_loss(
    name: str,
    estimate: Float[Tensor, "batch time"],
    target: Float[Tensor, "batch time"],
    mixture: Float[Tensor, "batch longer"],
) -> Float[Tensor, " batch"]:
    """Compute the objective of that name, one value per item; ValueError for a name that is not in `SEPARATION`.

    `mixture` is whole where estimate and target are a part of it: the level of what is asked for in a part says little
    of how much it matters. All objectives but `l1` are of signals divided by the mixture's level.
    """
    if name not in SEPARATION:
        raise ValueError(f"there is no objective {name!r}; there are {', '.join(SEPARATION)}")
    if name == "l1":
        return l1_loss(estimate, target)
    unit = level(mixture)
    return SEPARATION[name](estimate / unit, target / unit)


SEPARATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_loss,
    "l1_level": l1_loss,
    "rms": rms_loss,
    "snr": snr_loss,
    "si_snr": si_snr_loss,
    "spectral": spectral_loss,
    "mrstft": mrstft_loss,
}
"""Objectives that compare an estimate (batch, time) with its target, by their names in `train.loss_weights`."""


def mixit_loss(
    estimates: Float[Tensor, "batch sources time"],
    mixtures: Float[Tensor, "batch mixtures time"],
    *,
    objective: Objective = "snr",
    max_snr_db: float = 30.0,
    search: Search = "exact",
) -> MixIT:
    """Mixture-invariant loss: the mean over the mixtures of the objective, for the assignment where it is lowest.

    With y a mixture, r its remix and tau = 10^(-max_snr_db / 10):

        snr      10 log10( |y - r|^2 + tau p ) - 10 log10 p,   p = max(|y|^2, 1e-3 |x|^2), x the sum of the mixtures
        si_snr   -10 log10( t / (e + tau t + 1e-8) + 1e-8 ),   t = |k y|^2, e = |r - k y|^2, k = <r, y> / (|y|^2 + 1e-8)
        mse      mean over time of (y - r)^2

    snr is that of Wisdom et al., eq. 2, a number of dB because of its second term, which has no gradient. Without the
    lower limit of p, a silent mixture would weigh up to 80 dB. si_snr is of signals without their means (Le Roux et al.
    2019) and, with max_snr_db=math.inf, Asteroid's; it does not fix the level of the estimates, which then do not add
    up to the input. Neither falls below -max_snr_db, where gradients vanish.

    A source of silence goes to the first mixture. Waveforms of less than float32 are converted and autocast is off in
    here, but estimates made in bfloat16 carry its rounding. See `best_assignment` for `search` and its ValueError.
    """
    assignment = best_assignment(estimates, mixtures, objective=objective, max_snr_db=max_snr_db, search=search)
    with torch.autocast(estimates.device.type, enabled=False):
        mixtures = _at_least_float32(mixtures)
        remixes = remix(_at_least_float32(estimates), assignment, mixtures.shape[1])
        if objective == "si_snr":
            mixtures = mixtures - mixtures.mean(dim=-1, keepdim=True)
            remixes = remixes - remixes.mean(dim=-1, keepdim=True)
            scale = (remixes * mixtures).sum(dim=-1) / (_energy(mixtures) + ENERGY_EPSILON)
            wanted = scale[..., None] * mixtures
            loss = _negative_si_snr(_energy(wanted), _energy(remixes - wanted), max_snr_db)
        elif objective == "snr":
            power = _reference_power(_energy(mixtures), _energy(mixtures.sum(dim=1)))
            loss = _negative_snr(power, _energy(mixtures - remixes), max_snr_db)
        else:
            loss = (mixtures - remixes).square().mean(dim=-1)
        return MixIT(loss.mean(dim=1), assignment)


@torch.no_grad()
def best_assignment(
    estimates: Float[Tensor, "batch sources time"],
    references: Float[Tensor, "batch references time"],
    *,
    objective: Objective = "snr",
    max_snr_db: float = 30.0,
    search: Search = "exact",
) -> Int[Tensor, "batch sources"]:
    """The reference that each source goes to, so that the sums of sources fit all references best; no gradient.

    The references are the mixtures of `mixit_loss`, or in evaluation the stems of one. A reference may get nothing.

    "exact" compares all assignments, and raises a ValueError above 2^20 of them. "least_squares" ("efficient MixIT",
    Wisdom et al., arXiv:2106.00847) solves for real weights and gives each source to the reference where its weight
    is highest, a silent one to the first. It ignores the objective (but for the means that "si_snr" removes), and it
    is often wrong before the outputs fit well: the larger part of the time for unrelated outputs.
    """
    if search == "exact":
        losses = assignment_losses(estimates, references, objective=objective, max_snr_db=max_snr_db)
        code = losses.argmin(dim=1)
        n_references = references.shape[1]
        place = n_references ** torch.arange(estimates.shape[1], device=code.device)
        return code[:, None] // place % n_references

    _, cross, gram, _ = _inner_products(estimates, references, centred=objective == "si_snr")
    energy = gram.diagonal(dim1=1, dim2=2)
    ridge = torch.where(energy > 0, RIDGE * energy, 1.0)
    return torch.linalg.solve(gram + ridge.diag_embed(), cross.mT).argmax(dim=2)


@torch.no_grad()
def assignment_losses(
    estimates: Float[Tensor, "batch sources time"],
    references: Float[Tensor, "batch references time"],
    *,
    objective: Objective = "snr",
    max_snr_db: float = 30.0,
) -> Float[Tensor, "batch assignments"]:
    """Compute `mixit_loss` for every assignment, in float64 and without gradient.

    Assignment i gives source n to the reference that is the n-th digit of i in base `references`, source 0 being the
    last digit. Raises a ValueError above 2^20 assignments.
    """
    n_sources, n_references = estimates.shape[1], references.shape[1]
    if n_references**n_sources > MAX_ASSIGNMENTS:
        raise ValueError(
            f"{n_sources} sources can go to {n_references} references in {n_references**n_sources} ways, and an exact "
            f"search looks at {MAX_ASSIGNMENTS} at most: use search='least_squares'"
        )
    energy, cross, gram, energy_of_sum = _inner_products(estimates, references, centred=objective == "si_snr")

    # Of the sum of every subset of the sources, bit n of the subset's number being source n: <reference, sum>, |sum|^2.
    product = _subset_sums(cross)  # (batch, references, 2^sources)
    power = torch.zeros_like(energy_of_sum)[:, None]
    for n in range(n_sources):
        with_earlier = _subset_sums(gram[:, n, :n])
        power = torch.cat([power, power + 2 * with_earlier + gram[:, n, n, None]], dim=1)
    power = power[:, None]

    # These differences cancel, which float64 can bear: the table is right to 1e-7 dB at a limit of 30 dB, and float32
    # would be off by several dB where the estimates are perfect.
    if objective == "si_snr":
        wanted = product.square() / (energy[..., None] + ENERGY_EPSILON)
        of_subset = _negative_si_snr(wanted, (power - wanted).clamp(min=0), max_snr_db)
    else:
        error = (energy[..., None] - 2 * product + power).clamp(min=0)
        if objective == "snr":
            of_subset = _negative_snr(_reference_power(energy, energy_of_sum)[..., None], error, max_snr_db)
        else:
            of_subset = error / estimates.shape[-1]

    total = of_subset.new_zeros(len(estimates), n_references**n_sources)
    for reference in range(n_references):
        total += of_subset[:, reference, _subsets_given_to(reference, n_references, n_sources, total.device)]
    return total / n_references


def remix(
    estimates: Float[Tensor, "batch sources time"], assignment: Int[Tensor, "batch sources"], n_mixtures: int
) -> Float[Tensor, "batch {n_mixtures} time"]:
    """The sum of the sources assigned to each mixture; zeros where there are none."""
    n_items, _, n_samples = estimates.shape
    # Whole rows are added, rather than multiplied by a matrix of zeros and ones: TF32 would round the waveforms.
    row = assignment + n_mixtures * torch.arange(n_items, device=assignment.device)[:, None]
    remixes = estimates.new_zeros(n_items * n_mixtures, n_samples)
    return remixes.index_add(0, row.flatten(), estimates.flatten(0, 1)).view(n_items, n_mixtures, n_samples)


def mixture_consistency(
    estimates: Float[Tensor, "batch sources time"],
    mixture: Float[Tensor, "batch time"],
    weights: Literal["uniform", "magsq"],
) -> Float[Tensor, "batch sources time"]:
    """The estimates, changed so that they add up to the mixture: s_n + w_n (x - sum_k s_k), sum_n w_n = 1.

    "uniform" gives every source the same share of what is missing, "magsq" a share as its mean square (+ 1e-8).
    Wisdom et al., "Differentiable consistency constraints for improved deep speech enhancement", arXiv:1811.08521.
    Masks that add up to one do this already.
    """
    missing = mixture - estimates.sum(dim=1)
    if weights == "uniform":
        return estimates + missing[:, None] / estimates.shape[1]
    energy = ENERGY_EPSILON + estimates.square().mean(dim=-1)
    share = energy / energy.sum(dim=1, keepdim=True)
    return estimates + share[..., None] * missing[:, None]


def diversity_loss(masks: Float[Tensor, "batch sources bins frames"]) -> Float[Tensor, " batch"]:
    """Mean absolute cosine between the masks of two sources: 0 where none overlap, 1 where all are alike.

        1 / (N (N - 1)) sum_{i != j} |<v_i, v_j>|,   v_i = m_i / max(|m_i|, 1e-8)

    Independent uniform masks score 0.75. A mask of zeros is at right angles to all.
    """
    n_sources = masks.shape[1]
    with torch.autocast(masks.device.type, enabled=False):
        flat = _at_least_float32(masks).flatten(2)
        gram = flat @ flat.mT
        length = gram.diagonal(dim1=1, dim2=2).clamp(min=1e-16).sqrt()  # no gradient, rather than NaN, at zero
        cosine = gram / (length[:, :, None] * length[:, None, :])
        others = 1 - torch.eye(n_sources, dtype=cosine.dtype, device=cosine.device)
        return (cosine.abs() * others).sum(dim=(1, 2)) / max(n_sources * (n_sources - 1), 1)


def sparsity_loss(
    estimates: Float[Tensor, "batch sources time"],
    mixture: Float[Tensor, "batch time"],
    form: Literal["report", "l1l2"],
) -> Float[Tensor, " batch"]:
    """How many sources the energy is spread over, from their RMS r_n = sqrt(mean s_n^2 + 1e-8).

        report   sum_n r_n / r_x        x the mixture
        l1l2     sum_n r_n / sqrt(sum_n r_n^2)

    For consistent estimates "report" is 1 if one source is the mixture, but also if all are copies of it at 1/N, and
    sqrt(N) for N orthogonal sources of equal level: it rewards not separating. "l1l2" (Wisdom et al.,
    arXiv:2106.00847) ignores the mixture and lies between 1 for one active source and sqrt(N) for equal levels.
    """
    rms = _rms(estimates)
    whole = _rms(mixture) if form == "report" else rms.square().sum(dim=1).sqrt()
    return rms.sum(dim=1) / whole


def _inner_products(
    estimates: Float[Tensor, "batch sources time"], references: Float[Tensor, "batch references time"], *, centred: bool
) -> tuple[
    Float[Tensor, "batch references"],
    Float[Tensor, "batch references sources"],
    Float[Tensor, "batch sources sources"],
    Float[Tensor, " batch"],
]:
    """|reference|^2, <reference, estimate>, <estimate, estimate> and |sum of references|^2, in float64."""
    n_references, n_samples = references.shape[1], estimates.shape[-1]
    n_signals = n_references + estimates.shape[1]
    gram = estimates.new_zeros(len(estimates), n_signals, n_signals, dtype=torch.float64)
    total = gram.new_zeros(len(estimates), n_signals, 1)
    for start in range(0, n_samples, CHUNK_SAMPLES):
        chunk = slice(start, start + CHUNK_SAMPLES)
        signals = torch.cat([references[..., chunk].double(), estimates[..., chunk].double()], dim=1)
        gram += signals @ signals.mT  # autocast leaves float64 alone
        if centred:
            total += signals.sum(dim=-1, keepdim=True)
    gram -= total @ total.mT / n_samples
    of_references = gram[:, :n_references, :n_references]
    return (
        of_references.diagonal(dim1=1, dim2=2).clamp(min=0),
        gram[:, :n_references, n_references:],
        gram[:, n_references:, n_references:],
        of_references.sum(dim=(1, 2)).clamp(min=0),
    )


def _subset_sums(values: Float[Tensor, "*batch sources"]) -> Float[Tensor, "*batch subsets"]:
    """The sum of each of the 2^sources subsets: those without the last source, then the same ones with it."""
    sums = values.new_zeros(*values.shape[:-1], 1)
    for n in range(values.shape[-1]):
        sums = torch.cat([sums, sums + values[..., n, None]], dim=-1)
    return sums


def _subsets_given_to(
    reference: int, n_references: int, n_sources: int, device: torch.device
) -> Int[Tensor, " assignments"]:
    """For each assignment, the number of the subset that this reference gets."""
    subset = torch.zeros(1, dtype=torch.int64, device=device)
    for n in range(n_sources):
        subset = torch.cat([subset + (2**n if digit == reference else 0) for digit in range(n_references)])
    return subset


def _reference_power(
    energy: Float[Tensor, "batch references"], energy_of_sum: Float[Tensor, " batch"]
) -> Float[Tensor, "batch references"]:
    """Energy of each reference, with the limit below which it counts as silent."""
    return torch.maximum(energy, SILENCE_RATIO * energy_of_sum[:, None]).clamp(min=ENERGY_EPSILON)


def _negative_snr(power: Float[Tensor, "..."], error: Float[Tensor, "..."], max_snr_db: float) -> Float[Tensor, "..."]:
    threshold = 10 ** (-max_snr_db / 10)
    if threshold == 0:
        error = error.clamp(min=ENERGY_EPSILON)
    return 10 * torch.log10(error + threshold * power) - 10 * torch.log10(power)


def _negative_si_snr(
    wanted: Float[Tensor, "..."], error: Float[Tensor, "..."], max_snr_db: float
) -> Float[Tensor, "..."]:
    threshold = 10 ** (-max_snr_db / 10)
    return -10 * torch.log10(wanted / (error + threshold * wanted + ENERGY_EPSILON) + RATIO_EPSILON)


def _energy(waveform: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
    return waveform.square().sum(dim=-1)


def _rms(waveform: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
    return (waveform.square().mean(dim=-1) + 1e-8).sqrt()


def _at_least_float32(waveform: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return waveform if waveform.dtype == torch.float64 else waveform.float()
