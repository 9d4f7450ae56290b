"""Separating recordings: stems and residual are the input, blocks leave no seam, any file is done or named."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipeline import separators
from pipeline.separate import Separator, Unusable, command
from pipeline.separate.files import open_recording
from pipeline.separate.stream import Blocks, Stream, down_mix
from pipeline.separate.targets import SoundClass, find_class
from pipeline.training.portable import felt_seconds
from tests.separators.test_separators import TINY
from tests.stages.test_train_separator import MODEL, trained

RATE = 32000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained separator's folder, copied away from what it was trained on."""
    root = tmp_path_factory.mktemp("model")
    shutil.copytree(trained(root), root / "elsewhere" / "tiny")
    return root / "elsewhere" / "tiny"


@pytest.fixture(scope="module")
def separator(folder):
    return Separator.from_pretrained(folder, device="cpu")


def noise(channels, samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((channels, samples)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("rate", "seconds"), [(8000, 0.01), (16000, 1.3), (32000, 2.0), (44100, 40.0), (96000, 0.5)])
def test_stems_and_residual_are_the_input(separator, channels, rate, seconds):
    audio = noise(channels, max(1, round(rate * seconds)))
    stems = separator.separate(audio, rate, ["Speech", "Dog"])
    assert list(stems) == ["Speech", "Dog"]
    assert stems["Dog"].shape == audio.shape
    total = sum(stems.values()) + stems.residual
    np.testing.assert_allclose(total, audio, rtol=0, atol=1e-6)


def test_the_channels_of_a_recording_keep_their_balance(separator):
    mono = noise(1, 2 * RATE)
    stems = separator.separate(np.concatenate([2.5 * mono, -0.5 * mono]), RATE, ["Speech"])
    left, right = stems["Speech"]
    np.testing.assert_allclose(right, -0.2 * left, atol=1e-5)
    alone = separator.separate(mono, RATE, ["Speech"])["Speech"][0]
    assert np.square(left - 2.5 * alone).mean() < 1e-2 * np.square(left).mean()


def test_a_down_mix_that_cancels_is_the_alternating_sum():
    one = torch.randn(3 * RATE, generator=torch.Generator().manual_seed(0))
    both = torch.stack([torch.stack([one, -one]), torch.stack([one, one])])
    torch.testing.assert_close(down_mix(both), torch.stack([one, one]))
    torch.testing.assert_close(down_mix(both, "side"), torch.stack([one, 0 * one]))


def test_a_down_mix_changes_over_without_a_jump():
    """A sound that turns from both channels alike to both opposed: what the network is given has no jump anywhere."""
    tone = torch.sin(torch.arange(8 * RATE) * 0.01)
    turn = torch.linspace(1, -1, len(tone))
    mono = down_mix(torch.stack([tone, turn * tone])[None])[0]
    assert mono.diff().abs().max() < 0.02
    assert mono[-RATE:].square().mean() > 0.3  # and at the end, where the mean is nothing, the sound is there


def test_a_recording_may_be_a_tensor_of_one_channel(separator):
    audio = torch.from_numpy(noise(1, 5000)[0])
    assert separator.separate(audio, RATE, ["Dog"])["Dog"].shape == (1, 5000)


def test_a_sample_that_is_not_finite_is_refused(separator):
    audio = noise(1, 5000)
    audio[0, 77] = np.nan
    with pytest.raises(Unusable, match="not finite"):
        separator.separate(audio, RATE, ["Dog"])


# ------------------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("n_pieces", [1, 7, 500])
def test_pieces_of_any_size_give_what_the_whole_gives(separator, n_pieces):
    audio = noise(2, 44100 * 5)
    query = separator.query("Dog")[1][None]
    blocks = separator.blocks_of(1.0, 0.1)
    whole = separator.separate(audio, 44100, ["Dog"], blocks=blocks)["Dog"]
    stream = separator.stream(query, channels=2, sample_rate=44100, blocks=blocks)
    cuts = np.sort(np.random.default_rng(1).integers(0, audio.shape[1], n_pieces - 1)).tolist()
    found = [stream.push(piece) for piece in np.split(audio, cuts, axis=1)]
    found = np.concatenate([*found, stream.flush()], axis=2)[0]
    assert found.shape == audio.shape
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4)


def test_the_latency_of_a_stream_is_what_its_blocks_say(separator):
    blocks = separator.blocks_of(1.0, 0.1)
    stream = separator.stream(separator.query("Dog")[1][None], channels=1, sample_rate=RATE, blocks=blocks)
    pushed = popped = 0
    for _ in range(60):
        popped += stream.push(noise(1, 4000)).shape[2]
        pushed += 4000
        assert pushed - popped <= blocks.latency_seconds * RATE + 4000


