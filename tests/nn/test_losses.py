"""Losses against brute force, closed forms, and the numbers of other implementations.

golden/mixit_n4.npz, mixit_n8.npz: 6 mixtures of two mixtures (4,000 samples) with estimates from perfect to unrelated;
in the last one the second mixture is silent. `thsnr_*` is the published objective by brute force in NumPy, `ast_*`
Asteroid's MixITLossWrapper in float64, `mc_*`, `lsq_*`, `div`, `sp` the other formulas.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.nn import losses
from pipeline.nn.losses import (
    assignment_losses,
    best_assignment,
    diversity_loss,
    l1_loss,
    mixit_loss,
    mixture_consistency,
    remix,
    separation_loss,
    sparsity_loss,
)
from tests.golden.fill import arrays

OBJECTIVES = ["snr", "si_snr", "mse"]
SEEDS = st.integers(min_value=0, max_value=2**20)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n_signals, n_samples=2048):
    """Sines of whole periods with an energy of 1 each: no correlation, and no mean."""
    t = torch.arange(n_samples, dtype=torch.float64) / n_samples
    return torch.stack([torch.sin(2 * math.pi * (3 + 2 * k) * t) for k in range(n_signals)]) / math.sqrt(n_samples / 2)


def code(assignment):
    """The assignment to two mixtures as a binary number, source 0 being its last digit."""
    return (assignment << torch.arange(assignment.shape[1])).sum(dim=1)


def cases(n_sources, n_mixtures=2, n_samples=1500):
    """One item each: unrelated estimates, ones off by 3, 0.3 and 0.01, perfect ones; the last mixture silent; one
    estimate silent; all estimates silent. All are multiples of 1/1024, so that sums are the same in any precision."""
    n_items = 8
    sources = noise(n_items, n_sources, n_samples, seed=n_sources) + 0.05
    off = noise(n_items, n_sources, n_samples, seed=n_sources + 100)
    off *= torch.tensor([0, 3, 0.3, 0.01, 0, 0.5, 0.3, 0])[:, None, None]
    sources, estimates = (x.mul(1024).round().div(1024) for x in (sources, sources + off))
    owner = torch.randint(n_mixtures, (n_items, n_sources), generator=torch.Generator().manual_seed(0))
    owner[5] = 0
    mixtures = remix(sources, owner, n_mixtures)
    estimates[0] = off[0] + noise(n_sources, n_samples, seed=7).mul(1024).round().div(1024)
    estimates[6, -1] = 0
    estimates[7] = 0
    return estimates, mixtures


def objective_by_hand(mixture, remixed, whole, objective, max_snr_db):
    tau = 10 ** (-max_snr_db / 10)
    if objective == "mse":
        return ((mixture - remixed) ** 2).mean()
    if objective == "snr":
        power = max(mixture @ mixture, 1e-3 * (whole @ whole), torch.tensor(1e-8, dtype=mixture.dtype))
        error = mixture - remixed
        return 10 * torch.log10((error @ error + tau * power) / power)
    mixture, remixed = mixture - mixture.mean(), remixed - remixed.mean()
    wanted = (remixed @ mixture) / (mixture @ mixture + 1e-8) * mixture
    error = remixed - wanted
    return -10 * torch.log10(wanted @ wanted / (error @ error + tau * (wanted @ wanted) + 1e-8) + 1e-8)


def brute_force(estimates, mixtures, objective, max_snr_db=30.0):
    """The loss of every assignment, (batch, assignments), each remix written out; source 0 is the last digit."""
    n_sources, n_mixtures = estimates.shape[1], mixtures.shape[1]
    table = []
    for digits in itertools.product(range(n_mixtures), repeat=n_sources):
        owner = torch.tensor(digits[::-1])
        row = []
        for s, x in zip(estimates, mixtures, strict=True):
            values = [
                objective_by_hand(x[m], s[owner == m].sum(dim=0), x.sum(dim=0), objective, max_snr_db)
                for m in range(n_mixtures)
            ]
            row.append(torch.stack(values).mean())
        table.append(torch.stack(row))
    return torch.stack(table, dim=1)


def loss_and_gradient(estimates, mixtures, **settings):
    estimates = estimates.clone().requires_grad_()
    result = mixit_loss(estimates, mixtures, **settings)
    result.loss.sum().backward()
    return result.loss.detach(), result.assignment, estimates.grad


def test_l1_loss_is_the_mean_absolute_difference_of_each_item():
    estimate = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert l1_loss(estimate, target).tolist() == [0.75, 0.0]


def test_l1_loss_keeps_its_items_apart():
    estimate = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    l1_loss(estimate, torch.zeros(2, 50))[0].backward()
    assert estimate.grad[0].abs().allclose(torch.tensor(1 / 50))
    assert not estimate.grad[1].any()


# --- objectives of estimates with a target


def sounds():
    """Estimates, targets and whole mixtures of which they are a part."""
    estimate, target, rest = (noise(3, 3000, seed=seed).float() for seed in range(3))
    return 0.3 * estimate + target, target, torch.cat([target, rest], dim=1)


each_objective = pytest.mark.parametrize("name", sorted(losses.SEPARATION))


@each_objective
def test_an_objective_is_lowest_for_the_target_and_has_one_value_per_item(name):
    estimate, target, mixture = sounds()
    found = separation_loss(name, estimate, target, mixture)
    assert found.shape == (3,)
    assert (separation_loss(name, target, target, mixture) < found).all()
    assert (found < separation_loss(name, torch.zeros_like(target), target, mixture)).all()


@pytest.mark.parametrize("name", sorted(set(losses.SEPARATION) - {"l1"}))
def test_an_objective_but_plain_l1_does_not_depend_on_the_level(name):
    estimate, target, mixture = sounds()
    found = separation_loss(name, estimate, target, mixture)
    torch.testing.assert_close(separation_loss(name, estimate / 64, target / 64, mixture / 64), found)


@each_objective
def test_an_objective_of_silence_is_finite_with_its_gradient(name):
    estimate = torch.zeros(2, 700, requires_grad=True)
    found = separation_loss(name, estimate, torch.zeros(2, 700), torch.zeros(2, 700))
    found.sum().backward()
    assert found.isfinite().all()
    assert estimate.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", 0.6),
        ("l1_level", 0.3),  # the mixture's RMS is 2
        ("rms", math.sqrt(0.09 + 1e-3)),
        ("snr", 10 * math.log10(0.09 + 1e-3)),
        # The estimate is 1.6 times the target, or of no shape: only rounding is no part of it.
        ("si_snr", -10 * math.log10((0.64 + 1e-3) / 1e-3)),
    ],
)
def test_an_objective_of_a_square_wave_is_what_its_formula_says(name, expected):
    target = torch.tensor([1.0, -1.0]).repeat(50)[None]
    found = separation_loss(name, 1.6 * target, target, 2 * target)
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-4, atol=1e-4)


def test_spectra_of_noise_are_measured_in_units_of_its_level():
    error = noise(1, 64000).float()
    silence = torch.zeros_like(error)
    found = separation_loss("mrstft", error, silence, error).item()
    assert found == pytest.approx(math.sqrt(math.pi) / 2, rel=0.02)  # mean of a Rayleigh distribution
    opposite = separation_loss("spectral", error, -error, error).item()
    assert opposite == pytest.approx(0.5 * 4 * math.gamma(1.3), rel=0.02)  # magnitudes are right: R^0.6 of Rayleigh's R


def test_an_unknown_objective_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no objective 'l2'; there are l1, l1_level, rms, snr, si_snr, spectral"):
        separation_loss("l2", *sounds())


# --- mixit_loss against brute force


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n_sources", "n_mixtures"), [(2, 2), (4, 2), (8, 2), (4, 3)])
def test_equals_brute_force(n_sources, n_mixtures, objective):
    """Float32 waveforms against every remix in float64: the whole table, the minimum, and its gradient."""
    estimates, mixtures = cases(n_sources, n_mixtures)
    truth = estimates.clone().requires_grad_()
    table = brute_force(truth, mixtures, objective)
    lowest = table.min(dim=1).values
    lowest.sum().backward()

    found = assignment_losses(estimates.float(), mixtures.float(), objective=objective)
    assert (found - table).abs().max() < 1e-6
    loss, assignment, gradient = loss_and_gradient(estimates.float(), mixtures.float(), objective=objective)
    assert loss.dtype == torch.float32
    assert (loss - lowest).abs().max() < 1e-4
    chosen = (assignment * n_mixtures ** torch.arange(n_sources)).sum(dim=1)
    assert (table.gather(1, chosen[:, None])[:, 0] - lowest).max() < 1e-9

    # At ties (silent estimates) other minima, with other gradients, are as good.
    clear = table.sort(dim=1).values[:, :2].diff(dim=1)[:, 0] > 1e-6
    assert clear[:6].all()
    difference, size = ((x[clear]).flatten(1).norm(dim=1) for x in (gradient - truth.grad, truth.grad))
    # Perfect estimates have no gradient, or one of rounding errors: these are measured against 1 % of the largest.
    assert (difference / size.clamp(min=0.01 * size.max())).max() < 1e-5


@pytest.mark.parametrize("objective", ["snr", "si_snr"])
def test_equals_brute_force_at_other_limits(objective):
    estimates, mixtures = (x[:5] for x in cases(4))
    for limit in (10.0, 50.0):
        table = brute_force(estimates, mixtures, objective, limit)
        loss = mixit_loss(estimates, mixtures, objective=objective, max_snr_db=limit).loss
        assert (loss - table.min(dim=1).values).abs().max() < 1e-9
        assert loss[4].item() == pytest.approx(-limit, abs=1e-5)  # the epsilons


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_the_gram_matrix_do_not_matter(objective, monkeypatch):
    estimates, mixtures = cases(4)
    whole = assignment_losses(estimates, mixtures, objective=objective)
    for samples in (1, 499, 1500, 1501):
        monkeypatch.setattr(losses, "CHUNK_SAMPLES", samples)
        assert (assignment_losses(estimates, mixtures, objective=objective) - whole).abs().max() < 1e-6


@given(seed=SEEDS, order=st.permutations(range(5)), objective=st.sampled_from(OBJECTIVES))
@settings(max_examples=20, deadline=None)
def test_permuting_the_sources_permutes_the_assignment(seed, order, objective):
    estimates, mixtures = noise(2, 5, 60, seed=seed), noise(2, 2, 60, seed=seed + 1)
    plain = mixit_loss(estimates, mixtures, objective=objective)
    permuted = mixit_loss(estimates[:, order], mixtures, objective=objective)
    assert torch.equal(permuted.assignment, plain.assignment[:, order])
    torch.testing.assert_close(permuted.loss, plain.loss)


@given(seed=SEEDS, order=st.permutations(range(3)), objective=st.sampled_from(OBJECTIVES))
@settings(max_examples=20, deadline=None)
def test_reordering_the_mixtures_relabels_the_assignment(seed, order, objective):
    estimates, mixtures = noise(2, 4, 60, seed=seed), noise(2, 3, 60, seed=seed + 1)
    plain = mixit_loss(estimates, mixtures, objective=objective)
    reordered = mixit_loss(estimates, mixtures[:, order], objective=objective)
    assert torch.equal(torch.tensor(order)[reordered.assignment], plain.assignment)
    torch.testing.assert_close(reordered.loss, plain.loss)


@given(seed=SEEDS, log2_gain=st.integers(-8, 8), objective=st.sampled_from(["snr", "si_snr"]))
@settings(max_examples=20, deadline=None)
def test_the_level_of_the_whole_does_not_matter(seed, log2_gain, objective):
    estimates, mixtures = noise(2, 4, 200, seed=seed), noise(2, 2, 200, seed=seed + 1)
    plain = mixit_loss(estimates, mixtures, objective=objective)
    louder = mixit_loss(2.0**log2_gain * estimates, 2.0**log2_gain * mixtures, objective=objective)
    assert torch.equal(louder.assignment, plain.assignment)
    assert (louder.loss - plain.loss).abs().max() < 1e-3  # the epsilons, at 48 dB below


def test_items_do_not_touch_each_other():
    estimates, mixtures = cases(4)
    together = mixit_loss(estimates, mixtures)
    for item in range(len(estimates)):
        alone = mixit_loss(estimates[item : item + 1], mixtures[item : item + 1])
        assert alone.loss.item() == pytest.approx(together.loss[item].item(), abs=1e-9)
        assert torch.equal(alone.assignment[0], together.assignment[item])


# --- closed forms


def test_splitting_the_input_evenly_scores_3_db():
    """No separation at all: equal mixtures at right angles, and every output an eighth of their sum."""
    mixtures = orthogonal(2)[None]
    estimates = (mixtures.sum(dim=1, keepdim=True) / 8).expand(1, 8, -1)
    loss, assignment = mixit_loss(estimates, mixtures)
    assert loss.item() == pytest.approx(10 * math.log10(0.5 + 0.001), abs=1e-9)
    assert assignment.sum() == 4
    assert mixit_loss(estimates, mixtures, objective="si_snr").loss.item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("n_sources", [4, 8])
def test_everything_but_one_source_is_as_good_as_separation(n_sources):
    """The spurious optimum of mixtures that always have half of the sources: 2/N of everything minus the source."""
    sources = noise(1, n_sources, 500)
    owner = (torch.arange(n_sources) % 2)[None]
    estimates = 2 / n_sources * sources.sum(dim=1, keepdim=True) - sources
    loss, assignment = mixit_loss(estimates, remix(sources, owner, 2))
    assert loss.item() == pytest.approx(-30, abs=1e-6)
    assert torch.equal(assignment, 1 - owner)


def test_a_silent_mixture_is_measured_against_the_whole():
    (mixture, leak), silence = orthogonal(2), torch.zeros(2048, dtype=torch.float64)
    mixtures = torch.stack([mixture, silence])[None]
    # The leak, at -40 dB of the whole, belongs nowhere; -30 dB is where silence ends.
    both = mixit_loss(torch.stack([mixture, 0.01 * leak])[None], mixtures)
    to_first = 10 * math.log10(1e-4 + 1e-3) - 30  # and -30 dB of the other, which is nothing at all
    to_second = -30 + 10 * math.log10(1e-4 / 1e-3 + 1e-3)
    assert both.loss.item() == pytest.approx(min(to_first, to_second) / 2, abs=1e-5)
    assert both.assignment.tolist() == [[0, 0]]
    assert mixit_loss(torch.stack([mixture, silence])[None], mixtures).loss.item() == pytest.approx(-30, abs=1e-5)


def test_si_snr_does_not_see_gains_and_means():
    estimates, mixtures = noise(3, 4, 400), noise(3, 2, 400, seed=1)
    plain = mixit_loss(estimates, mixtures, objective="si_snr")
    for other in (mixit_loss(7 * estimates, 0.3 * mixtures, objective="si_snr"),
                  mixit_loss(estimates + 5, mixtures - 2, objective="si_snr")):  # fmt: skip
        assert torch.equal(other.assignment, plain.assignment)
        assert (other.loss - plain.loss).abs().max() < 1e-6


def test_a_remix_of_nothing_costs_80_db_of_si_snr():
    assert mixit_loss(torch.zeros(1, 2, 50), torch.ones(1, 2, 50), objective="si_snr").loss.item() == pytest.approx(80)


def test_one_of_16_sources_or_of_8_outputs_and_4_stems_is_found():
    for n_sources, n_references in ((16, 2), (8, 4)):  # 65,536 assignments each
        sources = noise(2, n_sources, 300)
        owner = torch.randint(n_references, (2, n_sources), generator=torch.Generator().manual_seed(1))
        references = remix(sources, owner, n_references)
        estimates = sources + 0.1 * noise(2, n_sources, 300, seed=2)
        for objective in OBJECTIVES:
            assert torch.equal(best_assignment(estimates, references, objective=objective), owner)


def test_too_many_assignments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"21 sources can go to 2 references in 2097152 ways.*least_squares"):
        mixit_loss(torch.ones(1, 21, 10), torch.ones(1, 2, 10))
    assert mixit_loss(torch.ones(1, 21, 10), torch.ones(1, 2, 10), search="least_squares").assignment.shape == (1, 21)


# --- gradients and precision


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n_mixtures", [2, 3])
def test_gradients_are_those_of_the_values(objective, n_mixtures):
    estimates = noise(2, 3, 12).requires_grad_()
    mixtures = noise(2, n_mixtures, 12, seed=1)
    mixtures[1, -1] = 0
    assert torch.autograd.gradcheck(lambda s, x: mixit_loss(s, x, objective=objective).loss, (estimates, mixtures))


@pytest.mark.parametrize("search", ["exact", "least_squares"])
@pytest.mark.parametrize("limit", [30.0, math.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_silence_and_perfection_have_finite_gradients(objective, limit, search):
    estimates, mixtures = (x.float() for x in cases(4))
    silent = torch.zeros_like(mixtures)
    for s, x in ((estimates, mixtures), (estimates, silent), (torch.zeros_like(estimates), silent)):
        loss, _, gradient = loss_and_gradient(s, x, objective=objective, max_snr_db=limit, search=search)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_under_autocast_too(dtype):
    estimates, mixtures = (x.to(dtype) for x in cases(4))
    expected = mixit_loss(estimates.float(), mixtures.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = mixit_loss(estimates, mixtures)
        masks = noise(1, 3, 4, 5).float()
        torch.testing.assert_close(diversity_loss(masks), diversity_loss(masks.double()).float())
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.assignment, expected.assignment)


# --- least squares


def test_least_squares_finds_clear_assignments():
    sources, owner = noise(3, 8, 400), torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]]).expand(3, -1)
    estimates = sources + 0.1 * noise(3, 8, 400, seed=1)
    found = mixit_loss(estimates, remix(sources, owner, 2), search="least_squares")
    assert torch.equal(found.assignment, owner)
    torch.testing.assert_close(found.loss, mixit_loss(estimates, remix(sources, owner, 2)).loss)


def test_least_squares_gives_every_source_to_one_mixture():
    """A silent source and two equal ones, where the normal equations are singular; all silent; all equal."""
    sources, owner = noise(1, 4, 400), torch.tensor([[1, 1, 0, 0]])
    mixtures = remix(sources, owner, 2)
    estimates = torch.cat([sources, sources[:, :1], torch.zeros(1, 1, 400)], dim=1)
    assert best_assignment(estimates, mixtures, search="least_squares").tolist() == [[1, 1, 0, 0, 1, 0]]
    assert best_assignment(torch.zeros(1, 3, 400), mixtures, search="least_squares").tolist() == [[0, 0, 0]]
    equal = best_assignment(mixtures[:, 1:].expand(1, 3, 400), mixtures, search="least_squares")
    assert equal.tolist() == [[1, 1, 1]]


# --- golden numbers


@pytest.mark.parametrize("n_sources", [4, 8])
def test_thresholded_snr_agrees_with_the_published_form(n_sources):
    """But for silence: the published form divides by 1e-8, ours by 1e-3 of the whole, so that the term of the silent
    mixture, matched perfectly, is -30 dB and not 0. The assignment and the gradient are the same."""
    golden = arrays(f"mixit_n{n_sources}")
    estimates, mixtures = golden["est"].double(), golden["ref"].double()
    table = assignment_losses(estimates, mixtures)
    assert (table - golden["thsnr_table"])[:5].abs().max() < 1e-7
    loss, assignment, gradient = loss_and_gradient(estimates, mixtures)
    assert (loss - golden["thsnr_loss"])[:5].abs().max() < 1e-7
    assert (loss - golden["thsnr_loss"])[5].item() == pytest.approx(-15, abs=1e-9)
    assert torch.equal(code(assignment), golden["thsnr_code"])
    torch.testing.assert_close(gradient[..., :64], golden["thsnr_grad_head"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(gradient.norm(dim=-1), golden["thsnr_grad_rownorm"], rtol=1e-7, atol=0)


@pytest.mark.parametrize(("objective", "theirs"), [("si_snr", "sisdr"), ("snr", "snr"), ("mse", "mse")])
@pytest.mark.parametrize("n_sources", [4, 8])
def test_agrees_with_asteroid(n_sources, objective, theirs):
    """Without our limit, and for its SNR on signals without their means, which it removes.

    Its SNR is compared where ours is defined alike: not for the silent mixture, and the perfect one to 0.01 dB only,
    as the epsilons of the two are all that keeps it from infinity.
    """
    golden = arrays(f"mixit_n{n_sources}")
    estimates, mixtures = golden["est"].double(), golden["ref"].double()
    if objective == "snr":
        estimates, mixtures = (x - x.mean(dim=-1, keepdim=True) for x in (estimates, mixtures))
    found = mixit_loss(estimates, mixtures, objective=objective, max_snr_db=math.inf)
    items = slice(5) if objective == "snr" else slice(6)
    difference = (found.loss - golden[f"ast_{theirs}_loss"]).abs()[items]
    assert difference[0] < 0.01
    assert difference[1:].max() < 1e-6
    if objective != "snr":
        assert difference[0] < 1e-9
    clear = (golden[f"ast_{theirs}_gap"] > 1e-6)[items]
    assert clear.all()
    assert torch.equal(code(found.assignment)[items][clear], golden[f"ast_{theirs}_code"][items][clear])


@pytest.mark.parametrize("n_sources", [4, 8])
def test_other_formulas_agree_with_their_golden_numbers(n_sources):
    golden = arrays(f"mixit_n{n_sources}")
    estimates, mixtures = golden["est"].double(), golden["ref"].double()
    whole = mixtures.sum(dim=1)
    for weights in ("uniform", "magsq"):
        consistent = mixture_consistency(estimates, whole, weights)
        torch.testing.assert_close(consistent[..., :64], golden[f"mc_{weights}_head"], rtol=0, atol=1e-12)
    torch.testing.assert_close(diversity_loss(golden["masks"].double()), golden["div"], rtol=0, atol=1e-8)
    torch.testing.assert_close(sparsity_loss(estimates, whole, "report"), golden["sp"], rtol=0, atol=1e-12)
    torch.testing.assert_close(sparsity_loss(estimates, whole, "l1l2"), golden["sp_l1l2"], rtol=0, atol=1e-12)
    assert torch.equal(code(best_assignment(estimates, mixtures, search="least_squares")), golden["lsq_code"])


# --- remix, consistency, auxiliary losses


def test_remix_adds_up_what_each_mixture_was_given():
    sources = torch.tensor([[[1.0, 2], [10, 20], [100, 200]], [[1, 1], [2, 2], [3, 3]]])
    mixed = remix(sources, torch.tensor([[0, 2, 0], [1, 1, 1]]), 3)
    assert mixed.tolist() == [[[101, 202], [0, 0], [10, 20]], [[0, 0], [6, 6], [0, 0]]]


@pytest.mark.parametrize("weights", ["uniform", "magsq"])
def test_consistent_estimates_add_up_and_stay_as_they_are(weights):
    estimates, mixture = noise(3, 4, 100), noise(3, 100, seed=1)
    estimates[0] = 0
    consistent = mixture_consistency(estimates, mixture, weights)
    torch.testing.assert_close(consistent.sum(dim=1), mixture)
    torch.testing.assert_close(mixture_consistency(consistent, mixture, weights), consistent)


def test_magsq_hands_nothing_to_a_silent_source():
    estimates = torch.stack([torch.ones(10), torch.zeros(10), 2 * torch.ones(10)])[None]
    consistent = mixture_consistency(estimates, torch.full((1, 10), 8.0), "magsq")
    assert consistent[0, :, 0].tolist() == pytest.approx([2, 0, 6], abs=1e-6)  # the missing 5 as 1 to 0 to 4


def test_consistent_estimates_miss_all_mixtures_by_the_same():
    mixtures = noise(2, 2, 300)
    consistent = mixture_consistency(noise(2, 6, 300, seed=1), mixtures.sum(dim=1), "uniform")
    owner = torch.tensor([[0, 1, 1, 0, 1, 0]]).expand(2, -1)
    error = (mixtures - remix(consistent, owner, 2)).square().sum(dim=-1)
    torch.testing.assert_close(error[:, 0], error[:, 1])


def test_diversity_loss_is_the_mean_cosine():
    apart, alike = torch.zeros(3, 5, 2), torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).expand(3, 5, 2)
    apart[0, 0], apart[1, 1], apart[2, 2] = 1, 2, 3
    one_pair = torch.stack([apart[0], 4 * apart[0], apart[1]])
    masks = torch.stack([apart, alike, one_pair])
    assert diversity_loss(masks).tolist() == pytest.approx([0, 1, 1 / 3], abs=1e-6)


def test_sparsity_loss_of_one_of_copies_and_of_orthogonal_sources():
    signals = 100 * orthogonal(4)
    one = torch.cat([signals[:1], torch.zeros(3, 2048, dtype=torch.float64)])
    copies = signals[:1].expand(4, -1) / 4
    estimates = torch.stack([one, copies, signals])
    mixture = estimates.sum(dim=1)
    assert sparsity_loss(estimates, mixture, "report").tolist() == pytest.approx([1, 1, 2], rel=1e-3)
    assert sparsity_loss(estimates, mixture, "l1l2").tolist() == pytest.approx([1, 2, 2], rel=1e-3)


def test_gradients_of_the_others_are_those_of_their_values():
    estimates, mixture = noise(2, 3, 10).requires_grad_(), noise(2, 10, seed=1).requires_grad_()
    masks = noise(2, 3, 2, 4).abs().requires_grad_()
    for weights in ("uniform", "magsq"):
        assert torch.autograd.gradcheck(lambda s, x, w=weights: mixture_consistency(s, x, w), (estimates, mixture))
    for form in ("report", "l1l2"):
        assert torch.autograd.gradcheck(lambda s, x, f=form: sparsity_loss(s, x, f), (estimates, mixture))
    assert torch.autograd.gradcheck(diversity_loss, (masks,))


def test_silent_estimates_and_empty_masks_have_finite_gradients():
    estimates, masks = torch.zeros(1, 3, 10).requires_grad_(), torch.zeros(1, 3, 4, 5).requires_grad_()
    silence = torch.zeros(1, 10)
    total = diversity_loss(masks).sum()
    for form in ("report", "l1l2"):
        total = total + sparsity_loss(estimates, silence, form).sum()
    for weights in ("uniform", "magsq"):
        total = total + mixture_consistency(estimates, silence, weights).sum()
    total.backward()
    assert total.isfinite()
    assert estimates.grad.isfinite().all()
    assert masks.grad.isfinite().all()
