"""The command on what it is given: forty bad inputs, odd good ones, models without queries, its flags."""

import errno
import functools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from pipeline import separators
from pipeline.separate import Separator, Unusable, command
from pipeline.separate.files import StemWriter
from pipeline.separate.stream import Blocks, Stream
from pipeline.separate.targets import SoundClass, group_by_level
from tests.separators.test_separators import TINY_BLIND
from tests.stages.test_train_separator import trained

RATE = 32000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def blind(folder, tmp_path_factory):
    """A separator without queries, at 16 kHz, with the detector of another."""
    out = tmp_path_factory.mktemp("blind") / "conv_tasnet"
    shutil.copytree(folder / "detector", out / "detector")
    torch.manual_seed(0)
    model = TINY_BLIND["conv_tasnet"]
    network = separators.build_blind("conv_tasnet", sample_rate=16000, **model)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, out / "weights.safetensors")
    config = {"architecture": "conv_tasnet", "model": model, "sample_rate": 16000, "segment_seconds": [2.0]}
    classes = json.loads((folder / "config.json").read_text())["classes"]
    (out / "config.json").write_text(json.dumps(config | {"status": "ok", "classes": classes}))
    return out


def noise(channels, samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


def run(*arguments):
    return command.main([str(a) for a in arguments])


# -------------------------------------------------------------------------------------------------------- bad inputs


def wav(channels=1, rate=8000, tag=1, data=b"\x00\x01" * 800, claimed=None):
    """A WAV file's bytes with any header."""
    fmt = struct.pack("<HHIIHH", tag, channels, rate, 2 * rate * channels, 2 * channels, 16)
    size = len(data) if claimed is None else claimed
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(0xFFFFFFFF, len(body) if claimed is None else claimed + 36)) + body


def sound(path, audio=None, cut=None, subtype=None, rate=RATE):
    soundfile.write(path, noise(1, RATE) if audio is None else audio, rate, subtype=subtype)
    if cut is not None:
        os.truncate(path, int(path.stat().st_size * cut))


def not_finite(value, at=9, subtype="FLOAT"):
    audio = noise(1, 5 * RATE)
    audio[at] = value
    return lambda path: sound(path, audio, subtype=subtype)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.wav", b"x")


def of(content):
    return lambda path: path.write_bytes(content)


RANDOM = np.random.default_rng(0).bytes(5000)
BAD = {
    "missing.wav": lambda path: None,
    "no folder/x.wav": lambda path: None,
    "n" * 256 + ".wav": lambda path: None,
    "n" * 240 + ".wav": of(b"x"),
    "empty.wav": of(b""),
    "empty.mp3": of(b""),
    "one byte.flac": of(b"f"),
    "text.wav": of(b"this is no sound\n"),
    "json.flac": of(b'{"sound": null}'),
    "page.mp3": of(b"<!DOCTYPE html><html></html>" * 50),
    "pointer.wav": of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
    "picture.flac": of(b"\x89PNG\r\n\x1a\n" + RANDOM),
    "picture.mp4": of(b"\x00\x00\x00\x18ftypmp42" + bytes(50)),
    "zeros.m4a": of(bytes(5000)),
    "random.mp3": of(RANDOM),
    "random.ogg": of(RANDOM),
    "random.wav": of(RANDOM),
    "zip.wav": zipped,
    "head.opus": of(b"OggS\x00\x02" + bytes(20)),
    "head.wav": of(b"RIFF\x24\x00\x00\x00WAVEfmt "),
    "head.flac": of(b"fLaC\x00\x00\x00\x22"),
    "no samples.wav": lambda path: sound(path, noise(1, 0)),
    "no samples.flac": lambda path: sound(path, noise(1, 0)),
    "no data.wav": of(wav(data=b"", claimed=0xFFFFFF00)),
    "no channels.wav": of(wav(channels=0)),
    "no rate.wav": of(wav(rate=0)),
    "no codec.wav": of(wav(tag=0x7777)),
    "255 channels.wav": of(wav(channels=255, data=bytes(510 * 100))),
    "cut.flac": lambda path: sound(path, noise(1, 20 * RATE), cut=0.5),
    "cut.wav": lambda path: sound(path, noise(1, 20 * RATE), cut=0.5),
    "cut.ogg": lambda path: sound(path, cut=0.01),
    "nan.wav": not_finite(np.nan),
    "nan late.wav": not_finite(np.nan, at=-1),
    "nan double.wav": not_finite(np.nan, subtype="DOUBLE"),
    "infinite.wav": not_finite(np.inf),
    "minus infinite.wav": not_finite(-np.inf),
    "loop.wav": lambda path: path.symlink_to(path),
    "dangling.wav": lambda path: path.symlink_to(path.parent / "nowhere.wav"),
    "pipe.wav": os.mkfifo,
    "socket.wav": unix_socket,
    "-dash.wav": of(b"x"),
    "ünïcode 音.wav": of(b"x"),
    "new\nline.wav": of(b"x"),
}


