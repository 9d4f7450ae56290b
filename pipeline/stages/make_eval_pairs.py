"""Stage make_eval_pairs: which anchors are mixed at which gain for evaluation, as a table, never as sound.

The first n classes x pairs_per_class items of the pair stream give every class that many pairs: 52,700 of them for 527
classes and 100 (Kong et al., arXiv:2305.07447, sec. IV). As a table they are 2 MB in place of 25 GB of WAV files, whose
16 bits would clip the mixtures. The stage reads the index alone: each anchor's energy is in it.
"""

import argparse
import csv
import io
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pydantic import Field

from pipeline.core.config import Params, load_params
from pipeline.core.ontology import class_of, classes, kin
from pipeline.core.runtime import (
    fingerprint,
    publish,
    remove,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.mixtures.anchors import AnchorIndex
from pipeline.mixtures.mixing import SILENT_ENERGY, PairsParams, energy_gain, level_ratio
from pipeline.mixtures.pairs import Draw, Exclude, PairStream

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("pair", pa.int64(), nullable=False),  # 0, 1, ...; sorted by class, then as they come in the stream
        pa.field("class_index", pa.int64(), nullable=False),
        pa.field("mid", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),  # an anchor's key
        pa.field("target_clip", pa.string(), nullable=False),
        pa.field("target_recording", pa.string(), nullable=False),
        pa.field("target_onset_seconds", pa.float64(), nullable=False),
        pa.field("interferer_class_index", pa.int64(), nullable=False),
        pa.field("interferer_mid", pa.string(), nullable=False),
        pa.field("interferer", pa.string(), nullable=False),
        pa.field("interferer_clip", pa.string(), nullable=False),
        pa.field("interferer_recording", pa.string(), nullable=False),
        pa.field("interferer_onset_seconds", pa.float64(), nullable=False),
        pa.field("gain", pa.float64(), nullable=False),  # of the interferer: mixture = target + gain * interferer
        pa.field("clamped", pa.bool_(), nullable=False),  # the gain is a bound, and the SNR not 0 dB
        pa.field("seed", pa.int64(), nullable=False),
    ]
)


