"""Stage train_mixit: it learns, resumes to the same bytes, keeps its best weights, and takes running out of memory."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from pipeline.core import devices
from pipeline.mixtures.moms import is_validation
from pipeline.separators import build_blind
from pipeline.separators.performer import Separator
from pipeline.stages import evaluate_mixit, pretrain_performer
from pipeline.stages import train_mixit as train_stage
from pipeline.stages.train_mixit import train_mixit
from pipeline.training import mixit
from tests.corpora import write_recordings, write_sounds
from tests.tiny_mixit import MIXIT, MODELS, PERFORMER, PRETRAIN, RATE, entry, write_music

ROOT = Path(__file__).parents[2]
FILES = ("weights.safetensors", "config.json")
EACH_STEP = {"checkpoint_every_seconds": 1e-9}


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    return write_music(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    """Of four classes, with as many clips that validate as it takes."""
    sounds = []
    for index in (3, 72, 137, 300):
        names = [f"c{index}x{i}" for i in range(99)]
        held_out = [name for name in names if is_validation(name)][:2]
        trained = [name for name in names if not is_validation(name)][:6]
        sounds += [(name, index, [index]) for name in trained + held_out]
    return write_sounds(tmp_path_factory.mktemp("anchors") / "train", sounds)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two tones in each clip, as far as anybody has told: one low, one high."""
    rng, time = np.random.default_rng(0), np.arange(RATE) / RATE
    waveforms = {}
    for number in range(60):
        pitches = rng.uniform(100, 400), rng.uniform(1500, 3000)
        waveforms[f"clip{number}"] = sum(rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * hz * time) for hz in pitches)
    return write_recordings(tmp_path_factory.mktemp("clips") / "train", waveforms, RATE)


