"""Stage evaluate: separate every evaluation pair under two or three queries, and score the estimates pair by pair.

    average             mean of the query embeddings of the class' targets in the *train* pairs, repeats included: what
                        a user has who wants "a siren" and no example of this one (Kong et al., arXiv:2305.07447,
                        table III)
    oracle              the embedding of the clean target itself: an upper bound (train.query: own trains on it)
    average+interferer  the average query, and that of the interferer's class: of separators that take it, for a user
                        who knows what else sounds

Pairs are mixed on read, by the rules and gains of the manifest. The metrics are those of metrics.py, the target being
the reference and the scaled interferer the other source. The pairs are cut into parts; a killed run goes on from the
parts it has finished. Aggregation is the report's.
"""

import argparse
import io
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from scipy.io import wavfile
from torch import Tensor

from pipeline import separators
from pipeline.core.config import Params, load_params
from pipeline.core.devices import choose_device, exact_float32
from pipeline.core.ontology import class_of
from pipeline.core.parts import run_parts
from pipeline.core.runtime import (
    fingerprint,
    keep_freed_memory,
    link_or_copy,
    publish,
    read_json,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.evaluation import metrics
from pipeline.evaluation.columns import of_estimates
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.scores import schema, score, table
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mixing import Normalize, PairsParams, mix
from pipeline.separators import QuerySeparator

log = logging.getLogger(__name__)

QUERIES = ("average", "oracle")
WITH_INTERFERER = "average+interferer"  # of separators trained with train.interferer_query
ALWAYS = ("sdr", "si_sdr")  # metrics that the report is made of


class EvaluateParams(Params):
    """Section `evaluate:` of params.yaml."""

    batch_size: int = Field(gt=0, le=65_536)
    pairs_per_part: int = Field(gt=0, le=10**6)
    metrics: dict[str, dict[str, Any]]  # files of pipeline/evaluation/metrics, with their options
    n_examples: int = Field(ge=0, le=10_000)
    device: Literal["auto", "cpu", "cuda"]

    @field_validator("metrics")
    @classmethod
    def _complete(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if missing := [name for name in ALWAYS if name not in value]:
            raise ValueError(f"{missing[0]} is missing, which the report is made of")
        return value

    def build_metrics(self) -> list[Metric]:
        """Build the metrics, in the order of params.yaml."""
        return [metrics.build(name, given) for name, given in self.metrics.items()]


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to score any part of one run."""

    run: str  # fingerprint of the run: a worker that outlives it must not go on with old weights or anchors
    separator: Path
    pairs: Path  # the parquet file
    anchors: Path
    queries: Path  # .npz: class_index, query
    examples: tuple[int, ...]  # pairs whose sounds are kept
    normalize: Normalize
    params: EvaluateParams = field(hash=False)
    device: str


@dataclass(frozen=True)
class Loaded:
    """Contents of the files that a Setup names, in memory."""

    separator: QuerySeparator
    reader: AnchorReader
    pairs: pa.Table
    average: dict[int, Float[np.ndarray, " query_dim"]]
    metrics: list[Metric]


@lru_cache(maxsize=1)
def load(setup: Setup) -> Loaded:
    """Load once per process and run."""
    keep_freed_memory()
    with np.load(setup.queries) as stored:
        average = dict(zip(stored["class_index"].tolist(), stored["query"], strict=True))
    separator = separators.load(setup.separator).to(setup.device)
    return Loaded(separator, _open(setup.anchors), pq.read_table(setup.pairs), average, setup.params.build_metrics())


def _open(anchors: Path) -> AnchorReader:
    return AnchorReader(anchors, AnchorIndex.load(anchors))


def average_queries(pairs: pa.Table, reader: AnchorReader) -> dict[int, Float[np.ndarray, " query_dim"]]:
    """Mean query embedding of the targets of each class, a target counted once per pair that it is in.

    Summed in float64 and without BLAS, whose threads would change the last bit.
    """
    classes, targets = pairs["class_index"].to_numpy(), np.array(pairs["target"].to_pylist())
    averages = {}
    for class_index in np.unique(classes).tolist():
        distinct, repeats = np.unique(targets[classes == class_index], return_counts=True)
        queries = reader.queries(reader.index.row(anchor) for anchor in distinct.tolist()).astype(np.float64)
        averages[class_index] = np.average(queries, axis=0, weights=repeats).astype(np.float32)
        if not np.isfinite(averages[class_index]).all():
            raise ValueError(f"the query embeddings of class {class_index}'s train targets are not all finite")
    return averages


def choose_examples(class_indices: Sequence[int], pairs: Sequence[int], n: int) -> list[int]:
    """The first pair of each of n classes spread evenly over those there are: known before any result is."""
    first: dict[int, int] = {}
    for class_index, pair in sorted(zip(class_indices, pairs, strict=True)):
        first.setdefault(class_index, pair)
    n = min(n, len(first))
    return [list(first.values())[i * len(first) // n] for i in range(n)]


def kinds_of(separator: QuerySeparator) -> tuple[str, ...]:
    """List the kinds of queries that a separator is scored under."""
    return (*QUERIES, WITH_INTERFERER) if separator.takes_interferer else QUERIES


def separate(
    separator: QuerySeparator,
    mixture: Float[Tensor, "batch time"],
    average: Float[Tensor, "batch query_dim"],
    oracle: Float[Tensor, "batch query_dim"],
    interferer: Float[Tensor, "batch query_dim"],
    pairs: Sequence[int],
) -> Float[Tensor, "batch kinds time"]:
    """Estimates under the queries of `kinds_of`; NaN under an average query that is NaN, its class having none.

    `interferer` is the average query of the interferer's class. Any other estimate that is not finite is an error,
    which names its pairs.
    """
    kinds = kinds_of(separator)
    estimates = mixture.new_full((mixture.shape[0], len(kinds), mixture.shape[1]), torch.nan)
    with torch.inference_mode(), exact_float32():
        shared = separator.shared(mixture)
        joint = [separator.joint_query(average), separator.joint_query(oracle)]
        if WITH_INTERFERER in kinds:
            joint.append(separator.joint_query(average, interferer))
        for i, (kind, query) in enumerate(zip(kinds, joint, strict=True)):
            known = torch.ones_like(query[:, 0], dtype=torch.bool) if kind == "oracle" else query.isfinite().all(dim=-1)
            if known.any():
                some = {name: tensor[known] for name, tensor in shared.items()}
                estimates[known, i] = separator(mixture[known], query[known], **some).float()
            bad = (known & ~estimates[:, i].isfinite().all(dim=-1)).cpu()
            if bad.any():
                names = ", ".join(str(pair) for pair, is_bad in zip(pairs, bad, strict=True) if is_bad)
                raise ValueError(f"NaN or infinity in the estimates of pairs {names} under the {kind} query")
    return estimates


def score_part(rows: tuple[int, int], directory: Path, *, setup: Setup) -> None:
    """Score rows [start, stop) of the pairs into directory/scores.parquet, and keep the sounds of the examples."""
    loaded, device, params = load(setup), setup.device, setup.params
    reader, index = loaded.reader, loaded.reader.index
    start, stop = rows
    pairs = loaded.pairs.slice(start, stop - start)
    unknown = np.full(index.query_dim, np.nan, np.float32)
    kinds = kinds_of(loaded.separator)
    sounds = ("mixture", "target", *kinds)

    found: list[dict[str, np.ndarray]] = []
    for first in range(0, len(pairs), params.batch_size):
        batch = pairs.slice(first, params.batch_size).to_pydict()

        targets, interferers = ([index.row(key) for key in batch[role]] for role in ("target", "interferer"))
        average, of_interferer = (
            torch.from_numpy(np.stack([loaded.average.get(index, unknown) for index in batch[column]])).to(device)
            for column in ("class_index", "interferer_class_index")
        )
        mixture, target, interferer = mix(
            torch.from_numpy(reader.waveforms(targets)).to(device),
            torch.from_numpy(reader.waveforms(interferers)).to(device),
            torch.tensor(batch["gain"], dtype=torch.float32, device=device),
            setup.normalize,
        )
        estimates = separate(
            loaded.separator,
            mixture,
            average,
            torch.from_numpy(reader.queries(targets)).to(device),
            of_interferer,
            batch["pair"],
        )
        found.append(score(estimates, mixture, target, interferer, loaded.metrics))
        for i, pair in enumerate(batch["pair"]):
            if pair in setup.examples:
                for name, waveform in zip(sounds, (mixture[i], target[i], *estimates[i]), strict=True):
                    _write_wav(directory / f"{pair}-{name}.wav", waveform.cpu().numpy(), index.sample_rate)

    scores = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    write_atomic(directory / "scores.parquet", _parquet(table(pairs, scores, kinds, schema(loaded.metrics))))


def _write_wav(path: Path, waveform: np.ndarray, sample_rate: int) -> None:
    """float32, so that nothing clips. By scipy: libsndfile stamps float files with the time of day."""
    buffer = io.BytesIO()
    wavfile.write(buffer, sample_rate, waveform.astype(np.float32))
    write_atomic(path, buffer.getvalue())


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def summarise(scores: pa.Table, without_average: Sequence[str]) -> dict[str, Any]:
    """Counts, and a first look at each query: mean and median over all pairs. The report's aggregates are by class."""
    names = of_estimates(scores.column_names)
    queries = np.array(scores["query"].to_pylist())
    kinds = list(dict.fromkeys(queries.tolist()))
    summary: dict[str, Any] = {
        "n_pairs": len(scores) // len(kinds),
        "n_classes": len(scores["class_index"].unique()),
        "classes_without_average_query": list(without_average),
    }
    for query in kinds:
        values = {name: scores[name].to_numpy()[queries == query] for name in names}
        summary[query] = {
            "n_nan": {name: int(np.isnan(value).sum()) for name, value in values.items()},
            "sdri_mean": _rounded(np.nanmean, values["sdri"]),
            "sdri_median": _rounded(np.nanmedian, values["sdri"]),
        }
    return summary


def _rounded(statistic: Any, values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else round(float(statistic(values)), 4)


def describe_examples(pairs: pa.Table, scores: pa.Table, examples: Sequence[int]) -> list[dict[str, Any]]:
    """Describe the examples for the report: who is mixed with whom, the scores, the files."""
    rows = {row["pair"]: row for row in pairs.to_pylist()}
    scored = {(row["pair"], row["query"]): row for row in scores.to_pylist()}
    kinds = dict.fromkeys(scores["query"].to_pylist())
    names = of_estimates(scores.column_names)
    described = []
    for pair in examples:
        row = rows[pair]
        described.append(
            {
                "pair": pair,
                "class_index": row["class_index"],
                "class_name": class_of(row["mid"]).name,
                "target_clip": row["target_clip"],
                "interferer_class_index": row["interferer_class_index"],
                "interferer_class_name": class_of(row["interferer_mid"]).name,
                "interferer_clip": row["interferer_clip"],
                "files": {sound: f"{pair}-{sound}.wav" for sound in ("mixture", "target", *kinds)},
                **{name: _finite(scored[pair, "oracle"][name]) for name in scores.column_names if "_mixture" in name},
                **{query: {name: _finite(scored[pair, query][name]) for name in names} for query in kinds},
            }
        )
    return described


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None  # JSON has no NaN


def evaluate(
    name: str,
    separator: Path,
    pairs_dir: Path,
    anchors: Path,
    out: Path,
    *,
    params: EvaluateParams,
    normalize: Normalize,
) -> dict[str, Any]:
    """Write the scores of every pair of pairs_dir/eval to out/scores.parquet, and examples; return the summary."""
    device = str(choose_device(params.device))
    separators.load(separator)  # what cannot be loaded fails here, not in every worker
    readers = _readers(anchors, separator)
    eval_pairs, train_pairs = (pairs_dir / split / "pairs.parquet" for split in ("eval", "train"))
    pairs = _read_pairs(eval_pairs, readers["eval"])

    files = [anchors / split / file for split in readers for file in ("index.parquet", "index.json", "shards.json")]
    files += [separator / "config.json", separator / "weights.safetensors", eval_pairs, train_pairs]
    run = fingerprint(params, normalize, device, *files)
    scratch = scratch_dir(f"evaluate@{name}", run)
    averages = average_queries(_read_pairs(train_pairs, readers["train"]), readers["train"])
    classes = {row["class_index"]: row["mid"] for row in pairs.select(["class_index", "mid"]).to_pylist()}
    without_average = [mid for class_index, mid in sorted(classes.items()) if class_index not in averages]
    if without_average:
        log.warning("%s: %d classes have no train pairs: %s", name, len(without_average), ", ".join(without_average))
    buffer = io.BytesIO()
    np.savez(buffer, class_index=np.array(list(averages), np.int64), query=np.stack(list(averages.values())))
    write_atomic(scratch / "average_queries.npz", buffer.getvalue())

    known = [row for row in pairs.select(["class_index", "pair"]).to_pylist() if row["class_index"] in averages]
    examples = choose_examples([row["class_index"] for row in known], [row["pair"] for row in known], params.n_examples)
    setup = Setup(
        run=run,
        separator=separator.absolute(),
        pairs=eval_pairs.absolute(),
        anchors=(anchors / "eval").absolute(),
        queries=(scratch / "average_queries.npz").absolute(),
        examples=tuple(examples),
        normalize=normalize,
        params=params,
        device=device,
    )
    starts = range(0, len(pairs), params.pairs_per_part)
    parts = {f"part-{i:05d}": (s, min(s + params.pairs_per_part, len(pairs))) for i, s in enumerate(starts)}
    done = run_parts(partial(score_part, setup=setup), parts, scratch / "parts")

    scores = _gather([done[part] for part in parts], scratch / "finished", pairs, examples)
    publish(scratch / "finished", out)
    shutil.rmtree(scratch)
    return summarise(scores, without_average)


def _readers(anchors: Path, separator: Path) -> dict[str, AnchorReader]:
    """Open the anchors of both splits; ValueError where their embeddings are not those that the separator takes."""
    query_dim = read_json(separator / "config.json")["model"]["query_dim"]
    readers = {split: _open(anchors / split) for split in ("train", "eval")}
    for split, reader in readers.items():
        if reader.index.query_dim != query_dim:
            raise ValueError(
                f"{separator} takes queries of {query_dim} numbers, "
                f"and those of {anchors / split} have {reader.index.query_dim}"
            )
    return readers


def _gather(parts: Sequence[Path], finished: Path, pairs: pa.Table, examples: Sequence[int]) -> pa.Table:
    """Bring the parts' scores and sounds together in the folder `finished`, made anew, and return the scores."""
    scores = pa.concat_tables([pq.read_table(part / "scores.parquet") for part in parts])
    shutil.rmtree(finished, ignore_errors=True)
    (finished / "examples").mkdir(parents=True)
    write_atomic(finished / "scores.parquet", _parquet(scores.combine_chunks()))
    for part in parts:
        for path in sorted(part.glob("*.wav")):
            link_or_copy(path, finished / "examples" / path.name)
    write_json(finished / "examples" / "examples.json", describe_examples(pairs, scores, examples))
    return scores


def _read_pairs(path: Path, reader: AnchorReader) -> pa.Table:
    """The manifest of a split, sorted by pair; ValueError unless each pair is there once, with anchors that exist."""
    pairs = pq.read_table(path)
    if not len(pairs):
        raise ValueError(f"{path} has no rows")
    if np.any(np.diff(pairs["pair"].to_numpy()) <= 0):
        raise ValueError(f"{path} is not sorted by pair, or names one twice")
    for role in ("target", "interferer"):
        if missing := sorted(set(pairs[role].to_pylist()) - set(reader.index.keys)):
            raise ValueError(f"{path} names {missing[0]!r} as {role}, which is not among its split's anchors")
    return pairs


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of `separators:` or `mae_separators:`")
    parser.add_argument("--separator", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    params = load_params("evaluate", EvaluateParams)
    normalize = load_params("pairs", PairsParams).normalize
    if choose_device(params.device).type == "cuda":
        os.environ.setdefault("USS_WORKERS", "0")  # one process per GPU, unless somebody wants more
    with running(f"evaluate@{args.name}", args.out):
        summary = evaluate(
            args.name, args.separator, args.pairs, args.anchors, args.out, params=params, normalize=normalize
        )
        write_json(args.summary, summary)
        log.info("%s: %s", args.name, summary)


if __name__ == "__main__":
    run_command(main)
