"""Stage pretrain_performer: it learns to fill in, resumes to the same bytes, and a separator takes what it writes."""

import csv
import itertools
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import devices
from pipeline.mixtures.tracks import MomStream
from pipeline.nn.favor import PerformerEncoder
from pipeline.separators import build_blind
from pipeline.separators.performer import Pretrainer, Separator
from pipeline.stages import pretrain_performer as pretrain_stage
from pipeline.stages.pretrain_performer import PRETRAINED, SCRATCH, pretrain_performer
from pipeline.training.mixit import index_file
from tests.tiny_mixit import PERFORMER, PRETRAIN, RATE, write_music

FILES = (f"{PRETRAINED}/weights.safetensors", f"{PRETRAINED}/config.json", f"{SCRATCH}/README.md")


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    return write_music(tmp_path_factory.mktemp("music"))


@pytest.fixture
def pretrain(music, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(pretrain_stage, "STATISTICS_BATCHES", 2)  # half of the time, otherwise
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (0, 10**12))  # whatever runs beside the tests
    index, params = music

    def pretrain(name="out", model=PERFORMER, **changes):
        out = tmp_path / name
        summary = pretrain_performer(
            index,
            out,
            out.with_suffix(".csv"),
            music=params,
            params=PRETRAIN.model_copy(update=changes),
            model=model,
        )
        return out, summary

    return pretrain


@pytest.mark.parametrize(
    "changes", [{}, {"mask_mode": "drop", "target": "wave", "loss_on": "all", "redraw_every_steps": 0}]
)
def test_pretraining_beats_an_untrained_network_and_separators_load_it(pretrain, changes):
    out, summary = pretrain(epochs=6.0, validate_every_steps=12, **changes)
    assert summary["loss"] < 0.95 * summary["loss_untrained"]  # measured over seeds: 0.24 to 0.82 of it
    assert summary["steps"] == 48  # 6 x 8 s, in fours of 0.25 s
    assert (summary["status"], summary["mask_ratio"], summary["sample_rate"]) == ("ok", 0.3, RATE)
    config = json.loads((out / PRETRAINED / "config.json").read_text())
    assert config == {"model": PERFORMER, **summary}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(FILES)
    weights = load_file(out / PRETRAINED / "weights.safetensors")
    separator = build_blind("performer", sample_rate=config["sample_rate"], **config["model"])
    head = separator.head.weight.clone()
    separator.load_pretrained(weights)
    assert all(torch.equal(separator.state_dict()[name], tensor) for name, tensor in weights.items())
    assert torch.equal(separator.head.weight, head)
    assert weights["std"].min() > 0
    assert weights["mean"].std() > 0


def test_the_loss_is_that_of_the_weights_kept(pretrain):
    out, summary = pretrain(epochs=2.0)
    with out.with_suffix(".csv").open() as file:
        found = {int(row["step"]): float(row["validation"]) for row in csv.DictReader(file) if row["validation"]}
    assert sorted(found) == [4, 8, 12, 16]
    assert summary["best_step"] == min(found, key=found.get)
    assert summary["loss"] == pytest.approx(min(found.values()), abs=1e-5)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(pretrain):
    one, two, other = (pretrain(name, seed=seed)[0] for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in FILES)
    assert (one / FILES[0]).read_bytes() != (other / FILES[0]).read_bytes()
    # What is not pretrained depends on this, and is not to train again.
    assert (one / FILES[2]).read_bytes() == (other / FILES[2]).read_bytes()


def test_without_a_length_it_is_the_first_of_those_indexed(pretrain, monkeypatch):
    met, forward = set(), Pretrainer.forward

    def watched(self, waveform, generator):
        met.add(waveform.shape[1])
        return forward(self, waveform, generator)

    monkeypatch.setattr(Pretrainer, "forward", watched)
    pretrain(segment_seconds=None)
    assert met == {2000}
    met.clear()
    pretrain("long", segment_seconds=0.5)
    assert met == {4000}


@pytest.mark.parametrize("mask_mode", ["token", "drop"])
def test_every_encoder_gets_new_random_features(pretrain, monkeypatch, mask_mode):
    drawn, redraw = [], PerformerEncoder.redraw
    monkeypatch.setattr(
        PerformerEncoder, "redraw", lambda self, *arguments: drawn.append(arguments) or redraw(self, *arguments)
    )
    pretrain(mask_mode=mask_mode)
    n_encoders = 2 if mask_mode == "drop" else 1
    assert [step for step, _ in drawn if step] == [step for step in (3, 6) for _ in range(n_encoders)]  # of 8 steps


@pytest.mark.parametrize("call", [4, 9])
def test_killed_and_run_again_it_gives_the_same_bytes(pretrain, monkeypatch, caplog, call):
    """Two batches validate the untrained network, two more every fourth step."""
    whole, _ = pretrain("whole", checkpoint_every_seconds=1e-9)
    calls, forward = itertools.count(), Pretrainer.forward

    def dies(self, *arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(Pretrainer, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain("killed", checkpoint_every_seconds=1e-9)
    monkeypatch.setattr(Pretrainer, "forward", forward)
    with caplog.at_level("INFO"):
        killed, _ = pretrain("killed", checkpoint_every_seconds=1e-9)
    assert "resumed at step" in caplog.text
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in FILES)
    assert whole.with_suffix(".csv").read_bytes() == killed.with_suffix(".csv").read_bytes()


def test_only_tracks_of_the_train_split_are_learned_from(pretrain, music, monkeypatch):
    met, batch = {True: set(), False: set()}, MomStream.batch

    def watched(self, n):
        found = batch(self, n)
        met[self._fixed].update(track for pair in found.track_ids for track in pair)
        return found

    monkeypatch.setattr(MomStream, "batch", watched)
    pretrain()
    table = pd.read_parquet(index_file(music[0], 0.25))
    split = dict(zip(table["track_id"], table["split"], strict=True))
    assert {split[track] for track in met[False]} == {"train"}
    assert {split[track] for track in met[True]} == {"validation"}


def runs_out(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 21.00 GiB.")


@pytest.mark.parametrize("where", ["statistics", "device", "validation", "training"])
def test_running_out_of_memory_is_a_result(pretrain, monkeypatch, tmp_path, where):
    calls, forward = itertools.count(), Pretrainer.forward
    last = 0 if where == "validation" else 3  # two batches validate the untrained network

    def trains(self, *arguments):
        return runs_out() if next(calls) == last else forward(self, *arguments)

    if where == "statistics":
        monkeypatch.setattr(Separator, "learn_statistics", runs_out)
    elif where == "device":
        monkeypatch.setattr(torch.nn.Module, "to", runs_out)
    else:
        monkeypatch.setattr(Pretrainer, "forward", trains)
    out, summary = pretrain()
    assert summary == {"status": "out_of_memory", "steps": 0, "mask_ratio": 0.3, "sample_rate": RATE}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(FILES[1:])
    assert json.loads((out / PRETRAINED / "config.json").read_text()) == {"model": PERFORMER, **summary}
    assert out.with_suffix(".csv").read_text() == "step,loss,gradient_norm,learning_rate,validation\n"
    assert not [path for path in (tmp_path / "data/scratch/pretrain_performer").iterdir() if path.is_dir()]


def test_other_errors_stop_the_stage(pretrain, monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Pretrainer, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pretrain()
    assert not (tmp_path / "out").exists()


def test_a_length_that_was_not_indexed_is_named(pretrain):
    with pytest.raises(ValueError, match=r"segments of 0\.75 s were not indexed"):
        pretrain(segment_seconds=0.75)
