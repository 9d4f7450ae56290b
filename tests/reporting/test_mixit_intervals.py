"""Intervals of separators without queries: over recordings, wherever they occur, and only of what is defined."""

import numpy as np
import pandas as pd
import pytest

from pipeline.reporting.mixit_intervals import read_intervals


def write(folder, recordings, pairs=None, **columns):
    """The tables of an entry whose mixtures of mixtures have these two recordings each; its stems have the first."""
    folder.mkdir(parents=True)
    first, second = ([pair[i] for pair in recordings] for i in range(2))
    table = pd.DataFrame({"source": first, "target_recording": first, "interferer_recording": second, **columns})
    table.to_parquet(folder / "moms.parquet")
    stems = pd.DataFrame({"source": first, "target_recording": first, "n_stems": 2, "si_snr": table["snr"]})
    stems.to_parquet(folder / "mixtures.parquet")
    if pairs is not None:
        pairs.to_parquet(folder / "pairs.parquet")


def width(folder, key="snr"):
    found = read_intervals(folder, ["a"], n_resamples=50, seed=0)["a"]
    return found[f"{key}_ci_hi"] - found[f"{key}_ci_lo"]


def test_of_independent_mixtures_the_interval_is_students(tmp_path):
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    write(tmp_path / "a", [(f"{i}a", f"{i}b") for i in range(400)], snr=values)
    found = read_intervals(tmp_path, ["a"], n_resamples=500, seed=0)["a"]
    assert found["snr_ci_lo"] < values.mean() < found["snr_ci_hi"]
    assert width(tmp_path) == pytest.approx(2 * 1.97 * values.std(ddof=1) / 20, rel=0.02)
    assert width(tmp_path, "stem_si_snr") == pytest.approx(width(tmp_path), rel=0.02)


def test_pieces_of_one_track_count_as_one(tmp_path):
    tracks = np.random.default_rng(0).normal(0.0, 1.0, 20)
    write(tmp_path / "once" / "a", [(f"{i}", f"{i}") for i in range(20)], snr=tracks)
    write(tmp_path / "often" / "a", [(f"{i}", f"{i}") for i in range(20) for _ in range(50)], snr=tracks.repeat(50))
    write(tmp_path / "naive" / "a", [(f"{i}", f"{i}") for i in range(1000)], snr=tracks.repeat(50))
    once, often, naive = (width(tmp_path / name) for name in ("once", "often", "naive"))
    assert often == pytest.approx(once, rel=0.05)
    assert naive < 0.3 * once


def test_the_recordings_of_both_mixtures_count_and_each_of_several(tmp_path):
    values = np.random.default_rng(1).normal(0.0, 1.0, 12).repeat(10)
    for name, recordings in {
        "first": [(f"{i // 10}", f"x{i}") for i in range(120)],
        "second": [(f"x{i}", f"{i // 10}") for i in range(120)],
        "one of several": [(f"x{i}+{i // 10}+y{i}", f"z{i}") for i in range(120)],
        "apart": [(f"x{i}", f"y{i}") for i in range(120)],
    }.items():
        write(tmp_path / name / "a", recordings, snr=values)
    apart = width(tmp_path / "apart")
    for name in ("first", "second", "one of several"):
        assert width(tmp_path / name) > 2 * apart, name


def test_what_is_undefined_is_left_out_or_has_no_interval(tmp_path):
    known = np.array([1.0, np.nan, 3.0, 5.0])
    write(tmp_path / "a", [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")], snr=known, overlap=np.nan)
    found = read_intervals(tmp_path, ["a", "never"], n_resamples=50, seed=0)
    assert set(found) == {"a"}
    assert set(found["a"]) == {f"{name}_ci_{end}" for name in ("snr", "stem_si_snr") for end in ("lo", "hi")}
    assert found["a"]["snr_ci_lo"] < 3.0 < found["a"]["snr_ci_hi"]


def test_pairs_have_the_intervals_of_the_report_and_shorter_lengths_their_own(tmp_path):
    rng = np.random.default_rng(2)
    recordings = [(f"{i}", f"{i + 1}") for i in range(8)]
    pairs = pd.DataFrame({"class_index": [3] * 8 + [7] * 8, "target_recording": [f"t{i // 2}" for i in range(16)]})
    pairs = pairs.assign(interferer_recording=[f"i{i % 5}" for i in range(16)], si_sdri=rng.normal(size=16))
    pairs = pairs.assign(sdri=rng.normal(size=16) + 5)
    write(tmp_path / "a", recordings, pairs, snr=rng.normal(size=8))
    write(tmp_path / "a" / "2s", recordings, snr=rng.normal(size=8) + 10)
    found = read_intervals(tmp_path, ["a"], n_resamples=50, seed=0)
    assert set(found) == {"a", "a@2s"}
    assert found["a@2s"]["snr_ci_lo"] > 5 > found["a"]["snr_ci_hi"]
    mean = pairs.groupby("class_index")["sdri"].mean().mean()
    assert found["a"]["pairs_sdri_class_mean_mean_ci_lo"] < mean < found["a"]["pairs_sdri_class_mean_mean_ci_hi"]
    assert "pairs_si_sdri_class_median_mean_ci_hi" in found["a"]
    assert read_intervals(tmp_path, ["a"], n_resamples=50, seed=0) == found
