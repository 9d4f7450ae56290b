"""Stage evaluate: on six classes of noise bands and tones, with a network of random weights and with known answers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.io import wavfile

from pipeline.core import runtime
from pipeline.core.ontology import classes
from pipeline.evaluation.metrics.bss_eval import bss_eval
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.evaluation.scores import schema, score
from pipeline.mixtures import shards
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader, write_index
from pipeline.mixtures.mixing import mix
from pipeline.separators import QuerySeparator, build
from pipeline.stages import evaluate as stage
from pipeline.stages.evaluate import EvaluateParams, average_queries, choose_examples, evaluate, separate

ROOT = Path(__file__).parents[2]
CLASSES = (3, 72, 137, 300, 420, 506)
SAMPLE_RATE, SEGMENT_SAMPLES, QUERY_DIM, ANCHORS_PER_CLASS, N_PAIRS = 32000, 4096, 6, 3, 24
METRICS = {"sdr": {}, "si_sdr": {}, "bss_eval": {"filter_samples": 32}}
PARAMS = EvaluateParams(batch_size=3, pairs_per_part=4, metrics=METRICS, n_examples=2, device="cpu")
MODEL = {"query_dim": QUERY_DIM, "n_fft": 256, "hop_length": 64, "channels": [2, 2, 2, 2, 2, 2]}


def anchor(class_index, number):
    return f"clip{class_index}_{number}-{class_index:03d}"


def write_anchors(directory, seed):
    """Anchors of every class in the format of mine_anchors: a tone of the class' pitch, in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(SEGMENT_SAMPLES) / SAMPLE_RATE
    samples, rows = [], []
    for class_index in CLASSES:
        for number in range(ANCHORS_PER_CLASS):
            tone = np.sin(2 * np.pi * (200 + 10 * class_index) * t + rng.uniform(0, 6))
            waveform = rng.uniform(0.1, 0.3) * (tone + 0.3 * rng.standard_normal(SEGMENT_SAMPLES))
            query = rng.standard_normal(QUERY_DIM).astype(np.float32)
            key = anchor(class_index, number)
            pcm = (waveform.clip(-1, 1) * 32767).astype(np.int16)
            samples.append((key, {"wav": shards.encode_wav(pcm, SAMPLE_RATE), "npy": shards.encode_array(query)}))
            mid = classes()[class_index].mid
            rows.append(
                {
                    **{"anchor": key, "clip_id": key[:-4], "class_index": class_index, "mid": mid, "labels": mid},
                    "recording": key[:-4],
                    **{"onset_seconds": 0.0, "score": 1.0, "purity": 1.0, "sha256": ""},
                    **{"energy": float(np.mean(waveform**2)), "peak": float(abs(waveform).max())},
                }
            )
    directory.mkdir(parents=True)
    members = shards.write_shard(directory / "anchors-00000.tar", samples)
    place = {(member.key, member.ext): member for member in members}
    for row in rows:
        wav, query = place[row["anchor"], "wav"], place[row["anchor"], "npy"]
        row |= {"shard": "anchors-00000.tar", "wav_offset": wav.offset, "wav_size": wav.size}
        row |= {"query_offset": query.offset, "query_size": query.size}
    sizes = {"sample_rate": SAMPLE_RATE, "segment_samples": SEGMENT_SAMPLES, "query_dim": QUERY_DIM}
    write_index(directory, rows, **sizes, empty_classes=[])
    shards.write_index(directory)


