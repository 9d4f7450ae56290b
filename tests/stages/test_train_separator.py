"""The stage train_separator, on tones: it learns, resumes to the same bytes, and takes published weights unchanged."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.mixtures.anchors import AnchorReader
from pipeline.mixtures.mixing import PairsParams
from pipeline.separators import build, load
from pipeline.separators.resunet import dropped_shapes, published_name
from pipeline.stages.train_separator import Batches, Plan, TrainParams, main, train_separator
from tests.corpora import write_anchors, write_sed

ROOT = Path(__file__).parents[2]
MODEL = {"n_fft": 256, "hop_length": 64, "channels": [4, 4, 4, 4, 4, 4]}
PLAN = Plan("resunet", MODEL)
PAIRS = PairsParams(exclude="ontology", normalize="joint", match_energy=True, min_gain=0.02, max_gain=50.0)
PARAMS = TrainParams(
    seed=0,
    steps=6,
    batch_size=2,
    segment_seconds=0.25,
    query="own",
    interferer_query=0.0,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup=[[0.0, 0.1], [2.0, 1.0]],
    decay="cosine",
    loss_weights={"l1": 1.0},
    gradient_clip=0.0,
    ema=0.0,
    precision="fp32",
    device="cpu",
    log_every_steps=2,
    checkpoint_every_seconds=60.0,
)


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    return write_anchors(tmp_path_factory.mktemp("anchors") / "train", 4)


def run(anchors, out, plan=PLAN, **changes):
    params = PARAMS.model_copy(update=changes)
    sed = write_sed(anchors.parent / "sed")
    return train_separator("tiny", anchors, sed, out, out.with_suffix(".csv"), plan=plan, params=params, pairs=PAIRS)


def trained(root):
    """The folder of a separator after a short training, whose scratch is there too: other modules train the same."""
    with contextlib.chdir(root):
        run(write_anchors(root / "anchors" / "train", 4), root / "separator")
    return root / "separator"


def test_training_lowers_the_loss_and_writes_what_evaluation_needs(anchors, tmp_path):
    config = run(anchors, tmp_path / "out", steps=60, learning_rate=1e-2, log_every_steps=10)
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    assert float(rows[-1][1]) < 0.9 * float(rows[0][1])  # measured over seeds: 0.54 to 0.67 of it
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert config["model"] == {**MODEL, "query_dim": 4, "interferer_query": False}
    build(config["architecture"], **config["model"]).load_state_dict(load_file(tmp_path / "out/weights.safetensors"))


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(anchors, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(anchors, tmp_path / name, seed=seed)
    one, two, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_averaged_weights_are_others_than_the_last_ones(anchors, tmp_path):
    run(anchors, tmp_path / "last")
    run(anchors, tmp_path / "mean", ema=0.5)
    last, mean = (load_file(tmp_path / name / "weights.safetensors") for name in ("last", "mean"))
    assert not torch.equal(last["unet.leave.weight"], mean["unet.leave.weight"])
    assert (tmp_path / "last.csv").read_bytes() == (tmp_path / "mean.csv").read_bytes()


def test_bfloat16_trains_too(anchors, tmp_path):
    run(anchors, tmp_path / "out", precision="bf16")
    assert all(t.dtype != torch.bfloat16 for t in load_file(tmp_path / "out/weights.safetensors").values())


def test_a_batch_is_a_function_of_its_number(anchors):
    one, two = (Batches(anchors, PAIRS, seed=0, batch_size=4, segment_seconds=0.25) for _ in range(2))
    two.load(7)
    batch, again = one.load(3), two.load(3)
    mixture, target, query = batch.mixture, batch.target, batch.query
    assert batch.part == again.part == slice(0, 8000)
    for a, b in zip((mixture, target, query), (again.mixture, again.target, again.query), strict=True):
        assert torch.equal(a, b)
    assert mixture.shape == target.shape == (4, 8000)
    assert query.shape == (4, 4)
    # Joint normalisation at 0 dB: the mixture peaks at one, and what is not target has the target's energy.
    torch.testing.assert_close(mixture.abs().amax(dim=1), torch.ones(4))
    torch.testing.assert_close((mixture - target).square().mean(dim=1), target.square().mean(dim=1))
    assert "clip0_" in one.describe(3)


def test_a_shorter_segment_is_cut_from_the_same_mixture(anchors):
    whole = Batches(anchors, PAIRS, seed=0, batch_size=4, segment_seconds=0.25)
    short = Batches(anchors, PAIRS, seed=0, batch_size=4, segment_seconds=0.125)
    starts = set()
    for n in range(5):
        one, other = whole.load(n), short.load(n)
        assert torch.equal(one.mixture, other.mixture)
        assert torch.equal(one.query, other.query)
        assert other.target.shape == (4, 4000)
        assert torch.equal(one.target[:, other.part], other.target)
        starts.add(other.part.start)
    assert len(starts) > 1
    with pytest.raises(ValueError, match=r"train\.segment_seconds 0\.5 is 16000 samples; the anchors .* have 8000"):
        Batches(anchors, PAIRS, seed=0, batch_size=4, segment_seconds=0.5)


def test_a_class_query_is_a_mean_of_the_targets_class_and_changes_nothing_else(anchors, monkeypatch):
    numbered = lambda _, row: np.array([row, int(row) ** 2, 1, 0], np.float32)  # noqa: E731
    monkeypatch.setattr(AnchorReader, "query", numbered)
    settings = {"seed": 0, "batch_size": 4, "segment_seconds": 0.125}
    own = Batches(anchors, PAIRS, **settings)
    classes, again = (Batches(anchors, PAIRS, **settings, query="class") for _ in range(2))
    index, differ = own.index, 0
    for n in range(6):
        one, other = own.load(n), classes.load(n)
        assert torch.equal(other.query, again.load(n).query)
        assert torch.equal(one.target, other.target)
        targets, interferers = own.stream.batch(n, 4)
        for rows, queries in ((targets, other.query), (interferers, other.interferer_query)):
            for row, query in zip(rows, queries, strict=True):
                members = torch.from_numpy(own.reader.queries(index.rows(int(index.class_index[row]))))
                subsets = itertools.chain.from_iterable(
                    itertools.combinations(range(len(members)), k) for k in range(1, len(members) + 1)
                )
                assert any(torch.allclose(members[list(some)].mean(dim=0), query) for some in subsets)
        differ += int(not torch.equal(one.query, other.query))
    assert differ


def test_the_interferers_query_is_given_in_as_many_rows_as_asked_and_changes_nothing_else(anchors):
    settings = {"seed": 0, "batch_size": 8, "segment_seconds": 0.125}
    never, half, again, always = (
        Batches(anchors, PAIRS, **settings, interferer_query=probability) for probability in (0.0, 0.5, 0.5, 1.0)
    )
    given = []
    for n in range(20):
        one, other = never.load(n), half.load(n)
        assert not one.given.any()
        assert always.load(n).given.all()
        assert torch.equal(other.given, again.load(n).given)
        for name in ("mixture", "target", "query", "interferer_query"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.part == other.part
        given += other.given.tolist()
    assert 40 < sum(given) < 120  # of 160; further off with a probability of 1e-10


def test_a_separator_trained_with_the_interferers_query_says_so_and_loads(anchors, tmp_path):
    config = run(anchors, tmp_path / "out", steps=8, interferer_query=0.5)
    assert config["model"]["interferer_query"] is True
    network = load(tmp_path / "out")
    assert network.takes_interferer
    assert network.not_given.any()  # it has learned
    assert config["n_parameters"] > run(anchors, tmp_path / "without", steps=1)["n_parameters"]


def test_a_published_checkpoint_is_converted_not_trained(anchors, tmp_path):
    arguments = {"query_dim": 4, "n_fft": MODEL["n_fft"], "channels": MODEL["channels"]}
    torch.manual_seed(0)
    ours = build("resunet", hop_length=64, **arguments).state_dict()
    state = {f"ss_model.{published_name(name)}": tensor for name, tensor in ours.items()}
    state |= {f"ss_model.{name}": torch.zeros(shape) for name, shape in dropped_shapes(**arguments).items()}
    state["ss_model.base.stft.conv_real.weight"][0, 0] = torch.hann_window(MODEL["n_fft"])
    state["query_net.base.fc1.weight"] = torch.zeros(2)
    file = tmp_path / "published.ckpt"
    torch.save({"epoch": 0, "state_dict": state}, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    config = run(anchors, tmp_path / "out", Plan("resunet", MODEL, file, sha256))
    assert config["steps"] == 0
    with pytest.raises(
        ValueError, match=r"published\.ckpt does not fit: it has n_fft .*separators\.tiny\.model\.n_fft"
    ):
        run(anchors, tmp_path / "other", Plan("resunet", {**MODEL, "n_fft": 2 * MODEL["n_fft"]}, file, sha256))
    written = load_file(tmp_path / "out/weights.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in ours.items())


PARAMS_YAML = """
pairs: {exclude: ontology, normalize: joint, match_energy: true, min_gain: 0.02, max_gain: 50.0}
train: {seed: 0, steps: 24, batch_size: 2, segment_seconds: 0.25, query: own, interferer_query: 0.5,
  optimizer: adamw, learning_rate: 3e-3,
  warmup: [[0, 1.0]], decay: none, loss_weights: {l1: 1.0},
  gradient_clip: 0.0, ema: 0.9, precision: fp32, device: cpu, log_every_steps: 4, checkpoint_every_seconds: 0.3}
