"""Stage evaluate_mixit, on songs and anchors and with random weights: its numbers are those worked out anew."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import wavfile

from pipeline.core import devices, runtime
from pipeline.evaluation.masks import mask_overlap
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mixing import mix
from pipeline.nn.losses import best_assignment, mixit_loss, remix
from pipeline.separators import build_blind, load_blind
from pipeline.stages import evaluate_mixit as stage
from pipeline.stages.evaluate_mixit import EvaluateMixitParams, batches, evaluate_mixit
from pipeline.training import mixit
from pipeline.training.mixit import anchor_streams, music_streams, seed_of
from tests.corpora import write_sounds
from tests.tiny_mixit import MIXIT, MODELS, RATE, write_music

CLASSES = (3, 72, 137, 300, 420, 506)
PARAMS = EvaluateMixitParams(
    n_moms=7,
    n_mixtures=8,
    max_stems=3,
    batch_size=3,
    pairs_per_part=4,
    bss=True,
    bss_filter_samples=16,
    n_examples=2,
    device="cpu",
)
N_PAIRS = 10


def write_separator(directory, architecture, data, **changes):
    """A trained entry, but for the training."""
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    separator = build_blind(architecture, sample_rate=RATE, **MODELS[architecture])
    # Masks that differ: those of a new network are all alike.
    for parameter in separator.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_file({name: t.contiguous() for name, t in separator.state_dict().items()}, directory / "weights.safetensors")
    config = {
        **{"architecture": architecture, "model": MODELS[architecture], "data": data, "sample_rate": RATE},
        **{"mixtures": "whole", "segment_seconds": [0.25], "pretrained": False, "diversity": 0.1, "sparsity": 0.0},
        **{"sparsity_form": "report", "n_sources": 4, "n_parameters": 1234, "status": "ok", "steps": 12},
        "best_step": 8,
    }
    runtime.write_json(directory / "config.json", config | changes)
    return directory


def write_pairs(directory):
    """Four classes in turn against the next one, of clips cNxI."""
    rows = []
    for pair in range(N_PAIRS):
        target, interferer = CLASSES[pair % 4], CLASSES[(pair + 1) % 4]
        rows.append(
            {
                "pair": pair,
                "class_index": target,
                "mid": f"/m/{target}",
                "target": f"c{target}x{pair % 3}-{target:03d}",
                "target_clip": f"c{target}x{pair % 3}",
                "target_recording": f"recording of c{target}x{pair % 3}",
                "interferer_recording": f"recording of c{interferer}x{pair % 2}",
                "interferer": f"c{interferer}x{pair % 2}-{interferer:03d}",
                "gain": 0.5 + pair / N_PAIRS,
            }
        )
    directory.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(directory / "pairs.parquet")
    return directory / "pairs.parquet"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the two kinds of entries are tested on, and an entry of each."""
    root = tmp_path_factory.mktemp("world")
    index, music = write_music(root)
    sounds = [(f"c{i}x{number}", i, [i]) for i in CLASSES for number in range(4)]
    anchors, pairs = write_sounds(root / "anchors" / "eval", sounds), write_pairs(root / "pairs" / "eval")
    tests = {
        "music": stage.Test("music", index, music, MIXIT, None),
        "clips": stage.Test("clips", anchors, None, MIXIT, stage.EvalPairs(pairs, "joint")),
    }
    separators = {
        "music": write_separator(root / "conv", "conv_tasnet", "music"),
        "clips": write_separator(root / "performer", "performer", "clips"),
    }
    return tests, separators


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """Directory and summary of a run on either."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for data in ("music", "clips"):
            out = tmp_path_factory.mktemp("result") / "scores"
            monkeypatch.setenv("DVC_ROOT", str(out.parent))
            found[data] = out, run(world, data, out)
    return found


def run(world, data, out, params=PARAMS, separator=None):
    tests, separators = world
    return evaluate_mixit("tiny", separator or separators[data], out, test=tests[data], params=params)


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def opened(world, data):
    """The test data as streams, and the separator, by other code than the stage's."""
    test, separator = world[0][data], load_blind(world[1][data])

    def streams(purpose, random_subsets=True):
        shared = {"seconds": [0.25], "seed": seed_of(MIXIT.seed, purpose), "batch_size": 1}
        shared["max_stems"] = 3 if purpose == mixit.SINGLE else 2
        shared["snr_range"] = MIXIT.mom_snr_range
        if data == "clips":
            return anchor_streams(test.source, "all", random_subsets=True, n_items=None, **shared).moms[0]
        shared |= {"mixtures": "subsets", "random_subsets": random_subsets, "fixed": True}
        return music_streams(test.source, "test", test.music, **shared).moms[0]

    return separator, streams


