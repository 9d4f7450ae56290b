"""A stream of a .stem.mp4 is the same samples from wherever one begins, at their place; a bad file is told by name."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from pipeline.audio import BadClip, stem_mp4
from pipeline.audio.stem_mp4 import BLOCK, StemStream
from pipeline.datasets.music import split_stream, stream_path, tracks_of
from pipeline.mixtures.tracks import BadFile, SegmentReader, _open, segments
from pipeline.stages.index_music import index_music
from tests.tiny_mixit import music_params

RATE = 44100
SECONDS = 3.0
CLICK = 50_000  # in every stream at the same sample


def sounds(n: int, seconds: float, noise: float) -> list[np.ndarray]:
    """Stereo tones, of another frequency in each stream and channel."""
    t, rng = np.arange(round(seconds * RATE)) / RATE, np.random.default_rng(0)
    found = []
    for k in range(n):
        sound = np.stack([0.1 * np.sin(2 * np.pi * hertz * (k + 1) * t) for hertz in (220, 330)])
        sound += noise * rng.standard_normal(sound.shape)
        sound[:, CLICK : CLICK + 20] += 0.5
        found.append(sound.astype(np.float32))
    return found


def write(
    path: Path, n: int = 5, seconds: float = SECONDS, pns: bool = False, noise: float = 0.0, codec: str = "aac", **muxer
) -> Path:
    """A .stem.mp4 of `n` streams. `pns`: with noise that the decoder draws."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"aac_pns": str(int(pns))} if codec == "aac" else {}
    with av.open(str(path), "w", format="mp4", options=muxer) as file:
        streams = [file.add_stream(codec, rate=RATE, layout="stereo", options=options) for _ in range(n)]
        waveforms = sounds(n, seconds, noise)
        form = streams[0].codec_context.codec.audio_formats[0].name
        for start in range(0, waveforms[0].shape[1], 1024):
            for stream, waveform in zip(streams, waveforms, strict=True):
                piece = np.ascontiguousarray(waveform[:, start : start + 1024])
                piece = piece if form == "fltp" else (piece * 2.0**31).astype({"s32p": "i4", "s16p": "i2"}[form])
                frame = av.AudioFrame.from_ndarray(piece, format=form, layout="stereo")
                frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    return path


def decoded(path: Path, k: int) -> np.ndarray:
    """The whole stream, in one go."""
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray() for frame in file.decode(audio=k)], 1).T


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("musdb18")
    write(root / "train/A - #1.stem.mp4")
    write(root / "train/Meaxic - Take A Step.stem.mp4", noise=0.02)
    write(root / "test/B - C.stem.mp4", noise=0.001, movflags="faststart")  # not the sound of A
    return root


# -------------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("k", range(5))
def test_a_piece_is_that_of_the_whole_stream_wherever_it_begins(root, k):
    path = root / "train/Meaxic - Take A Step.stem.mp4"
    whole = decoded(path, k)
    stream = StemStream(path, k)
    assert (stream.rate, stream.channels, stream.frames) == (RATE, 2, round(SECONDS * RATE))
    for start in (CLICK, 0, 1, 1023, 1024, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5000, stream.frames - 7):
        frames = min(40_000, stream.frames - start)
        np.testing.assert_array_equal(stream.read(start, frames), whole[start : start + frames])
        alone = StemStream(path, k)
        np.testing.assert_array_equal(alone.read(start, 5), whole[start : start + 5])
        alone.close()


def test_noise_that_the_decoder_draws_does_not_depend_on_what_was_read_before(tmp_path):
    path = write(tmp_path / "x.stem.mp4", n=1, pns=True, noise=0.05)
    stream = StemStream(path, 0)
    whole = stream.read(0, stream.frames)
    assert np.abs(whole - decoded(path, 0)[: stream.frames]).max() > 1e-6  # a decoder that goes on draws other noise
    for start in np.random.default_rng(0).integers(stream.frames - 3000, size=12).tolist():
        np.testing.assert_array_equal(stream.read(start, 3000), whole[start : start + 3000])


