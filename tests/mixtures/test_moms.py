"""Mixtures of mixtures of anchors: what is drawn, how loud it is, and who is kept apart."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.ontology import classes
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.moms import AnchorMoms, ClipMoms, is_validation
from pipeline.mixtures.shards import ClipReader
from tests.corpora import write_recordings, write_sounds

RATE, SAMPLES = 8000, 2000
CLASSES = (3, 72, 137, 300, 420, 506)
MEETING = ((3, [3, 72]), (72, [3, 72]), (137, [137]), (300, [300]))
EACH = 30  # anchors of a class: enough that every class has some that validate


def open_anchors(directory):
    return AnchorReader(directory, AnchorIndex.load(directory))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    sounds = [(f"c{index}x{number}", index, [index]) for index in CLASSES for number in range(EACH)]
    return open_anchors(write_sounds(tmp_path_factory.mktemp("anchors") / "train", sounds))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Of four classes, the clips of each are labelled with one more, and some clips have two anchors."""
    pairs = [(3, 72), (72, 137), (137, 300), (300, 3)]
    sounds = [(f"c{a}x{number}", a, [a, b]) for a, b in pairs for number in range(4)]
    sounds += [(f"c{a}x0", b, [a, b]) for a, b in pairs]
    sounds += [(f"plain{index}x{number}", index, [index]) for index in (3, 72, 137, 300) for number in range(3)]
    return open_anchors(write_sounds(tmp_path_factory.mktemp("labelled") / "train", sounds))


def moms(reader, **changes):
    options = {"seed": 1, "segment_samples": SAMPLES, "batch_size": 4, "max_stems": 3} | changes
    return AnchorMoms(reader, **options)


def same(a, b):
    arrays = ("mixtures", "stems", "n_stems", "snr_db")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays) and a.track_ids == b.track_ids


def energies(waveforms):
    return (waveforms.astype(np.float64) ** 2).sum(-1)


def test_a_batch_is_a_function_of_seed_and_number(reader):
    one, two = moms(reader), moms(reader)
    later = one.batch(5)
    for n in (0, 3):
        two.batch(n)
    assert same(later, two.batch(5))
    assert not same(later, one.batch(6))
    assert not same(later, moms(reader, seed=2).batch(5))
    # A larger batch holds the same items.
    np.testing.assert_array_equal(moms(reader, batch_size=8).batch(2).mixtures[4:], later.mixtures)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_no_class_and_no_clip_comes_twice(reader, n, seed):
    for sides in moms(reader, seed=seed).describe(n):
        keys = [key for side in sides for key in side.split("+")]
        rows = [reader.index.row(key) for key in keys]
        assert len({reader.index.mids[row] for row in rows}) == len(rows)
        assert len({reader.index.clip_ids[row] for row in rows}) == len(rows)


@pytest.mark.parametrize("max_stems", [1, 2])
def test_no_clip_is_labelled_with_another_anchors_class(labelled, max_stems):
    index, met = labelled.index, Counter()
    some = moms(labelled, max_stems=max_stems)
    for n in range(50):
        for sides in some.describe(n):
            rows = [index.row(key) for side in sides for key in side.split("+")]
            present = {index.mids[row] for row in rows}
            assert len({index.clip_ids[row] for row in rows}) == len(rows)
            for row in rows:
                assert set(index.labels[row].split(";")) & present == {index.mids[row]}
                met[index.labels[row].count(";")] += 1
    assert met[1] > 20  # clips of two labels are not left out


def test_anchors_alike_are_brought_to_their_level_too(reader, monkeypatch):
    """Sums of sounds with something in common are louder or quieter than their energies tell."""
    whole = reader.waveform(0)
    monkeypatch.setattr(reader, "waveform", lambda row: whole)
    batch = moms(reader, batch_size=16).batch(0)
    assert len(np.unique(batch.n_stems, axis=0)) > 3
    levels = energies(batch.mixtures)
    np.testing.assert_allclose(10 * np.log10(levels[:, 0] / levels[:, 1]), batch.snr_db, atol=1e-3)


