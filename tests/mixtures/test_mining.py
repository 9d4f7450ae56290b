"""Mining: the best window against brute force, ties, clips of any length, and a random that is random."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.mixtures.mining import STEPS, best_start, box_sum, last_start, random_start, smooth, window

BOX, SEGMENT = 201, 200  # frames, as in the paper

curves = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.sampled_from([0, 0.25, 0.3, 0.9]) | st.floats(0, 1, width=32)
)


def brute_force_smooth(probability: np.ndarray, width: int) -> list[Fraction]:
    """The definition, in exact arithmetic: frame by frame, with indices outside the clip moved to its ends."""
    steps = [Fraction(int(np.rint(float(p) * STEPS)), STEPS) for p in probability]
    inside = range(len(steps))
    return [
        sum(steps[min(max(k, inside[0]), inside[-1])] for k in range(t - width // 2, t + width // 2 + 1)) / width
        for t in inside
    ]


def brute_force_start(probability: np.ndarray, width: int, segment_frames: int) -> int:
    score = brute_force_smooth(probability, width)
    centre = score.index(max(score))
    start = centre - segment_frames // 2
    while start + segment_frames > len(probability) - 1:
        start -= 1
    return max(start, 0)


@settings(deadline=None)
@given(curves, st.sampled_from([1, 3, 7, 21]))
def test_smoothing_equals_the_definition_exactly(probability, width):
    exact = brute_force_smooth(probability, width)
    assert [Fraction(int(total), width * STEPS) for total in box_sum(_whole(probability), width)] == exact
    np.testing.assert_allclose(smooth(probability, width), [float(x) for x in exact], rtol=1e-15)


@settings(deadline=None)
@given(curves, st.sampled_from([(3, 2), (7, 6), (21, 20), (5, 10)]))
def test_the_best_window_is_exactly_that_of_brute_force(probability, sizes):
    width, segment_frames = sizes
    start = best_start(probability, width=width, segment_frames=segment_frames)
    assert start == brute_force_start(probability, width, segment_frames)


@pytest.mark.parametrize("seed", range(5))
def test_brute_force_agrees_at_full_size_on_the_steps_that_panns_gives(seed):
    """31 values, each repeated 32 times, the last one up to 1,001 frames: full of ties."""
    segments = np.random.default_rng(seed).choice([0.1, 0.2, 0.7], 31).astype(np.float32)
    probability = np.repeat(segments, 32)
    probability = np.concatenate([probability, np.full(1001 - len(probability), probability[-1])])
    start = best_start(probability, width=BOX, segment_frames=SEGMENT)
    assert start == brute_force_start(probability, BOX, SEGMENT)


def test_of_equal_windows_the_first_is_taken():
    flat = np.full(1001, 0.3, np.float32)
    assert best_start(flat, width=BOX, segment_frames=SEGMENT) == 0
    twice = np.zeros(1001, np.float32)
    twice[[300, 700]] = 0.1  # in floating point, sums that contain only zeros before them may differ from later ones
    assert best_start(twice, width=BOX, segment_frames=SEGMENT) == 300 - 100 - 100


def test_an_event_is_put_in_the_middle():
    probability = np.zeros(1001)
    probability[400:601] = 1
    assert best_start(probability, width=BOX, segment_frames=SEGMENT) == 400
    found = window(probability[:, None], 400, segment_frames=SEGMENT, class_position=0, kin=np.array([True]))
    assert (found.score, found.purity) == (1, 1)


@pytest.mark.parametrize(("event", "start"), [(slice(0, 30), 0), (slice(980, 1001), 800)])
def test_a_window_at_the_border_stays_inside_the_clip(event, start):
    probability = np.zeros(1001)
    probability[event] = 1
    assert best_start(probability, width=BOX, segment_frames=SEGMENT) == start


@given(st.integers(1, 1200), st.integers(0, 50))
def test_every_window_lies_inside_the_clip(n_samples, seed):
    hop, segment_samples = 4, 40
    n_frames = n_samples // hop + 1
    probability = np.random.default_rng(seed).random(n_frames)
    starts = [
        best_start(probability, width=11, segment_frames=10),
        random_start(n_frames, segment_frames=10, seed=seed, key="a"),
        last_start(n_frames, 10),
    ]
    for start in starts:
        assert start >= 0
        assert start * hop + segment_samples <= n_samples or (n_samples < segment_samples and start == 0)
    if n_samples >= segment_samples:  # and no later one does
        assert (last_start(n_frames, 10) + 1) * hop + segment_samples > n_samples


def test_random_starts_cover_the_clip_evenly():
    """Kong et al.'s "random" starts in the first second of ten, half of the time at its very beginning."""
    starts = np.array([random_start(1001, segment_frames=SEGMENT, seed=0, key=f"clip{n}-007") for n in range(8000)])
    assert starts.min() == 0
    assert starts.max() == 800
    observed = np.histogram(starts, bins=np.linspace(0, 801, 10))[0]
    chi_square = ((observed - 8000 / 9) ** 2 / (8000 / 9)).sum()
    assert chi_square < 26.1  # 8 degrees of freedom, p = 0.001


def test_a_random_start_depends_on_seed_and_key_only():
    draw = {
        (seed, key): random_start(1001, segment_frames=SEGMENT, seed=seed, key=key) for seed in (0, 1) for key in "ab"
    }
    assert draw == {(0, "a"): 419, (0, "b"): 652, (1, "a"): 92, (1, "b"): 234}


def test_purity_falls_when_another_class_sounds_in_the_window_only():
    probability = np.zeros((1001, 4))
    probability[:, 0] = 0.9
    probability[0:201, 1] = 0.8  # inside
    probability[300:, 2] = 1.0  # outside
    probability[:, 3] = 1.0  # kin
    kin = np.array([True, False, False, True])
    found = window(probability, 0, segment_frames=SEGMENT, class_position=0, kin=kin)
    assert found.score == pytest.approx(0.9)
    assert found.purity == pytest.approx(0.2)
    assert window(probability, 0, segment_frames=SEGMENT, class_position=0, kin=~np.zeros(4, bool)).purity == 1


def test_score_and_box_mean_are_the_same_number_inside_the_clip():
    probability = np.random.default_rng(0).random((1001, 3))
    kin = np.array([False, True, False])
    score = smooth(probability, BOX)
    for start in (0, 123, 800):
        found = window(probability, start, segment_frames=SEGMENT, class_position=1, kin=kin)
        assert found.score == score[start + 100, 1]
        assert found.purity == 1 - max(score[start + 100, [0, 2]])


def test_a_clip_shorter_than_a_segment_is_its_own_window():
    probability = np.array([[0.2, 0.1], [0.4, 0.3], [0.6, 0.2]])
    assert best_start(probability[:, 0], width=BOX, segment_frames=SEGMENT) == 0
    assert random_start(3, segment_frames=SEGMENT, seed=0, key="x") == 0
    found = window(probability, 0, segment_frames=SEGMENT, class_position=0, kin=np.array([True, False]))
    assert (found.score, found.purity) == (pytest.approx(0.4), pytest.approx(0.8))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="odd number of frames, not 200"):
        smooth(np.zeros(5), 200)
    with pytest.raises(ValueError, match="not a finite number"):
        best_start(np.array([0.1, np.nan]), width=1, segment_frames=1)


def _whole(probability: np.ndarray) -> np.ndarray:
    return np.rint(probability.astype(np.float64) * STEPS).astype(np.int64)
