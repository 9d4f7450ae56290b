"""Pretraining of an audio masked autoencoder: its data, its steps, and how well it fills in what it does not see.

Filter banks are computed once, and kept in a file. A change of the waveform's magnitude, the released augmentation, is
added to them: 20 log g in the log domain, exact but within 4 dB of the floor.
"""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.core.config import Params, Sha256
from pipeline.core.devices import Precision, autocast
from pipeline.evaluation.probing import ProbeParams
from pipeline.mixtures.shards import ClipReader
from pipeline.nn.fbank import FLOOR, HOP_SAMPLES, N_MELS, PADDING, STD, WINDOW_SAMPLES, fbank, normalise, to_16k
from pipeline.training.loop import fit, rows_on_disk
from pipeline.upstreams.mae import (
    BANDS,
    MAX_FRAMES,
    PATCH,
    Decoder,
    Encoder,
    MaskedAutoencoder,
    PublishedFormat,
    normalised_patches,
    patches,
    unpatched,
)

FLOOR_VALUE = float(normalise(torch.tensor(FLOOR).log()))
EVAL_BATCH = 8


class ModelParams(Params):
    """`pretrain_mae.model:` in params.yaml: the sizes."""

    dim: int = Field(gt=0, le=16_384)
    depth: int = Field(gt=0, le=128)
    heads: int = Field(gt=0, le=1024)
    mlp_ratio: float = Field(gt=0, le=64)
    decoder: Decoder
    decoder_dim: int = Field(gt=0, le=16_384)
    decoder_depth: int = Field(gt=0, le=128)
    decoder_heads: int = Field(gt=0, le=1024)


class PretrainParams(Params):
    """Section `pretrain_mae:` of params.yaml."""

    weights: str | None
    weights_sha256: Sha256 | None
    weights_format: PublishedFormat
    model: ModelParams
    seed: int = Field(ge=0, lt=2**31)
    steps: int = Field(gt=0, le=10**9)
    batch_size: int = Field(gt=0, le=65_536)
    learning_rate: float = Field(gt=0, le=1)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    mask_ratio: float = Field(gt=0, lt=1)
    frames: int = Field(gt=0, le=MAX_FRAMES, multiple_of=PATCH)
    magnitude: bool
    roll: bool
    short: Literal["pad", "repeat"]
    precision: Precision
    device: Literal["auto", "cpu", "cuda"]
    recompute: bool
    log_every_steps: int = Field(gt=0)
    checkpoint_every_seconds: float = Field(gt=0)
    n_reconstructions: int = Field(ge=0, le=10_000)
    probe: ProbeParams

    @model_validator(mode="after")
    def _windows(self) -> "PretrainParams":
        if self.model.decoder == "local" and self.frames != MAX_FRAMES:
            raise ValueError(f"decoder local has windows for {MAX_FRAMES} frames, not for {self.frames}")
        return self