def test_each_mixture_has_one_to_max_stems_anchors(reader):
    counts = Counter()
    for n in range(30):
        batch = moms(reader).batch(n)
        assert batch.mixtures.shape == (4, 2, SAMPLES)
        assert batch.stems.shape == (4, 2, 3, SAMPLES)
        assert batch.mixtures.dtype == batch.stems.dtype == np.float32
        counts.update(batch.n_stems.ravel().tolist())
        for i in range(4):
            for side in range(2):
                count = int(batch.n_stems[i, side])
                assert len(batch.stem_names[i][side]) == len(batch.track_ids[i][side].split("+")) == count
                assert batch.stems[i, side, :count].any(-1).all()
                assert not batch.stems[i, side, count:].any()
    assert sorted(counts) == [1, 2, 3]
    assert min(counts.values()) > 240 / 3 * 0.6


def test_without_subsets_each_mixture_has_max_stems_anchors(reader):
    assert {
        int(k) for n in range(5) for k in moms(reader, random_subsets=False, max_stems=2).batch(n).n_stems.flat
    } == {2}


def test_stems_are_equally_loud_and_add_up_to_their_mixture(reader):
    batch = moms(reader, batch_size=32).batch(0)
    np.testing.assert_allclose(batch.stems.sum(2), batch.mixtures, atol=1e-6)
    np.testing.assert_allclose(np.abs(batch.mixtures.sum(1)).max(-1), 0.5, atol=1e-5)
    for found, counts in zip(energies(batch.stems), batch.n_stems, strict=True):
        for side in range(2):
            some = found[side, : counts[side]]
            np.testing.assert_allclose(some, some[0], rtol=1e-4)


def test_the_second_mixture_lies_in_range_below_the_first(reader):
    batch = moms(reader, batch_size=64, snr_range=(-2.0, 6.0)).batch(0)
    levels = energies(batch.mixtures)
    np.testing.assert_allclose(10 * np.log10(levels[:, 0] / levels[:, 1]), batch.snr_db, atol=1e-3)
    assert -2 <= batch.snr_db.min() < -1
    assert 5 < batch.snr_db.max() <= 6


def test_a_short_segment_is_cut_from_anywhere_in_the_anchor(reader):
    batch = moms(reader, batch_size=16, max_stems=1, segment_samples=500).batch(0)
    starts = set()
    for i in range(16):
        whole = reader.waveform(reader.index.row(batch.track_ids[i][0])).astype(np.float64)
        piece = batch.stems[i, 0, 0].astype(np.float64)
        pieces = np.lib.stride_tricks.sliding_window_view(whole, 500)
        likeness = pieces @ piece / np.linalg.norm(pieces, axis=1) / np.linalg.norm(piece)
        assert likeness.max() > 1 - 1e-6
        starts.add(int(likeness.argmax()))
    assert len(starts) > 10
    assert max(starts) > 1000


def test_validation_clips_are_held_out_for_good(reader):
    index = reader.index
    met = {part: set() for part in ("train", "validation", "all")}
    for part, keys in met.items():
        some = moms(reader, part=part)
        for n in range(60):
            keys.update(key for sides in some.describe(n) for side in sides for key in side.split("+"))
    clips = {part: {index.clip_ids[index.row(key)] for key in keys} for part, keys in met.items()}
    assert not clips["train"] & clips["validation"]
    assert all(is_validation(clip) for clip in clips["validation"])
    assert not any(is_validation(clip) for clip in clips["train"])
    assert clips["all"] & clips["train"]
    assert clips["all"] & clips["validation"]


def test_takes_of_one_recording_validate_together_and_never_meet(tmp_path):
    sounds = [
        (f"1-{upload}{index}-{take}-7", index, [index]) for index in CLASSES for upload in range(30) for take in "ABC"
    ]
    first, second = CLASSES[:2]
    sounds += [(f"2-{upload}{first}-D-7", second, [second]) for upload in range(30)]  # from the first class' uploads
    takes = open_anchors(write_sounds(tmp_path / "train", sounds))
    met = {part: set() for part in ("train", "validation")}
    for part, recordings in met.items():
        for n in range(60):
            for sides in moms(takes, part=part).batch(n).recordings:
                together = [recording for side in sides for recording in side.split("+")]
                assert len(set(together)) == len(together)
                recordings.update(together)
    assert not met["train"] & met["validation"]
    assert len(met["validation"]) > 5
    clips = takes.index.clip_ids
    assert {is_validation(clip) for clip in clips} == {True, False}
    assert [is_validation(clip) for clip in clips] == [is_validation(name) for name in takes.index.recordings]


def test_segments_of_one_upload_validate_together():
    for n in range(200):
        upload = f"-abcdefg{n:03d}"
        assert len({is_validation(name) for name in (upload, f"{upload}_0", f"{upload}_30000")}) == 1


