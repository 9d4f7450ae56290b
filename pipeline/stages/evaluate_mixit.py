"""Stage evaluate_mixit: what one entry of `mixit_music:` or `mixit_clips:` does on test data, in numbers and sounds.

The numbers are those of mixit_scores.py, each beside that of doing nothing. An entry of mixit_clips also meets the
chain's evaluation pairs, where its outputs go to target and interferer by best assignment: an upper bound, to be read
beside the query-based models and not against them. Memory giving out is a result here as in training.
"""

import argparse
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pydantic import Field
from scipy.io import wavfile
from torch import Tensor

from pipeline.core.config import Params, load_params
from pipeline.core.devices import blame_neighbours, choose_device, exact_float32, is_out_of_memory, use_available_cores
from pipeline.core.parts import run_parts
from pipeline.core.runtime import (
    fingerprint,
    keep_freed_memory,
    publish,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.evaluation.mixit_scores import (
    MASK_SCORES,
    MOM_SCORES,
    PAIR_SCORES,
    STEM_SCORES,
    mom_scores,
    pair_scores,
    stem_scores,
)
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mixing import Normalize, PairsParams, mix
from pipeline.mixtures.tracks import MomBatch, MusicParams, index_file
from pipeline.separators import BlindSeparator, load_blind
from pipeline.training import mixit
from pipeline.training.mixit import MixitParams, anchor_streams, music_streams, read_config, seed_of

log = logging.getLogger(__name__)

TOLD = (
    *("architecture", "data", "mixtures", "pretrained", "diversity", "sparsity", "sparsity_form"),
    *("sample_rate", "n_sources"),
)

ROLES = ("target", "interferer")  # x1 and x2 of a mixture of mixtures, as far as statistics are concerned


class EvaluateMixitParams(Params):
    """Section `evaluate_mixit:` of params.yaml."""

    n_moms: int = Field(gt=0, le=10_000)
    n_mixtures: int = Field(ge=0, le=10_000)
    max_stems: int = Field(ge=2, le=64)
    batch_size: int = Field(gt=0, le=65_536)
    pairs_per_part: int = Field(gt=0, le=10**6)
    bss: bool
    bss_filter_samples: int = Field(gt=1, le=4096)
    n_examples: int = Field(ge=0, le=10_000)
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class EvalPairs:
    """The chain's pairs of the eval split, and how they are mixed."""

    file: Path
    normalize: Normalize


@dataclass(frozen=True)
class Test:
    """Test data of an entry, and how it is mixed."""

    data: mixit.Source
    source: Path  # the index of the music, or the anchors of the eval split
    music: MusicParams | None
    mixit: MixitParams
    pairs: EvalPairs | None  # for an entry of mixit_clips


def separate(separator: BlindSeparator, mixture: Float[Tensor, "batch time"]) -> tuple[Tensor, Tensor]:
    """(estimates, masks), float32; ValueError where an estimate is not finite."""
    with torch.inference_mode(), exact_float32():
        estimates, masks = separator.separate(mixture)
    if not estimates.isfinite().all():
        raise ValueError("NaN or infinity in the estimates")
    return estimates.float(), masks.float()


def batches(test: Test, seconds: float, purpose: int, n: int, batch_size: int, max_stems: int) -> Iterator[MomBatch]:
    """The first n mixtures of mixtures of the test data, the same for every entry of this segment length.

    They are added up from stems or anchors, also for entries that learn from recordings as they are.

    purpose TEST: stems in random subsets, if those of training are. SINGLE: all stems of a track that sound, up to
    max_stems; of anchors, any number of them up to that.
    """
    shared: dict[str, Any] = {
        "seconds": [seconds],
        "seed": seed_of(test.mixit.seed, purpose),
        "batch_size": batch_size,
        "max_stems": max_stems,
        "snr_range": test.mixit.mom_snr_range,
    }
    if test.music is None:
        subsets = test.mixit.random_subsets or purpose == mixit.SINGLE
        streams = anchor_streams(test.source, "all", random_subsets=subsets, n_items=n, **shared)
    else:
        subsets = test.mixit.random_subsets and purpose == mixit.TEST
        shared |= {"mixtures": "subsets", "random_subsets": subsets, "fixed": True}
        streams = music_streams(test.source, "test", test.music, **shared)
    moms = streams.moms[0]
    for k in range(moms.n_batches):
        if k * batch_size >= n:
            return
        yield moms.batch(k)


def score_moms(
    separator: BlindSeparator, test: Test, seconds: float, params: EvaluateMixitParams, device: str
) -> pd.DataFrame:
    """A row per mixture of mixtures: its scores, the source of x1, and the recordings of x1 (target) and x2."""
    rows: list[pd.DataFrame] = []
    for batch in batches(test, seconds, mixit.TEST, params.n_moms, params.batch_size, test.mixit.max_stems):
        mixtures = torch.from_numpy(batch.mixtures).to(device)
        found = mom_scores(*separate(separator, mixtures.sum(dim=1)), mixtures)
        of = {"source": [first for first, _ in batch.track_ids]}
        of |= {f"{role}_recording": [pair[i] for pair in batch.recordings] for i, role in enumerate(ROLES)}
        rows.append(pd.DataFrame(of | found))
    return pd.concat(rows, ignore_index=True).iloc[: params.n_moms]


def score_mixtures(
    separator: BlindSeparator, test: Test, seconds: float, params: EvaluateMixitParams, device: str, examples: Path
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """A row per single mixture of two stems or more, and the first few mixtures as sounds with all outputs."""
    rows: list[pd.DataFrame] = []
    described: list[dict[str, Any]] = []
    for k, batch in enumerate(
        batches(test, seconds, mixit.SINGLE, params.n_mixtures, params.batch_size, params.max_stems)
    ):
        known = np.flatnonzero(batch.n_stems[: params.n_mixtures - k * params.batch_size, 0] >= 2)
        if not len(known):
            continue
        stems = torch.from_numpy(batch.stems[known, 0]).to(device)
        estimates, _ = separate(separator, stems.sum(dim=1))
        n_stems = batch.n_stems[known, 0]
        found = stem_scores(estimates, stems, n_stems, params.bss_filter_samples if params.bss else None)
        of = {"source": [batch.track_ids[i][0] for i in known]}
        of |= {"target_recording": [batch.recordings[i][0] for i in known]}
        rows.append(pd.DataFrame(of | {"n_stems": n_stems} | found))
        for i in range(min(len(known), params.n_examples - len(described))):
            sounds = {"mixture": stems[i].sum(dim=0), **{f"output-{n}": s for n, s in enumerate(estimates[i])}}
            described.append(_write_example(examples, str(len(described)), sounds, separator.sample_rate))
    columns = ["source", "target_recording", "n_stems", *STEM_SCORES]
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
    return table, described


def _write_example(folder: Path, name: str, sounds: dict[str, Tensor], sample_rate: int) -> dict[str, Any]:
    files = {}
    for what, waveform in sounds.items():
        buffer = io.BytesIO()
        wavfile.write(buffer, sample_rate, waveform.cpu().numpy().astype(np.float32))
        files[what] = f"{name}-{what}.wav"
        write_atomic(folder / files[what], buffer.getvalue())
    outputs = [waveform for what, waveform in sounds.items() if what != "mixture"]
    levels = [round(float(10 * torch.log10(w.double().square().mean() + 1e-12)), 2) for w in outputs]
    return {"name": name, "files": files, "outputs_db": levels}


@dataclass(frozen=True)
class PairsSetup:
    """Everything a worker needs to score any part of the pairs."""

    run: str
    separator: Path
    pairs: Path
    anchors: Path
    normalize: Normalize
    batch_size: int
    device: str


@lru_cache(maxsize=1)
def _loaded(setup: PairsSetup) -> tuple[BlindSeparator, AnchorReader, pa.Table]:
    keep_freed_memory()
    reader = AnchorReader(setup.anchors, AnchorIndex.load(setup.anchors))
    return load_blind(setup.separator).to(setup.device), reader, pq.read_table(setup.pairs)


def score_pairs(rows: tuple[int, int], directory: Path, *, setup: PairsSetup) -> None:
    """Score rows [start, stop) of the pairs into directory/pairs.parquet."""
    separator, reader, table = _loaded(setup)
    found = []
    for first in range(rows[0], rows[1], setup.batch_size):
        batch = table.slice(first, min(setup.batch_size, rows[1] - first)).to_pydict()
        targets, interferers = ([reader.index.row(key) for key in batch[role]] for role in ("target", "interferer"))
        mixture, target, interferer = mix(
            torch.from_numpy(reader.waveforms(targets)).to(setup.device),
            torch.from_numpy(reader.waveforms(interferers)).to(setup.device),
            torch.tensor(batch["gain"], dtype=torch.float32, device=setup.device),
            setup.normalize,
        )
        estimates, _ = separate(separator, mixture)
        names = ("pair", "class_index", "mid", "target_clip", "target_recording", "interferer_recording")
        found.append(pd.DataFrame({name: batch[name] for name in names} | pair_scores(estimates, target, interferer)))
    write_atomic(directory / "pairs.parquet", _parquet(pd.concat(found, ignore_index=True)))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), buffer)
    return buffer.getvalue()