def test_forty_bad_files_are_a_line_each_and_the_good_ones_are_done(folder, tmp_path, capsys):
    assert len(BAD) >= 40
    (tmp_path / "bad").mkdir()
    bad = [tmp_path / "bad" / name for name in BAD]
    for path, make in zip(bad, BAD.values(), strict=True):
        make(path)
    for name in ("first.wav", "last.wav"):
        sound(tmp_path / name)
    tracks = [tmp_path / "first.wav", *bad, tmp_path / "last.wav"]
    assert run(*tracks, "-n", folder, "-o", tmp_path / "out", "--class", "Dog") == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    for path in bad:
        name = str(path).replace("\n", "\\n")
        assert sum(line.startswith(f"error: {name}: ") for line in errors) == 1, (path.name, errors)
    assert len(errors) == len(bad)
    assert len(lines) == len(errors) + 1  # and the summary
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.wav")) == ["Dog.wav", "Dog.wav"]
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("suffix", ["ogg", "flac", "mp3"])
def test_recordings_that_were_joined_are_separated_to_the_end(folder, tmp_path, suffix):
    """As the reader of the corpora has it: libsndfile and PyAV stop behind the first, or count its codec's delay."""
    for i in range(2):
        sound(tmp_path / f"{i}.{suffix}", noise(1, RATE, seed=i))
    whole = tmp_path / f"x.{suffix}"
    whole.write_bytes(b"".join((tmp_path / f"{i}.{suffix}").read_bytes() for i in range(2)))
    assert run(whole, "-n", folder, "-o", tmp_path / "out", "--class", "Dog") == 0
    assert soundfile.info(tmp_path / "out/x/Dog.wav").frames == 2 * RATE


ODD = {
    "one sample.wav": lambda path: sound(path, noise(1, 1)),
    "silence.wav": lambda path: sound(path, np.zeros((RATE, 2))),
    "square.wav": lambda path: sound(path, np.sign(noise(1, RATE))),
    "ten ms.wav": lambda path: sound(path, noise(1, 80), rate=8000),
    "-in front.wav": sound,
    "ünïcode 音.flac": sound,
    "named as another.mp3": lambda path: path.write_bytes(wav()),
    "five.wav": lambda path: sound(path, noise(5, 1000), rate=11025),
}