class FilterBanks:
    """Normalised filter banks of all clips of a split, 1024 frames each, in a file.

    features  (clips, 1024, 128) float16. What a clip of less than 10.24 s leaves is, as `short` says, the value that
              AudioMAE pads with, or the clip again
    n_frames  (clips,): frames that are the clip's
    """

    def __init__(self, clips: ClipReader, file: Path, *, short: Literal["pad", "repeat"]) -> None:
        self.clip_ids = list(clips.clips)
        if not self.clip_ids:
            raise ValueError("there are no clips to learn from")
        self.features = rows_on_disk(file, (len(self.clip_ids), MAX_FRAMES, N_MELS), np.float16)
        self.n_frames = np.zeros(len(self.clip_ids), np.int64)
        samples = WINDOW_SAMPLES + (MAX_FRAMES - 1) * HOP_SAMPLES
        for i, clip_id in enumerate(self.clip_ids):
            waveform = to_16k(torch.from_numpy(clips.waveform(clip_id))[None], clips.sample_rate)
            waveform = (waveform - waveform.mean())[:, :samples]
            if short == "repeat":
                waveform = waveform.repeat(1, -(-samples // waveform.shape[1]))[:, :samples]
            waveform = nn.functional.pad(waveform, (0, max(0, WINDOW_SAMPLES - waveform.shape[1])))
            found = normalise(fbank(waveform))[0].numpy()
            self.n_frames[i] = len(found)
            self.features[i] = PADDING
            self.features[i, : len(found)] = found

    def batch(
        self, n: int, *, size: int, seed: int, frames: int, magnitude: bool, roll: bool
    ) -> tuple[Float[Tensor, "batch frames mels"], Float[Tensor, "batch tokens"]]:
        """(features, noise of the patches) of batch n, a pure function of (seed, n): every clip once per epoch.

        Of a clip that has more than `frames` frames, as many from a random place.
        """
        rows = self.rows(n, size=size, seed=seed)
        rng = np.random.default_rng([seed, 1, n])
        gains = rng.beta(10, 10, size) + 0.5 if magnitude else np.ones(size)
        features = self.features[rows].astype(np.float32)
        for i, row in enumerate(rows):
            real = features[i, : self.n_frames[row]]
            real[:] = np.maximum(real + 2 * np.log(gains[i]) / (2 * STD), FLOOR_VALUE)
            if roll:
                real[:] = np.roll(real, rng.integers(len(real)), axis=0)
        starts = rng.integers(np.maximum(self.n_frames[rows] - frames, 0), endpoint=True)
        pieces = np.stack([clip[start : start + frames] for clip, start in zip(features, starts, strict=True)])
        noise = rng.random((size, frames // PATCH * BANDS), dtype=np.float32)
        return torch.from_numpy(pieces), torch.from_numpy(noise)

    def middle(self, rows: slice | list[int], frames: int) -> Float[Tensor, "clips frames mels"]:
        """`frames` frames from the middle of each of the clips."""
        starts = np.maximum(self.n_frames[rows] - frames, 0) // 2
        clips = zip(self.features[rows], starts, strict=True)
        return torch.from_numpy(np.stack([clip[start : start + frames] for clip, start in clips]).astype(np.float32))

    def rows(self, n: int, *, size: int, seed: int) -> list[int]:
        """The clips of batch n, by number; every epoch has an order of its own."""
        count = len(self.clip_ids)
        items = range(n * size, (n + 1) * size)
        orders = {epoch: _order(seed, epoch, count) for epoch in range(items[0] // count, items[-1] // count + 1)}
        return [int(orders[item // count][item % count]) for item in items]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """The clips in the order of one epoch. Kept, for the next batches are of the same epoch."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def build_optimizer(model: nn.Module, params: PretrainParams) -> torch.optim.Optimizer:
    """AdamW with betas 0.9 and 0.95; biases and other vectors do not decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]},
        {"params": [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")], "weight_decay": 0.0},
    ]
    rate, decay = params.learning_rate, params.weight_decay
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + float(np.cos(np.pi * progress)))


def train(model: MaskedAutoencoder, data: FilterBanks, params: PretrainParams, *, scratch: Path, curve: Path) -> None:
    """Fit the autoencoder to the filter banks; it stays on its device."""
    device = next(model.parameters()).device
    size, seed = params.batch_size, params.seed

    def load(n: int) -> tuple[Tensor, Tensor]:
        return data.batch(n, size=size, seed=seed, frames=params.frames, magnitude=params.magnitude, roll=params.roll)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        features, noise = (tensor.to(device, non_blocking=True) for tensor in batch)
        with autocast(device, params.precision):
            value, _, _ = model(features, noise, params.mask_ratio)
        return value

    fit(
        model,
        build_optimizer(model, params),
        load,
        loss,
        steps=params.steps,
        learning_rate=lambda n: learning_rate_factor(n, warmup_steps=params.warmup_steps, steps=params.steps),
        gradient_clip=0.0,
        seed=seed,
        describe=lambda n: ", ".join(data.clip_ids[row] for row in data.rows(n, size=size, seed=seed)),
        scratch=scratch,
        curve=curve,
        log_every_steps=params.log_every_steps,
        checkpoint_every_seconds=params.checkpoint_every_seconds,
    )


def mean_patch(data: FilterBanks) -> Float[Tensor, "bands 256"]:
    """The mean over all clips and times of the normalised patches of each band: the best guess without looking."""
    total = torch.zeros(BANDS, PATCH * PATCH, dtype=torch.float64)
    for row in range(len(data.clip_ids)):
        target = normalised_patches(patches(torch.from_numpy(data.features[row : row + 1].astype(np.float32))))
        total += target.double().view(-1, BANDS, PATCH * PATCH).mean(dim=0)
    return (total / len(data.clip_ids)).float()


def reconstruction_loss(
    model: MaskedAutoencoder, data: FilterBanks, guess: Float[Tensor, "bands 256"], params: PretrainParams
) -> tuple[float, float]:
    """(of the model, of `guess` for every hidden patch) on the middle of all clips, under masks that the seed fixes."""
    device = next(model.parameters()).device
    sums = np.zeros(2)
    tokens = params.frames // PATCH * BANDS
    noise = np.random.default_rng([params.seed, 2]).random((len(data.clip_ids), tokens), dtype=np.float32)
    everywhere = guess.repeat(tokens // BANDS, 1)[None].to(device)
    with torch.inference_mode():
        for first in range(0, len(data.clip_ids), EVAL_BATCH):
            part = slice(first, first + EVAL_BATCH)
            features = data.middle(part, params.frames).to(device)
            value, _, hidden = model(features, torch.from_numpy(noise[part]).to(device), params.mask_ratio)
            guessed = model.loss(features, everywhere.expand(len(features), -1, -1), hidden)
            sums += np.array([value.item(), guessed.item()]) * len(features)
    loss, guessed_loss = sums / len(data.clip_ids)
    return float(loss), float(guessed_loss)


def reconstructions(model: MaskedAutoencoder, data: FilterBanks, params: PretrainParams) -> bytes:
    """An .npz of a few clips, spread over the split: original, what was visible (NaN elsewhere), and the whole guess.

    The decoder predicts normalised patches; the true mean and deviation of each are given back to them, as AudioMAE's
    own pictures do, so that what they show is structure, not level.
    """
    n = min(params.n_reconstructions, len(data.clip_ids))
    rows = [i * len(data.clip_ids) // n for i in range(n)]
    features = data.middle(rows, params.frames)
    tokens = params.frames // PATCH * BANDS
    noise = np.random.default_rng([params.seed, 3]).random((n, tokens), dtype=np.float32)
    device = next(model.parameters()).device
    with torch.inference_mode():
        _, prediction, hidden = model(features.to(device), torch.from_numpy(noise).to(device), params.mask_ratio)
    target = patches(features)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    whole = torch.where(hidden.cpu()[..., None], prediction.float().cpu() * (variance + 1e-6).sqrt() + mean, target)
    visible = torch.where(hidden.cpu()[..., None], torch.nan, target)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        clips=np.array([data.clip_ids[row] for row in rows]),
        original=features.numpy().astype(np.float16),
        visible=unpatched(visible).numpy().astype(np.float16),
        reconstruction=unpatched(whole).numpy().astype(np.float16),
    )
    return buffer.getvalue()


def untrained(sizes: dict[str, Any], params: PretrainParams) -> Encoder:
    """The autoencoder, or where there is no decoder the encoder, as a training would start."""
    torch.manual_seed(params.seed)
    if "decoder" not in sizes:
        return Encoder(**sizes)
    return MaskedAutoencoder(**sizes, recompute=params.recompute)
