"""Stage sed: the sound event detector that says *when* a clip's label sounds, and the query encoder.

With `weights` (PANNs Cnn14_DecisionLevelMax) and `query_weights` (Cnn14) the published networks are checked and
converted. Without, a small network of the same family is trained here on the weak labels of the train split and plays
the missing part. Either way the stage reports the detector's mean average precision on the eval split.

    data/clips/train ──(log-mel, once)──> small network ──┐
    *.pth ──(size, sha256, weights_only)──────────────────┴──> <out>/detector, <out>/query ──> mAP on data/clips/eval

A small detector is surer of the clips that it was trained on than of others. With `folds`, the recordings of the train
split are dealt into as many folds, and a further detector is trained without each: <out>/folds/<fold>, and
<out>/folds/folds.json says which clip is in which fold. Stage mine_anchors cuts a clip with the detector that has not
seen its recording.
"""

import argparse
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from pydantic import Field, field_validator
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from pipeline.core.config import AudioParams, Params, Sha256, load_params
from pipeline.core.devices import choose_device, go_on_alike, use_available_cores, use_precision
from pipeline.core.ontology import class_of, classes
from pipeline.core.runtime import fingerprint, keep_freed_memory, publish, run_command, running, scratch_dir, write_json
from pipeline.core.weights import read_tensors
from pipeline.mixtures.shards import ClipEntry, ClipReader
from pipeline.nn import panns
from pipeline.nn.features import MEL_FLOOR, MEL_HOP_LENGTH, N_MELS
from pipeline.nn.features import SAMPLE_RATE as NETWORK_SAMPLE_RATE
from pipeline.nn.panns import Detector, SmallCnn
from pipeline.training.loop import build_optimizer, fit, learning_rate_factor, rows_on_disk, write_curve

log = logging.getLogger(__name__)

SILENCE_DB = 10 * float(np.log10(MEL_FLOOR))
CLIPS_PER_BATCH = 8  # of inference; the network sees each clip by itself, so it changes nothing but the speed