@pytest.mark.parametrize("data", ["music", "clips"])
def test_the_summary_has_every_number(results, data):
    _, summary = results[data]
    assert {key: summary[key] for key in ("status", "steps", "segment_seconds", "sample_rate", "n_sources")} == {
        **{"status": "ok", "steps": 12, "segment_seconds": 0.25},
        **{"sample_rate": RATE, "n_sources": 4},
    }
    assert summary["data"] == data
    assert (summary["diversity"], summary["n_parameters"]) == (0.1, 1234)
    assert set(summary["moms"]) == {
        *("n", "snr", "si_snr", "do_nothing_snr", "do_nothing_si_snr", "snr_above_do_nothing")
    }
    assert set(summary["masks"]) == {"overlap", "ne_mask", "ne_energy"}
    assert set(summary["stems"]) == {"n", "n_undefined", "si_snri", "si_snr", "sdr", "sir", "sar"}
    assert (summary["pairs"] is None) == (data == "music")
    numbers = [summary["moms"]["snr"], summary["masks"]["overlap"], summary["stems"]["si_snri"]]
    if data == "clips":
        assert (summary["pairs"]["n"], summary["pairs"]["n_classes"]) == (N_PAIRS, 4)
        numbers += [summary["pairs"][name] for name in summary["pairs"] if not name.startswith("n")]
    assert np.isfinite(numbers).all()
    assert (summary["moms"]["n"], summary["stems"]["n_undefined"]) == (7, 0)
    assert len(summary["examples"]) == 2
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("data", ["music", "clips"])
def test_scores_of_mixtures_of_mixtures_are_those_of_each_worked_out_alone(world, results, data):
    out, summary = results[data]
    table = pd.read_parquet(out / "moms.parquet")
    assert len(table) == PARAMS.n_moms
    separator, streams = opened(world, data)
    for item in (0, 4, 6):
        batch = streams(mixit.TEST).batch(item)
        mixtures = torch.from_numpy(batch.mixtures)
        with torch.inference_mode():
            estimates, masks = separator.separate(mixtures.sum(dim=1))
        found = table.iloc[item]
        assert found["source"] == batch.track_ids[0][0]
        assert (found["target_recording"], found["interferer_recording"]) == batch.recordings[0]
        expected = {
            "snr": -mixit_loss(estimates, mixtures, max_snr_db=30.0).loss,
            "do_nothing_snr": -mixit_loss(mixtures.sum(dim=1, keepdim=True).expand(1, 4, -1) / 4, mixtures).loss,
            "overlap": mask_overlap(masks),
        }
        assert found[list(expected)].tolist() == pytest.approx([v.item() for v in expected.values()], abs=1e-3)
    assert (table["snr_above_do_nothing"] - (table["snr"] - table["do_nothing_snr"])).abs().max() < 1e-6
    for name in ("snr", "si_snr", "snr_above_do_nothing"):
        assert summary["moms"][name] == pytest.approx(table[name].mean(), abs=1e-3)
    assert summary["masks"]["ne_energy"] == pytest.approx(table["ne_energy"].mean(), abs=1e-3)


