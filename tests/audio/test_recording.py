"""One reader for clips and for music: joined, uncounted, cut and foreign files are read whole, or say what is wrong."""

import io
import math
import os
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import soundfile

from pipeline import audio
from pipeline.audio import ffmpeg, joined
from pipeline.audio.badclip import BadClip
from pipeline.datasets.music import Stem, Track
from pipeline.mixtures import manifest
from pipeline.mixtures.tracks import scan
from pipeline.stages import resample

RATE = 44_100
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")


def steps(rate=RATE, seconds=12):
    """Another pitch in every second, so that a piece says where it is from."""
    pitch = np.repeat(300 + 100 * np.arange(seconds), rate)
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate)).astype(np.float32)


def pitches(waveform, rate):
    """What sounds in each whole second, in Hz."""
    seconds = waveform[: len(waveform) // rate * rate].reshape(-1, rate)
    return [int(np.abs(np.fft.rfft(second * np.hanning(rate))).argmax()) for second in seconds]


def encoded(waveform, format, rate=RATE, **options):
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", rate, 1 if waveform.ndim == 1 else waveform.shape[1], format=format, **options
    ) as sound:
        sound.write(waveform)
    return file.getvalue()


def without_count(mp3):
    """An MP3 as an encoder writes it into a pipe, or sox: without the frame that counts the others."""
    frame = joined._Frame.read(mp3[:4])
    assert mp3[4 + frame.side_size :][:4] in (b"Xing", b"Info")
    return mp3[frame.size :]


