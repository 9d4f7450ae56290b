"""Directories as the stages write them, small: clips with tones of known class, anchors cut from them, and songs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from pipeline.core import ontology
from pipeline.datasets import recording_of
from pipeline.mixtures import anchors, shards
from pipeline.nn import panns

SAMPLE_RATE = 32000
# Speech, Dog and Bell stand for three pitches.
PITCH_HZ = {"/m/09x0r": 300.0, "/m/0bt9lr": 900.0, "/m/0395lw": 2700.0}
MIDS = tuple(PITCH_HZ)


def tone(mid: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Int16: the class' pitch at a random level and phase, in faint noise."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    waveform = rng.uniform(0.1, 0.5) * np.sin(2 * np.pi * PITCH_HZ[mid] * t + rng.uniform(0, 6))
    return np.rint(32767 * (waveform + 0.01 * rng.standard_normal(len(t))).clip(-1, 1)).astype(np.int16)


def write_clips(directory: Path, n_per_class: int, *, seconds: float = 4.0, seed: int = 0) -> Path:
    """A clips directory (see `resample`): one class sounds in each clip's second half; the rest is faint noise."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    samples, rows = [], []
    for number in range(n_per_class):
        for mid in MIDS:
            clip_id = f"clip{seed}_{number}_{MIDS.index(mid)}"
            quiet = np.rint(30 * rng.standard_normal(round(seconds / 2 * SAMPLE_RATE))).astype(np.int16)
            pcm = np.concatenate([quiet, tone(mid, seconds / 2, rng)])
            samples.append((clip_id, {"wav": shards.encode_wav(pcm, SAMPLE_RATE)}))
            rows.append(
                {"clip_id": clip_id, "recording": clip_id, "labels": mid, "status": "ok", "duration_seconds": seconds}
            )
    place = {member.key: member for member in shards.write_shard(directory / "clips-00000.tar", samples)}
    for row in rows:
        member = place[row["clip_id"]]
        row |= {"shard": "clips-00000.tar", "offset": member.offset, "size": member.size}
    with (directory / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["clip_id"]))
    shards.write_index(directory)
    return directory


def write_sed(directory: Path, query_dim: int = 4) -> Path:
    """Detector and query encoder, with random weights, as stage sed writes them."""
    torch.manual_seed(0)
    indices = [ontology.class_of(mid).index for mid in MIDS]
    for part in ("detector", "query"):
        network = panns.SmallCnn(class_indices=indices, channels=[4, 4], embedding_dim=query_dim)
        panns.save(network, directory / part)
    return directory


