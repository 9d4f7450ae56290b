"""Scores of separators without queries, on signals whose answer is known, and against a literal search."""

from itertools import product

import numpy as np
import pytest
import torch

from pipeline.evaluation import mixit_scores
from pipeline.evaluation.metrics.bss_eval import bss_eval
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.evaluation.mixit_scores import (
    mom_scores,
    pair_scores,
    stem_scores,
)
from pipeline.nn.losses import mixit_loss

SAMPLES = 1000


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(batch, signals, seed=0):
    """Signals of unit RMS and mean zero that have nothing in common."""
    basis = randn(batch, SAMPLES, signals, seed=seed)
    basis = basis - basis.mean(dim=1, keepdim=True)
    return torch.linalg.qr(basis)[0].mT.contiguous() * SAMPLES**0.5


def masks_of(n_sources, batch=2):
    return torch.rand(batch, n_sources, 9, 5, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ mixtures of mixtures


def test_perfect_outputs_reach_the_limit_of_30_db_and_doing_nothing_3():
    stems = orthogonal(2, 4)
    mixtures = torch.stack([stems[:, 0] + stems[:, 3], stems[:, 1] + stems[:, 2]], dim=1)
    found = mom_scores(stems[:, [2, 0, 1, 3]], masks_of(4), mixtures)
    assert found["snr"] == pytest.approx([30.0] * 2, abs=1e-3)
    assert (found["si_snr"] > 70).all()
    # Half of the sum is x1 / 2 + x2 / 2: an error of half the energy of x1.
    assert found["do_nothing_snr"] == pytest.approx([10 * np.log10(2)] * 2, abs=0.01)
    assert found["do_nothing_si_snr"] == pytest.approx([0.0] * 2, abs=0.01)
    assert found["snr_above_do_nothing"] == pytest.approx(found["snr"] - found["do_nothing_snr"])
    assert all(value.dtype == np.float64 and value.shape == (2,) for value in found.values())


def test_doing_nothing_is_scored_exactly_for_any_number_of_outputs():
    mixtures = randn(3, 2, SAMPLES)
    scores = []
    for n_sources in (8, 16, 40):
        estimates = (mixtures.sum(dim=1, keepdim=True) / n_sources).expand(-1, n_sources, -1)
        masks = torch.full((3, n_sources, 2, 2), 1 / n_sources)
        scores.append(mom_scores(estimates, masks, mixtures)["do_nothing_snr"])
        if n_sources <= 16:
            brute = -mixit_loss(estimates, mixtures, objective="snr", max_snr_db=30.0).loss
            assert scores[-1] == pytest.approx(brute.numpy(), abs=1e-4)
    assert scores[2] == pytest.approx(scores[0], abs=0.1)  # least squares would have 0 dB


@pytest.mark.parametrize("n_sources", [2, 3, 8])
def test_a_separator_that_does_nothing_is_no_better_than_its_row(n_sources):
    mixtures = orthogonal(3, 2)
    mixtures[1, 1] *= 0.5
    estimates = (mixtures.sum(dim=1, keepdim=True) / n_sources).expand(-1, n_sources, -1)
    found = mom_scores(estimates, torch.full((3, n_sources, 9, 5), 1 / n_sources), mixtures)
    assert found["snr_above_do_nothing"] == pytest.approx([0.0] * 3, abs=1e-4)
    assert found["si_snr"] == pytest.approx(found["do_nothing_si_snr"], abs=1e-4)
    assert found["overlap"] == pytest.approx([1.0] * 3)
    assert found["ne_mask"] == pytest.approx([n_sources] * 3)
    assert found["ne_energy"] == pytest.approx([n_sources] * 3)


def test_one_output_at_work_is_one_effective_source():
    mixtures = orthogonal(2, 2)
    estimates = torch.zeros(2, 4, SAMPLES)
    estimates[:, 2] = mixtures.sum(dim=1)
    masks = torch.zeros(2, 4, 9, 5)
    masks[:, 2] = 1
    found = mom_scores(estimates, masks, mixtures)
    assert found["ne_mask"] == pytest.approx([1.0] * 2)
    assert found["ne_energy"] == pytest.approx([1.0] * 2)
    assert found["overlap"] == pytest.approx([0.0] * 2)


def test_scores_of_mixtures_do_not_depend_on_the_order_of_outputs_or_of_mixtures():
    estimates, mixtures, masks = randn(2, 4, SAMPLES), randn(2, 2, SAMPLES, seed=1), masks_of(4)
    expected = mom_scores(estimates, masks, mixtures)
    order = [3, 1, 0, 2]
    again = [(estimates[:, order], masks[:, order], mixtures), (estimates, masks, mixtures.flip(1))]
    for found in (mom_scores(*arguments) for arguments in again):
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, abs=1e-4), name


