"""Evaluation as the stage does it (batches, mixing on read, one process per core) against one pair at a time.

    python -m benchmarks.evaluation --pairs 1000

One pair at a time is what the original evaluation does (bytedance/uss): mixture and sources are rendered WAV files,
read one by one; the network runs at batch 1, once per query, with all cores as its threads; each estimate is scored by
its own call. Both sides use the same pairs, weights and float64 fast_bss_eval, in turns of a few pairs, and their
scores are compared. The stage's worker processes start, and take a first batch, before the clock:
that costs some seconds once.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import fast_bss_eval.torch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from safetensors.torch import save_file

from pipeline import separators
from pipeline.core.ontology import classes
from pipeline.core.runtime import cpu_count, write_json
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.mixtures import shards
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader, anchor_key, write_index
from pipeline.mixtures.mixing import mix
from pipeline.separators import build
from pipeline.stages.evaluate import EvaluateParams, Setup, load, score_part

SAMPLE_RATE, SEGMENT_SAMPLES, QUERY_DIM = 32000, 64000, 128
CLASSES, ANCHORS_PER_CLASS = 8, 8
MODEL = {"query_dim": QUERY_DIM, "n_fft": 1024, "hop_length": 320, "channels": [8, 16, 32, 64, 96, 96]}


def make_world(root, n_pairs):
    """What the earlier stages would leave: anchors, pairs, average queries and a network of random weights."""
    rng = np.random.default_rng(0)
    samples, rows = [], []
    for class_index in range(CLASSES):
        for number in range(ANCHORS_PER_CLASS):
            key = anchor_key(f"clip{class_index}_{number}", class_index)
            spectrum = np.fft.rfft(rng.standard_normal(SEGMENT_SAMPLES))
            waveform = np.fft.irfft(spectrum / (1 + np.arange(len(spectrum)) / (500 * (1 + class_index))))
            pcm = (0.3 * waveform / abs(waveform).max() * 32767).astype(np.int16)
            query = rng.standard_normal(QUERY_DIM).astype(np.float32)
            samples.append((key, {"wav": shards.encode_wav(pcm, SAMPLE_RATE), "npy": shards.encode_array(query)}))
            mid = classes()[class_index].mid
            rows.append(
                {
                    **{"anchor": key, "clip_id": key[:-4], "class_index": class_index, "mid": mid, "labels": mid},
                    **{"onset_seconds": 0.0, "score": 1.0, "purity": 1.0, "energy": 1.0, "peak": 1.0, "sha256": ""},
                }
            )
    (root / "anchors").mkdir()
    for member in shards.write_shard(root / "anchors" / "anchors-00000.tar", samples):
        row = next(row for row in rows if row["anchor"] == member.key)
        kind = {"wav": "wav", "npy": "query"}[member.ext]
        row |= {"shard": "anchors-00000.tar", f"{kind}_offset": member.offset, f"{kind}_size": member.size}
    write_index(
        root / "anchors", rows,
        sample_rate=SAMPLE_RATE, segment_samples=SEGMENT_SAMPLES, query_dim=QUERY_DIM, empty_classes=[],
    )  # fmt: skip
    pairs = []
    for pair in range(n_pairs):
        target = rng.integers(len(rows))
        interferer = rng.choice([i for i, row in enumerate(rows) if row["class_index"] != rows[target]["class_index"]])
        pairs.append(
            {
                **{"pair": pair, "class_index": rows[target]["class_index"], "mid": rows[target]["mid"]},
                **{"target": rows[target]["anchor"], "target_clip": rows[target]["clip_id"]},
                **{"interferer_class_index": rows[interferer]["class_index"], "interferer": rows[interferer]["anchor"]},
                "gain": 1.0,
            }
        )
    pq.write_table(pa.Table.from_pylist(pairs), root / "pairs.parquet")
    torch.manual_seed(0)
    (root / "separator").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in build("resunet", **MODEL).state_dict().items()}
    save_file(weights, root / "separator" / "weights.safetensors")
    write_json(root / "separator" / "config.json", {"architecture": "resunet", "model": MODEL})
    average = rng.standard_normal((CLASSES, QUERY_DIM)).astype(np.float32)
    np.savez(root / "queries.npz", class_index=np.arange(CLASSES), query=average)
    return pairs, average


def render(root, pairs):
    """The pairs as WAV files, float so that both sides score the same samples (uss writes 16 bits)."""
    reader = AnchorReader(root / "anchors", AnchorIndex.load(root / "anchors"))
    (root / "wavs").mkdir()
    for pair in pairs:
        target, interferer = (reader.waveform(reader.index.row(pair[role])) for role in ("target", "interferer"))
        sounds = mix(target, interferer, np.float32(pair["gain"]).reshape(()), "joint")
        for name, waveform in zip(("mixture", "target", "interferer"), sounds, strict=True):
            soundfile.write(root / "wavs" / f"{pair['pair']}-{name}.wav", waveform, SAMPLE_RATE, subtype="FLOAT")
    return reader


def score_one_at_a_time(root, pair, separator, average, oracle, filter_samples):
    """Scores of one pair: {query: (sdr, si_sdr[, bss_sdr, bss_sir, bss_sar])}."""
    mixture, target, interferer = (
        torch.from_numpy(soundfile.read(root / "wavs" / f"{pair}-{name}.wav", dtype="float32")[0])
        for name in ("mixture", "target", "interferer")
    )
    with torch.inference_mode():
        estimates = {
            name: separator(mixture[None], torch.from_numpy(query)[None])[0]
            for name, query in (("average", average), ("oracle", oracle))
        } | {"mixture": mixture}
    scores = {}
    for name, estimate in estimates.items():
        scores[name] = [sdr(estimate, target).item(), si_sdr(estimate, target).item()]
        if filter_samples:
            n_threads = torch.get_num_threads()
            torch.set_num_threads(1)  # with more, torch's batched LU fails (pytorch#142815)
            bss = fast_bss_eval.torch.bss_eval_sources(
                torch.stack([target, interferer]).double(),
                torch.stack([estimate, mixture - estimate + 1e-6 * interferer]).double(),
                filter_length=filter_samples,
                compute_permutation=False,
            )
            torch.set_num_threads(n_threads)
            scores[name] += [value[0].item() for value in bss]
    return scores


def compare(root, pairs, reader, average, *, bss, chunk):
    """Seconds of each side over all pairs, and the largest difference between their scores in dB."""
    metrics = {"sdr": {}, "si_sdr": {}} | ({"bss_eval": {"filter_samples": 512}} if bss else {})
    params = EvaluateParams(batch_size=4, pairs_per_part=chunk, metrics=metrics, n_examples=0, device="cpu")
    setup = Setup(
        run=f"bss={bss}", separator=root / "separator", pairs=root / "pairs.parquet", anchors=root / "anchors",
        queries=root / "queries.npz", examples=(), normalize="joint", params=params, device="cpu",
    )  # fmt: skip
    separator = separators.load(root / "separator")
    n_workers = cpu_count()
    seconds = {"stage": 0.0, "one at a time": 0.0}
    difference = 0.0
    names = ["sdr", "si_sdr"] + (["bss_sdr", "bss_sir", "bss_sar"] if bss else [])
    with ProcessPoolExecutor(n_workers, get_context("spawn"), initializer=start_worker, initargs=(setup,)) as pool:
        list(pool.map(partial(warm_up, setup=setup), [root / f"warm-bss{bss}-{i}" for i in range(n_workers)]))
        for start in range(0, len(pairs), chunk):
            stop = min(start + chunk, len(pairs))
            edges = np.linspace(start, stop, n_workers + 1).astype(int).tolist()
            parts = [part for part in pairwise(edges) if part[0] < part[1]]
            directories = [root / f"bss{bss}-{part[0]}" for part in parts]
            for directory in directories:
                directory.mkdir()
            begin = time.perf_counter()
            list(pool.map(partial(score_part, setup=setup), parts, directories))
            seconds["stage"] += time.perf_counter() - begin

            begin = time.perf_counter()
            theirs = [
                score_one_at_a_time(
                    root, pair["pair"], separator, average[pair["class_index"]],
                    reader.query(reader.index.row(pair["target"])), 512 if bss else None,
                )
                for pair in pairs[start:stop]
            ]  # fmt: skip
            seconds["one at a time"] += time.perf_counter() - begin

            ours = pa.concat_tables([pq.read_table(d / "scores.parquet") for d in directories]).to_pylist()
            for i, row in enumerate(ours):
                expected = theirs[i // 2][row["query"]]
                difference = max(difference, *(abs(row[n] - v) for n, v in zip(names, expected, strict=True)))
    return seconds, difference


def start_worker(setup):
    torch.set_num_threads(1)
    load(setup)


def warm_up(directory, setup):
    """One batch before the clock; and a wait, so that the other processes get theirs."""
    directory.mkdir()
    score_part((0, 16), directory, setup=setup)
    time.sleep(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of the network, one at a time")
    parser.add_argument("--chunk", type=int, default=64, help="pairs per turn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pairs, average = make_world(root, args.pairs)
        reader = render(root, pairs)
        print(f"{args.pairs} pairs of 2 s, two queries, {cpu_count()} cores, network {MODEL['channels']}")
        for bss in (False, True):
            seconds, difference = compare(root, pairs, reader, average, bss=bss, chunk=args.chunk)
            stage, single = seconds["stage"], seconds["one at a time"]
            print(
                f"{'with' if bss else 'without'} BSS Eval: stage {args.pairs / stage:.1f} pairs/s, "
                f"one at a time {args.pairs / single:.1f} pairs/s: {single / stage:.2f} times as fast "
                f"(scores differ by {difference:.1e} dB at most)"
            )


if __name__ == "__main__":
    # Set before the workers start: each has one thread, as in the stage.
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    main()
