"""Intervals over recordings and seeds: that they hold the truth as often as they say, and what they go by."""

import numpy as np
import pytest

from pipeline.evaluation.statistics import Design, class_intervals, mean_over_classes, resample


def study(
    rng, n_classes=10, n_recordings=6, n_pairs=8, target=1.4, interferer=1.4, pair=2.0, seed=0.0, skew=False, n=1
):
    """Scores of `n` trainings on the same pairs, whose true mean is 0; some recordings have several clips."""

    def draw(count):
        return rng.exponential(1, count) - 1 if skew else rng.standard_normal(count)

    total = n_classes * n_recordings
    of_clip = np.repeat(np.arange(total), 1 + rng.poisson(0.35, total))
    class_index = np.repeat(np.arange(n_classes), n_pairs)
    own = of_clip // n_recordings
    targets = np.concatenate([np.resize(rng.permutation(of_clip[own == c]), n_pairs) for c in range(n_classes)])
    others = np.concatenate([rng.choice(of_clip[own != c], n_pairs) for c in range(n_classes)])
    shared = target * draw(total)[targets] + interferer * draw(total)[others] + pair * draw(len(targets))
    runs = {str(s): shared + seed * rng.standard_normal() + 0.5 * rng.standard_normal(len(shared)) for s in range(n)}
    return runs, Design.of(class_index.tolist(), targets.tolist(), others.tolist())


CASES = {
    "level": {},
    "level of few recordings": {"n_recordings": 5, "n_pairs": 5},
    "level of skewed scores": {"skew": True},
    "level by targets": {"target": 1.5, "interferer": 0.0, "pair": 0.5},
    "level by interferers": {"target": 0.0, "interferer": 1.5, "pair": 0.5},
    "difference": {"target": 0.4, "interferer": 0.4, "pair": 0.8},
    "difference by single pairs": {"target": 0.0, "interferer": 0.0, "pair": 1.0},
    "many pairs, skewed": {"n_pairs": 24, "skew": True},
    "3 seeds": {"n": 3, "seed": 0.5},
    "3 seeds, skewed": {"n": 3, "seed": 0.5, "skew": True},
    "3 seeds that differ": {"n": 3, "seed": 1.0, "target": 0.3, "interferer": 0.3, "pair": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_printed_95_percent_is_95(case):
    rng, hits, repeats = np.random.default_rng(0), 0, 300
    for _ in range(repeats):
        runs, design = study(rng, **CASES[case])
        found = resample(runs, design, n_resamples=200, seed=int(rng.integers(1 << 30)))
        estimate = mean_over_classes([found[s, "mean"] for s in runs], design)
        hits += estimate.low <= 0 <= estimate.high
    # 95 +- 2 %, and one standard error of what 300 studies find of it
    assert abs(hits / repeats - 0.95) <= 0.02 + np.sqrt(0.95 * 0.05 / repeats)


def test_pairs_of_one_recording_tell_no_more_than_one():
    values = np.repeat(np.random.default_rng(0).normal(size=8), 10)
    width = []
    for recording in (np.repeat(np.arange(8), 10), np.arange(80)):
        for design in (
            Design.of([0] * 80, recording.tolist(), list(range(80))),
            Design.of([0] * 80, list(range(80)), recording.tolist()),
        ):
            found = resample({"x": values}, design, n_resamples=200, seed=0)["x", "mean"]
            estimate = mean_over_classes([found], design)
            width.append(estimate.high - estimate.low)
            low, high = class_intervals(found, design)[:, 0]
            assert low < estimate.value < high
    assert min(width[:2]) > 2.5 * max(width[2:])


def test_what_two_models_share_is_not_in_their_difference():
    runs, design = study(np.random.default_rng(1))
    found = resample({"a": runs["0"], "b": runs["0"] + 0.5}, design, n_resamples=50, seed=0)
    for kind in ("mean", "median"):
        estimate = mean_over_classes([found["b", kind] - found["a", kind]], design)
        np.testing.assert_allclose((estimate.value, estimate.low, estimate.high), 0.5, atol=1e-9)


def test_independent_values_of_one_class_have_students_interval():
    values = np.random.default_rng(2).normal(size=12)
    design = Design.one_way([str(i) for i in range(12)])
    estimate = mean_over_classes([resample({"x": values}, design, n_resamples=50, seed=0)["x", "mean"]], design)
    half = 2.200985 * values.std(ddof=1) / np.sqrt(12)  # t of 11 degrees of freedom
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=1e-6)


def test_undefined_pairs_are_left_out():
    runs, design = study(np.random.default_rng(3), n_classes=2)
    values = np.where(design.class_index == 1, np.nan, runs["0"])
    found = resample({"x": values}, design, n_resamples=50, seed=0)["x", "mean"]
    estimate = mean_over_classes([found], design)
    low, high = class_intervals(found, design)
    assert estimate.value == pytest.approx(runs["0"][design.class_index == 0].mean())
    assert low[0] < estimate.value < high[0]
    assert np.isnan([low[1], high[1]]).all()