def test_odd_files_are_separated(folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, make in ODD.items():
        make(tmp_path / "in" / name)
    assert run(tmp_path / "in", "-n", folder, "-o", tmp_path / "out", "--class", "Dog", "--residual") == 0
    for name in ODD:
        there, out = tmp_path / "in" / name, tmp_path / "out" / os.path.splitext(name)[0]
        for stem in ("Dog", "residual"):
            assert soundfile.info(out / f"{stem}.wav").frames == soundfile.info(there).frames
    assert not soundfile.read(tmp_path / "out/silence/Dog.wav")[0].any()


def test_a_full_disk_fails_the_recording_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    sound(tmp_path / "x.wav")

    def write(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StemWriter, "write", write)
    assert run(tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--class", "Dog") == 1
    assert "x.wav: No space left on device" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_an_output_that_is_a_file_is_refused(folder, tmp_path, capsys):
    sound(tmp_path / "x.wav")
    (tmp_path / "out").write_text("mine")
    assert run(tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--class", "Dog") == 2
    assert "it is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_leaves_nothing_half_written(folder, tmp_path, sent):
    sound(tmp_path / "x.wav", noise(2, 600 * RATE))
    args = [sys.executable, "-m", "pipeline.separate", tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out"]
    # A suite that runs in the background of a shell has SIGINT ignored, and its children would inherit that.
    heed = functools.partial(signal.signal, sent, signal.SIG_DFL)
    running = subprocess.Popen([*args, "--class", "Dog"], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not (tmp_path / "out/x").exists():  # the first block is at work
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(sent)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert said == "interrupted; what was finished is kept\n"
    # Where the signal came late the file was there, whole.
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [soundfile.info(path).frames for path in files] in ([], [600 * RATE])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(folder, tmp_path, capsys, device):
    assert run(tmp_path / "x.wav", "-n", folder, "--class", "Dog", "-d", device) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: device {device}: ")
    assert error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- without queries


def test_a_model_without_queries_gives_all_sounds_by_energy_and_name(blind, tmp_path, capsys):
    sound(tmp_path / "x.wav", noise(2, 5 * 44100), subtype="FLOAT", rate=44100)
    assert run(tmp_path / "x.wav", "-n", blind, "-o", tmp_path / "out", "--residual", "--float32", "--json") == 0
    stems = json.loads(capsys.readouterr().out)["done"][0]["stems"]
    names = [name for name in sorted(stems) if name != "residual"]
    assert [name[0] for name in names] == ["1", "2", "3"]
    assert {name[2:] for name in names} <= {"Speech", "Dog", "Bell"}
    audio = {name: soundfile.read(path, dtype="float32")[0] for name, path in stems.items()}
    energies = [np.square(audio[name]).sum() for name in names]
    assert energies == sorted(energies, reverse=True)
    original = soundfile.read(tmp_path / "x.wav", dtype="float32")[0]
    np.testing.assert_allclose(sum(audio.values()), original, atol=1e-5)
    arrays = Separator.from_pretrained(blind, device="cpu").separate(original.T, 44100)
    assert list(arrays) == names


def test_a_model_without_queries_can_be_asked_for_nothing(blind, tmp_path, capsys):
    sound(tmp_path / "x.wav")
    assert run(tmp_path / "x.wav", "-n", blind, "-o", tmp_path / "out", "--class", "Dog") == 2
    assert "takes no queries" in capsys.readouterr().err
    with pytest.raises(Unusable, match="without queries"):
        Separator.from_pretrained(blind, device="cpu").separate(noise(1, RATE).T, RATE, ["Dog"])


def test_sounds_in_no_order_are_matched_from_block_to_block():
    """Two tones, which an estimate gives in another order every time: each stem has one of them throughout."""
    time = torch.arange(40000) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (500, 3000)])
    calls = []

    def estimate(mono):
        calls.append(mono.shape[1])
        spectrum = torch.fft.rfft(mono)
        low = torch.arange(spectrum.shape[1]) < 1500 / RATE * mono.shape[1]
        both = torch.fft.irfft(torch.stack([spectrum * low, spectrum * ~low], dim=1), n=mono.shape[1])
        return both.flip(1) if len(calls) % 2 else both

    stream = Stream(estimate, 2, channels=1, sample_rate=RATE, blocks=Blocks(6400, 3200, 320), ordered=False)
    found = np.concatenate([stream.push(tones.sum(dim=0, keepdim=True).numpy()), stream.flush()], axis=2)[:, 0]
    assert len(calls) > 4
    both = np.corrcoef(np.concatenate([found, tones.numpy()]))[:2, 2:]
    assert sorted(both.round().flatten().tolist()) == [0, 0, 1, 1]
    assert both.max(axis=1).min() > 0.99


# ---------------------------------------------------------------------------------------------------------------- flags


def test_recordings_at_once_give_what_one_after_the_other_does(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        sound(tmp_path / "in" / f"{i}.wav", noise(1, RATE, seed=i))
    for jobs in (1, 3):
        assert run(tmp_path / "in", "-n", folder, "-o", tmp_path / str(jobs), "--class", "Dog", "-j", jobs) == 0
    for i in range(3):
        one, other = (soundfile.read(tmp_path / jobs / str(i) / "Dog.wav")[0] for jobs in ("1", "3"))
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("flags", [["--shifts", "3"], ["--precision", "bf16"], ["--stereo", "side"], ["--flac"]])
def test_flags_change_the_estimate_a_little_and_the_sum_not(folder, tmp_path, flags, capsys):
    sound(tmp_path / "x.wav", np.concatenate([noise(1, RATE), 0.2 * noise(1, RATE, seed=1)], axis=1))
    args = [tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--two-stems", "Dog", "--json", *flags]
    assert run(*args, "--spectrogram", "--benchmark") == 0
    told = capsys.readouterr()
    assert "real-time factor" in told.err
    stems = json.loads(told.out)["done"][0]["stems"]
    total = sum(soundfile.read(path)[0] for path in stems.values())
    np.testing.assert_allclose(total, soundfile.read(tmp_path / "x.wav")[0], atol=1e-3)
    for path in stems.values():
        with open(os.path.splitext(path)[0] + ".png", "rb") as file:
            assert file.read(4) == b"\x89PNG"


def test_what_is_not_wanted_is_refused_by_a_model_that_takes_no_such_query(folder, tmp_path, capsys):
    sound(tmp_path / "x.wav")
    args = [tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--class", "Dog", "--not", "Bell"]
    assert run(tmp_path / "x.wav", *args) == 2  # once, not for every recording
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "not wanted" in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.wav"))


def test_classes_are_grouped_by_levels_of_the_ontology():
    named = {"Dog": (74, "/m/0bt9lr"), "Bark": (75, "/m/05tny_"), "Speech": (0, "/m/09x0r")}
    classes = [SoundClass(index, mid, name) for name, (index, mid) in named.items()]

    def groups(level):
        return {name: [one.name for one in members] for name, members in group_by_level(classes, level).items()}

    assert groups(1) == {"Animal": ["Dog", "Bark"], "Human sounds": ["Speech"]}
    assert groups(3) == {"Dog": ["Dog", "Bark"], "Speech": ["Speech"]}


def test_levels_give_a_stem_per_group_that_is_detected(folder, tmp_path, capsys):
    sound(tmp_path / "x.wav")
    args = [tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--levels", "1", "--threshold", "0", "--json"]
    assert run(*args) == 0
    assert {"Animal", "Human sounds"} <= set(json.loads(capsys.readouterr().out)["done"][0]["stems"])