def summarise(moms: pd.DataFrame, mixtures: pd.DataFrame, pairs: pd.DataFrame | None) -> dict[str, Any]:
    """Means over the test data; null where undefined. Its units are dB, shares, and counts of sources.

    The report computes the intervals of them, from the tables of scores.
    """
    summary: dict[str, Any] = {
        "moms": {"n": len(moms), **_means(moms, MOM_SCORES)},
        "masks": _means(moms, MASK_SCORES),
        "stems": None,
        "pairs": None,
    }
    if len(mixtures):
        undefined = int(mixtures["si_snri"].isna().sum())
        summary["stems"] = {"n": len(mixtures), "n_undefined": undefined, **_means(mixtures, STEM_SCORES)}
    if pairs is not None:
        by_class = pairs.groupby("class_index")
        summary["pairs"] = {
            "n": len(pairs),
            "n_undefined": int(pairs["si_sdri"].isna().sum()),
            "n_classes": int(pairs["class_index"].nunique()),
        } | {f"{metric}_class_{kind}_mean": _rounded(by_class[metric].agg(kind).mean()) for metric, kind in PAIR_SCORES}
    return summary


def _means(table: pd.DataFrame, names: Sequence[str]) -> dict[str, float | None]:
    return {name: _rounded(table[name].mean()) for name in names}


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None  # JSON has no NaN