def write_pairs(directory, class_indices):
    """Every class in turn against the next one; the first class' first anchor comes twice as often as its others."""
    rows = []
    for pair in range(N_PAIRS):
        target, interferer = (class_indices[(pair + i) % len(class_indices)] for i in (0, 1))
        number = pair // len(class_indices) % ANCHORS_PER_CLASS
        rows.append(
            {
                "pair": pair,
                "class_index": target,
                "mid": classes()[target].mid,
                "target": anchor(target, number),
                "target_clip": anchor(target, number)[:-4],
                "target_recording": f"recording of {anchor(target, number)[:-4]}",
                "interferer_class_index": interferer,
                "interferer_mid": classes()[interferer].mid,
                "interferer": anchor(interferer, (number + 1) % ANCHORS_PER_CLASS),
                "interferer_clip": anchor(interferer, (number + 1) % ANCHORS_PER_CLASS)[:-4],
                "interferer_recording": f"recording of {anchor(interferer, (number + 1) % ANCHORS_PER_CLASS)[:-4]}",
                "gain": 0.5 + pair / N_PAIRS,
            }
        )
    directory.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(directory / "pairs.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """anchors/, pairs/ and separator/ as the earlier stages leave them. The last class has no train pairs."""
    root = tmp_path_factory.mktemp("world")
    for seed, split in enumerate(("train", "eval")):
        write_anchors(root / "anchors" / split, seed)
        write_pairs(root / "pairs" / split, CLASSES[:-1] if split == "train" else CLASSES)
    torch.manual_seed(0)
    (root / "separator").mkdir()
    save_weights(MODEL, root / "separator")
    write_config(MODEL, root / "separator")
    return root


def write_config(model, directory):
    config = {"architecture": "resunet", "model": model, "segment_samples": SEGMENT_SAMPLES}
    runtime.write_json(directory / "config.json", config)


def save_weights(model, directory):
    weights = {name: tensor.contiguous() for name, tensor in build("resunet", **model).state_dict().items()}
    save_file(weights, directory / "weights.safetensors")


def open_anchors(directory):
    return AnchorReader(directory, AnchorIndex.load(directory))


def run(world, out, params=PARAMS, separator=None):
    return evaluate(
        "tiny", separator or world / "separator", world / "pairs", world / "anchors", out, params=params,
        normalize="joint",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    """Output directory and summary of one run."""
    out = tmp_path_factory.mktemp("result") / "scores"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DVC_ROOT", str(out.parent))
        return out, run(world, out)


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_scores_are_those_of_each_pair_worked_out_alone(world, result):
    scores = pd.read_parquet(result[0] / "scores.parquet").set_index(["pair", "query"])
    reader = open_anchors(world / "anchors" / "eval")
    separator = build("resunet", **MODEL).eval()
    separator.load_state_dict(load_file(world / "separator" / "weights.safetensors"))
    pairs = pd.read_parquet(world / "pairs" / "eval" / "pairs.parquet")
    for role in ("target_recording", "interferer_recording"):
        assert scores.xs("oracle", level="query")[role].tolist() == pairs[role].tolist()
    for pair in pairs.iloc[[0, 7, 23]].itertuples():
        mixture, target, interferer = mix(
            torch.from_numpy(reader.waveform(reader.index.row(pair.target)))[None],
            torch.from_numpy(reader.waveform(reader.index.row(pair.interferer)))[None],
            torch.tensor([pair.gain], dtype=torch.float32),
            "joint",
        )
        with torch.inference_mode():
            estimate = separator(mixture, torch.from_numpy(reader.query(reader.index.row(pair.target)))[None])
        references = torch.stack([target, interferer], 1)
        bss = bss_eval(torch.stack([estimate, mixture], 1), references, filter_samples=32)
        found = scores.loc[(pair.pair, "oracle")]
        expected = {
            "sdr": sdr(estimate, target),
            "sdr_mixture": sdr(mixture, target),
            "sdr_half": sdr(mixture / 2, target),
            "sdri": sdr(estimate, target) - sdr(mixture, target),
            "si_sdr": si_sdr(estimate, target),
            "si_sdr_mixture": si_sdr(mixture, target),
            "si_sdri": si_sdr(estimate, target) - si_sdr(mixture, target),
            "bss_sdr": bss.sdr[:, 0],
            "bss_sir": bss.sir[:, 0],
            "bss_sar": bss.sar[:, 0],
            "bss_sdr_mixture": bss.sdr[:, 1],
        }
        assert found[list(expected)].tolist() == pytest.approx([v.item() for v in expected.values()], abs=1e-3)


def test_rows_are_sorted_and_name_their_pair(world, result):
    scores = pd.read_parquet(result[0] / "scores.parquet")
    pairs = pd.read_parquet(world / "pairs" / "eval" / "pairs.parquet")
    assert scores.columns.tolist() == schema(PARAMS.build_metrics()).names
    assert scores["query"].tolist() == ["average", "oracle"] * N_PAIRS
    for key in ("pair", "class_index", "mid", "target_clip", "interferer_class_index"):
        assert scores[key].tolist() == pairs[key].repeat(2).tolist()


def test_the_two_queries_give_two_estimates(result):
    scores = pd.read_parquet(result[0] / "scores.parquet").dropna()
    by_query = [scores[scores["query"] == query] for query in ("average", "oracle")]
    merged = by_query[0].merge(by_query[1], on="pair")
    assert merged["sdr_mixture_x"].tolist() == merged["sdr_mixture_y"].tolist()
    assert (merged["sdr_x"] != merged["sdr_y"]).all()


def test_the_average_query_counts_a_target_once_per_pair(world):
    reader = open_anchors(world / "anchors" / "train")
    pairs = stage._read_pairs(world / "pairs" / "train" / "pairs.parquet", reader)
    averages = average_queries(pairs, reader)
    assert sorted(averages) == list(CLASSES[:-1])
    for class_index, average in averages.items():
        rows = [p for p in pairs.to_pylist() if p["class_index"] == class_index]
        assert len(rows) > len({row["target"] for row in rows})  # repeats
        queries = reader.queries(reader.index.row(row["target"]) for row in rows)
        np.testing.assert_allclose(average, np.mean(queries, axis=0), rtol=1e-6)


def test_a_class_without_train_pairs_has_no_average_scores_and_is_named(result):
    out, summary = result
    scores = pd.read_parquet(out / "scores.parquet")
    lost = (scores["class_index"] == CLASSES[-1]) & (scores["query"] == "average")
    assert summary["classes_without_average_query"] == [classes()[CLASSES[-1]].mid]
    assert scores.loc[lost, ["sdr", "sdri", "si_sdr", "si_sdri", "bss_sdr", "bss_sir", "bss_sar"]].isna().all(axis=None)
    assert scores.loc[lost, ["sdr_mixture", "si_sdr_mixture", "bss_sdr_mixture"]].notna().all(axis=None)
    assert scores[~lost].notna().all(axis=None)
    assert summary["n_pairs"] == N_PAIRS
    assert summary["n_classes"] == len(CLASSES)
    assert set(summary["average"]["n_nan"].values()) == {lost.sum()}
    assert set(summary["oracle"]["n_nan"].values()) == {0}
    of_average = scores[scores["query"] == "average"]["sdri"]
    assert summary["average"]["sdri_mean"] == pytest.approx(of_average.mean(), abs=1e-4)
    assert summary["average"]["sdri_median"] == pytest.approx(of_average.median(), abs=1e-4)


def test_examples_are_the_sounds_that_were_scored(result):
    out, _ = result
    scores = pd.read_parquet(out / "scores.parquet").set_index(["pair", "query"])
    examples = json.loads((out / "examples" / "examples.json").read_text())
    assert [example["class_index"] for example in examples] == [CLASSES[0], CLASSES[2]]
    for example in examples:
        sounds = {}
        for sound, file in example["files"].items():
            rate, waveform = wavfile.read(out / "examples" / file)
            assert (rate, waveform.dtype, waveform.shape) == (SAMPLE_RATE, np.float32, (SEGMENT_SAMPLES,))
            sounds[sound] = torch.from_numpy(waveform)
        assert example["class_name"] == classes()[example["class_index"]].name
        for query in ("average", "oracle"):
            found = sdr(sounds[query], sounds["target"]).item()
            assert found == pytest.approx(scores.loc[(example["pair"], query), "sdr"], abs=1e-6)
            assert found == pytest.approx(example[query]["sdr"], abs=1e-4)
        assert example["sdr_mixture"] == pytest.approx(sdr(sounds["mixture"], sounds["target"]).item(), abs=1e-4)


def test_examples_are_chosen_without_looking_at_results():
    class_indices, pairs = [5, 5, 1, 9, 9, 7, 1], [0, 1, 2, 3, 4, 5, 6]
    assert choose_examples(class_indices, pairs, 2) == [2, 5]
    assert choose_examples(class_indices, pairs, 9) == [2, 0, 5, 3]
    assert choose_examples(class_indices, pairs, 0) == []


def test_a_second_run_gives_the_same_bytes(world, result, tmp_path):
    assert run(world, tmp_path / "again") == result[1]
    assert content(tmp_path / "again") == content(result[0])


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_none(world, result, tmp_path, monkeypatch):
    monkeypatch.setenv("USS_WORKERS", "2")
    assert run(world, tmp_path / "parallel") == result[1]
    assert content(tmp_path / "parallel") == content(result[0])


def test_without_bss_eval_its_columns_are_not_there(world, tmp_path):
    params = PARAMS.model_copy(update={"metrics": {"sdr": {}, "si_sdr": {}}, "n_examples": 0})
    summary = run(world, tmp_path / "scores", params)
    scores = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    assert not [name for name in scores if "bss" in name]
    assert sorted(summary["oracle"]["n_nan"]) == ["sdr", "sdri", "si_sdr", "si_sdri"]
    assert json.loads((tmp_path / "scores" / "examples" / "examples.json").read_text()) == []


def command(world, cwd):
    return [
        *(sys.executable, "-m", "pipeline.stages.evaluate", "tiny", "--separator", world / "separator"),
        *("--pairs", world / "pairs", "--anchors", world / "anchors"),
        *("--out", cwd / "data" / "scores", "--summary", cwd / "reports" / "evaluate_tiny.json"),
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(world, result, tmp_path):
    evaluate_section = json.dumps(PARAMS.model_dump())
    pairs_section = '{"exclude": none, "normalize": joint, "match_energy": true, "min_gain": 0.02, "max_gain": 50.0}'
    (tmp_path / "params.yaml").write_text(f"evaluate: {evaluate_section}\npairs: {pairs_section}\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path), "USS_WORKERS": "0"}
    process = subprocess.Popen(command(world, tmp_path), cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("data/scratch/evaluate@tiny/*/parts/part-*/done.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "data" / "scores").exists()

    again = subprocess.run(command(world, tmp_path), cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"parts are finished already" in again.stderr
    assert content(tmp_path / "data" / "scores") == content(result[0])
    assert json.loads((tmp_path / "reports" / "evaluate_tiny.json").read_text()) == result[1]
    assert not list(tmp_path.glob("data/scratch/evaluate@tiny/*/parts"))


def broken_separator(world, directory, **config):
    directory.mkdir()
    weights = load_file(world / "separator" / "weights.safetensors")
    save_file(weights, directory / "weights.safetensors")
    write_config({**MODEL, **config}, directory)
    return directory, weights


def test_a_non_finite_estimate_stops_the_stage_naming_the_pairs(world, tmp_path):
    directory, weights = broken_separator(world, tmp_path / "nan")
    weights["unet.leave.bias"].fill_(torch.nan)
    save_file(weights, directory / "weights.safetensors")
    with pytest.raises(ValueError, match="estimates of pairs 0, 1, 2 under the average query"):
        run(world, tmp_path / "out", separator=directory)
    assert not (tmp_path / "out").exists()


def test_only_the_pairs_at_fault_are_named():
    class Spiteful(QuerySeparator):
        def forward(self, mixture, query):
            return mixture / query[:, :1]

    mixture, query, other = torch.ones(3, 8), torch.tensor([[1.0], [0.0], [2.0]]), torch.ones(3, 1)
    separator, pairs = Spiteful(query_dim=1), [10, 11, 12]
    with pytest.raises(ValueError, match="pairs 11 under the oracle query"):
        separate(separator, mixture, torch.ones(3, 1), query, other, pairs)
    estimates = separate(separator, mixture, torch.tensor([[1.0], [torch.nan], [2.0]]), query + 1, other, pairs)
    assert estimates[1, 0].isnan().all()
    assert estimates[[0, 2]].isfinite().all()
    assert estimates[0, 0, 0] == 1
    assert estimates[2, 1, 0] == 1 / 3


def test_a_separator_that_takes_the_interferers_query_has_rows_with_it(world, tmp_path):
    torch.manual_seed(1)
    model = {**MODEL, "interferer_query": True}
    separator = build("resunet", **model).eval()
    torch.nn.init.normal_(separator.not_given)
    (tmp_path / "separator").mkdir()
    save_file(
        {n: t.contiguous() for n, t in separator.state_dict().items()}, tmp_path / "separator/weights.safetensors"
    )
    write_config(model, tmp_path / "separator")
    summary = run(world, tmp_path / "scores", separator=tmp_path / "separator")
    scores = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    assert scores["query"].tolist() == ["average", "oracle", "average+interferer"] * N_PAIRS
    assert summary["n_pairs"] == N_PAIRS
    told = scores[scores["query"] == "average+interferer"].set_index("pair")
    unknown = (told["class_index"] == CLASSES[-1]) | (told["interferer_class_index"] == CLASSES[-1])
    assert told["sdri"].isna().tolist() == unknown.tolist()  # that class has no train pairs, hence no average
    assert summary["average+interferer"]["n_nan"]["sdri"] == unknown.sum()
    pair = pd.read_parquet(world / "pairs" / "eval" / "pairs.parquet").iloc[0]
    reader, train = (open_anchors(world / "anchors" / split) for split in ("eval", "train"))
    averages = average_queries(stage._read_pairs(world / "pairs" / "train" / "pairs.parquet", train), train)
    anchors = [torch.from_numpy(reader.waveform(reader.index.row(pair[r])))[None] for r in ("target", "interferer")]
    mixture, target, _ = mix(*anchors, torch.tensor([pair["gain"]], dtype=torch.float32), "joint")
    query, other = (torch.from_numpy(averages[pair[c]])[None] for c in ("class_index", "interferer_class_index"))
    with torch.inference_mode():
        estimate = separator(mixture, separator.joint_query(query, other))
    assert told.loc[0, "sdr"] == pytest.approx(sdr(estimate, target).item(), abs=1e-3)
    example = json.loads((tmp_path / "scores" / "examples" / "examples.json").read_text())[0]
    assert (tmp_path / "scores" / "examples" / example["files"]["average+interferer"]).is_file()


def test_weights_of_another_model_are_refused(world, tmp_path):
    directory, _ = broken_separator(world, tmp_path / "other", channels=[2, 2, 2, 2, 2, 4])
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(world, tmp_path / "out", separator=directory)


def test_queries_of_another_size_are_refused(world, tmp_path):
    directory, _ = broken_separator(world, tmp_path / "other")
    torch.manual_seed(0)
    model = {**MODEL, "query_dim": 7}
    save_weights(model, directory)
    write_config(model, directory)
    with pytest.raises(ValueError, match=r"takes queries of 7 numbers, and those of .*train have 6"):
        run(world, tmp_path / "out", separator=directory)


def test_pairs_of_other_anchors_are_refused(world, tmp_path):
    pairs = pd.read_parquet(world / "pairs" / "eval" / "pairs.parquet")
    reader = open_anchors(world / "anchors" / "eval")
    pairs.loc[5, "interferer"] = "nobody-003"
    pairs.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="names 'nobody-003' as interferer"):
        stage._read_pairs(tmp_path / "pairs.parquet", reader)
    pairs.loc[5, "pair"] = 4
    pairs.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="names one twice"):
        stage._read_pairs(tmp_path / "pairs.parquet", reader)


def test_returning_the_mixture_improves_nothing():
    mixture = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    target = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    found = score(mixture[:, None], mixture, target, mixture - target, PARAMS.build_metrics())
    assert found["sdri"].tolist() == found["si_sdri"].tolist() == [[0.0], [0.0]]
    assert found["bss_sdr"].tolist() == found["bss_sdr_mixture"].tolist()
    assert all(math.isfinite(value) for values in found.values() for value in values.flat)
