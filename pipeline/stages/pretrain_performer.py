"""Stage pretrain_performer: teach the Performer's front end and encoder to fill in hidden frames of the train tracks.

Masked autoencoding (the report, section 3.3) on single mixtures, without labels or stems, on the tracks that the
separators train on: the report's "entire corpus" would show them the test tracks.

The weights are in a folder of their own, PRETRAINED. Beside it lies another, SCRATCH, whose content never changes: what
an entry depends on that does without them. Memory giving out is a result, as in train_mixit: then there are no weights,
and config.json says so.
"""

import argparse
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.core.config import load_params
from pipeline.core.devices import (
    autocast,
    blame_neighbours,
    choose_device,
    go_on_alike,
    is_out_of_memory,
    loading,
    use_available_cores,
    use_precision,
)
from pipeline.core.runtime import (
    fingerprint,
    keep_freed_memory,
    publish,
    remove,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.mixtures.tracks import MusicParams, index_file
from pipeline.separators import build_blind, model_params
from pipeline.separators.performer import Pretrainer
from pipeline.training import mixit
from pipeline.training.loop import Validation, fit, write_curve
from pipeline.training.mixit import PretrainPerformerParams, Streams, music_streams, seed_of

log = logging.getLogger(__name__)

# What `pretrained` of an entry makes of dvc.yaml's pretrained_${item.pretrained}.
PRETRAINED, SCRATCH = "pretrained_true", "pretrained_false"
STATISTICS_BATCHES = 16  # for mean and deviation of the bins


def pretrain_performer(
    index: Path, out: Path, curve: Path, *, music: MusicParams, params: PretrainPerformerParams, model: dict[str, Any]
) -> dict[str, Any]:
    """Write weights.safetensors (front end and encoder) and config.json to `out`/PRETRAINED; return the summary."""
    keep_freed_memory()
    use_available_cores()
    use_precision(params.precision)
    device = choose_device(params.device)
    seconds = params.segment_seconds or music.segment_seconds[0]
    train, held_out = (
        music_streams(
            index,
            split,
            music,
            seconds=[seconds],
            seed=seed_of(params.seed, mixit.TRAIN if split == "train" else mixit.VALIDATION),
            batch_size=max(1, params.batch_size // 2),
            mixtures="whole",
            max_stems=1,
            snr_range=(0.0, 0.0),
            random_subsets=False,
            fixed=split != "train",
        )
        for split in ("train", "validation")
    )
    train.check_batch(max(1, params.batch_size // 2), "pretrain_performer")
    scratch = scratch_dir(
        "pretrain_performer",
        fingerprint(json.dumps(model, sort_keys=True), music, params, index_file(index, seconds)),
    )
    go_on_alike(scratch, device, params.precision)
    summary: dict[str, Any] = {"status": "ok", "mask_ratio": params.mask_ratio, "sample_rate": train.sample_rate}
    finished = scratch / "finished"
    remove(finished)  # by a run that was killed
    for folder in (PRETRAINED, SCRATCH):
        (finished / folder).mkdir(parents=True, exist_ok=True)
    try:
        learned, state = _learn(train, held_out, scratch, curve, params=params, model=model, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        blame_neighbours(error, device)
        log.error("out of memory (%s); `dvc repro -s --force pretrain_performer`, then `dvc repro`, tries again", error)
        summary |= {"status": "out_of_memory", "steps": 0}
        write_curve(curve, [], validation=True)
    else:
        summary |= learned
        write_atomic(finished / PRETRAINED / "weights.safetensors", save(state))
    write_json(finished / PRETRAINED / "config.json", {"model": model, **summary})
    write_atomic(finished / SCRATCH / "README.md", "Nothing: entries that are not pretrained depend on this.\n")
    publish(finished, out)
    shutil.rmtree(scratch)
    return summary


def _learn(
    train: Streams,
    held_out: Streams,
    scratch: Path,
    curve: Path,
    *,
    params: PretrainPerformerParams,
    model: dict[str, Any],
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the training went, for the summary, and the weights that it hands over."""
    torch.manual_seed(params.seed)
    separator: Any = build_blind("performer", sample_rate=train.sample_rate, **model)
    separator.learn_statistics(_single(train, n) for n in range(STATISTICS_BATCHES))
    pretrainer = Pretrainer(
        separator,
        mask_mode=params.mask_mode,
        mask_ratio=params.mask_ratio,
        mask_span=params.mask_span,
        target=params.target,
        loss_on=params.loss_on,
    ).to(device)

    def loss(batch: tuple[int, Tensor]) -> Tensor:
        n, waveform = batch
        generator = torch.Generator().manual_seed(seed_of(params.seed, n))
        with autocast(device, params.precision):
            value: Tensor = pretrainer(waveform.to(device, non_blocking=True), generator)
        return value

    def validation_loss() -> float:
        moms = held_out.moms[0]
        n_batches = min(moms.n_batches, math.ceil(params.n_validation_mixtures / max(2, params.batch_size)))
        with torch.inference_mode():
            value = sum(float(loss((n, _single(held_out, n)))) for n in range(n_batches)) / n_batches
        if not math.isfinite(value):
            raise FloatingPointError(f"the validation loss is {value}")
        return value

    def redraw(n: int) -> None:
        if params.redraw_every_steps and n and n % params.redraw_every_steps == 0:
            pretrainer.redraw(n, params.seed)

    # A mixture is half of a mixture of mixtures: an epoch has as many items as MixIT's has pairs, twice as long.
    steps, an_epoch = (train.steps(epochs, max(1, params.batch_size // 2)) for epochs in (params.epochs, 1.0))
    pretrainer.eval()
    untrained = validation_loss()
    fitted = fit(
        pretrainer,
        mixit.build_optimizer(pretrainer, params.learning_rate, params.weight_decay),
        lambda n: (n, _single(train, n)),
        loss,
        steps=steps,
        learning_rate=lambda n: mixit.learning_rate_factor(
            n,
            warmup_steps=params.warmup_steps,
            steps=steps,
            final=params.final_learning_rate / params.learning_rate,
        ),
        gradient_clip=params.gradient_clip,
        seed=params.seed,
        describe=lambda n: train.describe(n, params.seed),
        scratch=scratch,
        curve=curve,
        log_every_steps=params.log_every_steps,
        checkpoint_every_seconds=params.checkpoint_every_seconds,
        validation=Validation(validation_loss, params.validate_every_steps or an_epoch, params.patience),
        before_step=redraw,
    )
    learned = {
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "loss": round(fitted.best_validation or 0.0, 6),
        "loss_untrained": round(untrained, 6),
    }
    return learned, {name: tensor.cpu().contiguous() for name, tensor in pretrainer.encoder_state().items()}


def _single(streams: Streams, n: int) -> Tensor:
    """The single mixtures of batch n, (2 x batch, time)."""
    with loading(f"batch {n}"):
        return torch.from_numpy(streams.moms[0].batch(n).mixtures).flatten(0, 1)


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    parser.add_argument("--curve", type=Path, required=True)
    args = parser.parse_args()
    params, music = load_params("pretrain_performer", PretrainPerformerParams), load_params("music", MusicParams)
    model = load_params(params.model, model_params("performer")).model_dump()
    with running("pretrain_performer", args.out):
        summary = pretrain_performer(args.index, args.out, args.curve, music=music, params=params, model=model)
        write_json(args.summary, summary)
        log.info("%s", json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
