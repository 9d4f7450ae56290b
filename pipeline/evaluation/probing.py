"""The linear probe: how much of the class labels a linear reader finds in an encoder's features of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.core.config import Params
from pipeline.core.ontology import class_of
from pipeline.mixtures.shards import ClipReader
from pipeline.upstreams import Upstream, combine


class ProbeParams(Params):
    """Section `pretrain_mae.probe:` of params.yaml."""

    regularisation: float = Field(gt=0, le=10**6)  # C of the logistic regression
    bootstrap_resamples: int = Field(gt=1)
    batch_size: int = Field(gt=0, le=65_536)


@dataclass(frozen=True)
class Probe:
    """Mean average precision of a probe on the eval clips, its 95 % interval, and that of each resample of them."""

    mean_average_precision: float
    low: float
    high: float
    resampled: Float[np.ndarray, " resamples"]


def clip_features(
    upstream: Upstream, clips: ClipReader, *, clip_samples: int, batch_size: int, device: torch.device
) -> Float[np.ndarray, "clips twice_dim"]:
    """The last layer's features of each clip, their mean and their maximum over it; in the reader's order.

    Each clip is heard as long as it is: what would be padded behind it says nothing about it.
    """
    upstream.eval().to(device)
    by_length: dict[int, list[str]] = {}
    for clip_id in clips.clips:
        by_length.setdefault(min(clip_samples, len(clips.waveform(clip_id))), []).append(clip_id)
    found: dict[str, Float[np.ndarray, " dim"]] = {}
    for samples, members in sorted(by_length.items()):
        for first in range(0, len(members), batch_size):
            some = members[first : first + batch_size]
            waveform = torch.from_numpy(np.stack([clips.waveform(clip_id)[:samples] for clip_id in some]))
            waveform = F.pad(waveform, (0, max(0, 1600 - samples))).to(device)  # 50 ms: a window of every front end
            with torch.inference_mode():
                h = combine(upstream, upstream.hidden(waveform), "last").float()
                pooled = torch.cat([h.mean(dim=1), h.amax(dim=1)], dim=1)  # an event may be short
            found |= dict(zip(some, pooled.cpu().numpy(), strict=True))
    return np.stack([found[clip_id] for clip_id in clips.clips])


def labels(clips: ClipReader, class_indices: Sequence[int]) -> Bool[np.ndarray, "clips classes"]:
    """Which of the classes each clip carries."""
    sets = [{class_of(mid).index for mid in clip.labels} for clip in clips.clips.values()]
    return np.array([[index in carried for index in class_indices] for carried in sets])


def class_indices(clips: ClipReader) -> set[int]:
    """The classes that occur in the clips."""
    return {class_of(mid).index for clip in clips.clips.values() for mid in clip.labels}


def linear_probe(
    train_features: Float[np.ndarray, "train dim"],
    train_labels: Bool[np.ndarray, "train classes"],
    eval_features: Float[np.ndarray, "eval dim"],
    eval_labels: Bool[np.ndarray, "eval classes"],
    recordings: Sequence[str],
    params: ProbeParams,
) -> Probe:
    """Fit one logistic regression per class on standardised features; the mean of their average precisions on eval.

    Classes without a positive or a negative in train, or without a positive in eval, do not count: ValueError if none
    does. The interval is that of a bootstrap over the eval clips' `recordings`, whose clips come and go together, the
    same resamples for every encoder.
    """
    usable = [
        j
        for j in range(train_labels.shape[1])
        if 0 < train_labels[:, j].sum() < len(train_labels) and eval_labels[:, j].any()
    ]
    if not usable:
        raise ValueError("no class has positives and negatives in train and positives in eval: nothing to probe")
    scaler = StandardScaler().fit(train_features)
    x, y = scaler.transform(train_features), scaler.transform(eval_features)
    scores = np.stack(
        [
            LogisticRegression(C=params.regularisation, max_iter=1000).fit(x, train_labels[:, j]).decision_function(y)
            for j in usable
        ],
        axis=1,
    )
    truth = eval_labels[:, usable]
    names, member = np.unique(np.asarray(recordings, str), return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=params.bootstrap_resamples
    )
    counts = np.concatenate([np.ones((1, len(truth)), int), drawn[:, member]])
    found = np.nanmean([average_precision(truth[:, k], scores[:, k], counts) for k in range(len(usable))], axis=0)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return Probe(float(found[0]), float(low), float(high), found[1:])


def average_precision(
    truth: Bool[np.ndarray, " clips"], scores: Float[np.ndarray, " clips"], counts: Int[np.ndarray, "resamples clips"]
) -> Float[np.ndarray, " resamples"]:
    """Average precision of each resample, in which clip i is `counts[r, i]` times; NaN for one without a positive.

    The sum over the distinct scores of precision times the recall gained, as scikit-learn has it, which takes one
    resample at a time and sorts anew for each: with it the bootstrap took longer than everything else in a probe.
    """
    order = np.argsort(-scores)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of equal scores
    last = last[np.diff(truth[order].cumsum()[last], prepend=0) > 0]  # elsewhere no recall is gained
    drawn = counts[:, order]
    positives = (drawn * truth[order]).cumsum(axis=1)[:, last]
    clips = drawn.cumsum(axis=1)[:, last]
    precision = positives / np.maximum(clips, 1)
    gained = np.diff(positives, axis=1, prepend=0)
    total = gained.sum(axis=1)
    return np.where(total > 0, (gained * precision).sum(axis=1) / np.maximum(total, 1), np.nan)


def probe_upstreams(
    upstreams: Sequence[Upstream],
    train: ClipReader,
    evaluation: ClipReader,
    params: ProbeParams,
    *,
    clip_samples: int,
    device: torch.device,
) -> list[Probe]:
    """One probe per encoder, on the same clips, classes and resamples."""
    known = sorted(class_indices(train) & class_indices(evaluation))
    recordings = [clip.recording for clip in evaluation.clips.values()]
    found = []
    for upstream in upstreams:
        both = [
            clip_features(upstream, clips, clip_samples=clip_samples, batch_size=params.batch_size, device=device)
            for clips in (train, evaluation)
        ]
        found.append(
            linear_probe(both[0], labels(train, known), both[1], labels(evaluation, known), recordings, params)
        )
    return found


def described(probe: Probe) -> dict[str, float]:
    """The probe as JSON for a stage's summary."""
    return {
        "mean_average_precision": round(probe.mean_average_precision, 6),
        "ci_lo": round(probe.low, 6),
        "ci_hi": round(probe.high, 6),
    }


def difference(after: Probe, before: Probe) -> dict[str, float]:
    """After less before, with the interval of the paired resamples."""
    low, high = np.quantile(after.resampled - before.resampled, [0.025, 0.975])
    value = after.mean_average_precision - before.mean_average_precision
    return {"mean_average_precision": round(value, 6), "ci_lo": round(float(low), 6), "ci_hi": round(float(high), 6)}
