"""Reading recordings: resampling keeps what it should, and no file is believed, waited for or swallowed whole."""

import io
import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import audio
from pipeline.audio import BadClip, is_below, level_db, locate, resample, to_int16

RATE = 44_100


def tone(frequency, rate, seconds, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def amplitude_at(waveform, frequency, rate):
    """Least-squares amplitude of a tone, and the RMS of what is left, edges aside."""
    middle = waveform[len(waveform) // 5 : -len(waveform) // 5].astype(np.float64)
    time = 2 * np.pi * frequency * np.arange(len(middle)) / rate
    basis = np.stack([np.sin(time), np.cos(time)], axis=1)
    weights = np.linalg.lstsq(basis, middle, rcond=None)[0]
    return np.hypot(*weights), np.sqrt(np.mean((middle - basis @ weights) ** 2))


def write(path, waveform, rate=RATE, **kwargs):
    soundfile.write(path, waveform, rate, **kwargs)
    return path


def read_segment(path, start, end, max_seconds=10):
    return audio.read_segment(path, float(start), float(end), float(max_seconds))


def reason(path, start=0, end=10):
    with pytest.raises(BadClip) as bad:
        read_segment(path, start, end)
    return bad.value.reason


# ---------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.8])
def test_a_tone_survives_resampling_at_its_level_and_frequency(rate, fraction):
    frequency = fraction * min(rate, 32_000) / 2
    amplitude, rest = amplitude_at(resample(tone(frequency, rate, 0.5), rate, 32_000), frequency, 32_000)
    assert 20 * abs(math.log10(amplitude / 0.5)) < 0.01
    assert 20 * math.log10(rest / 0.5) < -100


@pytest.mark.parametrize(
    ("rate", "frequency"), [(44_100, 17_500), (44_100, 21_000), (48_000, 18_000), (96_000, 40_000)]
)
def test_a_tone_above_nyquist_vanishes(rate, frequency):
    left = resample(tone(frequency, rate, 0.5), rate, 32_000)[1000:-1000]
    assert 20 * math.log10(np.abs(left).max() / 0.5) < -90


def test_resampling_delays_nothing():
    pulse = np.zeros(RATE, np.float32)
    pulse[RATE // 2] = 1
    assert int(np.argmax(np.abs(resample(pulse, RATE, 32_000)))) == 16_000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([4_000, 8_000, 11_025, 22_050, 44_100, 48_000, 384_000, 7_919]))
def test_resampling_gives_the_ceiling_of_the_exact_length(n, rate):
    assert len(resample(np.ones(n, np.float32), rate, 32_000)) == -(-n * 32_000 // rate)


def test_resampling_to_the_same_rate_changes_nothing():
    waveform = tone(440, 32_000, 0.1)
    np.testing.assert_array_equal(resample(waveform, 32_000, 32_000), waveform)


def test_sixteen_bits_are_rounded_and_clipped():
    values = np.array([0, 1, -1, 0.5 / 32767, 1.6 / 32767, 2, -2], np.float32)
    np.testing.assert_array_equal(to_int16(values), [0, 32767, -32767, 0, 2, 32767, -32768])
    assert to_int16(values).dtype == np.dtype("<i2")
    many = np.random.default_rng(0).uniform(-1.1, 1.1, audio._BLOCK_SAMPLES + 1001).astype(np.float32)
    np.testing.assert_array_equal(to_int16(many), np.clip(np.rint(many * np.float32(32767)), -32768, 32767))


def test_the_level_is_that_about_the_mean():
    assert level_db(tone(440, RATE, 1, amplitude=1.0)) == pytest.approx(-3.01, abs=0.01)
    assert level_db(tone(440, RATE, 1, amplitude=1e-3) + np.float32(0.7)) == pytest.approx(-63.01, abs=0.1)
    assert level_db(np.full(RATE, 0.3, np.float32)) < -120
    assert level_db(np.zeros(10, np.float32)) == -math.inf


@given(st.integers(1, 3000), st.floats(-90, -20), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_whether_a_level_is_below_does_not_depend_on_how_much_of_the_sound_was_looked_at(n, db, seed):
    rng = np.random.default_rng(seed)
    waveform = rng.uniform(-1, 1) + 10 ** rng.uniform(-5, 0) * rng.standard_normal(n) * (rng.random(n) < rng.random())
    waveform = waveform.astype(np.float32)
    assert is_below(waveform, db) == (level_db(waveform) < db)


def test_a_level_at_the_bound_is_decided_by_the_whole_sound():
    burst = np.zeros(16_000, np.float32)
    burst[8_000:9_000] = tone(440, 16_000, 1)[:1000]  # the part that is looked at, which alone is 12 dB louder
    level = level_db(burst)
    assert [is_below(burst, level + more) for more in (0.0, 0.01, 6.0)] == [False, True, True]


# ------------------------------------------------------------------------------------------------ down-mix


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_mono_is_the_mean_of_the_channels(tmp_path, subtype, channels):
    each = np.stack([tone(200 * (c + 1), RATE, 1, 0.1 * (c + 1)) for c in range(channels)], axis=1)
    segment = read_segment(write(tmp_path / "a.wav", each, subtype=subtype), 0, 1)
    assert (segment.channels, segment.sample_rate, segment.notes) == (channels, RATE, ())
    expected, _ = soundfile.read(tmp_path / "a.wav", always_2d=True)
    np.testing.assert_allclose(segment.waveform, expected.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_when_the_mean_cancels_the_left_channel_is_taken(tmp_path, subtype):
    left = tone(300, RATE, 2)
    path = write(tmp_path / "a.wav", np.stack([left, -0.999 * left], axis=1), subtype=subtype)
    segment = read_segment(path, 0, 2)
    assert segment.notes == ("antiphase",)
    np.testing.assert_allclose(segment.waveform, left, atol=1e-4)


def test_a_channel_that_is_not_finite_is_no_antiphase(tmp_path):
    left = tone(300, RATE, 2)
    both = np.stack([left, -left], axis=1)
    both[1001, 1] = np.nan
    assert reason(write(tmp_path / "a.wav", both, subtype="FLOAT"), end=2) == "non_finite"


def test_one_silent_channel_is_no_antiphase(tmp_path):
    left = tone(300, RATE, 1)
    assert read_segment(write(tmp_path / "a.wav", np.stack([left, 0 * left], axis=1)), 0, 1).notes == ()


def test_samples_near_the_largest_float_do_not_overflow_in_the_mean(tmp_path):
    path = write(tmp_path / "a.wav", np.full((RATE, 2), 3e38, np.float32), subtype="FLOAT")
    assert reason(path, end=1) == "peak_out_of_range"


# ------------------------------------------------------------------------------------------ which seconds


def recording(seconds, rate=16_000):
    """Of which each sample tells its place."""
    return ((np.arange(seconds * rate) % 30_000) / 32768).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_whole_recording_is_cut_by_the_times(tmp_path, suffix):
    whole = recording(40)
    segment = read_segment(write(tmp_path / f"a.{suffix}", whole, 16_000), 20.25, 30.25)
    assert segment.notes == ("cut",)
    np.testing.assert_array_equal(segment.waveform, whole[324_000:484_000])


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_a_whole_recording_of_a_lossy_codec_is_cut_by_the_times(tmp_path, suffix):
    whole = np.concatenate([tone(500 + 100 * k, 32_000, 1) for k in range(30)])
    segment = read_segment(write(tmp_path / f"a.{suffix}", whole, 32_000), 15, 25)
    for k in range(10):
        amplitude, _ = amplitude_at(segment.waveform[k * 32_000 :][:32_000], 2000 + 100 * k, 32_000)
        assert amplitude == pytest.approx(0.5, rel=0.1)


def test_a_file_about_as_long_as_the_segment_is_the_segment(tmp_path):
    whole = recording(11)
    segment = read_segment(write(tmp_path / "a.flac", whole, 16_000), 370, 380)
    assert segment.notes == ()
    np.testing.assert_array_equal(segment.waveform, whole[:160_000])


@pytest.mark.parametrize("start", [3, 30])
def test_a_segment_longer_than_the_clip_is_still_no_recording(tmp_path, start):
    """`audio.clip_seconds: 5` on files of 10 s: the first 5 s of the segment, not those from `start` of the file."""
    whole = recording(10)
    segment = read_segment(write(tmp_path / "a.wav", whole, 16_000), start, start + 10, max_seconds=5)
    assert segment.notes == ("long",)
    assert segment.whole_seconds == 10
    np.testing.assert_array_equal(segment.waveform, whole[:80_000])
    longer = recording(50)
    segment = read_segment(write(tmp_path / "b.wav", longer, 16_000), start, start + 10, max_seconds=5)
    assert segment.notes == ("cut", "long")
    assert segment.whole_seconds == 10
    np.testing.assert_array_equal(segment.waveform, longer[start * 16_000 :][:80_000])


def test_a_recording_from_zero_is_cut_at_the_end(tmp_path):
    assert len(read_segment(write(tmp_path / "a.wav", recording(60), 16_000), 0, 7.5).waveform) == 120_000
    assert len(read_segment(tmp_path / "a.wav", 0, 60).waveform) == 160_000


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_recording_that_ends_before_its_segment_is_no_clip(tmp_path, suffix):
    assert reason(write(tmp_path / f"a.{suffix}", recording(20), 16_000), 30, 40) == "outside_segment"


def test_a_shorter_file_is_kept_with_its_length(tmp_path):
    path = write(tmp_path / "a.wav", recording(4), 16_000)
    assert read_segment(path, 0, 4).notes == ()
    assert read_segment(path, 30, 34).notes == ()
    short = read_segment(path, 30, 40)
    assert (len(short.waveform), short.notes) == (64_000, ("short",))


def test_under_a_second_of_ten_is_no_clip_but_of_an_unknown_length_it_is(tmp_path):
    path = write(tmp_path / "a.wav", recording(1)[:8000], 16_000)
    assert reason(path) == "too_short"
    assert read_segment(path, 0, 0.5).notes == ()
    assert read_segment(path, 0, math.inf).notes == ()


@pytest.mark.parametrize(
    "times", [(5.0, 5.0), (5.0, 3.0), (-1.0, 9.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf)]
)
def test_times_that_are_no_segment_are_an_error(tmp_path, times):
    with pytest.raises(ValueError, match="segment"):
        read_segment(write(tmp_path / "a.wav", recording(1), 16_000), *times)


# -------------------------------------------------------------------------------------- headers that lie


def flac_with_total(waveform, total):
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="FLAC")
    content = bytearray(file.getvalue())
    fields = int.from_bytes(content[18:26])  # rate, channels, bits, and 36 bits of total samples
    content[18:26] = (fields >> 36 << 36 | total).to_bytes(8)
    return bytes(content)


@pytest.mark.parametrize("total", [0, 2**36 - 1])
def test_a_flac_that_does_not_know_its_length_is_read_whole(tmp_path, total):
    # ffmpeg writing into a pipe leaves 0. Read as a seekable file it ends at the last whole block, with an error.
    waveform = tone(440, RATE, 10)
    (tmp_path / "a.flac").write_bytes(flac_with_total(waveform, total))
    np.testing.assert_allclose(read_segment(tmp_path / "a.flac", 0, 10).waveform, waveform, atol=1e-4)
    np.testing.assert_allclose(read_segment(tmp_path / "a.flac", 30, 40).waveform, waveform, atol=1e-4)


@pytest.mark.parametrize("suffix", ["wav", "ogg", "mp3"])
def test_a_file_that_says_it_is_cut_is_truncated(tmp_path, suffix):
    whole = write(tmp_path / f"a.{suffix}", np.stack([tone(440, RATE, 10), tone(550, RATE, 10)], axis=1)).read_bytes()
    half = tmp_path / f"half.{suffix}"
    half.write_bytes(whole[: len(whole) // 2])
    assert reason(half) == "truncated"


def test_a_cut_file_that_holds_the_whole_segment_is_good(tmp_path):
    whole = write(tmp_path / "a.wav", recording(60), 16_000).read_bytes()
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    assert read_segment(tmp_path / "half.wav", 10, 20).notes == ("cut",)


# --------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["../a.wav", "/etc/passwd", "x/../../a.wav", "", "a\0.wav"])
def test_paths_that_lead_out_are_refused(tmp_path, path):
    with pytest.raises(BadClip) as bad:
        locate(tmp_path, path)
    assert bad.value.reason == "outside_root"


def test_links_are_not_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    write(outside / "a.wav", recording(1), 16_000)
    (root / "folder").symlink_to(outside)
    (root / "a.wav").symlink_to(outside / "a.wav")
    for path, expected in (("folder/a.wav", "outside_root"), ("a.wav", "not_regular_file"), ("b.wav", "missing")):
        with pytest.raises(BadClip) as bad:
            locate(root, path)
        assert bad.value.reason == expected
    (tmp_path / "alias").symlink_to(root)  # the root itself may be one
    write(root / "c.wav", recording(1), 16_000)
    assert locate(tmp_path / "alias", "c.wav").is_file()


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    assert reason(tmp_path / "a.wav") == "not_regular_file"
    (tmp_path / "b.wav").symlink_to("/etc/passwd")
    assert reason(tmp_path / "b.wav") == "unreadable"


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF" + bytes(100))
    write(tmp_path / "b.wav", recording(1), 16_000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        reason(tmp_path / "a.wav")
        read_segment(tmp_path / "b.wav", 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before


# -------------------------------------------------------------------------------------------------- ffmpeg

M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(4000)


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Puts a shell script in ffmpeg's place; returns a function that sets its lines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(*lines):
        script = folder / "ffmpeg"
        script.write_text("\n".join(["#!/bin/sh", f'printf "%s\\n" "$@" > {tmp_path}/arguments', *lines]) + "\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    return install


def test_without_ffmpeg_its_containers_are_unsupported(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, content in {
        "a.m4a": M4A,
        "b.webm": b"\x1a\x45\xdf\xa3" + bytes(99),
        "c.aac": b"\xff\xf1" + bytes(99),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert reason(tmp_path / name) == "unsupported_container"


def test_ffmpeg_is_told_what_the_container_is_and_a_name_is_never_an_option(tmp_path, ffmpeg):
    write(tmp_path / "out.wav", tone(440, 48_000, 10), 48_000, subtype="FLOAT")
    ffmpeg(f"cat {tmp_path}/out.wav")
    (tmp_path / "-y.m4a").write_bytes(M4A)
    segment = read_segment(tmp_path / "-y.m4a", 30, 40)
    assert (segment.sample_rate, segment.notes) == (48_000, ("ffmpeg",))
    np.testing.assert_array_equal(segment.waveform, tone(440, 48_000, 10))
    arguments = (tmp_path / "arguments").read_text().split("\n")
    assert arguments[arguments.index("-i") + 1] == f"file:{tmp_path}/-y.m4a"
    assert arguments[arguments.index("-f") + 1] == "mov"
    assert arguments[arguments.index("-protocol_whitelist") + 1] == "file,pipe"


def test_an_ffmpeg_that_hangs_floods_or_fails_is_a_bad_clip(tmp_path, ffmpeg, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(M4A)
    monkeypatch.setattr(audio, "FFMPEG_SECONDS", 0.3)
    ffmpeg("exec sleep 60")
    with pytest.raises(BadClip, match="took more than"):
        read_segment(tmp_path / "a.m4a", 0, 10)
    monkeypatch.setattr(audio, "FFMPEG_SECONDS", 60.0)
    monkeypatch.setattr(audio, "FFMPEG_BYTES", 1 << 20)
    ffmpeg("exec cat /dev/zero")
    with pytest.raises(BadClip, match="wrote more than"):
        read_segment(tmp_path / "a.m4a", 0, 10)
    ffmpeg('echo "[mov,mp4 @ 0x55d5c0ffee] moov atom not found" >&2', "exit 1")
    with pytest.raises(BadClip, match=r"undecodable: ffmpeg: \[mov,mp4\] moov atom not found$"):
        read_segment(tmp_path / "a.m4a", 0, 10)
    ffmpeg("exit 0")
    assert reason(tmp_path / "a.m4a") == "undecodable"


def test_audio_that_ffmpeg_complains_of_and_that_is_short_is_truncated(tmp_path, ffmpeg):
    write(tmp_path / "out.wav", tone(440, 48_000, 4), 48_000, subtype="FLOAT")
    (tmp_path / "a.m4a").write_bytes(M4A)
    ffmpeg(f"cat {tmp_path}/out.wav")
    assert read_segment(tmp_path / "a.m4a", 0, 10).notes == ("ffmpeg", "short")
    ffmpeg(f"cat {tmp_path}/out.wav", "echo 'File ended prematurely' >&2")
    assert reason(tmp_path / "a.m4a") == "truncated"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_the_real_ffmpeg_decodes_and_cuts(tmp_path):
    import subprocess

    whole = np.concatenate([tone(500 + 100 * k, 44_100, 1) for k in range(30)])
    write(tmp_path / "a.wav", whole)
    path = Path(tmp_path / "-a.m4a")
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", f"file:{path}"], check=True)
    segment = read_segment(path, 15, 25)
    assert segment.notes == ("ffmpeg", "cut")
    amplitude, _ = amplitude_at(segment.waveform[RATE * 3 :][:RATE], 2300, RATE)
    assert amplitude == pytest.approx(0.5, rel=0.1)
