"""The linear probe ranks encoders by what they know of the labels, and gives the same number twice."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pipeline.evaluation.probing import ProbeParams, average_precision, difference, linear_probe

PARAMS = ProbeParams(regularisation=0.1, bootstrap_resamples=50, batch_size=4)


def data(information, n=120, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 3)) < 0.3
    features = rng.standard_normal((n, dim))
    features[:, :3] += information * labels
    return features[: n // 2], labels[: n // 2], features[n // 2 :], labels[n // 2 :], [str(i) for i in range(n // 2)]


def test_informative_features_score_higher_than_noise_and_the_interval_says_so():
    knows, guesses = linear_probe(*data(3.0), PARAMS), linear_probe(*data(0.0), PARAMS)
    assert knows.mean_average_precision > 0.9
    assert guesses.mean_average_precision < 0.6
    assert knows.low <= knows.mean_average_precision <= knows.high
    gain = difference(knows, guesses)
    assert gain["ci_lo"] > 0.2


def test_the_same_features_give_the_same_number():
    one, two = linear_probe(*data(1.0), PARAMS), linear_probe(*data(1.0), PARAMS)
    assert one.mean_average_precision == two.mean_average_precision
    assert np.array_equal(one.resampled, two.resampled)
    assert difference(one, two) == {"mean_average_precision": 0.0, "ci_lo": 0.0, "ci_hi": 0.0}


def test_clips_of_one_recording_are_drawn_together():
    """Four copies of every clip say nothing new: over clips, the interval would be half as wide."""
    x, labels, y, truth, names = data(1.0, n=240)
    params = PARAMS.model_copy(update={"bootstrap_resamples": 1000})
    once = linear_probe(x, labels, y, truth, names, params)
    copied = linear_probe(x, labels, np.tile(y, (4, 1)), np.tile(truth, (4, 1)), names * 4, params)
    assert copied.mean_average_precision == pytest.approx(once.mean_average_precision, abs=1e-9)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=1e-6)


def test_classes_that_cannot_be_learnt_do_not_count():
    x, labels, y, truth, names = data(3.0)
    labels, truth = labels.copy(), truth.copy()
    labels[:, 0] = False
    without = linear_probe(x, labels[:, 1:], y, truth[:, 1:], names, PARAMS)
    assert linear_probe(x, labels, y, truth, names, PARAMS).mean_average_precision == without.mean_average_precision
    with pytest.raises(ValueError, match="nothing to probe"):
        linear_probe(x, np.zeros_like(labels), y, truth, names, PARAMS)


def test_average_precision_of_resamples_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    truth, scores = rng.random(60) < 0.1, rng.standard_normal(60).round(1)  # with ties
    drawn = [rng.integers(60, size=60) for _ in range(40)]
    counts = np.stack([np.bincount(rows, minlength=60) for rows in drawn])
    expected = [average_precision_score(truth[rows], scores[rows]) if truth[rows].any() else np.nan for rows in drawn]
    np.testing.assert_allclose(average_precision(truth, scores, counts), expected, rtol=0, atol=1e-12)


def test_a_resample_without_a_positive_has_no_average_precision():
    truth, scores = np.array([True, False, False]), np.array([0.3, 0.2, 0.1])
    found = average_precision(truth, scores, np.array([[0, 2, 1], [1, 1, 1]]))
    assert np.isnan(found[0])
    assert found[1] == 1