@pytest.mark.parametrize("data", ["music", "clips"])
def test_scores_of_stems_are_those_of_each_mixture_worked_out_alone(world, results, data):
    out, summary = results[data]
    table = pd.read_parquet(out / "mixtures.parquet")
    separator, streams = opened(world, data)
    singles = [streams(mixit.SINGLE, random_subsets=False).batch(item) for item in range(PARAMS.n_mixtures)]
    known = [batch for batch in singles if batch.n_stems[0, 0] >= 2]
    assert len(table) == len(known) == summary["stems"]["n"] > 1
    assert (len(known) == PARAMS.n_mixtures) == (data == "music")  # all stems sound in the songs
    for row, batch in zip(table.itertuples(), known, strict=True):
        count = int(batch.n_stems[0, 0])
        stems = torch.from_numpy(batch.stems[:, 0, :count])
        mixture = stems.sum(dim=1)
        with torch.inference_mode():
            estimates = separator(mixture)
        assignment = best_assignment(estimates, stems, objective="si_snr", max_snr_db=100.0)
        gain = si_sdr(remix(estimates, assignment, count), stems) - si_sdr(mixture[:, None].expand_as(stems), stems)
        assert (row.source, row.n_stems) == (batch.track_ids[0][0], count)
        assert row.target_recording == batch.recordings[0][0]
        assert row.si_snri == pytest.approx(gain.mean().item(), abs=1e-3)
    assert summary["stems"]["si_snri"] == pytest.approx(table["si_snri"].mean(), abs=1e-3)
    assert table[["sdr", "sir", "sar"]].notna().all(axis=None)


def test_pairs_are_scored_by_the_best_assignment_of_outputs(world, results):
    out, summary = results["clips"]
    table = pd.read_parquet(out / "pairs.parquet")
    assert table["pair"].tolist() == list(range(N_PAIRS))
    test, separator = world[0]["clips"], opened(world, "clips")[0]
    reader = AnchorReader(test.source, AnchorIndex.load(test.source))
    for pair, found in zip(pd.read_parquet(test.pairs.file).itertuples(), table.itertuples(), strict=True):
        mixture, target, interferer = mix(
            *(torch.from_numpy(reader.waveform(reader.index.row(key)))[None] for key in (pair.target, pair.interferer)),
            torch.tensor([pair.gain], dtype=torch.float32),
            "joint",
        )
        with torch.inference_mode():
            estimates = separator(mixture)
        # Of all sixteen ways to give four outputs to two, the one with the highest SNRs, which count up to 30 dB.
        best = None
        for code in range(16):
            output = sum((estimates[:, n] for n in range(4) if code >> n & 1), torch.zeros_like(mixture))
            pairs = ((target, output), (interferer, estimates.sum(dim=1) - output))
            errors = [(reference - y).square().sum() / reference.square().sum() for reference, y in pairs]
            loss = sum(torch.log10(error + 1e-3).item() for error in errors)
            if best is None or loss < best[0]:
                best = loss, output
        expected = sdr(best[1], target) - sdr(mixture, target)
        assert found.sdri == pytest.approx(expected.item(), abs=1e-3)
        of_pair = ("class_index", "target_clip", "target_recording", "interferer_recording")
        assert [getattr(found, name) for name in of_pair] == [getattr(pair, name) for name in of_pair]
    medians = table.groupby("class_index")["sdri"].median()
    assert summary["pairs"]["sdri_class_median_mean"] == pytest.approx(medians.mean(), abs=1e-3)
    means = table.groupby("class_index")["sdri"].mean()
    assert summary["pairs"]["sdri_class_mean_mean"] == pytest.approx(means.mean(), abs=1e-3)