def test_who_validates_depends_on_the_clips_name_alone_and_is_a_tenth():
    held_out = [is_validation(f"clip{i}") for i in range(5000)]
    assert sum(held_out) == pytest.approx(500, abs=70)
    # Never change: a clip that moves from one part to the other has been trained on.
    assert [i for i in range(150) if held_out[i]] == [11, 47, 60, 115, 124, 134, 145]


def test_a_fixed_set_has_its_size_and_a_stream_has_none(reader):
    some = moms(reader, n_items=10)
    assert some.n_batches == 3
    assert [len(some.batch(n).mixtures) for n in range(3)] == [4, 4, 2]
    np.testing.assert_array_equal(some.batch(1).mixtures, moms(reader).batch(1).mixtures)
    with pytest.raises(IndexError, match="no batch 3 in a set of 3"):
        some.batch(3)
    with pytest.raises(IndexError, match="no batch -1"):
        some.describe(-1)
    assert len(moms(reader).batch(10**9).mixtures) == 4
    assert moms(reader).n_batches == len(reader.index) / 2 / 4 + 0.5  # 180 anchors in pairs, by fours


def test_the_description_names_the_anchors_of_the_batch(reader):
    some = moms(reader)
    batch = some.batch(2)
    assert some.describe(2) == list(batch.track_ids)
    for sides, names in zip(batch.track_ids, batch.stem_names, strict=True):
        for side, mids in zip(sides, names, strict=True):
            rows = [reader.index.row(key) for key in side.split("+")]
            assert tuple(reader.index.mids[row] for row in rows) == mids