def evaluate_mixit(
    name: str, separator_dir: Path, out: Path, *, test: Test, params: EvaluateMixitParams
) -> dict[str, Any]:
    """Write moms.parquet, mixtures.parquet, pairs.parquet (of clips) and examples to `out`; return the summary.

    Of an entry trained on several lengths these are of the longest, and those of another length lie in `<length>s/`.
    """
    use_available_cores()
    device = str(choose_device(params.device))
    config = read_config(separator_dir)
    rate = AnchorIndex.load(test.source).sample_rate if test.music is None else test.music.sample_rate
    if rate != config["sample_rate"]:
        raise ValueError(f"{name} was trained at {config['sample_rate']} Hz, and the test data are read at {rate} Hz")
    longest, *shorter = sorted(config["segment_seconds"], reverse=True)
    summary = {"status": config["status"], "segment_seconds": longest, "steps": config["steps"]}
    summary["trained_seconds"] = config["segment_seconds"]
    summary |= {key: config[key] for key in (*TOLD, "n_parameters")}
    summary |= {key: config[key] for key in ("pretraining",) if key in config}  # only where memory gave out in it
    inputs = [separator_dir / "config.json"]
    if config["status"] == "ok":
        inputs.append(separator_dir / "weights.safetensors")
    if test.music is None:
        inputs += [test.source / file for file in ("index.parquet", "index.json", "shards.json")]
    else:
        inputs += [index_file(test.source, seconds) for seconds in (longest, *shorter)]
    context: list[Any] = [test.music] if test.music else []
    if test.pairs is not None:
        context += [test.pairs.normalize, test.pairs.file]
    run = fingerprint(params, test.mixit, device, *context, *inputs)
    scratch = scratch_dir(f"evaluate_mixit@{name}", run)
    finished = _empty(scratch / "finished")

    def scores(seconds: float, folder: Path, test: Test) -> dict[str, Any]:
        try:
            return _scores(separator_dir, folder, seconds, run, scratch, test=test, params=params, device=device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            blame_neighbours(error, torch.device(device))
            log.error("%s: out of memory at %g s: %s", name, seconds, error)
            _empty(folder)
            return {"status": "out_of_memory"}

    if config["status"] == "ok":
        summary |= scores(longest, finished, test)
        # The pairs have a length of their own, and are scored once.
        apart = replace(test, pairs=None)
        for seconds in shorter:
            found = scores(seconds, _empty(finished / f"{seconds:g}s"), apart)
            summary.setdefault("shorter", []).append({"status": "ok", "segment_seconds": seconds} | found)
    publish(finished, out)
    shutil.rmtree(scratch)
    return summary


def _empty(finished: Path) -> Path:
    shutil.rmtree(finished, ignore_errors=True)
    (finished / "examples").mkdir(parents=True)
    return finished


def _scores(
    separator_dir: Path,
    finished: Path,
    seconds: float,
    run: str,
    scratch: Path,
    *,
    test: Test,
    params: EvaluateMixitParams,
    device: str,
) -> dict[str, Any]:
    """Write the tables and examples to `finished`; return their part of the summary."""
    separator = load_blind(separator_dir).to(device)
    moms = score_moms(separator, test, seconds, params, device)
    mixtures, examples = score_mixtures(separator, test, seconds, params, device, finished / "examples")
    pairs = None
    if test.pairs is not None:
        setup = PairsSetup(
            run=run,
            separator=separator_dir.absolute(),
            pairs=test.pairs.file.absolute(),
            anchors=test.source.absolute(),
            normalize=test.pairs.normalize,
            batch_size=params.batch_size,
            device=device,
        )
        pairs = _all_pairs(setup, params, scratch)
        write_atomic(finished / "pairs.parquet", _parquet(pairs))
    write_atomic(finished / "moms.parquet", _parquet(moms))
    write_atomic(finished / "mixtures.parquet", _parquet(mixtures))
    return summarise(moms, mixtures, pairs) | {"examples": examples}


def _all_pairs(setup: PairsSetup, params: EvaluateMixitParams, scratch: Path) -> pd.DataFrame:
    n_pairs = pq.read_metadata(setup.pairs).num_rows
    starts = range(0, n_pairs, params.pairs_per_part)
    parts = {f"part-{i:05d}": (s, min(s + params.pairs_per_part, n_pairs)) for i, s in enumerate(starts)}
    done = run_parts(partial(score_pairs, setup=setup), parts, scratch / "parts")
    return pd.concat([pd.read_parquet(done[part] / "pairs.parquet") for part in parts], ignore_index=True)


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of the section")
    parser.add_argument("--data", choices=["music", "clips"], required=True)
    parser.add_argument("--separator", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True, help="the index of the music, or anchors of eval")
    parser.add_argument("--pairs", type=Path, help="pairs of eval, for an entry of mixit_clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    params = load_params("evaluate_mixit", EvaluateMixitParams)
    pairs = None
    if args.pairs is not None:
        pairs = EvalPairs(args.pairs / "pairs.parquet", load_params("pairs", PairsParams).normalize)
    test = Test(
        data=args.data,
        source=args.source,
        music=load_params("music", MusicParams) if args.data == "music" else None,
        mixit=load_params("mixit", MixitParams),
        pairs=pairs,
    )
    if choose_device(params.device).type == "cuda":
        os.environ.setdefault("USS_WORKERS", "0")  # one process per GPU, unless somebody wants more
    with running(f"evaluate_mixit@{args.name}", args.out):
        summary = evaluate_mixit(args.name, args.separator, args.out, test=test, params=params)
        write_json(args.summary, summary)
        log.info("%s: %s", args.name, json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