@pytest.mark.parametrize("data", ["music", "clips"])
def test_examples_are_the_first_mixtures_with_all_outputs(world, results, data):
    out, summary = results[data]
    separator, streams = opened(world, data)
    singles = [streams(mixit.SINGLE, random_subsets=False).batch(item) for item in range(PARAMS.n_mixtures)]
    known = [batch for batch in singles if batch.n_stems[0, 0] >= 2]
    assert [example["name"] for example in summary["examples"]] == ["0", "1"]
    assert len(content(out / "examples")) == 2 * 5
    for example, batch in zip(summary["examples"], known, strict=False):
        sounds = {}
        for what, file in example["files"].items():
            rate, sounds[what] = wavfile.read(out / "examples" / file)
            assert (rate, sounds[what].dtype, sounds[what].shape) == (RATE, np.float32, (2000,))
        assert list(sounds) == ["mixture", "output-0", "output-1", "output-2", "output-3"]
        mixture = torch.from_numpy(batch.stems[0, 0].sum(axis=0))
        np.testing.assert_allclose(sounds["mixture"], mixture, atol=1e-6)
        with torch.inference_mode():
            estimates = separator(mixture[None])[0].numpy()
        for n in range(4):
            np.testing.assert_allclose(sounds[f"output-{n}"], estimates[n], atol=1e-5)
            level = 10 * np.log10(np.mean(estimates[n].astype(np.float64) ** 2) + 1e-12)
            assert example["outputs_db"][n] == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("data", ["music", "clips"])
def test_a_second_run_gives_the_same_bytes(world, results, tmp_path, data):
    out, summary = results[data]
    assert run(world, data, tmp_path / "again") == summary
    assert content(tmp_path / "again") == content(out)