class MakeEvalPairsParams(Params):
    """Section `make_eval_pairs:` of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    pairs_per_class: int = Field(gt=0, le=10**6)


@dataclass(frozen=True)
class Chosen:
    """The pairs of an evaluation set, sorted by class and then as they come in the stream."""

    targets: Int[np.ndarray, " pairs"]  # rows of the index
    interferers: Int[np.ndarray, " pairs"]
    stream: PairStream
    passed_over: int  # pairs whose interferer is not the first anchor after the target
    repeats_avoided: int  # pairs taken in place of the stream's own, which the class already had


def choose(index: AnchorIndex, exclude: Exclude, params: MakeEvalPairsParams) -> Chosen:
    """Choose pairs_per_class pairs for every class; no pair of sounds comes again while its class has another one left.

    The stream gives one permutation of the classes after the other, so class k's p-th pair is among the first p
    permutations; which one it is depends on the seed, the anchors and the class' earlier pairs alone. Two sounds are
    the same if their samples are, whatever the clips and labels that they were cut for.
    """
    stream = PairStream(**index.pair_columns(), seed=params.seed, exclude=exclude, kin=kin)
    sounds = index.table["sha256"].to_pylist()
    taken: dict[int, set[tuple[str, str]]] = {k: set() for k in stream.classes}  # in the class' present round
    draws, repeats_avoided = list[Draw](), 0
    for item in range(len(stream.classes) * params.pairs_per_class):
        own = stream.draw(item)
        pairs = taken[int(index.class_index[own.target])]
        for draw in stream.choices(item):
            if (sounds[draw.target], sounds[draw.interferer]) not in pairs:
                break
        else:  # the class has had all its pairs: a new round
            pairs.clear()
            draw = own
        pairs.add((sounds[draw.target], sounds[draw.interferer]))
        repeats_avoided += draw != own
        draws.append(draw)
    targets, interferers = (np.array(rows) for rows in zip(*((d.target, d.interferer) for d in draws), strict=True))
    order = np.argsort(index.class_index[targets], kind="stable")
    passed_over = sum(draw.passed_over > 0 for draw in draws)
    return Chosen(targets[order], interferers[order], stream, passed_over, repeats_avoided)


def tabulate(
    index: AnchorIndex,
    targets: Int[np.ndarray, " pairs"],
    interferers: Int[np.ndarray, " pairs"],
    *,
    pairs: PairsParams,
    seed: int,
) -> pa.Table:
    """The manifest of these pairs: SCHEMA."""
    energies = index.energy[targets], index.energy[interferers]
    gain = energy_gain(*energies, match_energy=pairs.match_energy, min_gain=pairs.min_gain, max_gain=pairs.max_gain)
    columns: dict[str, Any] = {
        "pair": np.arange(len(targets)),
        "gain": gain,
        "clamped": pairs.match_energy & (gain != level_ratio(*energies)),
        "seed": np.full(len(targets), seed),
    }
    for prefix, rows in (("", targets), ("interferer_", interferers)):
        columns |= {f"{prefix}{name}": index.table[name].take(rows) for name in ("class_index", "mid")}
    for role, rows in (("target", targets), ("interferer", interferers)):
        columns |= {role: index.table["anchor"].take(rows), f"{role}_clip": index.table["clip_id"].take(rows)}
        columns[f"{role}_recording"] = index.table["recording"].take(rows)
        columns[f"{role}_onset_seconds"] = index.table["onset_seconds"].take(rows)
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def content_sha256(manifest: pa.Table) -> str:
    """Hash of the rows as text, floats in their shortest exact form: independent of Parquet's version and layout.

    The recordings are left out: they say which pairs are independent, and change no mixture.
    """
    manifest = manifest.drop_columns(["target_recording", "interferer_recording"])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(manifest.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in manifest.columns), strict=True))
    return sha256(text.getvalue().encode()).hexdigest()


def overlaps(
    index: AnchorIndex, targets: Int[np.ndarray, " pairs"], interferers: Int[np.ndarray, " pairs"]
) -> dict[str, float]:
    """Share of the pairs whose interferer's clip carries the target's class, or kin of it, or any label of its clip."""
    labels = [frozenset(joined.split(";")) for joined in index.labels]
    related = {mid: frozenset(kin(mid)) for mid in set(index.mids)}
    meetings = [
        (index.mids[t], labels[t], labels[i]) for t, i in zip(targets.tolist(), interferers.tolist(), strict=True)
    ]
    return {
        "target_label": float(np.mean([mid in theirs for mid, _, theirs in meetings])),
        "target_kin": float(np.mean([not related[mid].isdisjoint(theirs) for mid, _, theirs in meetings])),
        "any_label": float(np.mean([not ours.isdisjoint(theirs) for _, ours, theirs in meetings])),
    }


def make_eval_pairs(anchors: Path, out: Path, *, pairs: PairsParams, params: MakeEvalPairsParams) -> dict[str, Any]:
    """Write <out>/pairs.parquet and <out>/pairs.json; return the latter."""
    index = AnchorIndex.load(anchors)
    scratch = scratch_dir(f"make_eval_pairs@{out.name}", fingerprint(pairs, params, anchors / "index.parquet"))
    finished = scratch / "finished"
    remove(finished)
    finished.mkdir()

    chosen = choose(index, pairs.exclude, params)
    targets, interferers, stream = chosen.targets, chosen.interferers, chosen.stream
    manifest = tabulate(index, targets, interferers, pairs=pairs, seed=params.seed)
    free = chosen if pairs.exclude == "none" else choose(index, "none", params)
    repeats = _repeats(index, targets, interferers)
    summary = {
        "content_sha256": content_sha256(manifest),
        "pairs": len(manifest),
        "classes": len(stream.classes),
        "pairs_per_class": params.pairs_per_class,
        "exclude": pairs.exclude,
        # Classes that evaluation says nothing about: no anchors at all, or none that theirs may be mixed with.
        "classes_without_anchors": [class_of(mid).name for mid in index.empty_classes],
        "classes_without_interferer": [classes()[k].name for k in stream.without_interferer],
        "distinct_targets_per_class": _distinct_targets(manifest),
        **_gain_counts(manifest, index.energy[targets], index.energy[interferers], pairs),
        "interferer_not_the_next": chosen.passed_over,
        "repeats_avoided": chosen.repeats_avoided,
        "repeats": sum(repeats.values()),
        "repeats_by_class": repeats,
        "overlap": overlaps(index, targets, interferers),
        "overlap_without_exclusion": overlaps(index, free.targets, free.interferers),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(manifest, buffer, compression="zstd")
    write_atomic(finished / "pairs.parquet", buffer.getvalue().to_pybytes())
    write_json(finished / "pairs.json", summary)
    publish(finished, out)
    shutil.rmtree(scratch)
    return summary


def _distinct_targets(manifest: pa.Table) -> dict[str, int | float]:
    """A class of fewer anchors than pairs repeats its targets: its pairs are not independent."""
    distinct: dict[int, set[str]] = {}
    for class_index, target in zip(manifest["class_index"].to_pylist(), manifest["target"].to_pylist(), strict=True):
        distinct.setdefault(class_index, set()).add(target)
    counts = [len(targets) for targets in distinct.values()]
    return {"min": min(counts), "median": float(np.median(counts)), "max": max(counts)}


def _repeats(
    index: AnchorIndex, targets: Int[np.ndarray, " pairs"], interferers: Int[np.ndarray, " pairs"]
) -> dict[str, int]:
    """Pairs of the same two sounds as an earlier pair of their class, by class name; classes without any are left out.

    The gain follows from the two sounds, so that such a pair is the same mixture again.
    """
    sounds = index.table["sha256"].to_pylist()
    rows = zip(index.class_index[targets].tolist(), targets.tolist(), interferers.tolist(), strict=True)
    counts = Counter((k, sounds[t], sounds[i]) for k, t, i in rows)
    repeats = Counter[int]()
    for (k, _, _), count in counts.items():
        repeats[k] += count - 1
    return {classes()[k].name: n for k, n in sorted(repeats.items()) if n}


def _gain_counts(
    manifest: pa.Table,
    target_energy: Float[np.ndarray, " pairs"],
    interferer_energy: Float[np.ndarray, " pairs"],
    pairs: PairsParams,
) -> Mapping[str, int]:
    gain, clamped = manifest["gain"].to_numpy(), manifest["clamped"].to_numpy()
    return {
        "clamped_to_min_gain": int(np.sum(clamped & (gain == pairs.min_gain))),
        "clamped_to_max_gain": int(np.sum(clamped & (gain == pairs.max_gain))),
        "silent_targets": int(np.sum(target_energy <= SILENT_ENERGY)),
        "silent_interferers": int(np.sum(interferer_energy <= SILENT_ENERGY)),
    }


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=Path, required=True, help="anchors of one split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    pairs, params = load_params("pairs", PairsParams), load_params("make_eval_pairs", MakeEvalPairsParams)
    with running(f"make_eval_pairs@{args.out.name}", args.out):
        summary = make_eval_pairs(args.anchors, args.out, pairs=pairs, params=params)
        write_json(args.summary, summary)
        log.info("%d pairs of %d classes, %s", summary["pairs"], summary["classes"], summary["content_sha256"])
        for what in ("classes_without_anchors", "classes_without_interferer"):
            if summary[what]:
                log.warning("%s: %s", what.replace("_", " "), ", ".join(summary[what]))
        if summary["repeats"]:
            log.warning("%d pairs are repeats: %s", summary["repeats"], summary["repeats_by_class"])


if __name__ == "__main__":
    run_command(main)
