"""Stage mine_anchors: cut from every clip, for each of its labels, the segment where that label sounds surest.

AudioSet's labels say what is in a 10-s clip, not when; a sound event detector says when (Kong et al.,
arXiv:2305.07447). The result depends on clip and label alone, so it is mined once, and the query embedding of every
segment, as it is before anything is mixed to it, is kept beside it.

    clips-00003.tar ──> detector ──> window per label ──> segment ──> query encoder ──> anchors-00003.tar
"""

import argparse
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int16
from pydantic import Field

from pipeline.core.config import AudioParams, Params, load_params
from pipeline.core.devices import choose_device
from pipeline.core.ontology import class_of, classes, kin
from pipeline.core.parts import run_parts
from pipeline.core.runtime import (
    fingerprint,
    link_or_copy,
    publish,
    read_json,
    remove,
    run_command,
    running,
    scratch_dir,
    sha256_file,
    write_json,
)
from pipeline.mixtures import shards
from pipeline.mixtures.anchors import anchor_key, write_index
from pipeline.mixtures.mining import Window, best_start, random_start, window
from pipeline.mixtures.shards import ClipEntry, ClipReader, ShardReader
from pipeline.nn import panns
from pipeline.nn.features import SAMPLE_RATE as NETWORK_SAMPLE_RATE

log = logging.getLogger(__name__)

T = TypeVar("T")

# Why a clip's label has no anchor, in the order in which it is asked.
REASONS = (
    "unknown_class",  # the detector was trained without this class
    "short",  # the clip is shorter than a segment
    "low_score",
    "low_purity",
    "silent",  # there is no sound in the window: as a target it has no SDR
    "low_energy",  # the clip has a much louder window: the detector pointed beside the sound
)
# A window with less energy (-100 dBFS) is silent. `mixing` bounds its gain at the same level.
SILENT_ENERGY = 1e-10
FULL_SCALE = 32768  # of int16; the clips are int16 too, so that nothing is rounded