def test_samples_lie_where_the_encoder_had_them_in_every_stream(root):
    path = root / "train/A - #1.stem.mp4"
    for k, sound in enumerate(sounds(5, SECONDS, 0.0)):
        stream = StemStream(path, k)
        waveform = stream.read(0, stream.frames)
        error = waveform[RATE : RATE + 2000] - sound.T[RATE : RATE + 2000]
        assert np.abs(error).max() < 0.02
        assert CLICK - 2 <= np.diff(waveform[:, 0]).argmax() + 1 <= CLICK + 2


def test_who_reads_on_decodes_each_block_once_and_keeps_one(root, monkeypatch):
    calls = []
    real = StemStream._decode
    monkeypatch.setattr(StemStream, "_decode", lambda self, start, n: calls.append((start, n)) or real(self, start, n))
    stream = StemStream(root / "test/B - C.stem.mp4", 2)
    for start in range(0, stream.frames - 3000, 3000):
        stream.read(start, 3000)
    assert calls == [(start, min(BLOCK, stream.frames - start)) for start in range(0, stream.frames, BLOCK)]
    assert stream._block.nbytes <= BLOCK * 2 * 4


def test_lengths_about_a_packet_and_a_block(tmp_path):
    for frames in (500, 1500, BLOCK - 1, BLOCK, BLOCK + 1):
        path = write(tmp_path / f"{frames}.stem.mp4", n=1, seconds=frames / RATE)
        stream = StemStream(path, 0)
        assert frames - RATE / 1000 <= stream.frames <= frames  # such files count their length in milliseconds
        np.testing.assert_array_equal(stream.read(0, stream.frames), decoded(path, 0)[: stream.frames])