def write_anchors(
    directory: Path, n_per_class: int, *, seconds: float = 0.25, query_dim: int = 4, seed: int = 0
) -> Path:
    """An anchors directory (see `mine_anchors`): a tone per anchor, and a query that tells the classes apart."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    samples, rows = [], []
    for mid in MIDS:
        index = ontology.class_of(mid).index
        for number in range(n_per_class):
            clip_id = f"clip{seed}_{number}_{MIDS.index(mid)}"
            pcm = tone(mid, seconds, rng)
            query = (np.arange(query_dim) == MIDS.index(mid)).astype(np.float32)
            key = anchors.anchor_key(clip_id, index)
            samples.append((key, {"wav": shards.encode_wav(pcm, SAMPLE_RATE), "npy": shards.encode_array(query)}))
            waveform = pcm / 32768
            rows.append(
                {
                    "anchor": key, "clip_id": clip_id, "recording": clip_id, "class_index": index, "mid": mid,
                    "labels": mid, "onset_seconds": 0.0, "score": 0.9, "purity": 0.9,
                    "energy": float(np.mean(waveform**2)), "peak": float(abs(waveform).max()),
                    "shard": "anchors-00000.tar", "sha256": "",
                }
            )  # fmt: skip
    place = {(m.key, m.ext): m for m in shards.write_shard(directory / "anchors-00000.tar", samples)}
    for row in rows:
        wav, query = place[row["anchor"], "wav"], place[row["anchor"], "npy"]
        row |= {"wav_offset": wav.offset, "wav_size": wav.size, "query_offset": query.offset, "query_size": query.size}
    anchors.write_index(
        directory,
        rows,
        sample_rate=SAMPLE_RATE,
        segment_samples=round(seconds * SAMPLE_RATE),
        query_dim=query_dim,
        empty_classes=[],
    )
    shards.write_index(directory)
    return directory


def write_sounds(
    directory: Path,
    sounds: Sequence[tuple[str, int, Sequence[int]]],
    *,
    seconds: float = 0.25,
    sample_rate: int = 8000,
    seed: int = 0,
) -> Path:
    """An anchors directory of (clip, class index, indices of all classes that the clip is labelled with).

    An anchor is a tone of its class' pitch in noise, all of them at levels of their own. Queries are zeros.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    present = sorted({index for _, index, _ in sounds})
    samples, rows = [], []
    for clip_id, index, labels in sounds:
        pitch = sample_rate / 2 * (present.index(index) + 1) / (len(present) + 1)
        waveform = rng.uniform(0.05, 0.5) * np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6))
        waveform += 0.01 * rng.standard_normal(len(time))
        pcm, query = np.rint(32767 * waveform.clip(-1, 1)).astype(np.int16), np.zeros(1, np.float32)
        key, mids = anchors.anchor_key(clip_id, index), [ontology.classes()[label].mid for label in labels]
        samples.append((key, {"wav": shards.encode_wav(pcm, sample_rate), "npy": shards.encode_array(query)}))
        rows.append(
            {
                "anchor": key, "clip_id": clip_id, "recording": recording_of(clip_id), "class_index": index,
                "mid": ontology.classes()[index].mid, "labels": ";".join(mids), "onset_seconds": 0.0, "score": 0.9,
                "purity": 0.9, "energy": float(np.mean(waveform**2)), "peak": float(abs(waveform).max()),
                "shard": "anchors-00000.tar", "sha256": "",
            }
        )  # fmt: skip
    place = {(m.key, m.ext): m for m in shards.write_shard(directory / "anchors-00000.tar", samples)}
    for row in rows:
        wav, query = place[row["anchor"], "wav"], place[row["anchor"], "npy"]
        row |= {"wav_offset": wav.offset, "wav_size": wav.size, "query_offset": query.offset, "query_size": query.size}
    sizes = {"sample_rate": sample_rate, "segment_samples": len(time), "query_dim": 1}
    anchors.write_index(directory, rows, **sizes, empty_classes=[])
    shards.write_index(directory)
    return directory


def write_recordings(
    directory: Path, waveforms: Mapping[str, np.ndarray], sample_rate: int, recordings: Mapping[str, str] | None = None
) -> Path:
    """A clips directory (see `resample`) of these waveforms by clip id; `recordings` names that of some clips."""
    directory.mkdir(parents=True)
    pcm = {clip_id: np.rint(32767 * w.clip(-1, 1)).astype(np.int16) for clip_id, w in waveforms.items()}
    samples = [(clip_id, {"wav": shards.encode_wav(w, sample_rate)}) for clip_id, w in pcm.items()]
    place = {member.key: member for member in shards.write_shard(directory / "clips-00000.tar", samples)}
    rows = [
        {
            **{"clip_id": clip_id, "recording": (recordings or {}).get(clip_id, clip_id), "labels": "", "status": "ok"},
            **{"duration_seconds": len(pcm[clip_id]) / sample_rate, "shard": "clips-00000.tar"},
            **{"offset": place[clip_id].offset, "size": place[clip_id].size},
        }
        for clip_id in sorted(pcm)
    ]
    with (directory / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shards.write_index(directory)
    return directory


def write_songs(root: Path, n_tracks: int, *, seconds: float = 2.0, sample_rate: int = 8000, seed: int = 0) -> Path:
    """Music for source `folder`: tracks of three stems that a filter tells apart, a low tone, a high one, and noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    for number in range(n_tracks):
        tones = {"bass": rng.uniform(100, 300), "vocals": rng.uniform(1000, 1800)}
        stems = {name: 0.3 * np.sin(2 * np.pi * hertz * time) for name, hertz in tones.items()}
        # Hits: noise without its low half, four times a second.
        noise = np.diff(rng.standard_normal(len(time)), n=2, prepend=[0, 0])
        stems["drums"] = 0.1 * noise * np.exp(-20 * (time % 0.25))
        for name, waveform in stems.items():
            path = root / f"song{number}" / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, waveform.clip(-1, 1), sample_rate, subtype="PCM_16")
    return root
