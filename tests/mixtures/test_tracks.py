"""Whatever layout music lies in, it becomes the same tracks, segments and pairs; a bad file costs its track alone."""

import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio import level_db
from pipeline.datasets.music import Stem, Track, four_stems, load, moisesdb, synthetic_stems, tracks_of
from pipeline.mixtures import tracks as music
from pipeline.mixtures.tracks import (
    HELD_OUT,
    BadFile,
    MomStream,
    SegmentReader,
    of_split,
    recording_of,
    segments,
    split_tracks,
)

RATE = 8000


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def tone(path: Path, seconds: float = 1.0, hertz: float = 440.0, level: float = 0.1, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, waveform, rate, subtype="PCM_16")
    return path


def song(root: Path, name: str, seconds: float = 4.0, stems: str = "vocals drums bass other") -> Track:
    """A track of tones, of other frequencies in each track."""
    first = 100 + sum(name.encode()) % 300
    for k, stem in enumerate(stems.split()):
        tone(root / name / f"{stem}.wav", seconds, first * (k + 1))
    return Track(name, None, None, tuple(Stem(stem, (f"{name}/{stem}.wav",)) for stem in sorted(stems.split())), None)


def plain(name: str, artist: str | None = None, subset: str | None = None) -> Track:
    return Track(name, artist, subset, (), f"{name}.wav")


# ------------------------------------------------------------------------------------------------------------- sources


def moises(root: Path, uuid: str, data: object) -> Path:
    return put(root / uuid / "data.json", json.dumps(data))


def moises_stem(name: str, *ids: str, bleed: bool = False) -> dict[str, object]:
    parts = [{"id": i, "trackType": "x", "extension": "wav", "has_bleed": bleed} for i in ids]
    return {"stemName": name, "tracks": parts}


@pytest.mark.parametrize("place", ["", "moisesdb_v0.1", "moisesdb/moisesdb_v0.1"])
def test_moisesdb(tmp_path, place):
    base = tmp_path / place
    listed = [
        moises_stem("vocals", "v1", "v2"),
        moises_stem("guitar", "g1", bleed=True),
        moises_stem("drums", "d1"),
        moises_stem("guitar", "g2"),
        moises_stem("piano", "p1"),
    ]
    moises(base, "b-2", {"song": "S", "artist": "A", "genre": "rock", "stems": listed})
    moises(base, "a-1", {"song": "T", "artist": " ", "genre": "rock", "stems": [moises_stem("bass", "b1")]})
    (base / "extra").mkdir()
    counts: Counter[str] = Counter()
    first, second = tracks_of("moisesdb", tmp_path, counts=counts)
    prefix = f"{place}/" if place else ""
    assert first == Track("a-1", None, None, (Stem("bass", (f"{prefix}a-1/bass/b1.wav",)),), None)
    assert (second.track_id, second.artist, second.mixture) == ("b-2", "A", None)
    assert [(stem.name, len(stem.paths), stem.has_bleed) for stem in second.stems] == [
        ("drums", 1, False),
        ("guitar", 2, True),
        ("piano", 1, False),
        ("vocals", 2, False),
    ]
    assert counts["folders_without_data_json"] == 1
    of_four = tracks_of("moisesdb", tmp_path, "vdbo")[1]
    assert [(stem.name, len(stem.paths), stem.has_bleed) for stem in of_four.stems] == [
        ("vocals", 2, False),
        ("drums", 1, False),
        ("other", 3, True),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"artist": "A"}, "no key 'stems'"),
        ({"stems": {}}, "'stems' is {}, not a list"),
        ({"stems": [{"tracks": []}]}, r"no key 'stems\[0\].stemName'"),
        ({"stems": [{"stemName": "bass", "tracks": [{"id": "x"}]}]}, r"no key 'stems\[0\].tracks\[0\].extension'"),
        ({"stems": [moises_stem("bass", "../x")]}, "must be names, not paths"),
        ({"stems": [moises_stem("..", "x")]}, "holds other than letters"),
        ({"stems": [moises_stem("ba ss", "x")]}, "stem 'ba ss' holds other than"),
        ({"stems": []}, "neither stems nor a mixture"),
        ({"artist": 3, "stems": []}, "artist 3 is not a text"),
        ([], "no key 'stems'"),
    ],
)
def test_a_mistake_in_moisesdb_names_file_and_key(tmp_path, data, message):
    moises(tmp_path, "a-1", data)
    with pytest.raises(ValueError, match=rf"a-1/data\.json: .*{message}"):
        list(moisesdb.tracks(tmp_path))


def test_moisesdb_that_is_not_json_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no <track>/data\.json of MoisesDB"):
        list(moisesdb.tracks(tmp_path))
    put(tmp_path / "a" / "data.json", "{")
    with pytest.raises(ValueError, match=r"a/data\.json: not JSON"):
        list(moisesdb.tracks(tmp_path))