@pytest.fixture
def train(music, anchors, clips, tmp_path, monkeypatch):
    """Train an entry into tmp_path/<out>; returns (directory, config, rows of the curve, what it told)."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(train_stage, "STATISTICS_BATCHES", 2)  # half of the time, otherwise
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (0, 10**12))  # whatever runs beside the tests
    index, params = music

    def train(one, out="out", *, pretrained=None, **changes):
        directory, told = tmp_path / out, {}
        of_music = one.data == "music"
        config = train_mixit(
            one,
            index if of_music else anchors,
            directory,
            directory.with_suffix(".csv"),
            params=MIXIT.model_copy(update=changes),
            music=params if of_music else None,
            pretrained=pretrained,
            told=told,
            clips=None if of_music else clips,
        )
        with directory.with_suffix(".csv").open() as file:
            return directory, config, list(csv.DictReader(file)), told

    return train


def validations(rows):
    return {int(row["step"]): float(row["validation"]) for row in rows if row["validation"]}


@pytest.mark.parametrize(
    ("architecture", "data", "mixtures", "epochs"),
    [
        *(("performer", "music", "subsets", 5.0), ("performer", "music", "whole", 5.0)),
        *(("conv_tasnet", "music", "subsets", 5.0), ("performer", "clips", "subsets", 5.0)),
        ("performer", "clips", "whole", 0.5),
    ],
)
def test_training_lowers_the_loss_and_writes_what_evaluation_needs(train, architecture, data, mixtures, epochs):
    seconds = [0.125] if data == "clips" else [0.25]
    one = entry(architecture, data=data, mixtures=mixtures, epochs=epochs, segment_seconds=seconds)
    out, config, rows, _ = train(one, validate_every_steps=10, log_every_steps=10)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.2  # measured over seeds: 0.77 to 5 dB lower
    found = validations(rows)
    assert json.loads((out / "config.json").read_text()) == config
    assert (config["status"], config["steps"], config["data"]) == ("ok", max(found), data)
    assert config["mixtures"] == mixtures
    assert config["best_step"] == min(found, key=found.get)
    assert (config["sample_rate"], config["segment_seconds"]) == (RATE, one.params.segment_seconds)
    assert config["n_sources"] == 4
    separator = build_blind(config["architecture"], sample_rate=config["sample_rate"], **config["model"])
    separator.load_state_dict(load_file(out / "weights.safetensors"))
    assert config["n_parameters"] == sum(p.numel() for p in separator.parameters())
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(train):
    one, two, other = (train(entry(), name, seed=seed)[0] for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in FILES)
    assert (one / FILES[0]).read_bytes() != (other / FILES[0]).read_bytes()


def scaled(terms, factor):
    return {name: value * factor for name, value in terms.items()}


def dies_at(monkeypatch, call):
    """Call number `call` of the loss is the last, those of validation included. Undone by what is returned."""
    calls, loss = itertools.count(), mixit.training_losses

    def dies(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(mixit, "training_losses", dies)
    return lambda: monkeypatch.setattr(mixit, "training_losses", loss)


@pytest.mark.parametrize(
    ("architecture", "call"),
    [
        ("performer", 2),  # before the first validation
        ("performer", 5),  # in the midst of it: four batches after step 4
        ("performer", 10),
        ("conv_tasnet", 7),
    ],
)
def test_killed_and_run_again_it_gives_the_same_bytes(train, monkeypatch, caplog, architecture, call):
    """With dropout, new random features every 3 steps, validation every 4, and segments of two lengths."""
    one = entry(architecture, epochs=1.5, segment_seconds=None)
    whole, _, rows, _ = train(one, "whole", **EACH_STEP)
    assert len(rows) > 2
    undo = dies_at(monkeypatch, call)
    with pytest.raises(KeyboardInterrupt):
        train(one, "killed", **EACH_STEP)
    undo()
    with caplog.at_level("INFO"):
        killed, _, again, _ = train(one, "killed", **EACH_STEP)
    assert "resumed at step" in caplog.text
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in FILES)
    assert rows == again


def test_training_stops_early_with_the_weights_that_validated_best(train, monkeypatch):
    loss, met, says = mixit.training_losses, [], iter([4.0, 2.0, 3.0, 2.0, 5.0])

    def pretends(separator, *arguments):
        if separator.training:
            return loss(separator, *arguments)
        if not met or not torch.equal(met[-1]["embed.weight"], separator.embed.weight):  # not the second batch
            met.append({name: tensor.clone() for name, tensor in separator.state_dict().items()})
            pretends.value = next(says)
        return {"mixit": torch.tensor(pretends.value)}

    monkeypatch.setattr(mixit, "training_losses", pretends)
    out, config, rows, _ = train(entry(epochs=6.0), patience=3)
    assert validations(rows) == {4: 4.0, 8: 2.0, 12: 3.0, 16: 2.0, 20: 5.0}
    assert (config["steps"], config["best_step"]) == (20, 8)  # of 48
    weights = load_file(out / "weights.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in met[1].items())
    assert not torch.equal(weights["embed.weight"], met[-1]["embed.weight"])


def test_a_run_that_stops_early_stops_where_it_would_have_when_killed_before(train, monkeypatch):
    loss = mixit.training_losses
    # The better it separates, the worse it validates.
    monkeypatch.setattr(
        mixit,
        "training_losses",
        lambda separator, *rest: scaled(loss(separator, *rest), 1 if separator.training else -1),
    )
    one = entry(epochs=6.0)
    whole, config, rows, _ = train(one, "whole", patience=2, **EACH_STEP)
    assert config["steps"] < 48
    undo = dies_at(monkeypatch, config["steps"] + config["steps"] // 4 * 2 - 4)  # two steps before the last validation
    with pytest.raises(KeyboardInterrupt):
        train(one, "killed", patience=2, **EACH_STEP)
    undo()
    killed, found, again, _ = train(one, "killed", patience=2, **EACH_STEP)
    assert (found, again) == (config, rows)
    assert (whole / FILES[0]).read_bytes() == (killed / FILES[0]).read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 21.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 900 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_a_result(train, monkeypatch, music, tmp_path, error):
    calls, loss = itertools.count(), mixit.training_losses

    def runs_out(*arguments):
        if next(calls) == 3:
            raise error
        return loss(*arguments)

    monkeypatch.setattr(mixit, "training_losses", runs_out)
    out, config, rows, told = train(entry("conv_tasnet"))
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert json.loads((out / "config.json").read_text()) == config
    assert (config["status"], config["steps"]) == ("out_of_memory", 0)
    assert config["n_parameters"] > 0
    assert rows == []
    assert (tmp_path / "out.csv").read_text().startswith("step,loss,")
    assert set(told) == {"training_peak_rss_bytes"}
    assert not list((tmp_path / "data" / "scratch").rglob("checkpoint.pt"))

    evaluated = evaluate(out, music, tmp_path / "scores")
    assert (evaluated["status"], evaluated["steps"], evaluated["architecture"]) == ("out_of_memory", 0, "conv_tasnet")
    assert "pretraining" not in config.keys() | evaluated.keys()


def test_a_batch_of_more_than_an_epoch_is_a_typo_and_named(train):
    with pytest.raises(ValueError, match=r"mixit\.batch_size is 1000000000: all of its training data make 16"):
        train(entry(), batch_size=10**9)


@pytest.mark.parametrize("where", ["the loader", "a neighbour"])
def test_memory_that_is_not_the_models_to_lack_is_an_error(train, monkeypatch, where):
    if where == "the loader":
        monkeypatch.setattr(mixit.Streams, "load", runs_out)
        expected = pytest.raises(ValueError, match="memory does not hold batch 0")
    else:
        monkeypatch.setattr(mixit, "training_losses", runs_out)
        monkeypatch.setattr(devices, "memory_of_others", lambda device: (6 * 10**9, 10**10))
        expected = pytest.raises(MemoryError, match="other processes hold 6")
    with expected:
        train(entry())


def evaluate(out, music, scores):
    """What is said of an entry that ran out of memory: no numbers, and no files."""
    index, params = music
    evaluated = evaluate_mixit.evaluate_mixit(
        "tiny",
        out,
        scores,
        test=evaluate_mixit.Test("music", index, params, MIXIT, None),
        params=evaluate_mixit.EvaluateMixitParams(
            n_moms=4, n_mixtures=4, max_stems=2, batch_size=2, pairs_per_part=4, bss=False, bss_filter_samples=16,
            n_examples=1, device="cpu",
        ),
    )  # fmt: skip
    assert "moms" not in evaluated
    assert not [path for path in scores.rglob("*") if path.is_file()]
    json.dumps(evaluated, allow_nan=False)
    return evaluated


def runs_out(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("owner", "name"), [(torch.nn.Module, "to"), (Separator, "learn_statistics")])
def test_running_out_of_memory_before_the_first_step_is_a_result(train, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, runs_out)
    out, config, rows, _ = train(entry())
    assert (config["status"], config["steps"], rows) == ("out_of_memory", 0, [])
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_auxiliary_losses_train_and_do_not_validate(train):
    still = {"learning_rate": 1e-12, "final_learning_rate": 0.0, "weight_decay": 0.0}
    plain, heavy = (
        train(entry(diversity=weight, sparsity=weight), f"out{weight}", log_every_steps=1, **still)[2]
        for weight in (0.0, 50.0)
    )
    assert float(heavy[0]["loss"]) > float(plain[0]["loss"]) + 10
    assert validations(heavy) == pytest.approx(validations(plain), abs=1e-4)


def test_other_errors_stop_the_stage(train, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(mixit, "training_losses", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(entry())


def test_a_loss_that_is_not_finite_names_the_tracks(train, monkeypatch):
    loss, calls = mixit.training_losses, itertools.count()
    monkeypatch.setattr(
        mixit, "training_losses", lambda *arguments: scaled(loss(*arguments), float("nan") if next(calls) == 2 else 1)
    )
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2, batch: song\d \+ song\d, song\d \+ song"):
        train(entry())


@pytest.fixture(scope="module")
def pretrained(music, tmp_path_factory):
    index, params = music
    out = tmp_path_factory.mktemp("pretrained") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DVC_ROOT", str(out.parent))
        pretrain_performer.pretrain_performer(
            index, out, out.with_suffix(".csv"), music=params, params=PRETRAIN, model=PERFORMER
        )
    return out / pretrain_performer.PRETRAINED


def test_a_pretrained_entry_begins_with_the_pretrained_encoder(train, pretrained):
    one = entry(pretrained=True, epochs=1e-9)  # one step
    frozen = {"learning_rate": 1e-12, "final_learning_rate": 0.0, "weight_decay": 0.0}
    out, config, _, _ = train(one, pretrained=pretrained, **frozen)
    assert (config["steps"], config["pretrained"]) == (1, True)
    weights, given = load_file(out / "weights.safetensors"), load_file(pretrained / "weights.safetensors")
    assert len(given) > 10
    for name, tensor in given.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9)
    plain = load_file(train(entry(epochs=1e-9), "plain", **frozen)[0] / "weights.safetensors")
    assert not torch.allclose(plain["embed.weight"], given["embed.weight"])
    assert torch.allclose(plain["head.weight"], weights["head.weight"])
    # What is not pretrained takes its statistics from the training data.
    assert plain["mean"].std() > 0


def test_an_entry_whose_pretraining_ran_out_of_memory_has_that_as_its_result(
    train, music, tmp_path, monkeypatch, caplog
):
    index, params = music
    out = tmp_path / "performer"
    with monkeypatch.context() as without:
        without.setattr(Separator, "learn_statistics", runs_out)
        pretrain_performer.pretrain_performer(
            index, out, out.with_suffix(".csv"), music=params, params=PRETRAIN, model=PERFORMER
        )
    monkeypatch.setattr(mixit, "training_losses", None)  # nothing is trained
    out, config, rows, _ = train(entry(pretrained=True), pretrained=out / pretrain_performer.PRETRAINED)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert json.loads((out / "config.json").read_text()) == config
    assert (config["status"], config["steps"], config["pretraining"]) == ("out_of_memory", 0, "out_of_memory")
    assert config["pretrained"]
    assert rows == []
    assert (tmp_path / "out.csv").read_text() == "step,loss,gradient_norm,learning_rate,validation\n"
    assert "tiny: out of memory: in its pretraining" in caplog.text
    evaluated = evaluate(out, music, tmp_path / "scores")
    assert (evaluated["status"], evaluated["pretraining"]) == ("out_of_memory", "out_of_memory")


def test_another_pretraining_is_another_run(train, pretrained, tmp_path, monkeypatch):
    one, other = entry(pretrained=True), tmp_path / "other"
    other.mkdir()
    weights = {name: 0.9 * tensor for name, tensor in load_file(pretrained / "weights.safetensors").items()}
    save_file(weights, other / "weights.safetensors")
    (other / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    undo = dies_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(one, "killed", pretrained=other, **EACH_STEP)
    undo()
    killed = train(one, "killed", pretrained=pretrained, **EACH_STEP)[0]
    whole = train(one, "whole", pretrained=pretrained)[0]
    assert (killed / FILES[0]).read_bytes() == (whole / FILES[0]).read_bytes()


def test_what_nothing_pretrains_is_refused_by_name(train, pretrained):
    with pytest.raises(ValueError, match="baseline is to be pretrained, but nothing pretrains conv_tasnet"):
        train(entry("conv_tasnet", name="baseline", pretrained=True), pretrained=pretrained)
    with pytest.raises(ValueError, match="tiny is to be pretrained"):
        train(entry(pretrained=True))


def test_pretraining_of_another_rate_or_size_is_refused(train, pretrained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.safetensors").write_bytes((pretrained / "weights.safetensors").read_bytes())
    config = json.loads((pretrained / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sample_rate": 44100}))
    with pytest.raises(ValueError, match="tiny trains at 8000 Hz, and was pretrained at 44100 Hz"):
        train(entry(pretrained=True), pretrained=other)
    one = entry(pretrained=True)
    for changed, said in (({"dim": 32}, "dim is 32, and 16"), ({"norm": "minmax"}, "norm is minmax, and zscore")):
        other_model = mixit.Entry(one.name, one.data, one.params, PERFORMER | changed)
        with pytest.raises(ValueError, match=rf"tiny: mixit_models\.performer\.{said} in its pretraining"):
            train(other_model, pretrained=pretrained)
    sigmoid = mixit.Entry(one.name, one.data, one.params, PERFORMER | {"n_sources": 3, "mask_activation": "sigmoid"})
    assert train(sigmoid, "sigmoid", pretrained=pretrained)[1]["status"] == "ok"  # the head is its own


def test_batches_of_several_lengths_are_learned_from_and_all_lengths_validate(train, monkeypatch):
    met, loss = {True: [], False: []}, mixit.training_losses

    def watched(separator, mixtures, *rest):
        met[separator.training].append(tuple(mixtures.shape))
        return loss(separator, mixtures, *rest)

    monkeypatch.setattr(mixit, "training_losses", watched)
    _, config, _, _ = train(entry(epochs=3.0, segment_seconds=None), validate_every_steps=100)
    assert config["segment_seconds"] == [0.25, 0.5]
    assert len(met[True]) == config["steps"] == 16  # 3 x 8 s, at 2 x 2 x 0.375 s a step
    assert set(met[True]) == {(2, 2, 2000), (2, 2, 4000)}
    assert met[False] == [(2, 2, 2000)] * 2 + [(2, 2, 4000)] * 2  # four of either length


def test_its_features_are_drawn_again_every_so_many_steps_from_the_seed(train, monkeypatch):
    drawn, redraw = [], Separator.redraw
    monkeypatch.setattr(
        Separator, "redraw", lambda self, *arguments: drawn.append(arguments) or redraw(self, *arguments)
    )
    _, config, _, _ = train(entry(), redraw_every_steps=3, seed=5)
    assert config["steps"] == 8
    assert drawn == [(3, 5), (6, 5)]


def test_without_a_number_of_steps_it_validates_once_an_epoch(train):
    _, config, rows, _ = train(entry(epochs=2.5), validate_every_steps=None)
    assert config["steps"] == 20
    assert sorted(validations(rows)) == [8, 16, 20]


def test_what_the_training_took_is_told(train):
    _, _, _, told = train(entry(epochs=2.0))
    assert set(told) == {"seconds_per_audio_hour", "minutes_per_epoch", "training_peak_rss_bytes"}
    # An epoch is the 8 s of the four tracks that are trained on, in whole steps of 2 x 2 x 0.25 s.
    assert told["minutes_per_epoch"] * 60 == pytest.approx(told["seconds_per_audio_hour"] * 8 / 3600)
    assert 0 < told["minutes_per_epoch"] < 1
    assert told["training_peak_rss_bytes"] > 1e8


@pytest.mark.slow
def test_the_stage_killed_by_a_signal_goes_on_from_its_checkpoint(music, tmp_path):
    index, params = music
    sections = {
        "music": params.model_dump(),
        "mixit": MIXIT.model_copy(update={"checkpoint_every_seconds": 0.2}).model_dump(),
        "mixit_models": MODELS,
        "mixit_music": {"tiny": entry(epochs=12.0).params.model_dump()},
    }

    def start(name):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        YAML().dump(sections, directory / "params.yaml")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(directory)}
        command = [sys.executable, "-m", "pipeline.stages.train_mixit", "tiny", "--data", "music"]
        command += ["--source", str(index), "--out", "out", "--curve", "curve.csv"]
        return subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True)

    process = start("whole")
    _, log = process.communicate()
    assert process.returncode == 0, log
    timings = json.loads((tmp_path / "whole" / "data" / "timings" / "train_mixit@tiny.json").read_text())
    assert {"seconds", "minutes_per_epoch", "seconds_per_audio_hour"} <= set(timings)
    process = start("killed")
    while not list((tmp_path / "killed" / "data").rglob("checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "out").exists()
    process = start("killed")
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "resumed at step" in log
    for name in ("out/weights.safetensors", "out/config.json", "curve.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