def test_silence_stays_silent_and_finite(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(reader, "waveform", lambda row: np.zeros(SAMPLES, np.float32))
    batch = moms(reader).batch(0)
    assert not batch.mixtures.any()
    assert np.isfinite(batch.stems).all()


def test_moms_that_cannot_be(reader, tmp_path):
    with pytest.raises(ValueError, match=r"6 classes have anchors in all: mixtures of up to 4 anchors need 8"):
        moms(reader, max_stems=4)
    with pytest.raises(ValueError, match=r"segments of 2001 samples: the anchors have 2000 \(0\.25 s\)"):
        moms(reader, segment_samples=SAMPLES + 1)
    one = next(f"clip{i}" for i in range(99) if is_validation(f"clip{i}"))
    few = open_anchors(write_sounds(tmp_path / "few", [(one, 3, [3]), (f"{one}x", 3, [3]), (f"{one}y", 72, [72])]))
    with pytest.raises(ValueError, match="1 classes have anchors in validation"):
        moms(few, max_stems=1, part="validation")


def test_there_are_fewer_anchors_where_so_many_cannot_meet(tmp_path):
    """Two of four classes share their clips: there are never four anchors."""
    sounds = [(f"c{index}x{number}", index, labels) for index, labels in MEETING for number in range(3)]
    reader = open_anchors(write_sounds(tmp_path / "three", sounds))
    batch = moms(reader, max_stems=2, batch_size=30).batch(0)
    assert Counter(batch.n_stems.sum(1).tolist()).keys() == {2, 3}
    assert batch.n_stems.min() == 1


def test_clips_that_can_never_meet_are_an_error_and_not_a_pair(tmp_path):
    """Every clip has both labels: any two anchors share a class."""
    sounds = [(f"c{index}x{number}", index, [3, 72]) for index in (3, 72) for number in range(3)]
    reader = open_anchors(write_sounds(tmp_path / "both", sounds))
    assert {mid for mid in reader.index.mids} == {classes()[3].mid, classes()[72].mid}
    with pytest.raises(ValueError, match="no two anchors in 100 pairs"):
        moms(reader, max_stems=1).batch(0)


# --------------------------------------------------------------------------------------------------------------- clips

N_CLIPS = 24


def open_clips(directory, waveforms, recordings=None):
    return ClipReader(write_recordings(directory, waveforms, RATE, recordings), RATE)


def clip_moms(reader, **changes):
    return ClipMoms(reader, **{"seed": 1, "segment_samples": SAMPLES, "batch_size": 4} | changes)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Clips of noise at levels of their own, three of each recording."""
    rng = np.random.default_rng(0)
    waveforms = {f"clip{n:02d}": rng.uniform(0.01, 0.2) * rng.standard_normal(2 * RATE) for n in range(N_CLIPS)}
    recordings = {clip: f"recording{n // 3}" for n, clip in enumerate(waveforms)}
    return open_clips(tmp_path_factory.mktemp("clips") / "train", waveforms, recordings)


def test_both_mixtures_are_pieces_of_clips_as_they_are(found):
    some = clip_moms(found)
    for n in range(5):
        batch = some.batch(n)
        assert batch.mixtures.shape == (4, 2, SAMPLES)
        assert (batch.stems.shape, batch.n_stems.any()) == ((4, 2, 0, SAMPLES), False)
        for pair, mixtures in zip(batch.track_ids, batch.mixtures, strict=True):
            for clip, mixture in zip(pair, mixtures, strict=True):
                whole = found.waveform(clip)
                start = int(np.argmax(np.abs(np.correlate(whole, mixture, "valid"))))
                piece = whole[start : start + SAMPLES]
                gain = float(mixture @ piece) / float(piece @ piece)
                assert gain > 0
                np.testing.assert_allclose(mixture, gain * piece, atol=1e-4)
        assert np.abs(batch.mixtures.sum(axis=1)).max(axis=1) == pytest.approx(0.5, abs=1e-4)


def test_clips_meet_those_of_other_recordings_and_all_of_them_do(found):
    pairs = Counter(pair for n in range(1000) for pair in clip_moms(found).describe(n))
    recordings = {clip.clip_id: clip.recording for clip in found.clips.values()}
    assert all(recordings[a] != recordings[b] for a, b in pairs)
    assert len(pairs) == N_CLIPS * (N_CLIPS - 3)


def test_batches_of_clips_are_a_function_of_seed_and_number(found):
    later = clip_moms(found).batch(5)
    assert same(later, clip_moms(found).batch(5))
    assert not same(later, clip_moms(found).batch(6))
    assert not same(later, clip_moms(found, seed=2).batch(5))
    np.testing.assert_array_equal(clip_moms(found, batch_size=8).batch(2).mixtures[4:], later.mixtures)


def test_levels_of_two_clips_differ_by_what_was_drawn(found):
    some = clip_moms(found, snr_range=(-2.0, 4.0), batch_size=40)
    batch = some.batch(0)
    powers = energies(batch.mixtures)
    np.testing.assert_allclose(10 * np.log10(powers[:, 0] / powers[:, 1]), batch.snr_db, atol=1e-2)
    assert -2.01 < batch.snr_db.min() < -1
    assert 3 < batch.snr_db.max() < 4.01


def test_parts_of_clips_share_no_recording_and_a_fixed_set_ends(found):
    parts = {}
    for part in ("train", "validation"):
        try:
            some = clip_moms(found, part=part, n_items=6)
        except ValueError as error:  # too few recordings to validate
            assert "a pair needs two" in str(error)  # noqa: PT017
            continue
        parts[part] = {r for n in range(some.n_batches) for pair in some.batch(n).recordings for r in pair}
        assert [len(some.batch(n).mixtures) for n in range(some.n_batches)] == [4, 2]
        with pytest.raises(IndexError):
            some.batch(2)
        assert all(is_validation(recording) == (part == "validation") for recording in parts[part])
    assert "train" in parts


def test_silence_in_a_clip_is_passed_over_and_short_clips_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    waveforms = {f"clip{n}": np.zeros(10 * SAMPLES) for n in range(4)}
    for waveform in waveforms.values():
        waveform[7 * SAMPLES : 7 * SAMPLES + 300] = 0.1 * rng.standard_normal(300)
    waveforms["short"] = 0.1 * rng.standard_normal(SAMPLES - 1)
    some = clip_moms(open_clips(tmp_path / "clips", waveforms), batch_size=20)
    assert some.seconds == 4 * 10 * SAMPLES / RATE
    batch = some.batch(0)
    assert batch.mixtures.any(axis=2).all()
    assert "short" not in {clip for pair in batch.track_ids for clip in pair}


def test_clips_of_one_recording_make_no_pair(tmp_path):
    waveforms = {f"clip{n}": np.full(RATE, 0.1) * (-1) ** np.arange(RATE) for n in range(3)}
    reader = open_clips(tmp_path / "clips", waveforms, dict.fromkeys(waveforms, "one"))
    with pytest.raises(ValueError, match=r"3 clips of 0\.25 s or more, of 1 recordings, in all: a pair needs two"):
        clip_moms(reader)
