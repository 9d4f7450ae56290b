"""Stage resample: every kind of bad file has its line, and what comes out depends on the files alone."""

import csv
import functools
import hashlib
import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from pipeline.audio import resample
from pipeline.mixtures import manifest as manifests
from pipeline.mixtures import shards
from pipeline.stages import resample as stage

REPOSITORY = Path(__file__).parents[2]
RATE = 44_100
PARAMS = """\
data: {source: audioset, root: corpus, train: [a], eval: [b]}
audio: {sample_rate: 32000, clip_seconds: 10.0, segment_seconds: 2.0}
resample: {format: flac, n_shards: 4, max_bad_fraction: 0.1, silence_db: -80.0, long: first}
"""


# ------------------------------------------------------------------------------------------------- helpers


def encoded(waveform, rate=RATE, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=format, subtype=subtype)
    return file.getvalue()


@functools.cache
def sound(seconds=10.0, rate=RATE, channels=2, seed=0):
    """Tones in a little noise, so that a codec has something to do."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    tones = [0.3 * np.sin(2 * np.pi * rng.uniform(100, 3000) * np.arange(n) / rate) for _ in range(channels)]
    return (np.stack(tones, axis=1) + 0.01 * rng.standard_normal((n, channels))).astype(np.float32)


def patched(content, at, kind, value):
    content = bytearray(content)
    struct.pack_into(kind, content, at, value)
    return bytes(content)


def flac_with_total(content, total):
    fields = int.from_bytes(content[18:26])
    return content[:18] + (fields >> 36 << 36 | total).to_bytes(8) + content[26:]


def damaged(content, *fractions, length):
    content = bytearray(content)
    for fraction in fractions:
        start = int(len(content) * fraction)
        content[start : start + length] = b"\xff" * length
    return bytes(content)


def half(content):
    return content[: len(content) // 2]


def frame_size(mp3):
    """Of the first frame, which counts the others; mono or stereo at 44.1 kHz."""
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[mp3[2] >> 4]
    return 144_000 * kbps // RATE + (mp3[2] >> 1 & 1)


def list_clips(workspace, paths, split="train", seconds=10.0):
    """Write a manifest as scan does; ids are the file names without dots and slashes."""
    manifest = workspace / "manifest"
    manifest.mkdir(exist_ok=True)
    rows = sorted((re.sub(r"[^A-Za-z0-9_-]", "_", path), path) for path in paths)
    with open(manifest / f"{split}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(manifests.LISTED)
        for clip_id, path in rows:
            size = (workspace / "corpus" / path).lstat().st_size if (workspace / "corpus" / path).exists() else 0
            writer.writerow([clip_id, "a", "/m/09x0r;/m/04rlf", path, size, 0.0, seconds, f"recording of {clip_id}"])


def write_files(workspace, files):
    root = workspace / "corpus"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def configure(workspace, **changes):
    text = PARAMS
    for key, value in changes.items():
        text, n = re.subn(rf"{key}: [^,}}]+", f"{key}: {value}", text)
        assert n == 1
    (workspace / "params.yaml").write_text(text)


def command(out="clips", driver=None, more=()):
    start = ["-c", driver] if driver else ["-m", "pipeline.stages.resample"]
    paths = ["--manifest", "manifest", "--out", out, "--summary", f"{out}.json"]
    return [sys.executable, *start, "--split", "train", *paths, *more]


def environment(workspace, workers=0):
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace), "USS_WORKERS": str(workers), "PATH": "/nonexistent",
    }  # fmt: skip


def run(workspace, out="clips", workers=0, driver=None, variables=None, more=(), **kwargs):
    return subprocess.run(
        command(out, driver, more), cwd=workspace, env=environment(workspace, workers) | (variables or {}), timeout=60,
        capture_output=True, text=True, **kwargs,
    )  # fmt: skip


def run_well(workspace, **kwargs):
    done = run(workspace, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def scratch_dirs(workspace):
    return [path for path in (workspace / "data/scratch/resample_train").glob("*") if path.is_dir()]


# ---------------------------------------------------------------------------- every kind of file (data table)


def bad_files():
    """name -> (content, status, note)."""
    wav, flac = encoded(sound()), encoded(sound(), format="FLAC")
    ogg, mp3 = encoded(sound(), format="OGG", subtype="VORBIS"), encoded(sound(), format="MP3")
    opus = encoded(sound(rate=48_000), 48_000, format="OGG", subtype="OPUS")
    mono = sound(channels=1)
    nan, infinite = mono.copy(), mono.copy()
    nan[1000], infinite[-1] = np.nan, np.inf
    pair = np.concatenate([mono, -mono], axis=1)
    tone = 0.3 * np.sin(2 * np.pi * np.arange(10 * RATE) / 8)[:, None]
    return {
        "empty.wav": (b"", "no_samples", ""),
        "one_byte.wav": (b"R", "undecodable", ""),
        "page.wav": (b"<html><body>404</body></html>", "undecodable", ""),
        "text.flac": ("not audio\n" * 100).encode(),
        "header_only.wav": (wav[:44], "no_samples", ""),
        "header_only.flac": (flac[:44], "no_samples", ""),
        "no_frames.wav": (encoded(sound(0)), "no_samples", ""),
        "one_sample.wav": (encoded(sound(1 / RATE)), "too_short", ""),
        "cut.wav": (wav[: len(wav) // 2], "truncated", ""),
        "cut.ogg": (ogg[: len(ogg) // 2], "truncated", ""),
        "cut.opus": (opus[: len(opus) // 2], "truncated", ""),
        "cut.mp3": (mp3[: len(mp3) // 2], "truncated", ""),
        "cut.flac": (flac[: len(flac) // 2], "undecodable", ""),
        "hole.ogg": (damaged(ogg, 0.3, 0.5, 0.7, length=9000), "truncated", ""),
        "hole.mp3": (damaged(mp3, 0.5, length=4000), "undecodable", ""),
        "hole.flac": (damaged(flac, 0.5, length=2000), "undecodable", ""),
        "size_4gb.wav": (patched(patched(wav, 4, "<I", 2**32 - 1), 40, "<I", 2**32 - 1), "ok", ""),
        "channels_0.wav": (patched(wav, 22, "<H", 0), "undecodable", ""),
        "channels_65535.wav": (patched(wav, 22, "<H", 65535), "undecodable", ""),
        "rate_0.wav": (patched(wav, 24, "<I", 0), "undecodable", ""),
        "rate_max.wav": (patched(wav, 24, "<I", 2**32 - 1), "undecodable", ""),
        "rate_1.wav": (patched(wav, 24, "<I", 1), "rate_out_of_bounds", ""),
        "rate_3999.wav": (patched(wav, 24, "<I", 3999), "rate_out_of_bounds", ""),
        "rate_400k.wav": (patched(wav, 24, "<I", 400_000), "rate_out_of_bounds", ""),
        "bits_0.wav": (patched(wav, 34, "<H", 0), "undecodable", ""),
        "bits_255.wav": (patched(wav, 34, "<H", 255), "undecodable", ""),
        "unknown_codec.wav": (patched(wav, 20, "<H", 0x1234), "undecodable", ""),
        "no_data_chunk.wav": (patched(wav, 36, "<I", 0x6B6E756A), "undecodable", ""),
        "total_2_36.flac": (flac_with_total(flac, 2**36 - 1), "ok", ""),
        "total_0.flac": (flac_with_total(flac, 0), "ok", ""),
        "hour.flac": (encoded(np.zeros((3600 * 8_000, 2), np.int16), 8_000, "FLAC"), "silent", ""),
        "nan.wav": (encoded(nan, subtype="FLOAT"), "non_finite", ""),
        "inf.wav": (encoded(infinite, subtype="FLOAT"), "non_finite", ""),
        "f64_overflow.wav": (encoded(1e300 * mono.astype(np.float64), subtype="DOUBLE"), "non_finite", ""),
        "million.wav": (encoded(1e6 * mono, subtype="FLOAT"), "peak_out_of_range", ""),
        "largest_float.wav": (encoded(np.full((RATE, 2), 3e38, np.float32), subtype="FLOAT"), "peak_out_of_range", ""),
        "loud.wav": (encoded(5 * mono, subtype="FLOAT"), "ok", "clipped"),
        "antiphase.wav": (encoded(pair), "ok", "antiphase"),
        "antiphase.ogg": (encoded(pair, format="OGG"), "ok", "antiphase"),
        "silence.wav": (encoded(0 * mono), "silent", ""),
        "constant.wav": (encoded(0 * mono + 0.5), "silent", ""),
        "dither.wav": (encoded(np.sign(mono) / 32768), "silent", ""),
        "ultrasound.wav": (encoded(np.hanning(10 * RATE) * np.sin(2.7 * np.arange(10 * RATE))), "silent", ""),
        "offset.wav": (encoded(mono + np.float32(0.3)), "ok", ""),
        "six_channels.wav": (encoded(sound(channels=6)), "ok", ""),
        "u8.wav": (encoded(sound(), subtype="PCM_U8"), "ok", ""),
        "s24.flac": (encoded(sound(rate=48_000), 48_000, "FLAC", "PCM_24"), "ok", ""),
        "f64.wav": (encoded(sound(), subtype="DOUBLE"), "ok", ""),
        "alaw.wav": (encoded(sound(), subtype="ALAW"), "ok", ""),
        "adpcm.wav": (encoded(sound(), subtype="IMA_ADPCM"), "ok", ""),
        "r8k.wav": (encoded(sound(rate=8000), 8000), "ok", ""),
        "r192k.wav": (encoded(sound(rate=192_000), 192_000), "ok", ""),
        "r32k.wav": (encoded(sound(rate=32_000), 32_000), "ok", ""),
        "is_mp3.wav": (mp3, "ok", ""),
        "is_flac.wav": (flac, "ok", ""),
        "chained.ogg": (encoded(sound(), format="OGG") + encoded(sound(seed=1), format="OGG"), "ok", ""),
        "uncounted.mp3": (mp3[frame_size(mp3) :], "ok", ""),
        "joined.mp3": (mp3 + mp3, "ok", ""),
        "zeros.mp3": (bytes(417) + mp3, "ok", ""),
        "chained.opus": (opus + opus, "ok", ""),
        **{
            f"cut.{kind}": (half(encoded(sound(), format=kind)), "truncated", "")
            for kind in ("AIFF", "RF64", "W64", "AU")
        },
        "antiphase_tone.wav": (encoded(tone * np.array([1, -1])), "ok", "antiphase"),
        "antiphase_half.wav": (
            encoded(tone * np.where(np.arange(10 * RATE)[:, None] < RATE, [1, 1], [1, -1])),
            "ok",
            "antiphase",
        ),
        "antiphase_surround.wav": (encoded(tone * np.array([0, 0, 0, 0, 1, -1])), "ok", "antiphase"),
        "tagged.mp3": (b"ID3\x04\0\0\0\x20\0\0" + bytes(0x20 << 14) + mp3, "ok", ""),
        "short.wav": (encoded(sound(4)), "ok", "short"),
        "-dash.ogg": (ogg, "ok", ""),
        "a.m4a": (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(4000), "unsupported_container", ""),
        "a.mp4": (b"\0\0\0\x20ftypisom\0\0\0\0isomavc1" + bytes(4000), "unsupported_container", ""),
        "a.webm": (b"\x1a\x45\xdf\xa3" + bytes(4000), "unsupported_container", ""),
        "deep/er/good.wav": (wav, "ok", ""),
    }


SPECIAL = {
    "folder.wav": "not_regular_file",
    "pipe.wav": "not_regular_file",
    "passwd.wav": "not_regular_file",
    "null.wav": "not_regular_file",
    "way_out/x.wav": "outside_root",
    "../params.yaml": "outside_root",
    "/etc/passwd": "outside_root",
    "gone.wav": "missing",
    "gone/gone.wav": "missing",
}


# Not getrusage's maximum: that begins with the size of the process that was forked, which is pytest.
MEASURED = """
import re
from pathlib import Path
from pipeline.stages import resample
resample.main()
Path("peak").write_text(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The stage run once over the whole table. Returns its directory and what is expected of each file."""
    workspace = tmp_path_factory.mktemp("table")
    files = {name: (v, "undecodable", "") if isinstance(v, bytes) else v for name, v in bad_files().items()}
    write_files(workspace, {name: content for name, (content, _, _) in files.items()})
    root = workspace / "corpus"
    (root / "folder.wav").mkdir()
    os.mkfifo(root / "pipe.wav")
    (root / "passwd.wav").symlink_to("/etc/passwd")
    (root / "null.wav").symlink_to("/dev/null")
    (root / "way_out").symlink_to("/tmp")
    configure(workspace, max_bad_fraction=1.0)
    list_clips(workspace, [*files, *SPECIAL])

    run_well(workspace, driver=MEASURED)
    expected = {name: (status, note) for name, (_, status, note) in files.items()}
    return workspace, expected | {name: (status, "") for name, status in SPECIAL.items()}


def test_every_kind_of_file_has_its_status(table):
    workspace, expected = table
    found = {row["clip_id"]: row for row in rows_of(workspace / "clips/manifest.csv")}
    wrong = []
    for name, wanted in expected.items():
        row = found.pop(re.sub(r"[^A-Za-z0-9_-]", "_", name))
        if (row["status"], row["note"]) != wanted:
            wrong.append((name, wanted, row["status"], row["note"], row["detail"]))
    assert not wrong
    assert not found


def test_the_quarantine_list_has_every_bad_file_with_its_reason(table):
    workspace, expected = table
    listed = {row["path"]: row["reason"] for row in rows_of(workspace / "clips/quarantine.csv")}
    assert listed == {name: status for name, (status, _) in expected.items() if status != "ok"}


def test_the_summary_counts_them(table):
    workspace, expected = table
    summary = json.loads((workspace / "clips.json").read_text())
    statuses = [status for status, _ in expected.values()]
    bad = len(statuses) - statuses.count("ok") - statuses.count("missing")
    assert summary["kept"] == statuses.count("ok")
    assert (summary["missing"], summary["bad"]) == (statuses.count("missing"), bad)
    assert summary["bad_fraction"] == pytest.approx(bad / (len(statuses) - statuses.count("missing")))
    assert summary["bad_reasons"] == {s: statuses.count(s) for s in sorted(set(statuses)) if s not in ("ok", "missing")}
    assert summary["notes"] == {"antiphase": 5, "clipped": 1, "short": 1}


def test_the_table_takes_bounded_memory(table):
    workspace, _ = table
    peak_kb = int((workspace / "peak").read_text())
    assert peak_kb < 150_000  # 60 MB of it are Python and its libraries; the hour is 230 MB of floats


def test_shards_hold_what_the_manifest_says(table):
    workspace, _ = table
    clips = workspace / "clips"
    assert set(shards.verify(clips)) == {f"clips-{i:05d}.tar" for i in range(4)}
    kept = {row["clip_id"]: row for row in rows_of(clips / "manifest.csv") if row["status"] == "ok"}
    reader = shards.ClipReader(clips, 32_000)
    assert sorted(reader.clips) == sorted(kept)
    for clip_id, row in kept.items():
        pcm = np.round(reader.waveform(clip_id) * 32768).astype("<i2")
        assert hashlib.sha256(pcm.tobytes()).hexdigest() == row["sha256"]
        assert len(pcm) == round(float(row["duration_seconds"]) * 32_000) <= 320_000
        assert row["shard"] == f"clips-{shards.shard_number(clip_id, 4):05d}.tar"
        assert row["labels"] == "/m/09x0r;/m/04rlf"
    for clip_id in kept.keys() - {"short_wav"}:
        assert float(kept[clip_id]["duration_seconds"]) > (8 if clip_id == "hole_ogg" else 9.9)
    assert (kept["r8k_wav"]["source_rate"], kept["six_channels_wav"]["source_channels"]) == ("8000", "6")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_anyone_can_stream_the_shards(table):
    workspace, _ = table
    urls = [str(path) for path in sorted((workspace / "clips").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    kept = [row["clip_id"] for row in rows_of(workspace / "clips/manifest.csv") if row["status"] == "ok"]
    assert sorted(sample["__key__"] for sample in samples) == kept
    about = json.loads(samples[0]["json"])
    assert about["labels"] == ["/m/09x0r", "/m/04rlf"]


def test_two_workers_make_the_same_bytes(table):
    workspace, _ = table
    run_well(workspace, out="clips2", workers=2)
    assert contents(workspace / "clips2") == contents(workspace / "clips")
    assert (workspace / "clips2.json").read_bytes() == (workspace / "clips.json").read_bytes()


# ------------------------------------------------------------------------------------------- kills and limits


@pytest.fixture
def small(workspace):
    """Ten good clips of two seconds."""
    names = [f"clip{i}.{suffix}" for i in range(5) for suffix in ("wav", "flac")]
    formats = {name: name.split(".")[1].upper() for name in names}
    write_files(workspace, {name: encoded(sound(2, seed=i), format=formats[name]) for i, name in enumerate(names)})
    configure(workspace)
    list_clips(workspace, names, seconds=2.0)
    return workspace


SLOW = """
import time
from pipeline.stages import resample
make_clips = resample.make_clips
def slow(*args):
    time.sleep(0.2)
    return make_clips(*args)
resample.make_clips = slow
resample.main()
"""


def test_a_killed_run_is_continued_to_the_same_bytes(small):
    process = subprocess.Popen(command(driver=SLOW), cwd=small, env=environment(small), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if sum(len(list(path.glob("parts/[0-9]*/done.json"))) for path in scratch_dirs(small)) >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (small / "clips").exists()

    done = run_well(small)
    assert re.search(r"[2-4] of 4 parts are finished already", done.stderr)
    assert scratch_dirs(small) == []
    assert "finished already" not in run_well(small, out="again").stderr
    assert contents(small / "clips") == contents(small / "again")


def test_a_full_disk_leaves_no_partial_shard(small):
    configure(small, format="wav")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = run(small, preexec_fn=limit)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: .*File too large: '\S+/clips-\d+\.tar'; in part '\d+'", said)
    assert not (small / "clips").exists()
    for path in small.rglob("*.tar"):
        assert list(shards.members(path))  # whole, of a part that is finished
        assert (path.parent / "done.json").exists()
    assert not list(small.rglob("*.tmp"))

    run_well(small)
    run_well(small, out="again")
    assert contents(small / "clips") == contents(small / "again")


def test_neither_the_locale_nor_the_clock_changes_a_byte(small):
    """File names that are not ASCII under LC_ALL=C; recordings dated 1970, and then 2100."""
    names = ["Glocke läutet.wav", "鐘.flac"]
    write_files(small, {name: encoded(sound(2, seed=9), format=name.split(".")[1].upper()) for name in names})
    list_clips(small, [path.name for path in (small / "corpus").iterdir()], seconds=2.0)
    run_well(small)
    found = contents(small / "clips")
    assert sum("läutet" in row["path"] for row in rows_of(small / "manifest" / "train.csv")) == 1
    for out, seconds in (("past", 0), ("future", 4_102_444_800)):
        for path in (small / "corpus").iterdir():
            os.utime(path, (seconds, seconds))
        run_well(small, out=out, variables={"LC_ALL": "C", "LANG": "C"})
        assert contents(small / out) == found


def test_odd_names_go_through_the_stage_as_they_are(workspace):
    names = ["dog, barking.wav", 'the "dog".wav', "100%d.wav", "a#1.wav", "-i.wav", "two  spaces .wav", "e\u0301.wav",
             "\u00e9.wav", "鐘.wav", "it's;$HOME*.wav", f"{'x' * 250}.wav"]  # fmt: skip
    write_files(workspace, {name: encoded(sound(2, seed=i)) for i, name in enumerate(names)})
    write_files(workspace, {'bad, "one".wav': b"not audio"})
    configure(workspace, max_bad_fraction=0.2)
    listed = workspace / "manifest/train.csv"
    listed.parent.mkdir()
    with open(listed, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(manifests.LISTED)
        for i, name in enumerate([*names, 'bad, "one".wav']):
            writer.writerow([f"c{i:02d}", "a", "/m/09x0r", name, 1, 0.0, 2.0, name])
    run_well(workspace)
    rows = rows_of(workspace / "clips/manifest.csv")
    assert [row["recording"] for row in rows if row["status"] == "ok"] == names
    assert [row["path"] for row in rows_of(workspace / "clips/quarantine.csv")] == ['bad, "one".wav']
    assert len(shards.ClipReader(workspace / "clips", 32_000).clips) == len(names)


def test_an_output_that_cannot_be_written_is_named_and_nothing_is_lost(small):
    """Below /proc nobody may make a folder, not even root."""
    done = run(small, out="/proc/clips")
    assert done.returncode != 0
    assert "/proc/" in done.stderr.splitlines()[-1]
    run_well(small)
    run_well(small, out="again")
    assert contents(small / "clips") == contents(small / "again")


def test_too_many_bad_clips_stop_the_stage_and_a_raised_bound_goes_on(small):
    for name in ("clip0.wav", "clip1.wav"):
        (small / "corpus" / name).write_bytes(b"not audio")
    (small / "corpus" / "clip2.wav").unlink()
    done = run(small)
    assert done.returncode != 0
    assert "1 are missing, 2 of the 9 present are bad (22.2%); resample.max_bad_fraction is 10.0%" in done.stderr
    assert "undecodable: 2, such as 'clip0.wav', 'clip1.wav'" in done.stderr
    assert not (small / "clips").exists()
    listed = re.search(r"All of them: (\S+)", done.stderr)[1]
    assert [row["path"] for row in rows_of(small / listed)] == ["clip0.wav", "clip1.wav", "clip2.wav"]

    configure(small, max_bad_fraction=0.3)
    done = run_well(small)
    assert re.search(r"[1-3] of 4 parts are finished already", done.stderr)  # that of the missing clip is done again
    summary = json.loads((small / "clips.json").read_text())
    assert (summary["kept"], summary["bad"], summary["missing"]) == (7, 2, 1)


def test_a_file_that_is_back_is_taken_by_the_next_run(small):
    gone, away = small / "corpus/clip0.wav", small / "clip0.wav"
    (small / "corpus/clip1.wav").write_bytes(b"not audio")
    configure(small, max_bad_fraction=0.0)
    gone.rename(away)
    assert "1 are missing" in run(small).stderr
    away.rename(gone)
    configure(small, max_bad_fraction=0.3)
    run_well(small)
    assert [row["path"] for row in rows_of(small / "clips/quarantine.csv")] == ["clip1.wav"]


def test_a_corpus_that_is_gone_is_one_error_not_many_missing_clips(small):
    (small / "corpus").rename(small / "moved")
    done = run(small)
    assert done.returncode != 0
    assert "data.root 'corpus' is not a directory now" in done.stderr
    assert "dvc repro --force scan" in done.stderr
    listed = small / "00000.csv"
    listed.write_text(f"{','.join(manifests.LISTED)}\nx,a,/m/09x0r,x.wav,0,0.0,2.0,x\n")
    (small / "part").mkdir()
    audio = stage.AudioParams(sample_rate=32_000, clip_seconds=10.0, segment_seconds=2.0)
    params = stage.ResampleParams(format="wav", n_shards=1, max_bad_fraction=0.1, silence_db=-80.0, long="first")
    with pytest.raises(FileNotFoundError, match=r"data\.root"):  # unmounted while the stage was at work
        stage.resample_part(listed, small / "part", root=small / "corpus", split="train", audio=audio, params=params)
    assert not list((small / "part").glob("*.tar"))


def test_when_no_clip_is_left_the_stage_fails_whatever_the_bound(small):
    configure(small, max_bad_fraction=1.0)
    for path in (small / "corpus").iterdir():
        path.write_bytes(b"")
    done = run(small)
    assert done.returncode != 0
    assert "no clip is left" in done.stderr
    assert "no_samples: 10" in done.stderr


def test_wav_clips_are_the_same_samples(small):
    run_well(small)
    configure(small, format="wav")
    run_well(small, out="wav")
    assert [row["sha256"] for row in rows_of(small / "clips/manifest.csv")] == [
        row["sha256"] for row in rows_of(small / "wav/manifest.csv")
    ]
    flac, wav = shards.ClipReader(small / "clips", 32_000), shards.ClipReader(small / "wav", 32_000)
    np.testing.assert_array_equal(flac.waveform("clip0_wav"), wav.waveform("clip0_wav"))


# ----------------------------------------------------------------------------------------------- the same samples


def test_clips_of_train_with_the_samples_of_eval_are_left_out_counted_and_named(small):
    """Under another name, of another recording, and as WAV in place of FLAC: the names say nothing."""
    listed = small / "manifest/train.csv"
    mine = listed.read_text()
    lines = mine.splitlines()
    wav = encoded(*soundfile.read(small / "corpus/clip1.flac"))
    (small / "corpus/same.wav").write_bytes(wav)
    listed.write_text("\n".join([lines[0], "same,b,/m/09x0r,same.wav,1,0.0,2.0,another upload"]) + "\n")
    run_well(small, out="eval")
    listed.write_text(mine)
    done = run_well(small, more=("--held-out", "eval"))
    rows = {row["clip_id"]: row for row in rows_of(small / "clips/manifest.csv")}
    assert {clip_id for clip_id, row in rows.items() if row["status"] != "ok"} == {"clip1_flac"}
    assert (rows["clip1_flac"]["status"], rows["clip1_flac"]["detail"]) == ("also_in_eval", "the samples of same")
    assert {row["reason"] for row in rows_of(small / "clips/quarantine.csv")} == {"also_in_eval"}
    summary = json.loads((small / "clips.json").read_text())
    assert (summary["also_in_eval"], summary["bad"], summary["bad_fraction"], summary["kept"]) == (1, 0, 0, 9)
    assert "1 clips have the samples of clips of eval" in done.stderr
    assert "clip1_flac" not in shards.ClipReader(small / "clips", 32_000).clips
    run_well(small, out="two", workers=2, more=("--held-out", "eval"))
    assert contents(small / "two") == contents(small / "clips")


def test_clips_with_the_same_samples_are_of_one_recording(workspace):
    """a and b share samples, b's recording has c, c and d share samples: all four are one, e is not."""
    sounds = {"a.wav": 0, "b.wav": 0, "c.wav": 1, "d.wav": 1, "e.wav": 2}
    write_files(
        workspace,
        {name: encoded(sound(2, seed=seed)) for name, seed in sounds.items()},
    )
    configure(workspace)
    list_clips(workspace, list(sounds), seconds=2.0)
    listed = workspace / "manifest/train.csv"
    listed.write_text(listed.read_text().replace("recording of c_wav", "recording of b_wav"))
    done = run_well(workspace)
    assert [row["recording"] for row in rows_of(workspace / "clips/manifest.csv")] == 4 * ["recording of a_wav"] + [
        "recording of e_wav"
    ]
    assert json.loads((workspace / "clips.json").read_text())["repeated_sounds"] == 2
    assert "2 clips have the samples of others" in done.stderr


# ------------------------------------------------------------------------------------------------- long clips


@pytest.fixture
def long(workspace):
    """A dog in 20 to 28 of 30 s, silence before, and a clip that is not longer than clips are."""
    x = np.zeros((30 * RATE, 1), np.float32)
    x[20 * RATE : 28 * RATE] = sound(8, channels=1)
    write_files(workspace, {"dog.wav": encoded(x), "cat.wav": encoded(sound(3))})
    configure(workspace)
    list_clips(workspace, ["dog.wav", "cat.wav"], seconds="inf")
    return workspace


def test_pieces_of_a_long_clip_are_clips_of_one_recording_with_its_labels(long):
    configure(long, long="cut", silence_db=-200.0)
    x = sound(25, channels=1)
    write_files(long, {"dog.wav": encoded(x)})
    run_well(long)
    rows = {row["clip_id"]: row for row in rows_of(long / "clips/manifest.csv")}
    assert list(rows) == ["cat_wav", "dog_wav-piece1", "dog_wav-piece2", "dog_wav-piece3"]
    pieces = [row for clip_id, row in rows.items() if "piece" in clip_id]
    assert [float(row["duration_seconds"]) for row in pieces] == [10, 10, 5]
    assert {(row["recording"], row["labels"], row["note"]) for row in pieces} == {
        ("recording of dog_wav", "/m/09x0r;/m/04rlf", "long")
    }
    assert [row["detail"] for row in pieces] == [f"from {at} s on, of 25 s" for at in (0, 10, 20)]
    reader = shards.ClipReader(long / "clips", 32_000)
    together = np.concatenate([reader.waveform(row["clip_id"]) for row in pieces])
    assert np.abs(together - resample(x[:, 0], RATE, 32_000)).mean() < 1e-3
    summary = json.loads((long / "clips.json").read_text())
    assert (summary["clips"], summary["notes"], summary["dropped_seconds"]) == (4, {"long": 3}, 0)
    assert {entry.recording for entry in reader.clips.values()} == {"recording of cat_wav", "recording of dog_wav"}
    run_well(long, out="two", workers=2)
    assert contents(long / "two") == contents(long / "clips")


def test_silent_pieces_and_what_the_beginning_and_the_best_part_leave_are_counted(long):
    expected = {
        "first": (["cat_wav"], {}, 0.0, 1),  # its first 10 s are silent
        "cut": (["cat_wav", "dog_wav-piece3"], {"long": 1}, 20.0, 0),
        "best": (["cat_wav", "dog_wav"], {"long": 1}, 20.0, 0),
    }
    for choice, (kept, notes, dropped_seconds, bad) in expected.items():
        configure(long, long=choice, max_bad_fraction=0.9)
        run_well(long, out=choice)
        rows = rows_of(long / choice / "manifest.csv")
        assert [row["clip_id"] for row in rows if row["status"] == "ok"] == kept
        summary = json.loads((long / f"{choice}.json").read_text())
        assert (summary["notes"], summary["dropped_seconds"], summary["bad"]) == (notes, dropped_seconds, bad)
        for row in rows:
            if row["note"]:
                start = {"cut": 20, "best": 18}[choice]  # the first of the parts that hold the whole sound
                assert row["detail"] == f"from {start} s on, of 30 s"
                waveform = shards.ClipReader(long / choice, 32_000).waveform(row["clip_id"])
                assert np.abs(waveform[(20 - start) * 32_000 :][: 8 * 32_000]).max() > 0.1


def test_a_piece_that_is_called_like_another_clip_is_refused(long):
    configure(long, long="cut", max_bad_fraction=0.9)
    write_files(long, {"dog_wav-piece3": encoded(sound(2))})
    list_clips(long, ["dog.wav", "cat.wav", "dog_wav-piece3"], seconds="inf")
    done = run(long)
    assert done.returncode == 2
    assert "dog_wav-piece3" in done.stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------- the manifest


def test_a_manifest_cut_in_pieces_is_the_same_lists(workspace, monkeypatch):
    list_clips(workspace, [f"clip{i:04d}.wav" for i in range(1000)])
    manifest = workspace / "manifest/train.csv"
    whole = manifests.split_manifest(manifest, workspace / "whole", 7)
    monkeypatch.setattr(manifests, "_ROWS_HELD", 13)
    pieces = manifests.split_manifest(manifest, workspace / "pieces", 7)
    assert [path.read_bytes() for path in pieces] == [path.read_bytes() for path in whole]
    assert sum(len(rows_of(path)) for path in whole) == 1000
    assert list(manifests.read_rows(manifest, chunk=100)) == rows_of(manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_id,labels\n", "no column 'subset'"),
        ("{header}\nb,a,x,b.wav,1,0,10,b\na,a,x,a.wav,1,0,10,a\n", "line 3: 'a' after 'b'"),
        ("{header}\na,a,x,b.wav,1,0,10,a\na,a,x,a.wav,1,0,10,a\n", "line 3: 'a' after 'a'"),
        ('{header}\na,a,x,"b\n.wav",1,0,10,a\n', "line break"),
    ],
)
def test_a_manifest_that_scan_did_not_write_is_refused(workspace, text, message):
    (workspace / "m.csv").write_text(text.replace("{header}", ",".join(manifests.LISTED)))
    with pytest.raises(ValueError, match=message):
        manifests.split_manifest(workspace / "m.csv", workspace / "lists", 4)


def test_an_empty_manifest_is_an_error_that_names_it(workspace):
    configure(workspace)
    (workspace / "corpus").mkdir()
    list_clips(workspace, [])
    done = run(workspace)
    assert done.returncode != 0
    assert "manifest/train.csv lists no clip" in done.stderr


def test_workers_load_neither_torch_nor_pandas():
    code = (
        "import sys, pipeline.stages.resample; print(sorted({'torch', 'pandas', 'dask', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
