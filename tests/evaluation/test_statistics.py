"""Intervals over recordings and seeds: that they hold the truth as often as they say, and what they go by."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.statistics import Design, class_intervals, mean_over_classes, resample, weighted_median


def study(
    rng,
    n_studies=1,
    n_classes=10,
    n_recordings=6,
    n_pairs=8,
    target=1.4,
    interferer=1.4,
    pair=2.0,
    seed=0.0,
    skew=False,
    n_seeds=1,
):
    """Scores (studies, seeds, pairs) on one design, whose true mean is 0; some recordings have several clips."""

    def draw(*shape):
        return rng.exponential(1, shape) - 1 if skew else rng.standard_normal(shape)

    total = n_classes * n_recordings
    of_clip = np.repeat(np.arange(total), 1 + rng.poisson(0.35, total))
    class_index = np.repeat(np.arange(n_classes), n_pairs)
    own = of_clip // n_recordings
    targets = np.concatenate([np.resize(rng.permutation(of_clip[own == c]), n_pairs) for c in range(n_classes)])
    others = np.concatenate([rng.choice(of_clip[own != c], n_pairs) for c in range(n_classes)])
    shared = target * draw(n_studies, total)[:, targets] + interferer * draw(n_studies, total)[:, others]
    shared = shared + pair * draw(n_studies, len(targets))
    apart = seed * rng.standard_normal((n_studies, n_seeds, 1))
    apart = apart + 0.5 * rng.standard_normal((n_studies, n_seeds, len(targets)))
    return shared[:, None] + apart, Design.of(class_index.tolist(), targets.tolist(), others.tolist())


def mixtures(rng, n_studies=1, n_items=60, n_tracks=8, track=1.0, item=2.0, skew=False):
    """Scores (studies, 1, items) of mixtures of two of few tracks each, whose true mean is 0."""

    def draw(*shape):
        return rng.exponential(1, shape) - 1 if skew else rng.standard_normal(shape)

    both = np.array([rng.choice(n_tracks, 2, replace=False) for _ in range(n_items)])
    values = track * draw(n_studies, n_tracks)[:, both].sum(axis=2) + item * draw(n_studies, n_items)
    return values[:, None], Design.overlapping([[str(a), str(b)] for a, b in both])


DIFFERENCE = {"target": 0.4, "interferer": 0.4, "pair": 0.8}
CASES = {
    "level": {},
    "level of few recordings": {"n_recordings": 5, "n_pairs": 5},
    "level of skewed scores": {"skew": True},
    "level by targets": {"target": 1.5, "interferer": 0.0, "pair": 0.5},
    "level by interferers": {"target": 0.0, "interferer": 1.5, "pair": 0.5},
    "difference": DIFFERENCE,
    "difference by single pairs": {"target": 0.0, "interferer": 0.0, "pair": 1.0},
    "many pairs, skewed": {"n_pairs": 24, "skew": True},
    "medians": {"kind": "median", "n_pairs": 20},
    "3 seeds that agree": {"n_seeds": 3},
    "3 seeds": {"n_seeds": 3, "seed": 0.5},
    "3 seeds, skewed": {"n_seeds": 3, "seed": 0.5, "skew": True},
    "3 seeds that differ": {"n_seeds": 3, "seed": 1.0, "target": 0.3, "interferer": 0.3, "pair": 0.5},
    "3 seeds, difference": {"n_seeds": 3, "seed": 0.3, **DIFFERENCE},
    "3 seeds are all that varies": {"n_seeds": 3, "seed": 1.0, "target": 0.0, "interferer": 0.0, "pair": 0.1},
    "mixtures of mixtures": {"of": mixtures},
    "mixtures of mixtures, of tracks": {"of": mixtures, "n_tracks": 12, "track": 1.5, "item": 1.0},
    "mixtures of mixtures, skewed": {"of": mixtures, "n_tracks": 30, "skew": True},
}


def coverage(rng, n_designs=40, n_studies=50, of=study, kind="mean", **options):
    """Share of the intervals that hold the truth, of 2,000 studies on 40 designs."""
    hits = 0
    for _ in range(n_designs):
        runs, design = of(rng, n_studies, **options)
        columns = {f"{i}.{s}": x for i, seeds in enumerate(runs) for s, x in enumerate(seeds)}
        found = resample(columns, design, n_resamples=200, seed=int(rng.integers(1 << 30)), kinds=[kind])
        for i in range(n_studies):
            estimate = mean_over_classes([found[f"{i}.{s}", kind] for s in range(runs.shape[1])], design)
            hits += estimate.low <= 0 <= estimate.high
    return hits / (n_designs * n_studies)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_printed_95_percent_is_95(case):
    assert 0.93 <= coverage(np.random.default_rng(0), **CASES[case]) <= 0.97


def test_a_printed_95_percent_is_not_far_from_95():
    assert 0.90 <= coverage(np.random.default_rng(0), n_designs=4) <= 0.99


def test_mixtures_of_one_recording_each_have_the_interval_of_clusters():
    rng = np.random.default_rng(5)
    recording = [str(r) for r in rng.integers(0, 9, 40)]
    values = rng.normal(size=9)[[int(r) for r in recording]] + rng.normal(size=40)
    width = []
    for design in (Design.overlapping([[r] for r in recording]), Design.one_way(recording)):
        estimate = mean_over_classes([resample({"x": values}, design, n_resamples=9, seed=0)["x", "mean"]], design)
        width.append(estimate.high - estimate.low)
    assert width[0] == pytest.approx(width[1], rel=0.02)  # an item alone is a cluster of interferers there


def test_mixtures_that_share_a_recording_in_either_place_depend_on_one_another():
    rng = np.random.default_rng(6)
    track = rng.normal(size=6)
    both = np.array([(a, b) for a in range(6) for b in range(6) if a != b])
    values = track[both].sum(axis=1)
    apart = Design.overlapping([[f"{i}a", f"{i}b"] for i in range(len(both))])
    width = []
    for design in (Design.overlapping([[f"{a}", f"{b}"] for a, b in both]), apart):
        estimate = mean_over_classes([resample({"x": values}, design, n_resamples=9, seed=0)["x", "mean"]], design)
        assert estimate.value == pytest.approx(values.mean())
        width.append(estimate.high - estimate.low)
    assert width[0] > 2 * width[1]


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
    (((values,),), design) = study(np.random.default_rng(1))
    found = resample({"a": values, "b": values + 0.5}, design, n_resamples=50, seed=0)
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
    (((full,),), design) = study(np.random.default_rng(3), n_classes=2)
    values = np.where(design.class_index == 1, np.nan, full)
    found = resample({"x": values}, design, n_resamples=50, seed=0)["x", "mean"]
    estimate = mean_over_classes([found], design)
    low, high = class_intervals(found, design)
    assert estimate.value == pytest.approx(full[design.class_index == 0].mean())
    assert low[0] < estimate.value < high[0]
    assert np.isnan([low[1], high[1]]).all()


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_the_weighted_median_is_that_of_the_values_repeated(items):
    values, weights = (np.array(x) for x in zip(*items, strict=True))
    expected = np.median(np.repeat(values, weights)) if weights.any() else np.nan
    result = weighted_median(values.astype(float), weights[None].astype(np.int64))
    np.testing.assert_allclose(result, [expected], atol=1e-12)


def test_resamples_are_those_of_a_loop_which_draws_recordings_and_gathers_their_pairs():
    rng = np.random.default_rng(5)
    values, classes = rng.normal(size=40), np.repeat([2, 9], 20)
    target, interferer = rng.integers(0, 6, size=40), rng.integers(0, 7, size=40)
    values[3] = np.nan
    found = resample(
        {"x": values}, Design.of(classes.tolist(), target.tolist(), interferer.tolist()), n_resamples=30, seed=3
    )
    drawn = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(0,))).multinomial(7, np.full(7, 1 / 7), 30)
    assert len(np.unique(interferer)) == 7
    for position, index in enumerate((2, 9)):
        rows = np.flatnonzero((classes == index) & ~np.isnan(values))
        recordings = np.unique(target[classes == index])
        n = len(recordings)
        counts = np.random.default_rng([3, index]).multinomial(n, np.full(n, 1 / n), size=30)
        for r in range(30):
            times = counts[r][np.searchsorted(recordings, target[rows])] * drawn[r][interferer[rows]]
            gathered = np.repeat(values[rows], times)
            assert found["x", "median"].resampled[r, position] == pytest.approx(np.median(gathered))
            assert found["x", "mean"].resampled[r, position] == pytest.approx(np.mean(gathered))
        assert found["x", "median"].point[position] == np.median(values[rows])
        assert found["x", "mean"].point[position] == pytest.approx(values[rows].mean())


def test_a_class_draws_its_targets_alike_whatever_other_classes_there_are():
    values, clip = np.random.default_rng(0).normal(size=20), [str(i) for i in range(20)]
    both = resample({"x": values}, Design.of([1] * 10 + [2] * 10, clip, ["i"] * 20), n_resamples=9, seed=0)
    alone = resample({"x": values[10:]}, Design.of([2] * 10, clip[10:], ["i"] * 10), n_resamples=9, seed=0)
    np.testing.assert_array_equal(both["x", "median"].resampled[:, 1], alone["x", "median"].resampled[:, 0])


def test_the_whole_audioset_evaluation_is_resampled_in_time():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(527), 100)
    target, interferer = rng.integers(0, 57, size=52700), rng.integers(0, 20_000, size=52700)
    start = time.process_time()
    columns = {"a": rng.normal(size=52700), "b": rng.normal(size=52700)}
    resample(columns, Design.of(classes.tolist(), target.tolist(), interferer.tolist()), n_resamples=1000, seed=0)
    assert time.process_time() - start < 60