class MineAnchorsParams(Params):
    """Section `mine_anchors:` of params.yaml."""

    mode: Literal["area", "random"]
    smoothing_seconds: float = Field(gt=0, le=3600)
    min_score: float = Field(ge=0, le=1)
    min_purity: float = Field(ge=0, le=1)
    min_relative_energy: float = Field(ge=0, le=1)
    short: Literal["skip", "pad"]
    batch_size: int = Field(gt=0, le=65_536)
    seed: int = Field(ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Setup:
    """Paths and params that all parts share."""

    clips: Path
    sed: Path
    sed_sha256: str  # a worker that lives on from another run must not go on with that one's networks
    device: str
    params: MineAnchorsParams
    clip_samples: int
    segment_samples: int


@dataclass(frozen=True)
class Part:
    """A shard to be written, and the clips it is mined from, sorted."""

    shard: str
    clips: tuple[ClipEntry, ...]


@dataclass(frozen=True)
class Networks:
    """Detector and query encoder, on their device."""

    detector: panns.Detector
    encoder: panns.QueryEncoder
    folds: Mapping[int, panns.Detector] = field(default_factory=dict)  # each trained without this fold of the clips
    fold_of: Mapping[str, int] = field(default_factory=dict)  # clip id -> the fold that it is in

    def detector_of(self, clip_id: str) -> panns.Detector:
        """The detector that was not trained on the clip's recording, where there is such a one."""
        fold = self.fold_of.get(clip_id)
        return self.detector if fold is None else self.folds[fold]


@dataclass(frozen=True)
class Anchor:
    """A segment to be kept, before it has its query."""

    clip: ClipEntry
    mid: str
    window: Window
    pcm: Int16[np.ndarray, " time"]
    relative_energy: float  # of the segment, by that of the clip's loudest window


@lru_cache(maxsize=1)
def load_networks(sed: Path, sed_sha256: str, device: str) -> Networks:
    """Load the networks of the sed stage, once per process."""
    detector, encoder = panns.load_detector(sed / "detector"), panns.load_query_encoder(sed / "query")
    fold_of = read_json(sed / "folds" / "folds.json") if (sed / "folds").exists() else {}
    folds = {fold: panns.load_detector(sed / "folds" / str(fold)).to(device) for fold in set(fold_of.values())}
    return Networks(detector.to(device), encoder.to(device), folds, fold_of)


def find_anchors(
    clip: ClipEntry,
    waveform: Float32[np.ndarray, " time"],
    probability: Float32[np.ndarray, "frames classes"],
    position: Mapping[int, int],
    setup: Setup,
) -> Iterator[Anchor | tuple[str, str]]:
    """For each label of a clip its anchor, or (reason, mid) where there is none.

    `probability` has a frame for every 10 ms of the waveform, and `position` is the column of each class in it.
    """
    params, hop = setup.params, panns.FRAME_SAMPLES
    segment_frames = setup.segment_samples // hop
    pcm = np.rint(waveform * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    loudest = _loudest(pcm, setup.segment_samples)
    for mid in clip.labels:
        class_index = class_of(mid).index
        if class_index not in position:
            yield "unknown_class", mid
            continue
        if len(pcm) < setup.segment_samples and params.short == "skip":
            yield "short", mid
            continue
        column = position[class_index]
        if params.mode == "area":
            start = best_start(probability[:, column], width=_width(params), segment_frames=segment_frames)
        else:
            key = anchor_key(clip.clip_id, class_index)
            start = random_start(len(probability), segment_frames=segment_frames, seed=params.seed, key=key)
        related = _kin_mask(mid, tuple(position))
        found = window(probability, start, segment_frames=segment_frames, class_position=column, kin=related)
        segment = pcm[start * hop : start * hop + setup.segment_samples]
        segment = np.pad(segment, (0, setup.segment_samples - len(segment)))
        relative_energy = _energy(segment) / loudest if loudest else 0.0
        if found.score < params.min_score:
            yield "low_score", mid
        elif found.purity < params.min_purity:
            yield "low_purity", mid
        elif _energy(segment) <= SILENT_ENERGY:
            yield "silent", mid
        elif relative_energy < params.min_relative_energy:
            yield "low_energy", mid
        else:
            yield Anchor(clip, mid, found, segment, relative_energy)


def _width(params: MineAnchorsParams) -> int:
    """The smoothing box in frames."""
    return round(params.smoothing_seconds * NETWORK_SAMPLE_RATE / panns.FRAME_SAMPLES)


@cache
def _kin_mask(mid: str, class_indices: tuple[int, ...]) -> np.ndarray:
    return np.array([classes()[index].mid in kin(mid) for index in class_indices])


def _energy(pcm: Int16[np.ndarray, " time"]) -> float:
    # Integers: the same on any machine, and with it the gains, the pairs and their hash.
    return int(np.square(pcm.astype(np.int64)).sum()) / (len(pcm) * FULL_SCALE**2)


def _loudest(pcm: Int16[np.ndarray, " time"], segment_samples: int) -> float:
    """Energy of the loudest segment of a clip, among those that begin at a frame; of a shorter clip, padded."""
    total = np.concatenate([[0], np.cumsum(np.square(pcm.astype(np.int64)))])
    starts = np.arange(0, max(1, len(pcm) - segment_samples + 1), panns.FRAME_SAMPLES)
    ends = np.minimum(starts + segment_samples, len(pcm))
    return int(np.max(total[ends] - total[starts])) / (segment_samples * FULL_SCALE**2)


def mine_part(part: Part, directory: Path, *, setup: Setup) -> dict[str, str]:
    """Mine one shard of clips into a shard of anchors, whose SHA-256 is returned, and a list of what is in it and not.

    The networks see the clips in their order, `batch_size` at a time and at one length, so that not a bit depends on
    where or beside what the part is run.
    """
    networks = load_networks(setup.sed, setup.sed_sha256, setup.device)
    rows: dict[str, dict[str, Any]] = {}
    dropped: Counter[tuple[str, str]] = Counter()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for batch in _batches(part.clips, setup.params.batch_size):
            kept = list[Anchor]()
            for result in _mine_batch(batch, reader, networks, setup):
                if isinstance(result, Anchor):
                    kept.append(result)
                else:
                    dropped[result] += 1
            for some in _batches(kept, setup.params.batch_size):
                for anchor, query in zip(some, _embed(some, networks.encoder, setup), strict=True):
                    key, row, content = _sample(anchor, query)
                    rows[key] = row | {"shard": part.shard}
                    yield key, content

    reader = ShardReader(setup.clips)
    digest = sha256()
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        members = shards.write_shard(directory / part.shard, samples(), digest.update)
    for member in members:
        kind = {"wav": "wav", "npy": "query"}.get(member.ext)
        if kind:
            rows[member.key] |= {f"{kind}_offset": member.offset, f"{kind}_size": member.size}
    listed = [[reason, mid, count] for (reason, mid), count in sorted(dropped.items())]
    found = {"rows": list(rows.values()), "dropped": listed, "query_dim": networks.encoder.query_dim}
    write_json(directory / "anchors.json", found)
    return {part.shard: digest.hexdigest()}


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _mine_batch(
    batch: Sequence[ClipEntry], reader: ShardReader, networks: Networks, setup: Setup
) -> Iterator[Anchor | tuple[str, str]]:
    waveforms = list[np.ndarray]()
    padded = np.zeros((len(batch), setup.clip_samples), np.float32)
    for clip, row in zip(batch, padded, strict=True):
        waveform, rate = shards.decode_waveform(reader.read(clip.shard, clip.offset, clip.size))
        if rate != NETWORK_SAMPLE_RATE:
            raise ValueError(f"clip {clip.clip_id} is at {rate} Hz, not {NETWORK_SAMPLE_RATE}")
        waveforms.append(waveform[: setup.clip_samples])
        row[: len(waveforms[-1])] = waveforms[-1]
    detectors = [networks.detector_of(clip.clip_id) for clip in batch]
    frames = dict[int, np.ndarray]()  # by row
    for detector in dict.fromkeys(detectors):
        rows = [row for row, own in enumerate(detectors) if own is detector]
        segments = detector.framewise_probability(torch.from_numpy(padded[rows]).to(setup.device)).cpu()
        n_frames = setup.clip_samples // panns.FRAME_SAMPLES + 1
        probability = panns.to_frames(segments, segment_samples=detector.segment_samples, n_frames=n_frames)
        frames |= zip(rows, probability.numpy(), strict=True)
    for place, (clip, waveform, detector) in enumerate(zip(batch, waveforms, detectors, strict=True)):
        own = frames[place][: len(waveform) // panns.FRAME_SAMPLES + 1]  # the rest is the silence behind a short clip
        position = {index: column for column, index in enumerate(detector.class_indices)}
        yield from find_anchors(clip, waveform, own, position, setup)


def _embed(anchors: Sequence[Anchor], encoder: panns.QueryEncoder, setup: Setup) -> Float32[np.ndarray, "batch dim"]:
    waveform = np.stack([anchor.pcm for anchor in anchors]).astype(np.float32) / FULL_SCALE
    query = encoder.embed(torch.from_numpy(waveform).to(setup.device)).float().cpu().numpy()
    if not np.isfinite(query).all():
        bad = [a.clip.clip_id for a, q in zip(anchors, query, strict=True) if not np.isfinite(q).all()]
        raise ValueError(f"the query embedding of clip {bad[0]} is not finite")
    return query


def _sample(anchor: Anchor, query: Float32[np.ndarray, " dim"]) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    """Key, index row (without its place in the shard) and members of an anchor."""
    clip, found, of_class = anchor.clip, anchor.window, class_of(anchor.mid)
    key = anchor_key(clip.clip_id, of_class.index)
    wav = shards.encode_wav(anchor.pcm, NETWORK_SAMPLE_RATE)
    described = {
        "clip_id": clip.clip_id,
        "recording": clip.recording,
        "class_index": of_class.index,
        "mid": anchor.mid,
        "onset_seconds": found.start * panns.FRAME_SAMPLES / NETWORK_SAMPLE_RATE,
        "score": found.score,
        "purity": found.purity,
    }
    row = described | {
        "anchor": key,
        "labels": ";".join(clip.labels),
        "energy": _energy(anchor.pcm),
        "relative_energy": anchor.relative_energy,  # for the summary
        "peak": int(np.abs(anchor.pcm.astype(np.int64)).max()) / FULL_SCALE,
        "sha256": sha256(wav).hexdigest(),
    }
    described |= {"class_name": of_class.name, "labels": list(clip.labels)}
    return key, row, {"wav": wav, "npy": shards.encode_array(query), "json": shards.encode_json(described)}


def mine_anchors(clips: Path, sed: Path, out: Path, *, audio: AudioParams, params: MineAnchorsParams) -> dict[str, Any]:
    """Write the anchors directory of a split; return what was kept, and what was not and why."""
    shards.verify(clips, content=False)
    setup = _setup(clips, sed, audio=audio, params=params)
    parts = {name.replace("clips", "anchors"): list[ClipEntry]() for name in shards.read_index(clips)}
    for clip in sorted(ClipReader(clips, audio.sample_rate).clips.values(), key=lambda clip: clip.clip_id):
        parts[clip.shard.replace("clips", "anchors")].append(clip)

    run = fingerprint(audio, params, clips / "manifest.csv", clips / "shards.json", setup.sed_sha256, setup.device)
    scratch = scratch_dir(f"mine_anchors@{out.name}", run)
    directories = run_parts(
        partial(mine_part, setup=setup),
        {Path(name).stem: Part(name, tuple(entries)) for name, entries in parts.items()},
        scratch / "parts",
    )
    rows, dropped = list[dict[str, Any]](), dict[str, Counter[str]]()
    finished = scratch / "finished"
    remove(finished)
    finished.mkdir()
    query_dim = 0
    for name in parts:
        directory = directories[Path(name).stem]
        if (directory / name).exists():
            link_or_copy(directory / name, finished / name)
        listed = json.loads((directory / "anchors.json").read_bytes())
        rows += listed["rows"]
        query_dim = listed["query_dim"]
        for reason, mid, count in listed["dropped"]:
            dropped.setdefault(mid, Counter())[reason] += count
    if not rows:
        totals = dict(sum(dropped.values(), Counter()))
        raise ValueError(f"none of the labels of {clips} gave an anchor; dropped: {totals}")
    summary = _summary(rows, dropped)
    summary["clips"] = sum(map(len, parts.values()))
    write_index(
        finished,
        rows,
        sample_rate=NETWORK_SAMPLE_RATE,
        segment_samples=setup.segment_samples,
        query_dim=query_dim,
        empty_classes=sorted(dropped.keys() - {row["mid"] for row in rows}),
    )
    shards.write_index(finished, parts)
    publish(finished, out)
    shutil.rmtree(scratch)
    return summary


def _setup(clips: Path, sed: Path, *, audio: AudioParams, params: MineAnchorsParams) -> Setup:
    if audio.sample_rate != NETWORK_SAMPLE_RATE:
        raise ValueError(f"audio.sample_rate is {audio.sample_rate}; these networks hear {NETWORK_SAMPLE_RATE} Hz")
    segment_samples = round(audio.segment_seconds * audio.sample_rate)
    if segment_samples % panns.FRAME_SAMPLES:
        raise ValueError(f"audio.segment_seconds is {audio.segment_seconds}, not a whole number of 10-ms frames")
    if _width(params) % 2 == 0:
        raise ValueError(
            f"mine_anchors.smoothing_seconds is {params.smoothing_seconds}, {_width(params)} frames of 10 ms: "
            "a box around a frame has an odd number"
        )
    networks = [sed / part / file for part in ("detector", "query") for file in ("config.json", "weights.safetensors")]
    networks += sorted(path for path in (sed / "folds").rglob("*") if path.is_file())
    return Setup(
        clips=clips.absolute(),
        sed=sed.absolute(),
        sed_sha256=sha256("".join(map(sha256_file, networks)).encode()).hexdigest(),
        device=str(choose_device(params.device)),
        params=params,
        clip_samples=round(audio.clip_seconds * audio.sample_rate),
        segment_samples=segment_samples,
    )


def _summary(rows: Sequence[Mapping[str, Any]], dropped: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Counts, and the classes that were lost by name with the reasons."""
    kept = {row["mid"] for row in rows}
    totals = sum(dropped.values(), Counter[str]())
    return {
        "labels": len(rows) + totals.total(),  # of all clips together
        "anchors": len(rows),
        "classes": len(kept),
        "dropped": {reason: totals[reason] for reason in REASONS},
        "empty_classes": {class_of(mid).name: dict(dropped[mid]) for mid in dropped if mid not in kept},
        "unknown_classes": sorted(class_of(mid).name for mid in dropped if dropped[mid]["unknown_class"]),
        "score": _distribution([row["score"] for row in rows]),
        "purity": _distribution([row["purity"] for row in rows]),
        "relative_energy": _distribution([row["relative_energy"] for row in rows]),
    }


def _distribution(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median and the counts in ten bins of [0, 1]."""
    histogram, _ = np.histogram(np.clip(values, 0, 1), bins=10, range=(0, 1))
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "histogram": {f"{n / 10:.1f}": int(count) for n, count in enumerate(histogram)},  # by the bin's lower edge
    }


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="clips of one split")
    parser.add_argument("--sed", type=Path, required=True, help="detector and query encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    audio, params = load_params("audio", AudioParams), load_params("mine_anchors", MineAnchorsParams)
    if choose_device(params.device).type == "cuda":
        # One process feeds a GPU; more would each hold the networks there and take turns.
        os.environ.setdefault("USS_WORKERS", "0")
    with running(f"mine_anchors@{args.out.name}", args.out):
        summary = mine_anchors(args.clips, args.sed, args.out, audio=audio, params=params)
        write_json(args.summary, summary)
        log.info("%d anchors of %d labels, dropped %s", summary["anchors"], summary["labels"], summary["dropped"])
        for name, reasons in summary["empty_classes"].items():
            log.warning("%s is left without anchors: %s", name, reasons)


if __name__ == "__main__":
    run_command(main)
