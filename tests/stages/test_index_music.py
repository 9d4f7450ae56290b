"""Stage index_music: a table per segment length, what was left out and why, and the same bytes every time."""

import json

import numpy as np
import pandas as pd
import pytest
import soundfile

from pipeline.stages.index_music import index_music
from pipeline.training.mixit import index_file
from tests.corpora import write_songs
from tests.tiny_mixit import RATE, music_params

N_TRACKS, SECONDS = 8, 2.0


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("music"), N_TRACKS, seconds=SECONDS)


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_there_is_a_table_for_each_length_and_a_summary_of_all(songs, tmp_path):
    summary = index_music(tmp_path / "index", music_params(songs))
    assert json.loads((tmp_path / "index" / "summary.json").read_text()) == summary
    assert sorted(content(tmp_path / "index")) == [
        "quarantine.csv",
        "segments_0.25s.parquet",
        "segments_0.5s.parquet",
        "summary.json",
    ]
    split_of = {}
    for seconds in (0.25, 0.5):
        table = pd.read_parquet(index_file(tmp_path / "index", seconds))
        assert len(table) == N_TRACKS * SECONDS / seconds
        assert set(table["frames"]) == {seconds * RATE}
        assert set(table["active_stems"]) == {"bass;drums;vocals"}
        told = summary[f"segments_{seconds}s"]
        assert told["kept"] == len(table)
        assert told["left_out"] == {}
        assert told["active_stems"] == {"3": len(table)}
        assert {split: found["tracks"] for split, found in told["splits"].items()} == {
            "train": 4,
            "validation": 2,
            "test": 2,
        }
        assert sum(found["segments"] for found in told["splits"].values()) == len(table)
        split_of[seconds] = dict(zip(table["track_id"], table["split"], strict=True))
    assert split_of[0.25] == split_of[0.5]  # what one entry trains on, another is not tested on
    assert (summary["source"], summary["tracks"], summary["quarantined"]) == ("folder", N_TRACKS, 0)
    assert (tmp_path / "index" / "quarantine.csv").read_text() == "track_id,path,reason,detail\n"


def test_windows_may_overlap(songs, tmp_path):
    index_music(tmp_path / "index", music_params(songs, segment_seconds=[0.5], hop_seconds=0.25))
    table = pd.read_parquet(index_file(tmp_path / "index", 0.5))
    assert table.loc[table["track_id"] == "song0", "offset"].tolist() == list(range(0, 12001, 2000))


@pytest.fixture
def damaged(tmp_path):
    """Eight songs: one has a stem that is no audio, one a stem cut short."""
    root = write_songs(tmp_path / "songs", N_TRACKS)
    (root / "song3" / "drums.wav").write_text("no audio")
    whole = (root / "song5" / "bass.wav").read_bytes()
    (root / "song5" / "bass.wav").write_bytes(whole[:9000])
    return root


def test_an_unreadable_track_is_quarantined_with_the_reason(damaged, tmp_path):
    summary = index_music(tmp_path / "index", music_params(damaged, max_bad_fraction=0.25))
    listing = pd.read_csv(tmp_path / "index" / "quarantine.csv")
    assert listing[["track_id", "path", "reason"]].to_numpy().tolist() == [
        ["song3", "song3/drums.wav", "undecodable"],
        ["song5", "song5/bass.wav", "truncated"],
    ]
    assert listing["detail"].str.len().min() > 0
    assert summary["quarantined"] == 2
    assert summary["segments_0.25s"]["left_out"] == {"quarantined_truncated": 1, "quarantined_undecodable": 1}
    tables = [pd.read_parquet(index_file(tmp_path / "index", seconds)) for seconds in (0.25, 0.5)]
    assert all(set(table["track_id"]) == {f"song{i}" for i in (0, 1, 2, 4, 6, 7)} for table in tables)


def test_too_many_unreadable_tracks_stop_the_stage_with_their_counts(damaged, tmp_path):
    with pytest.raises(
        ValueError, match=r"2 of 8 tracks .*'quarantined_truncated': 1, .*max_bad_fraction is 0\.2"
    ) as e:
        index_music(tmp_path / "index", music_params(damaged, max_bad_fraction=0.2))
    assert "song3/drums.wav" in str(e.value)
    assert not (tmp_path / "index").exists()


def test_a_length_that_no_track_has_is_an_error(songs, tmp_path):
    with pytest.raises(ValueError, match=r"no segment of 3 s in 8 tracks: \{'short_tracks': 8\}"):
        index_music(tmp_path / "index", music_params(songs, segment_seconds=[0.5, 3.0]))


def test_silence_is_left_out_and_counted(tmp_path):
    root = write_songs(tmp_path / "songs", N_TRACKS)
    for stem in ("bass", "drums", "vocals"):
        waveform, rate = soundfile.read(root / "song0" / f"{stem}.wav")
        soundfile.write(root / "song0" / f"{stem}.wav", np.where(np.arange(len(waveform)) < RATE, 0, waveform), rate)
    summary = index_music(tmp_path / "index", music_params(root))
    assert summary["segments_0.5s"]["left_out"] == {"silent_segments": 2}
    assert summary["segments_0.5s"]["kept"] == N_TRACKS * 4 - 2


def test_the_same_music_gives_the_same_bytes_over_whatever_was_there(songs, tmp_path):
    for name in ("one", "two"):
        index_music(tmp_path / name, music_params(songs))
    first = content(tmp_path / "one")
    assert first == content(tmp_path / "two")
    index_music(tmp_path / "one", music_params(songs, seed=3, segment_seconds=[0.5]))
    assert content(tmp_path / "one") != first
    index_music(tmp_path / "one", music_params(songs))
    assert content(tmp_path / "one") == first