def test_musdb18(tmp_path):
    for folder in ("train/Ann & Co - One", "train/Meaxic - Take A Step", "test/Ann & Co - Ünder", "test/Untitled"):
        tone(tmp_path / "musdb18hq" / folder / "vocals.wav", 0.01)
    tone(tmp_path / "musdb18hq/test/Untitled/mixture.wav", 0.01)
    found = tracks_of("musdb18", tmp_path)
    assert [(track.track_id, track.artist, track.subset) for track in found] == [
        ("Ann_Co_-_One", "Ann & Co", "train"),
        ("Ann_Co_-_Under", "Ann & Co", "test"),
        ("Meaxic_-_Take_A_Step", "Meaxic", "validation"),
        ("Untitled", None, "test"),
    ]
    assert [stem.name for stem in found[0].stems] == ["vocals", "drums", "bass", "other"]
    assert found[0].mixture is None
    assert found[3].mixture == "musdb18hq/test/Untitled/mixture.wav"


def test_musdb18_compressed_gives_the_same_tracks_and_wav_comes_first(tmp_path):
    names = ("train/Ann & Co - One", "train/Meaxic - Take A Step", "test/Ann & Co - Ünder", "test/Untitled")
    for name in names:
        tone(tmp_path / "hq" / name / "vocals.wav", 0.01)
        put(tmp_path / "mp4" / f"{name}.stem.mp4", "")
    wav, packed = (tracks_of("musdb18", tmp_path / root) for root in ("hq", "mp4"))
    for one, other in zip(wav, packed, strict=True):
        assert (one.track_id, one.artist, one.subset) == (other.track_id, other.artist, other.subset)
        assert [stem.name for stem in one.stems] == [stem.name for stem in other.stems]
    for name in names[:3]:
        put(tmp_path / "hq" / f"{name}.stem.mp4", "")
    put(tmp_path / "hq/test/New.stem.mp4", "")
    counts: Counter[str] = Counter()
    both = tracks_of("musdb18", tmp_path / "hq", counts=counts)
    assert [track for track in both if track.track_id != "New"] == wav
    assert counts == {"second_encodings": 3}
    with pytest.raises(FileNotFoundError, match=r"MUSDB18-HQ in there, and no train/<track>\.stem\.mp4"):
        tracks_of("musdb18", tmp_path / "hq" / "train")


SLAKH = """
UUID: {uuid}
stems:
  S00: {{inst_class: Guitar, audio_rendered: true}}
  S01: {{inst_class: Drums, audio_rendered: true}}
  S02: {{inst_class: Bass, audio_rendered: false}}
  S04: {{inst_class: Guitar, audio_rendered: true}}
  S05: {{inst_class: Strings (continued), audio_rendered: true}}
"""


def slakh_track(folder: Path, uuid: str = "1e10", suffix: str = "flac") -> None:
    put(folder / "metadata.yaml", SLAKH.format(uuid=uuid))
    for name in ("mix", "stems/S00", "stems/S01", "stems/S04", "stems/S05"):
        tone(folder / f"{name}.{suffix}", 0.01)


def test_slakh(tmp_path):
    base = tmp_path / "slakh2100_flac_redux"
    for folder in ("train/Track00002", "test/Track00001", "validation/Track00003", "omitted/Track00004"):
        slakh_track(base / folder)
    counts: Counter[str] = Counter()
    found = tracks_of("slakh", tmp_path, counts=counts)
    assert [(track.track_id, track.subset) for track in found] == [
        ("Track00001", "test"),
        ("Track00002", "train"),
        ("Track00003", "validation"),
    ]
    assert [stem.name for stem in found[0].stems] == ["guitar", "drums", "guitar_2", "strings_continued"]
    assert found[0].stems[2].paths == ("slakh2100_flac_redux/test/Track00001/stems/S04.flac",)
    assert found[0].mixture == "slakh2100_flac_redux/test/Track00001/mix.flac"
    assert counts == {"omitted_tracks": 1, "stems_without_file": 3}
    # Three renderings of one MIDI file stay together.
    assert len({track.artist for track in found}) == 1
    assert [stem.name for stem in four_stems(found[0]).stems] == ["drums", "other"]


def test_babyslakh_is_flat_and_wav(tmp_path):
    slakh_track(tmp_path / "babyslakh_16k" / "Track00007", suffix="wav")
    (track,) = tracks_of("slakh", tmp_path)
    assert (track.track_id, track.subset, len(track.stems)) == ("Track00007", None, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metadata.yaml: is not there"),
        ("stems: [", "metadata.yaml: not YAML"),
        ("stems: 3", "metadata.yaml: no table 'stems'"),
        ("stems: {S00: {inst_class: Guitar}}", r"metadata.yaml: no key 'stems.S01.inst_class' for stems/S01.flac"),
    ],
)
def test_a_mistake_in_slakh_names_file_and_key(tmp_path, text, message):
    slakh_track(tmp_path / "train" / "Track00001")
    path = tmp_path / "train/Track00001/metadata.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tracks_of("slakh", tmp_path)


def test_fuss(tmp_path):
    line = "{0}/example00001.wav\t{0}/x_sources/background0_sound.wav\t{0}/x_sources/foreground0_sound.wav\n"
    for subset in ("train", "eval"):
        put(tmp_path / "ssdata" / f"{subset}_example_list.txt", line.format(subset) + "\n")
    first, second = tracks_of("fuss", tmp_path)
    assert (first.track_id, first.subset, first.mixture) == (
        "eval_example00001",
        "test",
        "ssdata/eval/example00001.wav",
    )
    assert [stem.name for stem in second.stems] == ["background0", "foreground0"]
    for bad in ("train/a.wav", "train/a.wav\t../b.wav", "train/a.wav\t/b.wav", "a.wav\tx/y_sound.wav\tz/y_sound.wav"):
        put(tmp_path / "ssdata" / "train_example_list.txt", line.format("train") + bad + "\n")
        with pytest.raises(ValueError, match=r"train_example_list\.txt:2: "):
            tracks_of("fuss", tmp_path)