separators: {tiny: {architecture: resunet, weights: null, weights_sha256: null, train: {},
  model: {n_fft: 256, hop_length: 64, channels: [4, 4, 4, 4, 4, 4],
  norm_momentum: 0.1, phase_bias: 1.0}}}
"""


def start(anchors, directory, sed=None):
    directory.mkdir(exist_ok=True)
    (directory / "params.yaml").write_text(PARAMS_YAML)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(directory)}
    command = [sys.executable, "-m", "pipeline.stages.train_separator", "tiny", "--anchors", str(anchors)]
    command += ["--sed", str(sed or write_sed(anchors.parent / "sed")), "--out", "out", "--curve", "curve.csv"]
    return subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True)


def test_networks_that_are_not_there_are_named_before_the_training(anchors, tmp_path):
    process = start(anchors, tmp_path / "run", sed=tmp_path / "nowhere")
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith(f"error: {tmp_path / 'nowhere/query'} has no weights.safetensors")
    assert not list((tmp_path / "run").rglob("checkpoint.pt"))


@pytest.mark.slow
def test_killed_and_run_again_it_gives_the_same_bytes(anchors, tmp_path):
    process = start(anchors, tmp_path / "whole")
    process.communicate()
    assert process.returncode == 0
    process = start(anchors, tmp_path / "killed")
    scratch = tmp_path / "killed" / "data" / "scratch"
    while not list(scratch.rglob("checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "out").exists()
    process = start(anchors, tmp_path / "killed")
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "resumed at step" in log
    for name in ("out/weights.safetensors", "out/config.json", "curve.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert not list(scratch.rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "learning_rate: 3e-3",
            "learning_rate: fast",
            "train.learning_rate: Input should be a valid number (got 'fast')",
        ),
        ("n_fft: 256", "n_fft: 256.5", "separators.tiny.model.n_fft: Input should be a valid integer (got 256.5)"),
        ("train: {}", "train: {steps: 0}", "separators.tiny.train.steps: Input should be greater than 0 (got 0)"),
        ("n_fft: 256, ", "", "separators.tiny.model.n_fft: Field required"),
    ],
)
def test_a_wrong_param_stops_it_with_its_dotted_name(anchors, workspace, monkeypatch, right, wrong, message):
    Path("params.yaml").write_text(PARAMS_YAML.replace(right, wrong))
    command = [
        "train_separator",
        "tiny",
        "--anchors",
        str(anchors),
        "--sed",
        str(write_sed(anchors.parent / "sed")),
        "--out",
        "out",
        "--curve",
        "curve.csv",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=re.escape(message)):
        main()
    assert not Path("out").exists()


def test_an_entry_trains_by_keys_of_its_own(anchors, workspace, monkeypatch):
    own = "train: {steps: 3, segment_seconds: 0.1, loss_weights: {rms: 1.0, spectral: 0.5}}"
    sizes = "bands: 4, width: 8, layers: 1, frame_hidden: 16, recurrent_hidden: 8, mask_hidden: 16, query_hidden: 8"
    entry = f"small: {{architecture: bandsplit, weights: null, weights_sha256: null, {own},"
    entry += f" model: {{n_fft: 128, hop_length: 64, {sizes}}}}}"
    Path("params.yaml").write_text(PARAMS_YAML.replace("separators: {", f"separators: {{{entry}, "))
    command = ["train_separator", "small", "--anchors", str(anchors), "--sed", str(write_sed(anchors.parent / "sed"))]
    command += ["--out", "out", "--curve", "curve.csv"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert json.loads(Path("out/config.json").read_text())["steps"] == 3
    header, row = Path("curve.csv").read_text().splitlines()
    assert {"rms", "spectral"} <= set(header.split(","))
    assert "l1" not in header.split(",")
    assert row.startswith("3,")