def test_a_network_that_looks_no_further_than_its_context_leaves_no_seam():
    """A filter of 1,001 taps, blocks with 500 samples of context: each seam is as good as anywhere else."""
    kernel = torch.randn(1, 1, 1001, generator=torch.Generator().manual_seed(0))

    def estimate(mono):
        return torch.nn.functional.conv1d(mono[:, None], kernel, padding=500)

    audio = noise(1, 20000)
    stream = Stream(estimate, 1, channels=1, sample_rate=RATE, blocks=Blocks(2000, 700, 200))
    found = np.concatenate([stream.push(audio), stream.flush()], axis=2)[0, 0]
    whole = estimate(torch.from_numpy(audio))[0, 0].numpy()
    np.testing.assert_allclose(found, whole, atol=1e-4 * np.abs(whole).max())
    short = Stream(estimate, 1, channels=1, sample_rate=RATE, blocks=Blocks(2000, 200, 200))
    found = np.concatenate([short.push(audio), short.flush()], axis=2)[0, 0]
    assert np.abs(found - whole).max() > 0.05 * np.abs(whole).max()  # without enough context there are seams


def snr_at_seams(separator, audio, blocks):
    """SNR in dB of the blockwise output to one pass over the whole, in the 20 ms around each seam."""
    query = torch.rand(1, separator.config["model"]["query_dim"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = separator.network(torch.from_numpy(audio), query)[0].numpy()
    found = separator.separate(audio, RATE, {"it": query[0]}, blocks=blocks)["it"][0]
    error = np.square(found - whole)
    seams = range(blocks.core, audio.shape[1] - 640, blocks.core)
    return [
        10 * np.log10(np.square(whole)[s - 320 : s + 320].mean() / (error[s - 320 : s + 320].mean() + 1e-20))
        for s in seams
    ]


BODIES = {
    "resunet": MODEL,
    "bandsplit": TINY["bandsplit"] | {"recurrent_hidden": 8},
    "mae_resunet": TINY["mae_resunet"],
    "mae_resunet interferer": TINY["mae_resunet"] | {"fusion": "interferer", "mae_input": "crop"},
    "mae_bandsplit": TINY["mae_bandsplit"] | {"body": TINY["bandsplit"] | {"n_fft": 1024, "hop_length": 512}},
    "mae_resunet attention": TINY["mae_resunet"] | {"fusion": "attention"},
}


@pytest.fixture(params=sorted(BODIES))
def body(request):
    """A separator of each architecture, its weights as they are drawn, as for a long recording."""
    torch.manual_seed(0)
    model = BODIES[request.param] | {"query_dim": 8}
    architecture = request.param.split()[0]
    network = separators.build(architecture, **model).eval()
    for layer in network.modules():  # what begins silent is given something to say
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.3)
    network.segment_samples = 2 * RATE
    config = {"architecture": architecture, "model": model, "sample_rate": RATE, "context_seconds": 2.0}
    return Separator(Path(request.param), config, network, device="cpu", precision="fp32")


def test_the_seams_of_every_body_are_60_db_below(body):
    """Loud and quiet by turns, so that a level taken of each block would jump."""
    loudness = np.repeat(10 ** (np.array([0, -30, -5, -40, 0, -20]) / 20), 3 * RATE).astype(np.float32)
    audio = loudness * noise(1, len(loudness))
    snrs = snr_at_seams(body, audio, body.blocks_of(4.0, 0.1))
    print(f"{body.folder}: context {body.blocks.context / RATE:.2f} s, dB at each seam: {np.round(snrs, 1)}")
    assert len(snrs) >= 3
    assert min(snrs) > 60, snrs


def test_a_short_recording_is_separated_as_in_evaluation(body):
    audio = noise(1, 2 * RATE)
    query = torch.rand(1, 8, generator=torch.Generator().manual_seed(1))
    long = body.network.segment_samples
    body.network.segment_samples = None
    with torch.inference_mode():
        evaluated = body.network(torch.from_numpy(audio), query)[0].numpy()
    body.network.segment_samples = long
    found = body.separate(audio, RATE, {"it": query[0]})["it"][0]
    np.testing.assert_allclose(found, evaluated, atol=1e-6)


def test_a_target_alone_is_what_it_is_among_others(body):
    """Blocks and targets that are separated at once do not change one another."""
    audio = noise(2, 21 * RATE)
    queries = {str(i): torch.rand(8, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    blocks = body.blocks_of(2.0, 0.1)
    together = body.separate(audio, RATE, queries, blocks=replace(blocks, batch=3))
    alone = body.separate(audio, RATE, {"1": queries["1"]}, blocks=blocks)
    np.testing.assert_allclose(together["1"], alone["1"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def told():
    """A ResUNet that may be given what else sounds."""
    torch.manual_seed(0)
    model = MODEL | {"query_dim": 8, "interferer_query": True}
    network = separators.build("resunet", **model).eval()
    network.segment_samples = 2 * RATE
    config = {"architecture": "resunet", "model": model, "sample_rate": RATE, "context_seconds": 1.0}
    return Separator(Path("it"), config, network, device="cpu", precision="fp32")


def estimate(separator, audio, query, other):
    with torch.inference_mode():
        joint = separator.network.joint_query(query[None], None if other is None else other[None])
        return separator.network(torch.from_numpy(audio), joint)[0].numpy()


def test_what_is_not_wanted_changes_the_estimate_of_a_model_that_takes_it(told):
    audio, query, other = noise(1, RATE), torch.rand(8), torch.rand(8)
    found = []
    for without in (None, other):
        stream = told.stream(query[None], without=without, channels=1, sample_rate=RATE)
        found.append(np.concatenate([stream.push(audio), stream.flush()], axis=2)[0, 0])
    np.testing.assert_allclose(found[1], estimate(told, audio, query, other), atol=1e-6)
    assert np.abs(found[1] - found[0]).max() > 1e-4


def test_of_sounds_that_are_all_there_each_is_told_of_the_others(told, body):
    """The mean of the others and of what is not wanted; a model that takes no such query is told nothing."""
    queries, other = torch.rand(3, 8), torch.rand(8)
    found = told.what_else_sounds(queries, other)
    torch.testing.assert_close(found[0], (queries[1] + queries[2] + other) / 3)
    assert told.what_else_sounds(queries[:1]) is None
    torch.testing.assert_close(told.what_else_sounds(queries[:1], other)[0], other)
    assert body.what_else_sounds(queries) is None
    audio = noise(1, RATE)
    stream = told.stream(queries, without=found, channels=1, sample_rate=RATE)
    estimates = np.concatenate([stream.push(audio), stream.flush()], axis=2)
    np.testing.assert_allclose(estimates[1, 0], estimate(told, audio, queries[1], found[1]), atol=1e-5)


def test_a_change_is_felt_as_far_as_a_filter_reaches(monkeypatch):
    class Filter(separators.QuerySeparator):
        hop_length = 320

        def forward(self, mixture, query, part=slice(None)):
            kernel = torch.zeros(1, 1, 2 * 4800 + 1)
            kernel[..., 0] = kernel[..., 4800] = 1
            return torch.nn.functional.conv1d(mixture[:, None], kernel, padding=4800)[:, 0]

    assert felt_seconds(Filter(query_dim=4), 4, torch.device("cpu"), seconds=1.0) == pytest.approx(0.15, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- targets

CLASSES = [SoundClass(0, "/m/09x0r", "Speech"), SoundClass(74, "/m/0bt9lr", "Dog"), SoundClass(75, "/m/05tny_", "Bark")]
CLASSES += [SoundClass(3, "/m/x", "Door"), SoundClass(16, "/m/0395lw", "Bell")]


@pytest.mark.parametrize("text", ["Dog", "dog", " DOG ", "/m/0bt9lr", "74", 74])
def test_a_class_is_found_by_name_id_and_mid(text):
    assert find_class(text, CLASSES).name == "Dog"


def test_a_beginning_is_enough_where_it_is_of_one_class():
    assert find_class("spee", CLASSES).name == "Speech"
    with pytest.raises(Unusable, match="'Bark' and 'Bell' begin so"):
        find_class("b", CLASSES)


@pytest.mark.parametrize(("text", "says"), [("Dgo", "did you mean 'Dog'"), ("xylophone", "there are 'Speech', 'Dog'")])
def test_a_typo_gets_suggestions(text, says):
    with pytest.raises(Unusable, match=says):
        find_class(text, CLASSES)


def test_a_model_knows_its_classes_and_can_be_queried_by_example(separator):
    assert {one.name for one in separator.classes} == {"Speech", "Dog", "Bell"}
    query = separator.query_of([noise(2, 44100)], 44100)
    stems = separator.separate(noise(1, RATE), RATE, {"like this": query})
    assert list(stems) == ["like this"]
    found = separator.detect(noise(1, 2 * RATE), RATE)
    assert found.probability.shape[1] == 3
    assert [one.name for one, _ in found.loudest(0.0, 2)] == [
        found.classes[i].name for i in np.argsort(-found.probability.max(axis=0), kind="stable")[:2]
    ]


# ----------------------------------------------------------------------------------------------------------- command


def run(*arguments):
    return command.main([str(a) for a in arguments])


def test_files_of_several_kinds_are_separated(folder, tmp_path, capsys):
    paths = []
    for name, rate, channels in (("a.wav", 44100, 2), ("b.flac", 16000, 1), ("c.ogg", 48000, 2), ("d.mp3", 44100, 1)):
        paths.append(tmp_path / "in" / name)
        paths[-1].parent.mkdir(exist_ok=True)
        soundfile.write(paths[-1], noise(channels, rate).T, rate)
    assert run(tmp_path / "in", "-n", folder, "-o", tmp_path / "out", "--class", "dog", "--residual", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["done"]) == 4
    for path in paths:
        for stem in ("Dog", "residual"):
            info = soundfile.info(tmp_path / "out" / path.stem / f"{stem}.wav")
            assert (info.samplerate, info.channels) == (soundfile.info(path).samplerate, soundfile.info(path).channels)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]


def test_float_files_add_up_to_the_input(folder, tmp_path):
    audio = noise(2, 3 * 44100)
    soundfile.write(tmp_path / "x.wav", audio.T, 44100, subtype="FLOAT")
    assert run(tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--two-stems", "Dog", "--float32") == 0
    parts = [soundfile.read(tmp_path / "out/x" / f"{s}.wav", dtype="float32")[0] for s in ("Dog", "residual")]
    np.testing.assert_allclose(sum(parts), audio.T, rtol=0, atol=1e-6)


def test_files_that_are_there_are_kept_unless_forced(folder, tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", noise(1, RATE)[0], RATE)
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/Dog.wav").write_text("mine")
    arguments = [tmp_path / "x.wav", "-n", folder, "-o", tmp_path / "out", "--class", "Dog"]
    assert run(*arguments) == 0
    assert (tmp_path / "out/x/Dog.wav").read_text() == "mine"
    assert "1 files were there" in capsys.readouterr().err
    assert run(*arguments, "--force") == 0
    assert soundfile.info(tmp_path / "out/x/Dog.wav").frames == RATE


def test_what_exceeds_full_scale_never_wraps_around(folder, tmp_path):
    soundfile.write(tmp_path / "x.wav", np.sign(noise(1, RATE)[0]) * 3, RATE, subtype="FLOAT")
    for mode in ("rescale", "clamp"):
        out = tmp_path / mode
        assert (
            run(tmp_path / "x.wav", "-n", folder, "-o", out, "--class", "Dog", "--residual", "--clip-mode", mode) == 0
        )
        rest = soundfile.read(out / "x/residual.wav", dtype="float64")[0]
        loud = np.abs(rest) > 0.5
        original = np.sign(noise(1, RATE)[0])
        assert (np.sign(rest[loud]) == original[loud]).mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.wav", "--class", "Dgo"], "did you mean 'Dog'"),
        (["x.wav"], "nothing is asked for"),
        (["--class", "Dog"], "no recording is named"),
        (["x.wav", "--class", "Dog", "-n", "nowhere/x/y"], "no model at nowhere/x/y: `make repro` trains some"),
        (["x.wav", "--query", "nowhere.wav"], "nowhere.wav: No such file"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, arguments, says):
    model = [] if "-n" in arguments else ["-n", folder]
    assert run(*arguments, *model) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_stem_is_never_written_over_its_recording(folder, tmp_path, capsys):
    soundfile.write(tmp_path / "Dog.wav", noise(1, RATE)[0], RATE)
    before = (tmp_path / "Dog.wav").read_bytes()
    arguments = [tmp_path / "Dog.wav", "-n", folder, "-o", tmp_path, "--filename", "{stem}.{ext}", "--class", "Dog"]
    assert run(*arguments, "--force") == 1
    assert "would be written over it" in capsys.readouterr().err
    assert (tmp_path / "Dog.wav").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("ffmpeg"), reason="nothing makes the file")
def test_a_video_s_sound_is_separated(folder, tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(2, 44100).T, 44100)
    subprocess.run(["ffmpeg", "-v", "error", "-i", "x.wav", "-c:a", "aac", "x.m4a"], cwd=tmp_path, check=True)
    assert open_recording(tmp_path / "x.m4a").channels == 2
    assert run(tmp_path / "x.m4a", "-n", folder, "-o", tmp_path / "out", "--class", "Dog") == 0
    assert abs(soundfile.info(tmp_path / "out/x/Dog.wav").frames - 44100) < 4096


def test_the_library_imports_little():
    code = "import sys, pipeline.separate; print({'dvc', 'dask', 'transformers', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
