"""Mixture-invariant training: what its entries of params.yaml say, the data they meet, and their loss.

An entry learns from music (`mixit_music:`, at music.sample_rate) or from the chain's own clips (`mixit_clips:`). It
sees sums of two mixtures. These are recordings as they are (`mixtures: whole`: full mixes, pieces of clips), and then
stems and anchors are for evaluation alone; or they are added up from isolated sources (`subsets`: stems, anchors).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import Params, load_params
from pipeline.core.devices import Precision, autocast
from pipeline.core.runtime import outside, read_json
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.moms import AnchorMoms, ClipMoms, Moms, Part
from pipeline.mixtures.shards import ClipReader
from pipeline.mixtures.tracks import Mixtures, MomBatch, MomStream, MusicParams, SegmentReader, index_file, of_split
from pipeline.nn.losses import Objective, Search, diversity_loss, mixit_loss, sparsity_loss
from pipeline.separators import BlindSeparator, model_params, takes_query

# First words after the seed of the streams: they share no draws.
TRAIN, VALIDATION, TEST, SINGLE, BUCKET = range(5)

Source = Literal["music", "clips"]
Split = Literal["train", "validation", "test"]


class MixitParams(Params):
    """`mixit:` in params.yaml: what all entries share."""

    seed: int = Field(ge=0, lt=2**31)
    loss: Objective
    max_snr_db: float = Field(gt=0, le=200)
    search: Search
    mom_snr_range: list[float] = Field(min_length=2, max_length=2)
    max_stems: int = Field(ge=1, le=64)
    random_subsets: bool
    batch_size: int = Field(gt=0, le=65_536)
    learning_rate: float = Field(gt=0, le=1)
    final_learning_rate: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(ge=0)
    redraw_every_steps: int = Field(ge=0)
    validate_every_steps: int | None = Field(gt=0)  # None: once an epoch
    n_validation_moms: int = Field(gt=0, le=10**6)
    patience: int = Field(ge=0)
    precision: Precision
    device: Literal["auto", "cpu", "cuda"]
    log_every_steps: int = Field(gt=0)
    checkpoint_every_seconds: float = Field(gt=0)


class EntryParams(Params):
    """One entry of `mixit_music:` or `mixit_clips:`; `model` is a place in params.yaml, as mixit_models.performer."""

    architecture: str
    model: str
    mixtures: Mixtures
    segment_seconds: list[Annotated[float, Field(gt=0, le=3600)]] | None = Field(min_length=1)
    epochs: float = Field(gt=0, le=10**6)
    pretrained: bool
    diversity: float = Field(ge=0)
    sparsity: float = Field(ge=0)
    sparsity_form: Literal["report", "l1l2"]


class PretrainPerformerParams(Params):
    """Section `pretrain_performer:` of params.yaml."""

    model: str
    segment_seconds: float | None = Field(gt=0, le=3600)
    seed: int = Field(ge=0, lt=2**31)
    epochs: float = Field(gt=0, le=10**6)
    batch_size: int = Field(gt=0, le=65_536)
    learning_rate: float = Field(gt=0, le=1)
    final_learning_rate: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(ge=0)
    mask_mode: Literal["token", "zero", "noise", "drop"]
    mask_ratio: float = Field(gt=0, lt=1)
    mask_span: int = Field(ge=1, le=10**6)
    target: Literal["logmag", "wave"]
    loss_on: Literal["masked", "all"]
    redraw_every_steps: int = Field(ge=0)
    validate_every_steps: int | None = Field(gt=0)
    n_validation_mixtures: int = Field(gt=0, le=10**6)
    patience: int = Field(ge=0)
    precision: Precision
    device: Literal["auto", "cpu", "cuda"]
    log_every_steps: int = Field(gt=0)
    checkpoint_every_seconds: float = Field(gt=0)


@dataclass(frozen=True)
class Entry:
    """An entry with all that it points to."""

    name: str
    data: Source
    params: EntryParams
    model: dict[str, Any]  # arguments of the separator but sample_rate


def read_entry(name: str, data: Source, path: Path = Path("params.yaml")) -> Entry:
    """An entry of `mixit_<data>:`; ValueError names what does not fit."""
    params = load_params(f"mixit_{data}.{name}", EntryParams, path)
    if takes_query(params.architecture):
        raise ValueError(f"mixit_{data}.{name}.architecture: {params.architecture!r} needs a query")
    if params.pretrained and data == "clips":
        raise ValueError(f"mixit_{data}.{name}.pretrained: the pretraining hears music; false is for clips")
    model = load_params(params.model, model_params(params.architecture), path).model_dump()
    return Entry(name, data, params, model)


@dataclass(frozen=True)
class Streams:
    """The data of one entry, one stream per segment length."""

    sample_rate: int
    seconds: Sequence[float]  # of the segments
    moms: Sequence[Moms]
    epoch_seconds: float  # of audio in one pass through all segments

    def steps(self, epochs: float, batch_size: int) -> int:
        """Steps of `batch_size` mixtures of mixtures that hear as much audio as so many epochs, at least one."""
        return max(1, ceil(epochs * self.epoch_seconds / (2 * batch_size * float(np.mean(self.seconds)))))

    def check_batch(self, batch_size: int, name: str) -> None:
        """ValueError naming the parameter where one batch of mixtures of mixtures is more than an epoch of audio."""
        fits = int(self.epoch_seconds / (2 * float(np.mean(self.seconds))))
        if batch_size > max(1, fits):
            raise ValueError(
                f"{name}.batch_size is {batch_size}: all of its training data make {fits}; say that or less"
            )

    def bucket(self, n: int, seed: int) -> int:
        """Which length batch n is of: all of its items, so that nothing is padded."""
        return int(np.random.default_rng([seed, BUCKET, n]).integers(len(self.moms)))

    def load(self, n: int, seed: int) -> MomBatch:
        """Batch n of training."""
        return self.moms[self.bucket(n, seed)].batch(n)

    def describe(self, n: int, seed: int) -> str:
        """Where it comes from."""
        return ", ".join(f"{a} + {b}" for a, b in self.moms[self.bucket(n, seed)].describe(n))


def music_streams(
    index: Path,
    split: Split,
    music: MusicParams,
    *,
    seconds: Sequence[float] | None,
    seed: int,
    batch_size: int,
    mixtures: Mixtures,
    max_stems: int,
    snr_range: Sequence[float],
    random_subsets: bool,
    fixed: bool,
) -> Streams:
    """Streams from the index of stage index_music; `seconds` None is all lengths that there are.

    ValueError for a length that was not indexed.
    """
    lengths = list(music.segment_seconds if seconds is None else seconds)
    if missing := [length for length in lengths if length not in music.segment_seconds]:
        raise ValueError(f"segments of {missing[0]:g} s were not indexed: music.segment_seconds has no {missing[0]:g}")
    root = outside(music.root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"music.root {music.root!r} is not a directory now. If the tracks have moved, set music.root; if they were "
            "generated, make them again with `dvc repro --force index_music`"
        )
    moms: list[Moms] = []
    heard = 0.0
    for length in lengths:
        manifest = of_split(pd.read_parquet(index_file(index, length)), split)
        heard = heard or len(manifest) * (length if music.hop_seconds is None else music.hop_seconds)
        reader = SegmentReader(root, manifest, music.sample_rate)
        moms.append(
            MomStream(
                manifest,
                reader,
                seed=seed,
                segment_samples=round(length * music.sample_rate),
                batch_size=batch_size,
                mixtures=mixtures,
                max_stems=max_stems,
                snr_range=(snr_range[0], snr_range[1]),
                random_subsets=random_subsets,
                random_offsets=music.split != "report",
                fixed=fixed,
            )
        )
    return Streams(music.sample_rate, lengths, moms, heard)


def anchor_streams(
    anchors: Path,
    part: Part,
    *,
    seconds: Sequence[float] | None,
    seed: int,
    batch_size: int,
    max_stems: int,
    snr_range: Sequence[float],
    random_subsets: bool,
    n_items: int | None,
) -> Streams:
    """Streams from one split of stage mine_anchors; `seconds` None is whole anchors."""
    index = AnchorIndex.load(anchors)
    reader = AnchorReader(anchors, index)
    whole = index.segment_samples / index.sample_rate
    lengths = [whole] if seconds is None else list(seconds)
    moms = [
        AnchorMoms(
            reader,
            seed=seed,
            segment_samples=round(length * index.sample_rate),
            batch_size=batch_size,
            max_stems=max_stems,
            snr_range=(snr_range[0], snr_range[1]),
            random_subsets=random_subsets,
            part=part,
            n_items=n_items,
        )
        for length in lengths
    ]
    return Streams(index.sample_rate, lengths, moms, moms[0].n_anchors * whole)


def clip_streams(
    clips: Path,
    anchors: Path,
    part: Part,
    *,
    seconds: Sequence[float] | None,
    seed: int,
    batch_size: int,
    snr_range: Sequence[float],
    n_items: int | None,
) -> Streams:
    """Streams of clips as they are, from one split of stage resample.

    The `anchors` of the same split say the rate, and the length where `seconds` is None: what is scored has it.
    """
    index = AnchorIndex.load(anchors)
    lengths = [index.segment_samples / index.sample_rate] if seconds is None else list(seconds)
    reader = ClipReader(clips, index.sample_rate)
    moms = [
        ClipMoms(
            reader,
            seed=seed,
            segment_samples=round(length * index.sample_rate),
            batch_size=batch_size,
            snr_range=(snr_range[0], snr_range[1]),
            part=part,
            n_items=n_items,
        )
        for length in lengths
    ]
    return Streams(index.sample_rate, lengths, moms, moms[0].seconds)


def seed_of(seed: int, purpose: int) -> int:
    """A seed of its own for each purpose."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def training_losses(
    separator: BlindSeparator, mixtures: Tensor, entry: EntryParams, params: MixitParams, device: torch.device
) -> dict[str, Tensor]:
    """Compute the terms of the loss of a batch of mixtures (batch, 2, time) by name (eq. 10 of the report).

    They are MixIT's, and the entry's diversity and sparsity where these have a weight.
    """
    mixtures = mixtures.to(device, non_blocking=True)
    mixture = mixtures.sum(dim=1)
    with autocast(device, params.precision):
        estimates, masks = separator.separate(mixture)
    estimates = estimates.float()
    found = mixit_loss(estimates, mixtures, objective=params.loss, max_snr_db=params.max_snr_db, search=params.search)
    terms = {"mixit": found.loss.mean()}
    if entry.diversity:
        terms["diversity"] = diversity_loss(masks).mean()
    if entry.sparsity:
        terms["sparsity"] = sparsity_loss(estimates, mixture, entry.sparsity_form).mean()
    return terms


def loss_weights(entry: EntryParams) -> dict[str, float]:
    """Weights of the terms of `training_losses`."""
    return {"mixit": 1.0, "diversity": entry.diversity, "sparsity": entry.sparsity}


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; biases, norms and other vectors do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int, final: float) -> float:
    """Linear over the warm-up, and half a cosine from 1 to `final`: lr_min + 1/2 (lr - lr_min)(1 + cos(pi t / T))."""
    cosine = final + 0.5 * (1 - final) * (1 + float(np.cos(np.pi * step / steps)))
    return cosine * min(1.0, (step + 1) / (warmup_steps + 1))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a trained entry."""
    config: dict[str, Any] = read_json(directory / "config.json")
    return config