class SedParams(Params):
    """Section `sed:` of params.yaml."""

    weights: str | None
    weights_sha256: Sha256 | None
    query_weights: str | None
    query_weights_sha256: Sha256 | None
    seed: int = Field(ge=0, lt=2**31)
    channels: list[Annotated[int, Field(gt=0, le=16_384)]] = Field(min_length=1, max_length=16)
    embedding_dim: int = Field(gt=0, le=16_384)
    steps: int = Field(gt=0, le=10**9)
    folds: int = Field(ge=0, le=100)  # 0: none; a single fold would leave nothing to train on
    fold_steps: int = Field(gt=0, le=10**9)
    batch_size: int = Field(gt=0, le=65_536)
    learning_rate: float = Field(gt=0, le=1)
    warmup_steps: int = Field(ge=0, le=10**9)
    mixup: float = Field(ge=0, le=1)
    gain_db: float = Field(ge=0, le=100)
    device: Literal["auto", "cpu", "cuda"]

    @field_validator("folds")
    @classmethod
    def _not_one(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves no clips to train its detector on; 0 (none) or at least 2")
        return folds


class WeakLabels:
    """Log-mels and weak labels of a split's clips; the log-mels lie in a file, as many as there may be.

    log_mel  (clips, frames, mels) float16, in dB; what is behind the end of a short clip is silence
    labels   (clips, classes) bool, in the order of `class_indices`
    """

    def __init__(self, clips: ClipReader, class_indices: list[int], file: Path, *, clip_samples: int) -> None:
        column = {index: j for j, index in enumerate(class_indices)}
        self.class_indices = list(class_indices)
        self.clip_ids = list(clips.clips)
        self.labels = np.zeros((len(self.clip_ids), len(class_indices)), bool)
        for i, clip_id in enumerate(self.clip_ids):
            for mid in clips.clips[clip_id].labels:
                if (index := class_of(mid).index) in column:
                    self.labels[i, column[index]] = True
        n_frames = clip_samples // MEL_HOP_LENGTH + 1
        self.log_mel = rows_on_disk(file, (len(self.clip_ids), n_frames, N_MELS), np.float16)
        network = SmallCnn(class_indices=[0], channels=[1], embedding_dim=1)  # its front end
        with torch.inference_mode():
            for i, waveform in enumerate(waveforms(clips, clip_samples)):
                self.log_mel[i] = network.log_mel(waveform[None])[0, :n_frames].numpy()

    def only(self, rows: Bool[np.ndarray, " clips"]) -> "WeakLabels":
        """The labels of these clips alone, with the classes that occur there: the batches then hold no other clip."""
        restricted = copy(self)
        labels = self.labels & rows[:, None]
        present = labels.any(axis=0)
        restricted.labels = labels[:, present]
        restricted.class_indices = [self.class_indices[j] for j in np.flatnonzero(present)]
        return restricted

    def batch(
        self, n: int, *, size: int, seed: int, mixup: float, gain_db: float
    ) -> tuple[Float[Tensor, "batch frames mels"], Float[Tensor, "batch classes"]]:
        """Batch n, a pure function of (seed, n): a class, then a clip that carries it, each with equal chances.

        Augmented by rolling in time, by a gain within +-gain_db, and with probability `mixup` by adding another item's
        power: a mixture carries the labels of both.
        """
        rng = np.random.default_rng([seed, n])
        present = np.flatnonzero(self.labels.any(axis=0))
        rows = np.array([rng.choice(np.flatnonzero(self.labels[:, j])) for j in rng.choice(present, size)])
        shifts = rng.integers(self.log_mel.shape[1], size=size)
        log_mel = torch.from_numpy(
            np.stack([np.roll(self.log_mel[row], shift, axis=0) for row, shift in zip(rows, shifts, strict=True)])
        ).float()
        labels = torch.from_numpy(self.labels[rows]).float()
        log_mel += torch.from_numpy(rng.uniform(-gain_db, gain_db, size)).float()[:, None, None]
        mixed = torch.from_numpy(rng.random(size) < mixup)
        # 10 log10(10^(a/10) + 10^(b/10))
        other = torch.logaddexp(log_mel * np.log(10) / 10, log_mel.roll(1, 0) * np.log(10) / 10) * 10 / np.log(10)
        log_mel = torch.where(mixed[:, None, None], other, log_mel).clamp(min=SILENCE_DB)
        labels = torch.where(mixed[:, None], torch.maximum(labels, labels.roll(1, 0)), labels)
        return log_mel, labels


def waveforms(clips: ClipReader, clip_samples: int) -> Iterator[Float[Tensor, " time"]]:
    """Every clip in the reader's order, cut or padded with silence to one length."""
    for clip_id in clips.clips:
        waveform = torch.from_numpy(clips.waveform(clip_id)[:clip_samples])
        yield F.pad(waveform, (0, clip_samples - len(waveform)))


def deal(clips: Iterable[ClipEntry], n_folds: int) -> dict[str, int]:
    """The fold of every clip, by clip id: all clips of a recording in one, and every class spread over all of them.

    Recordings with rare classes are dealt first, each to the fold that has the least of its classes. The same clips
    are dealt alike in any order.
    """
    of_recording: dict[str, list[ClipEntry]] = {}
    for clip in clips:
        of_recording.setdefault(clip.recording, []).append(clip)
    labels = {name: sorted(mid for clip in own for mid in clip.labels) for name, own in of_recording.items()}
    total = Counter(mid for own in labels.values() for mid in own)
    held = [Counter[str]() for _ in range(n_folds)]
    fold_of = dict[str, int]()
    for name in sorted(labels, key=lambda name: (min((total[mid] for mid in labels[name]), default=0), name)):
        shares = [(sum(counts[mid] / total[mid] for mid in labels[name]), counts.total()) for counts in held]
        fold = shares.index(min(shares))
        held[fold].update(labels[name])
        fold_of |= {clip.clip_id: fold for clip in of_recording[name]}
    return fold_of


def train_folds(data: WeakLabels, clips: ClipReader, params: SedParams, scratch: Path, out: Path) -> dict[str, Any]:
    """Write a detector per fold that was trained without it, and folds.json; return what the summary says of them.

    A clip is left out of folds.json if its fold's detector does not know all of its labels, as where a class has only
    one recording.
    """
    fold_of = deal(clips.clips.values(), params.folds)
    folds = np.array([fold_of[clip_id] for clip_id in data.clip_ids])
    unseen = dict[str, int]()
    for fold in range(params.folds):
        others = data.only(folds != fold)
        if not others.class_indices:
            continue  # all labelled clips are of one recording
        name = f"fold{fold}"
        places = {"scratch": scratch / name, "curve": scratch / f"{name}.csv"}
        detector = train_small(others, params, steps=params.fold_steps, **places)
        panns.save(detector, out / str(fold))
        for clip_id, clip in clips.clips.items():
            if fold_of[clip_id] == fold and {class_of(mid).index for mid in clip.labels} <= set(others.class_indices):
                unseen[clip_id] = fold
    write_json(out / "folds.json", unseen)
    return {"folds": params.folds, "clips_unseen": len(unseen), "clips_seen": len(clips.clips) - len(unseen)}


def train_small(data: WeakLabels, params: SedParams, *, steps: int, scratch: Path, curve: Path) -> SmallCnn:
    """Train the small network on these weak labels."""
    torch.manual_seed(params.seed)
    network = SmallCnn(class_indices=data.class_indices, channels=params.channels, embedding_dim=params.embedding_dim)
    device = choose_device(params.device)
    network.to(device)

    def load(n: int) -> tuple[Tensor, Tensor]:
        return data.batch(n, size=params.batch_size, seed=params.seed, mixup=params.mixup, gain_db=params.gain_db)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        log_mel, labels = (tensor.to(device) for tensor in batch)
        return F.binary_cross_entropy_with_logits(network(log_mel), labels)

    warmup = [[0.0, 0.1], [float(params.warmup_steps), 1.0]] if params.warmup_steps else [[0.0, 1.0]]
    fit(
        network,
        build_optimizer("adam", network.parameters(), params.learning_rate),
        load,
        loss,
        steps=steps,
        learning_rate=lambda n: learning_rate_factor(n, warmup=warmup, decay="cosine", steps=steps),
        gradient_clip=0.0,
        seed=params.seed,
        describe=lambda n: f"number {n} of seed {params.seed}",
        scratch=scratch,
        curve=curve,
        log_every_steps=10,
        checkpoint_every_seconds=60.0,
    )
    return network.cpu()


def mean_average_precision(detector: Detector, clips: ClipReader, *, clip_samples: int) -> dict[str, Any]:
    """mAP of the clip-wise maximum over the classes that occur in `clips` and that the detector knows.

    `unknown_classes` are those that occur but that it does not know.
    """
    device = next(p.device for p in detector.parameters())
    scores, batch = list[NDArray[np.float32]](), list[Tensor]()
    total = len(clips.clips)
    with torch.inference_mode():
        for number, waveform in enumerate(waveforms(clips, clip_samples), start=1):
            batch.append(waveform)
            if len(batch) == CLIPS_PER_BATCH or number == total:
                probability = detector.framewise_probability(torch.stack(batch).to(device))
                scores.append(probability.amax(dim=1).cpu().numpy())
                batch = []
    score = np.concatenate(scores)
    labels = [{class_of(mid).index for mid in clip.labels} for clip in clips.clips.values()]
    occurring = sorted(set().union(*labels))
    known = [j for j in occurring if j in detector.class_indices]
    if not known:
        raise ValueError("the detector knows none of the classes of the eval split")
    truth = np.array([[j in present for j in known] for present in labels])
    columns = [detector.class_indices.index(j) for j in known]
    precision = [float(average_precision_score(truth[:, k], score[:, c])) for k, c in enumerate(columns)]
    names = {c.index: c.name for c in classes()}
    return {
        "mean_average_precision": float(np.mean(precision)),
        "average_precision": {names[j]: p for j, p in zip(known, precision, strict=True)},
        "n_clips": total,
        "n_classes": len(known),
        "unknown_classes": [names[j] for j in occurring if j not in known],
    }


def sed(
    train: Path, evaluation: Path, out: Path, curve: Path, *, audio: AudioParams, params: SedParams
) -> dict[str, Any]:
    """Write `<out>/detector`, `<out>/query` and `<out>/folds`; return the detector's scores on the eval clips."""
    if audio.sample_rate != NETWORK_SAMPLE_RATE:
        raise ValueError(f"audio.sample_rate is {audio.sample_rate}; these networks hear {NETWORK_SAMPLE_RATE} Hz")
    keep_freed_memory()
    use_available_cores()
    use_precision("fp32")
    clip_samples = round(audio.clip_seconds * audio.sample_rate)
    scratch = scratch_dir("sed", fingerprint(audio, params, train / "manifest.csv", evaluation / "manifest.csv"))
    go_on_alike(scratch, choose_device(params.device), "fp32")
    small: SmallCnn | None = None
    cross_fitted: dict[str, Any] = {"folds": 0}
    if params.weights is None or params.query_weights is None:
        clips = ClipReader(train, audio.sample_rate)
        class_indices = sorted({class_of(mid).index for clip in clips.clips.values() for mid in clip.labels})
        data = WeakLabels(clips, class_indices, scratch / "log_mel.npy", clip_samples=clip_samples)
        small = train_small(data, params, steps=params.steps, scratch=scratch, curve=curve)
        if params.weights is None and params.folds:
            cross_fitted = train_folds(data, clips, params, scratch, scratch / "finished" / "folds")
    else:
        write_curve(curve, [])
    networks: dict[str, nn.Module] = {}
    for part, weights, sha256, published in (
        ("detector", params.weights, params.weights_sha256, panns.PannsDetector),
        ("query", params.query_weights, params.query_weights_sha256, panns.PannsQueryEncoder),
    ):
        if weights is None:
            assert small is not None
            networks[part] = small
        else:
            networks[part] = published(read_tensors(Path(weights), sha256=sha256, entry="model"))
        panns.save(networks[part], scratch / "finished" / part)
    detector = networks["detector"]
    assert isinstance(detector, Detector)
    detector.eval().to(choose_device(params.device))
    summary = mean_average_precision(detector, ClipReader(evaluation, audio.sample_rate), clip_samples=clip_samples)
    summary["detector"] = "small" if params.weights is None else Path(params.weights).name
    summary["query"] = "small" if params.query_weights is None else Path(params.query_weights).name
    summary["cross_fitted"] = cross_fitted  # the detectors that cut the anchors of the train split
    publish(scratch / "finished", out)
    shutil.rmtree(scratch)
    return summary


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="clips of the train split")
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation", help="clips of the eval split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    parser.add_argument("--curve", type=Path, required=True)
    args = parser.parse_args()
    audio, params = load_params("audio", AudioParams), load_params("sed", SedParams)
    with running("sed", args.out):
        summary = sed(args.train, args.evaluation, args.out, args.curve, audio=audio, params=params)
        write_json(args.summary, summary)
        log.info("mAP %.3f over %d classes", summary["mean_average_precision"], summary["n_classes"])


if __name__ == "__main__":
    run_command(main)