def test_a_run_that_died_over_the_pairs_goes_on_with_the_same_bytes(world, results, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    score, done = stage.pair_scores, []

    def dies(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return score(*arguments)

    monkeypatch.setattr(stage, "pair_scores", dies)
    with pytest.raises(KeyboardInterrupt):
        run(world, "clips", tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    done.clear()
    monkeypatch.setattr(stage, "pair_scores", lambda *arguments: done.append(arguments) or score(*arguments))
    assert run(world, "clips", tmp_path / "scores") == results["clips"][1]
    assert content(tmp_path / "scores") == content(results["clips"][0])
    assert sum(len(estimates) for estimates, _, _ in done) == N_PAIRS - 4  # the first part was there


def test_without_bss_its_means_are_none_and_without_mixtures_there_are_no_stems(world, tmp_path):
    plain = PARAMS.model_copy(update={"bss": False, "n_examples": 0})
    summary = run(world, "music", tmp_path / "plain", plain)
    assert [summary["stems"][name] for name in ("sdr", "sir", "sar")] == [None] * 3
    assert summary["stems"]["si_snri"] is not None
    assert summary["examples"] == []
    summary = run(world, "music", tmp_path / "none", plain.model_copy(update={"n_mixtures": 0}))
    assert summary["stems"] is None
    assert len(pd.read_parquet(tmp_path / "none" / "mixtures.parquet")) == 0


def test_every_length_is_tested_and_no_more_than_there_is(world, tmp_path):
    both = write_separator(tmp_path / "both", "conv_tasnet", "music", segment_seconds=[0.25, 0.5])
    params = PARAMS.model_copy(update={"n_moms": 1000, "bss": False})
    summary = run(world, "music", tmp_path / "scores", params, both)
    assert (summary["segment_seconds"], summary["trained_seconds"]) == (0.5, [0.25, 0.5])
    assert summary["moms"]["n"] == 2 * 4  # two tracks of 2 s
    rate, mixture = wavfile.read(tmp_path / "scores" / "examples" / "0-mixture.wav")
    assert (rate, len(mixture)) == (RATE, 4000)
    # The shorter one as it would be alone, but for the sounds, which are of the longest.
    single = write_separator(tmp_path / "single", "conv_tasnet", "music", segment_seconds=[0.25])
    alone = run(world, "music", tmp_path / "alone", params, single)
    (shorter,) = summary["shorter"]
    assert (shorter["status"], shorter["segment_seconds"], shorter["moms"]["n"]) == ("ok", 0.25, 2 * 8)
    assert {key: shorter[key] for key in ("moms", "stems", "masks")} == {
        key: alone[key] for key in ("moms", "stems", "masks")
    }
    for table in ("moms.parquet", "mixtures.parquet"):
        found = pd.read_parquet(tmp_path / "scores" / "0.25s" / table)
        pd.testing.assert_frame_equal(found, pd.read_parquet(tmp_path / "alone" / table))


def test_memory_that_gives_out_at_one_length_costs_that_length(world, tmp_path, monkeypatch):
    both = write_separator(tmp_path / "both", "conv_tasnet", "music", segment_seconds=[0.25, 0.5])
    score = stage.score_moms

    def runs_out(separator, test, seconds, *arguments):
        if seconds == 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(separator, test, seconds, *arguments)

    monkeypatch.setattr(stage, "score_moms", runs_out)
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (0, 10**12))
    summary = run(world, "music", tmp_path / "scores", PARAMS, both)
    assert summary["status"] == "out_of_memory"
    assert summary["shorter"][0]["status"] == "ok"
    assert not (tmp_path / "scores" / "moms.parquet").exists()
    assert (tmp_path / "scores" / "0.25s" / "moms.parquet").exists()


@pytest.mark.parametrize("where", ["score_moms", "pair_scores"])
def test_running_out_of_memory_is_a_result(world, tmp_path, monkeypatch, where):
    def runs_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(stage, where, runs_out)
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (0, 10**12))
    summary = run(world, "clips", tmp_path / "scores")
    assert (summary["status"], summary["steps"], summary["n_parameters"]) == ("out_of_memory", 12, 1234)
    assert not {"moms", "stems", "masks", "pairs", "examples"} & set(summary)
    assert not content(tmp_path / "scores")
    assert not list((tmp_path / "data" / "scratch").rglob("part-*"))


def test_other_errors_stop_the_stage(world, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(stage, "score_moms", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(world, "music", tmp_path / "scores")


def test_estimates_come_from_cudnn_without_tf32(world):
    separator, cudnn, met = load_blind(world[1]["music"]), torch.backends.cudnn, []
    plain = separator.separate
    separator.separate = lambda mixture: met.append((cudnn.enabled, cudnn.allow_tf32)) or plain(mixture)
    before = cudnn.enabled, cudnn.allow_tf32
    stage.separate(separator, torch.zeros(1, 2000))
    assert met == [(True, False)]
    assert (cudnn.enabled, cudnn.allow_tf32) == before


def test_every_entry_of_a_length_meets_the_same_mixtures(world):
    for test in world[0].values():
        for purpose in (mixit.TEST, mixit.SINGLE):
            some, all_at_once = (list(batches(test, 0.25, purpose, 6, size, 2)) for size in (2, 6))
            np.testing.assert_array_equal(np.concatenate([batch.mixtures for batch in some]), all_at_once[0].mixtures)


@pytest.mark.parametrize("data", ["music", "clips"])
def test_a_separator_of_another_sample_rate_is_refused(world, tmp_path, data):
    other = write_separator(tmp_path / "other", "performer", data, sample_rate=16000)
    with pytest.raises(ValueError, match="tiny was trained at 16000 Hz, and the test data are read at 8000 Hz"):
        run(world, data, tmp_path / "scores", separator=other)


def test_weights_of_another_size_and_estimates_that_are_not_finite_stop_the_stage(world, tmp_path):
    wide = MODELS["conv_tasnet"] | {"bottleneck": 20}
    other = write_separator(tmp_path / "other", "conv_tasnet", "music", model=wide)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(world, "music", tmp_path / "scores", separator=other)
    broken = write_separator(tmp_path / "broken", "conv_tasnet", "music")
    weights = build_blind("conv_tasnet", sample_rate=RATE, **MODELS["conv_tasnet"]).state_dict()
    weights["network.decoder.weight"].fill_(torch.nan)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, broken / "weights.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in the estimates"):
        run(world, "music", tmp_path / "scores", separator=broken)
    assert not (tmp_path / "scores").exists()