def test_folder(tmp_path):
    for name in ("b side/Vocals.wav", "b side/Vocals.flac", "b side/mix.wav", "live/c/gtr 1.wav", "live/c/gtr_1.wav"):
        tone(tmp_path / name, 0.01)
    for name in ("alone.flac", "live.wav", ".hidden.wav"):
        tone(tmp_path / name, 0.01)
    put(tmp_path / "notes.txt", "")
    put(tmp_path / "live/d/readme.txt", "")
    (tmp_path / "link").symlink_to(tmp_path / "b side")
    (tmp_path / "link.wav").symlink_to(tmp_path / "alone.flac")
    counts: Counter[str] = Counter()
    found = {track.track_id: track for track in tracks_of("folder", tmp_path, counts=counts)}
    assert list(found) == ["alone", "b_side", "live", "live_c"]
    assert found["alone"] == Track("alone", None, None, (), "alone.flac")
    assert found["b_side"].stems == (Stem("Vocals", ("b side/Vocals.wav",)),)
    assert found["b_side"].mixture == "b side/mix.wav"
    names = [stem.name for stem in found["live_c"].stems]
    assert len(set(names)) == 2
    assert all(re.fullmatch("gtr_1_[0-9a-f]{8}", name) for name in names)
    assert counts == {"links_not_followed": 2, "second_encodings": 1}


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no source 'x'; there are \['folder', 'fuss', 'moisesdb'"):
        load("x")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        tracks_of("folder", tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        tracks_of("folder", put(tmp_path / "x", ""))
    with pytest.raises(ValueError, match="no track of source 'folder' in there"):
        tracks_of("folder", tmp_path)


# ---------------------------------------------------------------------------------------------------- synthetic stems

OPTIONS = synthetic_stems.Options(seed=3, n_tracks=3, seconds=8.0, sample_rate=RATE)


def content(root: Path) -> dict[str, bytes]:
    """Without the marker, which says whose it is."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != synthetic_stems.MARKER]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("music") / "made"
    synthetic_stems.prepare(root, OPTIONS)
    return root


def test_synthetic_stems_are_the_same_bytes_and_made_once(made, tmp_path):
    before = content(made)
    assert len(before) == 12
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    synthetic_stems.prepare(made, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == times
    synthetic_stems.prepare(tmp_path / "again", OPTIONS)
    assert content(tmp_path / "again") == before
    # A track does not depend on how many there are; another seed is other music.
    one = synthetic_stems.render(OPTIONS.model_copy(update={"n_tracks": 1}), 2)["bass"]
    np.testing.assert_array_equal(one, synthetic_stems.render(OPTIONS, 2)["bass"])
    assert np.any(one != synthetic_stems.render(OPTIONS.model_copy(update={"seed": 4}), 2)["bass"])


def test_synthetic_stems_continue_after_a_kill(made, tmp_path, monkeypatch):
    written = 0

    def dying(path, data, real=synthetic_stems.write_atomic):
        nonlocal written
        if written == 5:
            raise KeyboardInterrupt
        written += 1
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic_stems, "write_atomic", dying)
        with pytest.raises(KeyboardInterrupt):
            synthetic_stems.prepare(tmp_path / "x", OPTIONS)
    kept = tmp_path / "x/track000/bass.wav"
    time_before = kept.stat().st_mtime_ns
    synthetic_stems.prepare(tmp_path / "x", OPTIONS)
    assert content(tmp_path / "x") == content(made)
    assert kept.stat().st_mtime_ns == time_before
    (tmp_path / "x/track001/drums.wav").write_bytes(b"short")
    synthetic_stems.prepare(tmp_path / "x", OPTIONS)
    assert content(tmp_path / "x") == content(made)


def test_synthetic_stems_of_other_options_are_replaced_and_strangers_left_alone(tmp_path):
    synthetic_stems.prepare(tmp_path / "x", OPTIONS.model_copy(update={"seconds": 1.0}))
    synthetic_stems.prepare(tmp_path / "x", OPTIONS.model_copy(update={"seconds": 1.0, "n_tracks": 1}))
    assert [track.track_id for track in tracks_of("synthetic_stems", tmp_path / "x")] == ["track000"]
    put(tmp_path / "y/mine.wav", "")
    with pytest.raises(ValueError, match=r"did not make \('mine\.wav'\)"):
        synthetic_stems.prepare(tmp_path / "y", OPTIONS)


def test_synthetic_stems_of_another_checkout_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "other"))
    short = OPTIONS.model_copy(update={"seconds": 1.0})
    synthetic_stems.prepare(tmp_path / "x", short)
    before = content(tmp_path / "x")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match=rf"music\.root .* holds what the checkout '{tmp_path}/other' has made"):
        synthetic_stems.prepare(tmp_path / "x", short.model_copy(update={"n_tracks": 1}))
    assert content(tmp_path / "x") == before


@pytest.mark.parametrize("seed", range(4))
def test_synthetic_stems_vary_and_fall_silent(seed):
    options = OPTIONS.model_copy(update={"seed": seed, "seconds": 20.0, "n_tracks": 4})
    active = Counter()
    songs = [synthetic_stems.song_of(options, i) for i in range(4)]
    assert len({some.beat for some in songs}) == 4
    for i in range(4):
        stems = synthetic_stems.render(options, i)
        assert set(stems) == {"vocals", "drums", "bass", "other"}
        for waveform in stems.values():
            assert len(waveform) == 20 * RATE
            assert 0.01 < np.abs(waveform).max() <= 0.5001
            assert np.isfinite(waveform).all()
        for start in range(0, 20 * RATE, 2 * RATE):
            active[sum(level_db(w[start : start + 2 * RATE]) > -60 for w in stems.values())] += 1
    assert min(active) >= 1
    assert len(active) >= 3


def test_synthetic_tracks_are_made_in_no_time(tmp_path):
    options = synthetic_stems.Options(seed=0, n_tracks=6, seconds=20.0, sample_rate=16000)
    start = time.process_time()
    synthetic_stems.prepare(tmp_path / "x", options)
    assert time.process_time() - start < 5  # 0.7 s here


# -------------------------------------------------------------------------------------------------------------- splits


def test_tracks_of_an_artist_are_one_recording():
    assert recording_of(plain("t1", artist="Ärzte")) == recording_of(plain("t2", artist="ärzte"))
    assert recording_of(plain("t1")) != recording_of(plain("t2"))


def test_tracks_of_an_artist_stay_together_and_fractions_are_met():
    tracks = [plain(f"t{i}", artist=f"A{i % 40}" if i % 2 else None) for i in range(200)]
    split = split_tracks(tracks, "track", (0.7, 0.1, 0.2), seed=1)
    sides = {}
    for track in tracks:
        if track.artist:
            assert sides.setdefault(track.artist, split[track.track_id]) == split[track.track_id]
    counts = Counter(split.values())
    assert abs(counts["train"] - 140) <= 5
    assert abs(counts["validation"] - 20) <= 5
    assert abs(counts["test"] - 40) <= 5


@given(st.integers(3, 30), st.integers(0, 5), st.randoms())
def test_a_split_depends_on_the_seed_and_not_on_the_order(n, seed, shuffler):
    tracks = [plain(f"t{i}", artist=f"a{i % 7}" if n > 20 else None) for i in range(n)]
    split = split_tracks(tracks, "track", seed=seed)
    shuffler.shuffle(tracks)
    assert split_tracks(tracks, "track", seed=seed) == split
    assert set(split.values()) == {"train", "validation", "test"}


def test_splits_that_cannot_be_made():
    tracks = [plain("a"), plain("b", subset="test")]
    assert split_tracks(tracks, "track", (0.5, 0.0, 0.5)).keys() == {"a", "b"}
    with pytest.raises(ValueError, match="2 artists or single tracks cannot be split into train, validation, test"):
        split_tracks(tracks, "track")
    with pytest.raises(ValueError, match="add up to 1"):
        split_tracks(tracks, "track", (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="track 'a' is in no split of its source"):
        split_tracks(tracks, "source")
    with pytest.raises(ValueError, match="splits segments"):
        split_tracks(tracks, "report")
    assert split_tracks([plain("b", subset="test")], "source") == {"b": "test"}
    seeds = {tuple(split_tracks([plain(f"{i}") for i in range(9)], "track", seed=s).items()) for s in range(5)}
    assert len(seeds) > 1


# ------------------------------------------------------------------------------------------------------------ segments


def test_segments_cover_a_track_and_know_its_stems(tmp_path):
    tracks = [song(tmp_path, name, 3.5) for name in ("a", "b", "c")]
    manifest, passed = segments(tracks, tmp_path, 1.0, 0.5)
    assert list(manifest.columns) == list(music.COLUMNS)
    assert list(manifest[manifest["track_id"] == "a"]["offset"]) == [0, 4000, 8000, 12000, 16000, 20000]
    assert set(manifest["frames"]) == {8000}
    assert set(manifest["n_active_stems"]) == {4}
    assert set(manifest["stems"]) == {"bass;drums;other;vocals"}
    # Four sines at 0.1.
    np.testing.assert_allclose(manifest["rms"], 0.1 / np.sqrt(2) * 2, rtol=0.02)
    assert set(manifest["split"]) == {"train", "validation", "test"}
    assert not passed.counts
    assert not passed.quarantine


def test_the_index_is_the_same_whatever_order_tracks_come_in(tmp_path):
    tracks = [song(tmp_path, name, 2.0, "vocals bass") for name in "abcde"]
    expected, _ = segments(tracks, tmp_path, 1.0, 1.0, how="report")
    random.Random(0).shuffle(tracks)
    again, _ = segments(tracks, tmp_path, 1.0, 1.0, how="report")
    pd.testing.assert_frame_equal(expected, again)


def write_again(root: Path, track: Track, name: str, subset: str | None = None, suffix: str = ".flac") -> Track:
    """The same song under another name, in another kind of file."""
    for path in (root / track.track_id).iterdir():
        waveform, rate = soundfile.read(path)
        (root / name).mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name / f"{path.stem}{suffix}", waveform, rate, subtype="PCM_16")
    stems = tuple(Stem(stem.name, (f"{name}/{stem.name}{suffix}",)) for stem in track.stems)
    return Track(name, f"artist of {name}", subset, stems, None)


@pytest.mark.parametrize("seconds", [0.4, 1.0])
def test_the_same_song_under_two_names_is_on_one_side_and_counted(tmp_path, seconds):
    tracks = [song(tmp_path, f"t{i}", 2.0) for i in range(8)]
    tracks += [write_again(tmp_path, track, f"copy{i}") for i, track in enumerate(tracks)]
    for seed in range(5):
        table, passed = segments(tracks, tmp_path, seconds, 0.7, fractions=(0.5, 0.25, 0.25), seed=seed)
        split = dict(zip(table["track_id"], table["split"], strict=True))
        recording = dict(zip(table["track_id"], table["recording"], strict=True))
        assert all(split[f"t{i}"] == split[f"copy{i}"] for i in range(8))
        assert all(recording[f"t{i}"] == recording[f"copy{i}"] for i in range(8))
        assert len(set(recording.values())) == 8
        assert passed.repeats["repeated_sounds"] == 8
    shorter = [*tracks[:8], song(tmp_path, "t0", 1.9)]
    assert segments(shorter[1:], tmp_path, seconds, 0.7)[1].repeats["repeated_sounds"] == 0


def test_a_song_that_the_source_trains_on_and_holds_out_is_left_out_of_train(tmp_path):
    named = [("a", "train"), ("b", "train"), ("c", "validation"), ("d", "test")]
    tracks = [Track(name, None, subset, song(tmp_path, name).stems, None) for name, subset in named]
    tracks += [write_again(tmp_path, tracks[3], "d_again", "train"), write_again(tmp_path, tracks[0], "a2", "train")]
    table, passed = segments(tracks, tmp_path, 1.0, 1.0, how="source")
    assert set(table.loc[table["split"] == "train", "track_id"]) == {"a", "a2", "b"}
    assert set(table.loc[table["split"] == "test", "track_id"]) == {"d"}
    assert passed.counts["also_held_out"] == 1
    assert passed.repeats["repeated_sounds"] == 2


def test_the_reports_split_is_of_segments_and_its_test_is_its_validation(tmp_path):
    tracks = [song(tmp_path, name, 5.0, "bass") for name in "ab"]
    manifest, _ = segments(tracks, tmp_path, 1.0, 1.0, how="report")
    assert Counter(manifest["split"]) == {"train": 8, HELD_OUT: 2}
    assert len(of_split(manifest, "train")) == 8
    assert list(of_split(manifest, "validation").index) == list(of_split(manifest, "test").index)
    assert len(of_split(manifest, "test")) == 2


def test_silence_is_left_out_and_silent_stems_are_not_active(tmp_path):
    track = song(tmp_path, "a", 4.0, "bass vocals")
    waveform, _ = soundfile.read(tmp_path / "a/bass.wav")
    waveform[RATE:] = 0
    soundfile.write(tmp_path / "a/bass.wav", waveform, RATE)
    waveform, _ = soundfile.read(tmp_path / "a/vocals.wav")
    waveform[2 * RATE : 3 * RATE] *= 0.005  # -69 dB of full scale
    soundfile.write(tmp_path / "a/vocals.wav", waveform, RATE)
    manifest, passed = segments([track], tmp_path, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    assert list(manifest["offset"]) == [0, RATE, 3 * RATE]
    assert list(manifest["n_active_stems"]) == [2, 1, 1]
    assert list(manifest["active_stems"]) == ["bass;vocals", "vocals", "vocals"]
    assert passed.counts == {"silent_segments": 1}


def test_a_short_stem_is_followed_by_silence_and_short_tracks_are_counted(tmp_path):
    track = song(tmp_path, "a", 3.0, "bass vocals")
    tone(tmp_path / "a/bass.wav", 1.5, 200)
    manifest, _ = segments([track], tmp_path, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    assert list(manifest["n_active_stems"]) == [2, 2, 1]
    bass, vocals = SegmentReader(tmp_path, manifest, RATE).stems(1)
    assert np.abs(bass[:4000]).max() > 0.09
    assert not bass[4000:].any()
    assert np.abs(vocals[4000:]).max() > 0.09
    manifest, passed = segments([track], tmp_path, 4.0, 4.0, fractions=(1.0, 0.0, 0.0))
    assert not len(manifest)
    assert passed.counts == {"short_tracks": 1}


def test_a_bad_file_costs_its_track_and_is_named(tmp_path):
    names = ["cut", "empty", "gone", "good", "link", "nan", "rate", "text"]
    tracks = [song(tmp_path, name, 3.0, "bass vocals") for name in names]
    data = {name: tmp_path / name / "vocals.wav" for name in names}
    data["cut"].write_bytes(data["cut"].read_bytes()[:20000])
    data["empty"].write_bytes(b"")
    data["gone"].unlink()
    data["link"].unlink()
    data["link"].symlink_to(data["good"])
    soundfile.write(data["nan"], np.append(np.zeros(23000), np.nan), RATE, subtype="FLOAT")  # behind the last window
    tone(data["rate"], 3.0, rate=16000)
    data["text"].write_text("RIFF no audio at all")
    manifest, passed = segments(tracks, tmp_path, 2.0, 2.0)
    assert set(manifest["track_id"]) == {"good"}
    assert [(bad.track_id, bad.path, bad.reason) for bad in passed.quarantine] == [
        ("cut", "cut/vocals.wav", "truncated"),
        ("empty", "empty/vocals.wav", "no_samples"),
        ("gone", "gone/vocals.wav", "missing"),
        ("link", "link/vocals.wav", "not_regular_file"),
        ("nan", "nan/vocals.wav", "non_finite"),
        ("rate", "rate/vocals.wav", "rate_out_of_bounds"),
        ("text", "text/vocals.wav", "undecodable"),
    ]
    assert (passed.counts["quarantined_undecodable"], passed.counts["quarantined_no_samples"]) == (1, 1)
    # Others keep the split that they would have without the bad ones being bad.
    assert set(manifest["split"]) == {split_tracks(tracks, "track")["good"]}


def test_damaged_flac_is_found_before_training(tmp_path):
    track = Track("a", None, None, (), "a.flac")
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.flac", 0.1 * rng.standard_normal(10 * RATE), RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    _, passed = segments([track], tmp_path, 3.0, 3.0, fractions=(1.0, 0.0, 0.0))
    assert [bad.path for bad in passed.quarantine] == ["a.flac"]
    assert passed.quarantine[0].reason in ("undecodable", "truncated")


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 30))
def test_every_frame_lies_in_a_block(total, frames, hop):
    blocks = list(music._blocks(total, frames, hop))
    seen = np.zeros(total, int)
    for offset, length, is_window in blocks:
        seen[offset : offset + length] += 1
        assert 0 < length <= frames
        assert not is_window or (length == frames and offset % hop == 0)
    assert (seen >= 1).all()
    assert hop < frames or (seen == 1).all()
    assert [offset for offset, _, is_window in blocks if is_window] == list(range(0, total - frames + 1, hop))


# -------------------------------------------------------------------------------------------------------------- reader


def test_stems_add_up_to_the_mixture_and_channels_are_averaged(tmp_path):
    track = song(tmp_path, "a", 3.0)
    left, right = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 3 * RATE)).astype(np.float32)
    soundfile.write(tmp_path / "a/bass.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    manifest, _ = segments([track], tmp_path, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    reader = SegmentReader(tmp_path, manifest, RATE)
    stems = reader.stems(2)
    assert stems.shape == (4, RATE)
    assert stems.dtype == np.float32
    np.testing.assert_allclose(stems[0], (left + right)[2 * RATE :] / 2, atol=1e-7)
    np.testing.assert_allclose(reader.mixture(2), stems.sum(0), atol=1e-6)
    np.testing.assert_array_equal(reader.stem(2, 0), stems[0])
    np.testing.assert_array_equal(reader.stem(0, 0, start_seconds=2.0), stems[0])
    assert not reader.stem(0, 0, start_seconds=3.0, samples=10).any()


def test_a_ready_mixture_is_read_and_several_files_are_one_stem(tmp_path):
    for name in "xyz":
        tone(tmp_path / f"{name}.wav", 2.0, 100 + 50 * "xyz".index(name))
    track = Track("a", None, None, (Stem("s", ("x.wav", "y.wav")),), "z.wav")
    tone(tmp_path / "other.wav", 2.0, 300)
    manifest, _ = segments([track, plain("other")], tmp_path, 1.0, 1.0, fractions=(0.5, 0.0, 0.5))
    reader = SegmentReader(tmp_path, manifest, RATE)
    x, y, z = (soundfile.read(tmp_path / f"{name}.wav", dtype="float32")[0] for name in "xyz")
    np.testing.assert_allclose(reader.stems(1)[0], (x + y)[RATE:], atol=1e-6)
    np.testing.assert_array_equal(reader.mixture(1), z[RATE:])
    assert list(manifest["n_active_stems"]) == [1, 1, -1, -1]
    assert reader.stems(3).shape == (0, RATE)
    np.testing.assert_array_equal(reader.mixture(3), soundfile.read(tmp_path / "other.wav", dtype="float32")[0][RATE:])


def test_another_rate_is_resampled(tmp_path):
    tone(tmp_path / "a.wav", 3.0, 1000.0, rate=44100)
    manifest, _ = segments([plain("a")], tmp_path, 1.5, 1.5, fractions=(1.0, 0.0, 0.0))
    reader = SegmentReader(tmp_path, manifest, 16000)
    piece = reader.mixture(1)
    assert len(piece) == reader.samples(1) == 24000
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(24000)))
    assert abs(spectrum.argmax() * 16000 / 24000 - 1000) < 1
    expected = 0.1 * np.sin(2 * np.pi * 1000 * (np.arange(24000) / 16000 + 1.5))
    np.testing.assert_allclose(piece[200:-200], expected[200:-200], atol=1e-3)
    np.testing.assert_array_equal(reader.mixture(1), piece)
    assert len(reader.mixture(0, 0.1, 12345)) == 12345


def test_a_piece_is_read_and_not_its_track(tmp_path, monkeypatch):
    tone(tmp_path / "a.flac", 60.0)
    largest = 0
    read = soundfile.SoundFile.buffer_read_into

    def watched(self, buffer, dtype):
        nonlocal largest
        largest = max(largest, len(buffer))
        return read(self, buffer, dtype)

    monkeypatch.setattr(soundfile.SoundFile, "buffer_read_into", watched)
    track = Track("a", None, None, (), "a.flac")
    manifest, _ = segments([track], tmp_path, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    assert len(manifest) == 60
    assert largest == RATE
    largest = 0
    SegmentReader(tmp_path, manifest, RATE).mixture(50)
    assert largest == RATE


def test_an_index_survives_csv_and_parquet(tmp_path):
    tracks = [song(tmp_path, "a", 2.0, "bass"), plain("b")]
    tone(tmp_path / "b.wav", 2.0)
    manifest, _ = segments(tracks, tmp_path, 1.0, 1.0, fractions=(0.5, 0.0, 0.5))
    manifest.to_csv(tmp_path / "x.csv", index=False)
    manifest.to_parquet(tmp_path / "x.parquet")
    for again in (pd.read_csv(tmp_path / "x.csv"), pd.read_parquet(tmp_path / "x.parquet")):
        reader = SegmentReader(tmp_path, again, RATE)
        assert [len(reader.stems(label)) for label in range(4)] == [1, 1, 0, 0]
        assert len(reader.mixture(3)) == RATE
        MomStream(again, reader, seed=0, segment_samples=RATE, batch_size=1, max_stems=2).batch(0)


def test_a_file_that_vanished_or_changed_is_named(tmp_path):
    track = song(tmp_path, "a", 2.0, "bass")
    manifest, _ = segments([track], tmp_path, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    reader = SegmentReader(tmp_path, manifest, RATE)
    tone(tmp_path / "a/bass.wav", 2.0, rate=16000)
    with pytest.raises(BadFile, match=r"a/bass\.wav: rate_out_of_bounds: 16000 Hz, 8000 when it was indexed"):
        reader.stems(0)
    os.remove(tmp_path / "a/bass.wav")
    with pytest.raises(BadFile, match=r"a/bass\.wav: missing"):
        reader.stems(0)


# -------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    tracks = [song(root, f"t{i}", 3.0 + i) for i in range(4)]
    manifest, _ = segments(tracks, root, 1.0, 1.0, fractions=(1.0, 0.0, 0.0))
    return root, manifest


def stream(corpus, manifest=None, **changes) -> MomStream:
    root, whole = corpus
    options = {"seed": 1, "segment_samples": RATE, "batch_size": 4, "max_stems": 3} | changes
    return MomStream(whole if manifest is None else manifest, SegmentReader(root, whole, RATE), **options)


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("mixtures", "stems", "n_stems", "snr_db")
    )


def test_batches_are_a_function_of_seed_and_number(corpus):
    one, two = stream(corpus), stream(corpus)
    later = one.batch(7)
    for n in (0, 3):
        two.batch(n)
    assert same(later, two.batch(7))
    assert not same(later, one.batch(8))
    assert not same(later, stream(corpus, seed=2).batch(7))
    # The order of the rows does not matter, and a larger batch holds the same items.
    assert same(later, stream(corpus, corpus[1].sample(frac=1, random_state=0)).batch(7))
    np.testing.assert_array_equal(stream(corpus, batch_size=8).batch(3).mixtures[4:], later.mixtures)
    assert one.describe(7) == list(later.track_ids)
    assert later.recordings == tuple(tuple(f"track {name}" for name in pair) for pair in later.track_ids)


def test_pairs_are_of_different_tracks_and_all_of_them_come(corpus):
    pairs = Counter(pair for n in range(100) for pair in stream(corpus).describe(n))
    assert len(pairs) == 12
    assert all(a != b for a, b in pairs)


def test_levels_stay_in_range_and_stems_add_up(corpus):
    snrs, sizes = [], Counter()
    some = stream(corpus, snr_range=(-2.0, 4.0))
    for n in range(15):
        batch = some.batch(n)
        assert batch.mixtures.shape == (4, 2, RATE)
        assert batch.stems.shape == (4, 2, 3, RATE)
        assert batch.mixtures.dtype == batch.stems.dtype == np.float32
        np.testing.assert_allclose(batch.stems.sum(2), batch.mixtures, atol=1e-5)
        powers = (batch.mixtures.astype(np.float64) ** 2).sum(-1)
        measured = 10 * np.log10(powers[:, 0] / powers[:, 1])
        np.testing.assert_allclose(measured, batch.snr_db, atol=1e-3)
        snrs += list(measured)
        for i in range(4):
            for side in range(2):
                count = int(batch.n_stems[i, side])
                sizes[count] += 1
                assert len(batch.stem_names[i][side]) == count
                assert batch.stems[i, side, :count].any(-1).all()
                assert not batch.stems[i, side, count:].any()
    assert -2.001 < min(snrs) < -1
    assert 3 < max(snrs) < 4.001
    assert set(sizes) == {1, 2, 3}
    whole = stream(corpus, random_subsets=False, max_stems=6).batch(0)
    assert (whole.n_stems == 4).all()


def test_a_whole_mixture_is_the_sum_of_all_stems_and_tells_none(corpus):
    root, manifest = corpus
    whole = stream(corpus, mixtures="whole", fixed=True, snr_range=(0.0, 0.0)).batch(0)
    assert not whole.n_stems.any()
    assert not whole.stems.any()
    assert whole.stem_names == 4 * (((), ()),)
    reader = SegmentReader(root, manifest, RATE)
    label = {(row.track_id, row.offset): k for k, row in ((int(k), reader.row(int(k))) for k in manifest.index)}
    for (track, _), mixtures in zip(whole.track_ids, whole.mixtures, strict=True):
        windows = [reader.stems(k).sum(axis=0) for (name, _), k in label.items() if name == track]
        assert any(np.allclose(mixtures[0], window, atol=1e-5) for window in windows)


def test_training_pieces_begin_anywhere_unless_told_otherwise(corpus):
    root, manifest = corpus
    starts = []

    class Watching(SegmentReader):
        def stem(self, label, k, start_seconds=None, samples=None):
            starts.append(start_seconds)
            return super().stem(label, k, start_seconds, samples)

    options = {"seed": 0, "segment_samples": RATE // 2, "batch_size": 8, "max_stems": 1}
    reader = Watching(root, manifest, RATE)
    MomStream(manifest, reader, **options).batch(0)
    assert len(set(starts)) == 16
    assert None not in starts
    starts.clear()
    MomStream(manifest, reader, **options, random_offsets=False).batch(0)
    assert set(starts) == {None}


def test_a_fixed_set_has_each_row_once_at_its_place(corpus):
    root, manifest = corpus
    some = stream(corpus, fixed=True, random_subsets=False, max_stems=4, snr_range=(0.0, 0.0))
    assert some.n_batches == 5  # 3 + 4 + 5 + 6 rows
    batches = [some.batch(n) for n in range(5)]
    assert [len(batch.mixtures) for batch in batches] == [4, 4, 4, 4, 2]
    firsts = np.concatenate([batch.mixtures[:, 0] for batch in batches])
    reader = SegmentReader(root, manifest, RATE)
    expected = Counter(reader.mixture(label).tobytes() for label in manifest.index)
    assert Counter(first.tobytes() for first in firsts) == expected
    names = Counter(pair[0] for batch in batches for pair in batch.track_ids)
    assert names == Counter(manifest["track_id"])
    assert all(a != b for batch in batches for a, b in batch.track_ids)
    with pytest.raises(IndexError, match="no batch 5 in a set of 5"):
        some.batch(5)


def test_tracks_without_stems_give_their_mixture(tmp_path):
    for name, hertz in (("a", 200.0), ("b", 300.0)):
        tone(tmp_path / f"{name}.wav", 3.0, hertz)
    manifest, _ = segments([plain("a"), plain("b")], tmp_path, 1.0, 1.0, fractions=(0.5, 0.0, 0.5))
    reader = SegmentReader(tmp_path, manifest, RATE)
    batch = MomStream(manifest, reader, seed=0, segment_samples=RATE, batch_size=2, max_stems=4).batch(0)
    assert not batch.n_stems.any()
    assert not batch.stems.any()
    assert (np.abs(batch.mixtures).max(-1) > 0.05).all()


def test_a_silent_place_is_not_taken(tmp_path):
    """Nine tenths of both tracks are silence; a piece never is."""
    for name in "ab":
        waveform = np.zeros(20 * RATE)
        waveform[: 2 * RATE] = 0.1 * np.sin(np.arange(2 * RATE) * (1 if name == "a" else 0.7))
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "bass.wav", waveform, RATE)
    tracks = [Track(name, None, None, (Stem("bass", (f"{name}/bass.wav",)),), None) for name in "ab"]
    manifest, passed = segments(tracks, tmp_path, 1.0, 1.0, fractions=(0.5, 0.0, 0.5))
    assert passed.counts == {"silent_segments": 36}
    reader = SegmentReader(tmp_path, manifest, RATE)
    some = MomStream(manifest, reader, seed=0, segment_samples=RATE, batch_size=10, max_stems=4)
    for n in range(3):
        batch = some.batch(n)
        assert (batch.n_stems == 1).all()
        assert all(level_db(mixture) > -60 for pair in batch.mixtures for mixture in pair)


def test_streams_that_cannot_be(corpus):
    root, manifest = corpus
    with pytest.raises(ValueError, match="a pair needs two tracks"):
        stream(corpus, manifest[manifest["track_id"] == "t0"])
    with pytest.raises(ValueError, match="mom_snr_range: 5"):
        stream(corpus, snr_range=(5.0, -5.0))
    with pytest.raises(ValueError, match="with 0 stems"):
        stream(corpus, max_stems=0)
    with pytest.raises(ValueError, match="row 0 is of track 't1' here and of 't0'"):
        stream(corpus, manifest[manifest["track_id"] != "t0"].reset_index(drop=True))
    with pytest.raises(ValueError, match="labels of their own"):
        SegmentReader(root, pd.concat([manifest, manifest]), RATE)