def without_total(flac):
    """A FLAC as ffmpeg writes it into a pipe: the 36 bits that say its length are zero."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def read(path, start=0.0, end=10.0, most=10.0):
    return audio.read_segment(path, start, end, most)


def reason(path, start=0.0, end=10.0):
    with pytest.raises(BadClip) as bad:
        read(path, start, end)
    return bad.value.reason


# ------------------------------------------------------------------------------------------------------- joined files


def whole_files():
    sound, loud = steps(), 10 ** (-3 + 3 * np.arange(12 * RATE) / (12 * RATE))
    variable = {"bitrate_mode": "VARIABLE", "compression_level": 0.3}
    mp3, mp3_low = encoded(sound, "MP3", **variable), encoded(steps(16_000), "MP3", 16_000)
    return {
        "uncounted.mp3": (without_count(encoded((loud * sound).astype("f4"), "MP3", **variable)), RATE),
        "constant.mp3": (without_count(encoded(sound, "MP3", bitrate_mode="CONSTANT", compression_level=0.5)), RATE),
        "stereo.mp3": (without_count(encoded(np.stack([sound, sound], 1), "MP3", **variable)), RATE),
        "mpeg2.mp3": (without_count(mp3_low), 16_000),
        "zeros.mp3": (bytes(417) + mp3, RATE),
        "tags.mp3": (b"ID3\4\0\0\0\0\1\0" + bytes(128) + mp3 + b"TAG" + bytes(125), RATE),
        "plain.flac": (encoded(sound, "FLAC"), RATE),
        "total_0.flac": (without_total(encoded(sound, "FLAC")), RATE),
        "plain.ogg": (encoded(sound, "OGG", subtype="VORBIS"), RATE),
        "plain.opus": (encoded(steps(48_000), "OGG", 48_000, subtype="OPUS"), 48_000),
        "plain.wav": (encoded(sound, "WAV"), RATE),
        "plain.w64": (encoded(sound, "W64"), RATE),
        "plain.rf64": (encoded(sound, "RF64"), RATE),
        "plain.aiff": (encoded(sound, "AIFF"), RATE),
        "plain.caf": (encoded(sound, "CAF"), RATE),
        "plain.au": (encoded(sound, "AU"), RATE),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(whole_files()))
def test_a_recording_is_read_whole_and_its_segment_from_the_right_place(tmp_path, name):
    content, rate = whole_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with audio.open_recording(path) as recording:
        assert abs(recording.frames - 12 * rate) < 0.1 * rate
        assert pitches(recording.read(0, 13 * rate), rate)[:11] == [300 + 100 * k for k in range(11)]
    segment = read(path, 6.0, 9.0)
    assert segment.notes == ("cut",)
    assert np.allclose(pitches(segment.waveform, rate), [900, 1000, 1100], atol=10)


@pytest.mark.parametrize("name", list(whole_files()))
def test_what_is_longer_than_a_clip_is_cut_or_its_loudest_part_is_taken(tmp_path, name):
    """12 s of which nobody has listed an end, for clips of 5 s."""
    content, rate = whole_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    parts = {long: list(audio.read_segments(path, 0.0, math.inf, 5.0, long)) for long in ("first", "cut", "best")}
    for long, starts in {"first": [0], "cut": [0, 5, 10]}.items():
        assert [part.start_seconds for part in parts[long]] == starts
        for part in parts[long]:
            assert part.notes == ("long",)
            assert part.whole_seconds == pytest.approx(12, abs=0.1)
            first = 300 + 100 * int(part.start_seconds)
            heard = pitches(part.waveform, rate)[:5]
            assert np.allclose(heard, [first + 100 * k for k in range(len(heard))], atol=10)
    assert sum(len(part.waveform) for part in parts["cut"]) == pytest.approx(12 * rate, abs=0.1 * rate)
    (best,) = parts["best"]
    assert len(best.waveform) == 5 * rate
    if name == "uncounted.mp3":  # which gets louder all the time
        assert best.start_seconds == 7


def test_the_loudest_part_may_begin_at_any_second(tmp_path):
    x = 1e-3 * np.random.default_rng(0).standard_normal(30 * 16_000).astype("f4")
    x[13 * 16_000 : 17 * 16_000] += steps(16_000, 4)
    soundfile.write(tmp_path / "a.wav", x, 16_000)
    (best,) = audio.read_segments(tmp_path / "a.wav", 0.0, math.inf, 4.0, "best")
    assert (best.start_seconds, best.whole_seconds, best.notes) == (13, 30, ("long",))
    (listed,) = audio.read_segments(tmp_path / "a.wav", 0.0, 15.0, 4.0, "best")  # what is behind 15 s is another's
    assert (listed.start_seconds, listed.whole_seconds) == (11, 15)


def test_a_rest_of_less_than_a_second_is_no_clip_and_an_end_that_lacks_is_no_silence(tmp_path):
    sound = steps(16_000, 11)
    soundfile.write(tmp_path / "a.wav", sound[: 16_000 * 21 // 2], 16_000)
    parts = list(audio.read_segments(tmp_path / "a.wav", 0.0, math.inf, 5.0, "cut"))
    assert [part.start_seconds for part in parts] == [0, 5]
    flac = encoded(sound, "FLAC", 16_000)
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) * 8 // 11])
    pieces = audio.read_segments(tmp_path / "cut.flac", 0.0, math.inf, 5.0, "cut")
    assert next(pieces).start_seconds == 0
    with pytest.raises(BadClip, match=r"truncated|undecodable"):
        next(pieces)


@pytest.mark.parametrize(
    "name", ["uncounted.mp3", "zeros.mp3", "plain.ogg", "plain.opus", "plain.flac", "total_0.flac", "tags.mp3"]
)
def test_joined_recordings_are_one_sound(tmp_path, name):
    content, rate = whole_files()[name]
    path = tmp_path / name
    path.write_bytes(2 * content)
    with audio.open_recording(path) as recording:
        assert abs(recording.frames - 24 * rate) < 0.2 * rate
        whole = recording.read(0, 25 * rate)
        assert abs(len(whole) - recording.frames) <= 1
        np.testing.assert_allclose(recording.read(20 * rate, 2 * rate), whole[20 * rate : 22 * rate], atol=2e-3)
    segment = read(path, 18.0, 21.0)
    assert segment.notes == ("cut",)
    assert np.allclose(pitches(segment.waveform, rate), [900, 1000, 1100], atol=60)


def test_joined_recordings_keep_their_channels_in_blocks(tmp_path):
    path = tmp_path / "a.flac"
    both = [np.stack([steps(), -steps()], axis=1), steps()]
    path.write_bytes(2 * encoded(both[0], "FLAC"))
    with audio.open_recording(path) as recording:
        whole = np.concatenate(list(recording.blocks(1 << 17)), axis=1)
    np.testing.assert_allclose(whole.T, np.concatenate(2 * [both[0]]), atol=1e-4)
    path.write_bytes(encoded(both[0], "FLAC") + encoded(both[1], "FLAC"))
    with audio.open_recording(path) as recording, pytest.raises(BadClip, match="2 and 1 channels"):
        list(recording.blocks(1 << 17))


def test_joined_recordings_of_two_rates_are_no_clip(tmp_path):
    path = tmp_path / "a.ogg"
    path.write_bytes(encoded(steps(), "OGG") + encoded(steps(32_000), "OGG", 32_000))
    assert read(path, 0.0, 10.0).notes == ()
    assert reason(path, 14.0, 24.0) == "undecodable"


def test_damage_between_mpeg_frames_is_not_passed_over(tmp_path):
    path, mp3 = tmp_path / "a.mp3", without_count(encoded(steps(), "MP3"))
    half = len(mp3) // 2
    path.write_bytes(mp3[:half] + b"\x55" * 5000 + mp3[half:])
    assert reason(path) == "undecodable"


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "SVX", "CAF"])
def test_a_cut_file_is_truncated_as_a_clip_and_as_music(tmp_path, format):
    content = encoded(steps(), format)
    (tmp_path / "a.wav").write_bytes(content[: len(content) // 2])
    expected = ("truncated", "undecodable") if format == "CAF" else ("truncated",)
    assert reason(tmp_path / "a.wav") in expected
    _, blamed = scan(Track("t", None, None, (), "a.wav"), tmp_path, 1.0, 1.0, Counter(), {})
    assert blamed.reason in expected


@pytest.mark.parametrize("format", ["OGG", "MP3", "FLAC"])
def test_a_cut_stem_is_no_track_of_music(tmp_path, format):
    content = encoded(steps(), format)
    (tmp_path / "a.ogg").write_bytes(content[: len(content) // 2])
    _, blamed = scan(Track("t", None, None, (), "a.ogg"), tmp_path, 1.0, 1.0, Counter(), {})
    assert blamed.reason in ("truncated", "undecodable")


def test_no_file_is_read_for_longer_than_a_day_of_sound(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.audio.recording.MAX_SECONDS", 10.0)
    (tmp_path / "a.flac").write_bytes(encoded(np.zeros(12 * RATE, np.float32), "FLAC"))
    _, blamed = scan(Track("t", None, None, (), "a.flac"), tmp_path, 1.0, 1.0, Counter(), {})
    assert blamed.reason == "too_long"
    monkeypatch.setattr("pipeline.audio.recording.MAX_PIECE", 8 * RATE)
    with pytest.raises(BadClip, match="too_long"):
        read(tmp_path / "a.flac", 0.0, float("inf"), 1e9)


# ---------------------------------------------------------------------------------------------------------- antiphase


def stereo(tmp_path, *channels, rate=48_000):
    soundfile.write(tmp_path / "a.wav", np.stack(channels, 1), rate, subtype="FLOAT")
    return read(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("period", [4, 8, 16, 24, 32, 64])
def test_an_opposite_tone_of_any_pitch_is_heard(tmp_path, rate, period):
    tone = (0.3 * np.sin(2 * np.pi * np.arange(10 * rate) / period)).astype(np.float32)
    segment = stereo(tmp_path, tone, -tone, rate=rate)
    assert segment.notes == ("antiphase",)
    np.testing.assert_allclose(segment.waveform, tone, atol=1e-6)


def test_only_where_the_mean_cancels_another_channel_is_taken(tmp_path):
    noise = (0.1 * np.random.default_rng(0).standard_normal(480_000)).astype(np.float32)
    sign = np.where((np.arange(480_000) > 120_000) & (np.arange(480_000) < 240_000), -1, 1).astype(np.float32)
    segment = stereo(tmp_path, noise, sign * noise)
    assert segment.notes == ("antiphase",)
    fading = np.minimum(np.abs(np.arange(480_000) - 120_000), np.abs(np.arange(480_000) - 240_000)) < 300
    np.testing.assert_allclose(segment.waveform[~fading], noise[~fading], atol=1e-6)
    right = np.where(sign < 0, noise, 0)
    segment = stereo(tmp_path, noise, right)
    assert segment.notes == ()
    np.testing.assert_allclose(segment.waveform, (noise + right) / 2, atol=1e-6)


@pytest.mark.parametrize("sounding", range(6))
def test_one_channel_of_many_is_no_antiphase_and_a_pair_of_them_is(tmp_path, sounding):
    noise = (0.1 * np.random.default_rng(0).standard_normal(480_000)).astype(np.float32)
    channels = [np.zeros_like(noise) for _ in range(6)]
    channels[sounding] = noise
    assert stereo(tmp_path, *channels).notes == ()
    channels[sounding - 1] = -noise
    segment = stereo(tmp_path, *channels)
    assert segment.notes == ("antiphase",)
    np.testing.assert_allclose(np.abs(segment.waveform), np.abs(noise), atol=1e-6)


def test_a_piece_of_music_is_the_same_from_wherever_it_is_read(tmp_path):
    rng = np.random.default_rng(0)
    left = (0.1 * rng.standard_normal(10 * RATE)).astype(np.float32)
    sign = np.repeat(rng.choice([-1, 1], 20), RATE // 2).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, sign * left], 1), RATE)
    with audio.open_recording(tmp_path / "a.wav") as recording:
        whole = recording.read(0, 10 * RATE)
        for start in (1, 4_409, 22_050, 44_101, 200_003):
            np.testing.assert_array_equal(recording.read(start, 50_000), whole[start : start + 50_000])


# -------------------------------------------------------------------------------------------------------------- ffmpeg


@needs_ffmpeg
@pytest.mark.parametrize("how", [
    "-c:a libopus x.webm", "-c:a libvorbis x.mkv", "-c:a pcm_s16le x.mkv", "-c:a aac x.m4a", "-c:a aac x.aac",
    "-c:a wmav2 x.wma", "-c:a aac x.ts", "-c:a flac -f ogg x.ogg", "-c:a mp3 x.mov", "-c:a ac3 x.ac3",
])  # fmt: skip
def test_what_libsndfile_does_not_know_is_cut_by_ffmpeg(tmp_path, how):
    soundfile.write(tmp_path / "x.wav", steps(48_000), 48_000)
    command = ["ffmpeg", "-y", "-v", "error", "-i", "x.wav", *how.split()]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this ffmpeg does not write it")
    path = tmp_path / how.split()[-1]
    segment = read(path, 6.0, 9.0)
    assert segment.notes == ("ffmpeg", "cut")
    assert np.allclose(pitches(segment.waveform, segment.sample_rate), [900, 1000, 1100], atol=20)
    rows, blamed = scan(Track("t", None, None, (Stem("a", (path.name,)),), None), tmp_path, 3.0, 3.0, Counter(), {})
    assert blamed is None
    assert len(rows) in (3, 4)  # of 12 s, less what the codec leaves out


@needs_ffmpeg
@pytest.mark.parametrize("late", [0.05, 3.5])
def test_sound_that_begins_later_than_the_picture_keeps_its_time(tmp_path, late):
    soundfile.write(tmp_path / "x.wav", steps(48_000), 48_000)
    picture = ["-f", "lavfi", "-i", "color=size=32x32:rate=5:duration=16", "-itsoffset", str(late), "-i", "x.wav"]
    command = ["ffmpeg", "-y", "-v", "error", *picture, "-c:v", "mpeg4", "-c:a", "aac", "x.mp4"]
    subprocess.run(command, cwd=tmp_path, check=True)
    begins = audio.open_recording(tmp_path / "x.mp4")
    assert abs(int(np.argmax(np.abs(begins.read(0, 5 * 48_000)) > 0.1)) / 48_000 - late) < 0.03
    begins.close()
    shift = round(late)
    segment = read(tmp_path / "x.mp4", 6.0 + late, 9.0 + late)
    assert segment.notes == ("ffmpeg", "cut")
    assert np.allclose(pitches(segment.waveform, 48_000), [900, 1000, 1100], atol=20), shift


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'error while loading shared libraries' >&2; exit 127", "unreadable"),
        ("kill -9 $$", "unreadable"),
        ("echo 'x: Cannot allocate memory' >&2; exit 1", "unreadable"),
        ("echo 'moov atom not found' >&2; exit 1", "undecodable"),
        ("echo nothing", "undecodable"),
    ],
)
def test_the_machines_fault_is_not_the_files(tmp_path, monkeypatch, script, expected):
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert reason(tmp_path / "a.m4a") == expected
    assert ffmpeg.version().startswith(f"{tmp_path}/ffmpeg")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert ffmpeg.version() == ""
    assert reason(tmp_path / "a.m4a") == "unsupported_container"


def test_a_finished_part_is_made_again_when_what_it_depends_on_has_changed(tmp_path, monkeypatch):
    root, part = tmp_path / "corpus", tmp_path / "part"
    root.mkdir()
    monkeypatch.setenv("PATH", "/nonexistent")
    params = resample.ResampleParams(format="wav", n_shards=1, max_bad_fraction=1.0, silence_db=-80.0, long="first")
    clips = resample.AudioParams(sample_rate=32_000, clip_seconds=10.0, segment_seconds=2.0)

    def made(*names):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        rows = "".join(f"{name[0]},a,/m/09x0r,{name},0,0.0,10.0,{name[0]}\n" for name in names)
        (tmp_path / "00000.csv").write_text(",".join(manifest.LISTED) + "\n" + rows)
        resample.resample_part(tmp_path / "00000.csv", part, root=root, split="x", audio=clips, params=params)
        return part

    (root / "a.wav").write_bytes(encoded(steps(), "WAV"))
    (root / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    assert not resample.is_stale(made("a.wav"), root)
    content = (root / "a.wav").read_bytes()
    (root / "a.wav").write_bytes(content)  # as many bytes, and another time
    os.utime(root / "a.wav", ns=(1, 1))
    assert resample.is_stale(part, root)
    assert not resample.is_stale(made("a.wav", "b.m4a"), root)
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert resample.is_stale(part, root)
    assert not resample.is_stale(made("a.wav"), root)
    (root / "a.wav").unlink()
    assert resample.is_stale(part, root)
    assert resample.is_stale(made("a.wav"), root)  # missing: looked at again in any case