# --------------------------------------------------------------------------------------------------------------- stems


def brute_force(estimates, stems):
    """The sums with the highest mean SI-SNR, of all ways to give each output to one stem."""
    centred = stems - stems.mean(dim=-1, keepdim=True)
    best = None
    for assignment in product(range(len(stems)), repeat=len(estimates)):
        sums = torch.stack([estimates[[a == k for a in assignment]].sum(dim=0) for k in range(len(stems))])
        value = si_sdr(sums - sums.mean(dim=-1, keepdim=True), centred).nan_to_num(-80).mean().item()
        if best is None or value > best[0]:
            best = (value, sums)
    return best[1]


@pytest.mark.parametrize(("n_sources", "n_stems"), [(3, 2), (4, 3), (5, 2)])
def test_stem_scores_are_those_of_the_best_of_all_assignments(n_sources, n_stems):
    stems = randn(3, n_stems, SAMPLES)
    shares = randn(3, n_sources, n_stems, seed=1).abs()
    estimates = shares @ stems + 0.5 * randn(3, n_sources, SAMPLES, seed=2)
    found = stem_scores(estimates, stems, np.full(3, n_stems), 16)
    for i in range(3):
        sums, mixture = brute_force(estimates[i], stems[i]), stems[i].sum(dim=0)
        got = si_sdr(sums, stems[i])
        assert found["si_snr"][i] == pytest.approx(got.mean().item(), abs=1e-4)
        gain = got - si_sdr(mixture.expand_as(stems[i]), stems[i])
        assert found["si_snri"][i] == pytest.approx(gain.mean().item(), abs=1e-4)
        each = []
        for k in range(n_stems):
            others = [j for j in range(n_stems) if j != k]
            each.append(bss_eval(sums[None, k : k + 1], stems[None, i, [k, *others]], filter_samples=16))
        for name in ("sdr", "sir", "sar"):
            expected = np.mean([getattr(bss, name).item() for bss in each])
            assert found[name][i] == pytest.approx(expected, abs=1e-4)


def test_the_mixture_as_an_output_gains_nothing_and_the_stems_all():
    stems = orthogonal(2, 3)
    mixture = stems.sum(dim=1, keepdim=True)
    of_stems = stem_scores(torch.cat([stems, torch.zeros(2, 1, SAMPLES)], dim=1), stems, np.full(2, 3), None)
    assert of_stems["si_snr"] == pytest.approx([100.0] * 2)
    assert of_stems["si_snri"] == pytest.approx([100 + 10 * np.log10(2)] * 2, abs=1e-3)  # two stems against one
    # Copies: whatever goes where, a stem's sum is the mixture.
    copies = stem_scores((mixture / 6).expand(-1, 6, -1), stems, np.full(2, 3), None)
    assert copies["si_snri"] == pytest.approx([0.0] * 2, abs=1e-3)