def test_what_is_wrong_with_a_file(tmp_path, root):
    whole = (root / "test/B - C.stem.mp4").read_bytes()  # its index is at the front
    cases = {
        "cut": (whole[: len(whole) // 2], "truncated", "bytes of"),
        "text": (b"no audio", "undecodable", "Invalid data"),
        "empty": (b"", "no_samples", "the file is empty"),
        "playlist": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "undecodable", "Invalid data"),
        "no index": ((root / "train/A - #1.stem.mp4").read_bytes()[:50_000], "undecodable", "Invalid data"),
    }
    assert whole.count(b"Lavf") == 1
    (tmp_path / "latin.stem.mp4").write_bytes(whole.replace(b"Lavf", b"\xe4\xf6\xfc\xdf"))
    assert StemStream(tmp_path / "latin.stem.mp4", 0).frames  # a tag in no alphabet is nothing wrong
    for name, (content, reason, detail) in cases.items():
        path = tmp_path / f"{name}.stem.mp4"
        path.write_bytes(content)
        with pytest.raises(BadClip, match=detail) as bad:
            StemStream(path, 0)
        assert bad.value.reason == reason
        assert str(tmp_path) not in str(bad.value)
    with pytest.raises(BadClip, match="missing: the file has 2 audio streams, and none of number 4"):
        StemStream(write(tmp_path / "two.stem.mp4", n=2, seconds=0.2), 4)
    with pytest.raises(BadClip, match="undecodable: alac, not AAC"):
        StemStream(write(tmp_path / "alac.stem.mp4", n=1, seconds=0.2, codec="alac"), 0)


def test_damage_is_found_when_it_is_read(tmp_path, root):
    content = bytearray((root / "test/B - C.stem.mp4").read_bytes())
    content[-60_000:-20_000] = np.random.default_rng(0).bytes(40_000)
    path = tmp_path / "x.stem.mp4"
    path.write_bytes(content)
    stream = StemStream(path, 1)
    stream.read(0, 1000)
    with pytest.raises(BadClip, match="undecodable"):
        stream.read(0, stream.frames)


def test_nothing_of_it_is_loaded_until_such_a_file_is_opened():
    code = "import sys, pipeline.mixtures.tracks; print([name for name in ('av', 'torch') if name in sys.modules])"
    root = Path(stem_mp4.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --------------------------------------------------------------------------------------------------------------- music


def test_only_a_number_behind_the_suffix_is_a_stream():
    assert split_stream(stream_path("a/b#1.stem.mp4", 4)) == ("a/b#1.stem.mp4", 4)
    for path in (
        "a#1.wav",
        "a#1.stem.mp4",
        "a.stem.mp4",
        "a.stem.mp4#x",
        "a.stem.mp4#",
        "a.mp4#1",
        "a.stem.mp4#²",
        "1",
    ):
        assert split_stream(path) == (path, None)


def test_musdb18_as_stem_mp4(root):
    found = tracks_of("musdb18", root)
    assert [(track.track_id, track.artist, track.subset) for track in found] == [
        ("A_-_1", "A", "train"),
        ("B_-_C", "B", "test"),
        ("Meaxic_-_Take_A_Step", "Meaxic", "validation"),
    ]
    assert [(stem.name, stem.paths) for stem in found[0].stems] == [
        ("vocals", ("train/A - #1.stem.mp4#4",)),
        ("drums", ("train/A - #1.stem.mp4#1",)),
        ("bass", ("train/A - #1.stem.mp4#2",)),
        ("other", ("train/A - #1.stem.mp4#3",)),
    ]
    assert found[0].mixture == "train/A - #1.stem.mp4#0"


def test_segments_of_streams_are_read_as_those_of_files(root):
    manifest, passed = segments(tracks_of("musdb18", root), root, 1.0, 0.5, how="source")
    assert not passed.quarantine
    assert list(manifest.groupby("split")["track_id"].agg(set)) == [{"B_-_C"}, {"A_-_1"}, {"Meaxic_-_Take_A_Step"}]
    assert set(manifest["n_active_stems"]) == {4}
    assert set(manifest["track_frames"]) == {round(SECONDS * RATE)}
    reader = SegmentReader(root, manifest, RATE)
    label = manifest.index[(manifest["track_id"] == "A_-_1") & (manifest["offset"] == RATE // 2)][0]
    path = root / "train/A - #1.stem.mp4"
    piece = slice(RATE // 2, RATE // 2 + RATE)
    np.testing.assert_allclose(reader.mixture(label), decoded(path, 0)[piece].mean(1), atol=1e-6)
    for stem, k in zip(reader.stems(label), (4, 1, 2, 3), strict=True):
        np.testing.assert_allclose(stem, decoded(path, k)[piece].mean(1), atol=1e-6)
    behind = reader.stem(label, 0, start_seconds=SECONDS - 0.25, samples=RATE // 2)
    assert behind[: RATE // 8].any()
    assert not behind[RATE // 4 :].any()
    assert not reader.stem(label, 0, start_seconds=SECONDS + 1, samples=100).any()


def test_a_stream_lies_inside_of_the_root_and_is_no_link(root, tmp_path):
    (tmp_path / "x.stem.mp4").symlink_to(root / "test/B - C.stem.mp4")
    os.mkfifo(tmp_path / "pipe.stem.mp4")
    for path, reason in (
        ("x.stem.mp4#0", "not_regular_file: link"),
        ("pipe.stem.mp4#0", "not_regular_file: pipe"),
        ("../x.stem.mp4#0", "outside_root"),
        ("gone.stem.mp4#0", "missing"),
    ):
        with pytest.raises(BadFile, match=reason) as bad:
            _open(tmp_path, path)
        assert bad.value.path == path


def test_stage_index_music_quarantines_what_it_cannot_read(tmp_path):
    for name in "abcd":
        write(tmp_path / f"in/train/{name} - x.stem.mp4", seconds=1.0, movflags="faststart")
    write(tmp_path / "in/train/few - x.stem.mp4", n=3, seconds=1.0)
    (tmp_path / "in/train/text - x.stem.mp4").write_text("no audio")
    cut = tmp_path / "in/train/d - x.stem.mp4"
    cut.write_bytes(cut.read_bytes()[:-20_000])
    params = music_params(tmp_path / "in", source="musdb18", segment_seconds=[0.5], max_bad_fraction=0.6)
    summary = index_music(tmp_path / "index", params)
    listing = pd.read_csv(tmp_path / "index" / "quarantine.csv")
    assert listing[["path", "reason", "detail"]].to_numpy().tolist()[1:] == [
        ["train/few - x.stem.mp4#4", "missing", "the file has 3 audio streams, and none of number 4"],
        ["train/text - x.stem.mp4#4", "undecodable", "Invalid data found when processing input"],
    ]
    assert listing["path"][0].startswith("train/d - x.stem.mp4#")
    assert listing["reason"][0] == "truncated"
    assert summary["segments_0.5s"]["kept"] == 6