def test_items_of_different_numbers_of_stems_do_not_touch_each_other():
    stems, n_stems = randn(4, 4, SAMPLES), np.array([2, 4, 3, 2])
    for i, count in enumerate(n_stems):
        stems[i, count:] = 0
    estimates = randn(4, 4, SAMPLES, seed=1)
    together = stem_scores(estimates, stems, n_stems, 16)
    for i in range(4):
        alone = stem_scores(estimates[i : i + 1], stems[i : i + 1, : n_stems[i]], n_stems[i : i + 1], 16)
        for name, values in together.items():
            assert values[i] == pytest.approx(alone[name][0], abs=1e-6), name


def test_without_a_filter_length_bss_eval_is_not_run():
    found = stem_scores(randn(2, 3, SAMPLES), randn(2, 2, SAMPLES, seed=1), np.full(2, 2), None)
    assert all(np.isnan(found[name]).all() for name in ("sdr", "sir", "sar"))
    assert np.isfinite(found["si_snri"]).all()


def test_what_is_undefined_is_nan_in_its_own_item_alone():
    stems = randn(3, 2, SAMPLES)
    estimates = randn(3, 3, SAMPLES, seed=1)
    estimates[1] = 0  # silence instead of sources
    stems[2, 1] = 0  # a stem that does not sound: the other one's scores are left
    found = stem_scores(estimates, stems, np.full(3, 2), 16)
    assert np.isfinite([values[0] for values in found.values()]).all()
    assert np.isnan([values[1] for values in found.values()]).all()
    assert np.isfinite(found["si_snr"][2])
    assert np.isnan([found[name][2] for name in ("sdr", "sir", "sar")]).all()


def test_more_outputs_than_can_be_searched_are_assigned_by_least_squares(monkeypatch):
    """Twelve outputs go to four stems in 16.8 million ways."""
    stems = orthogonal(1, 4)
    parts = torch.softmax(4 * randn(1, 3, SAMPLES, seed=1), dim=1)[:, :, None] * stems[:, None]
    estimates = parts.flatten(1, 2)
    found = stem_scores(estimates, stems, np.array([4]), None)
    assert found["si_snr"] == pytest.approx([100.0], abs=1.0)
    monkeypatch.setattr(mixit_scores, "MAX_ASSIGNMENTS", 1)
    mixtures = torch.stack([stems[:, :2].sum(dim=1), stems[:, 2:].sum(dim=1)], dim=1)
    assert mom_scores(estimates, masks_of(12, 1), mixtures)["snr"] == pytest.approx([30.0], abs=1e-3)
    pair = pair_scores(estimates, mixtures[:, 0], mixtures[:, 1])
    assert pair["sdr"] > 50


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pair_scores_are_of_the_outputs_that_go_to_the_target():
    target, interferer = randn(3, SAMPLES), randn(3, SAMPLES, seed=1)
    parts = randn(2, 3, SAMPLES, seed=2)
    estimates = torch.stack([parts[0], target - parts[0], interferer - parts[1], parts[1]], dim=1)
    estimates += 0.01 * randn(3, 4, SAMPLES, seed=3)
    found = pair_scores(estimates, target, interferer)
    output, mixture = estimates[:, :2].sum(dim=1), target + interferer
    for name, measure in (("sdr", sdr), ("si_sdr", si_sdr)):
        got, had = measure(output, target), measure(mixture, target)
        assert found[name] == pytest.approx(got.numpy(), abs=1e-4)
        assert found[f"{name}_mixture"] == pytest.approx(had.numpy(), abs=1e-4)
        assert found[f"{name}i"] == pytest.approx((got - had).numpy(), abs=1e-4)
    assert (found["sdri"] > 25).all()


def test_a_pair_whose_target_gets_no_output_scores_0_db_and_no_si_sdr():
    target, interferer = orthogonal(1, 2).unbind(dim=1)
    estimates = torch.stack([0.9 * interferer, 0.1 * interferer], dim=1)
    found = pair_scores(estimates, target, interferer)
    assert found["sdr"] == pytest.approx([0.0])
    assert found["sdri"] == pytest.approx([0.0], abs=1e-4)  # the mixture at equal levels is at 0 dB too
    assert np.isnan(found["si_sdri"]).all()
