"""Stage train_mixit: train one entry of `mixit_music:` or `mixit_clips:` without any labels, on mixtures of mixtures.

The loss is mixture-invariant training's (Wisdom et al., arXiv:2006.12701). The weights with the lowest such loss on
fixed held-out mixtures are kept, whatever auxiliary losses there are. Batch n is a pure function of (seed, n): a killed
run goes on from its checkpoint to the weights it would have had. A model whose step this machine's memory does not hold
is a result, which is written, also where it gave out in the pretraining that an entry needs; the graph goes on. Memory
that gives out over loading a batch, or that others hold, is an error.
"""

import argparse
import json
import logging
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.core.config import load_params
from pipeline.core.devices import (
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
    publish,
    remove,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.core.weights import read_safetensors
from pipeline.mixtures.tracks import MomBatch, MusicParams
from pipeline.separators import build_blind
from pipeline.training import mixit
from pipeline.training.loop import Fitted, Validation, fit, write_curve
from pipeline.training.mixit import Entry, MixitParams, Streams, anchor_streams, clip_streams, music_streams, seed_of
from pipeline.training.portable import DETECTOR, check_networks, equip_blind

log = logging.getLogger(__name__)

STATISTICS_BATCHES = 16


def streams(
    entry: Entry, source: Path, clips: Path | None, music: MusicParams | None, params: MixitParams
) -> tuple[Streams, Streams]:
    """(train, validation); `source` is the index of the music, or the anchors of the train split, with its clips."""
    shared: dict[str, Any] = {
        "seconds": entry.params.segment_seconds,
        "batch_size": params.batch_size,
        "snr_range": params.mom_snr_range,
    }
    seeds = [seed_of(params.seed, purpose) for purpose in (mixit.TRAIN, mixit.VALIDATION)]
    n_items = params.n_validation_moms
    if music is None and entry.params.mixtures == "whole":
        if clips is None:
            raise ValueError(f"{entry.name}: mixtures of clips as they are need the clips")
        return (
            clip_streams(clips, source, "train", seed=seeds[0], n_items=None, **shared),
            clip_streams(clips, source, "validation", seed=seeds[1], n_items=n_items, **shared),
        )
    shared |= {"max_stems": params.max_stems, "random_subsets": params.random_subsets}
    if music is None:
        return (
            anchor_streams(source, "train", seed=seeds[0], n_items=None, **shared),
            anchor_streams(source, "validation", seed=seeds[1], n_items=n_items, **shared),
        )
    shared["mixtures"] = entry.params.mixtures
    return (
        music_streams(source, "train", music, seed=seeds[0], fixed=False, **shared),
        music_streams(source, "validation", music, seed=seeds[1], fixed=True, **shared),
    )


def train_mixit(
    entry: Entry,
    source: Path,
    out: Path,
    curve: Path,
    *,
    params: MixitParams,
    music: MusicParams | None,
    pretrained: Path | None,
    told: dict[str, float],
    clips: Path | None = None,
    sed: Path | None = None,
) -> dict[str, Any]:
    """Train one entry into `out`: weights.safetensors and config.json, which is returned.

    `told` gets what it took, `clips` are those of the train split, and `sed` has the detector that goes along.
    """
    use_available_cores()
    use_precision(params.precision)
    device = choose_device(params.device)
    train, held_out = streams(entry, source, clips, music, params)
    train.check_batch(params.batch_size, "mixit")
    steps = train.steps(entry.params.epochs, params.batch_size)
    torch.manual_seed(params.seed)
    separator = build_blind(entry.params.architecture, sample_rate=train.sample_rate, **entry.model)
    weights = pretrained / "weights.safetensors" if entry.params.pretrained and pretrained else None
    if entry.params.pretrained:
        if weights is None or not separator.pretrained_names():
            raise ValueError(f"{entry.name} is to be pretrained, but nothing pretrains {entry.params.architecture}")
        given = mixit.read_config(weights.parent)
        _check_pretraining(entry, separator, given, train.sample_rate)
        if given.get("status") == "out_of_memory":
            weights = None
        else:
            separator.load_pretrained(read_safetensors(weights))
    untried = entry.params.pretrained and weights is None
    identity = json.dumps([entry.name, entry.params.model_dump(), entry.model, str(device)], sort_keys=True)
    inputs = [source / "index.parquet", source / "index.json"] if music is None else sorted(source.glob("*.parquet"))
    inputs += [] if clips is None else [clips / "manifest.csv"]
    scratch = scratch_dir(
        f"train_mixit-{entry.name}",
        fingerprint(identity, params, *([music] if music else []), *([weights] if weights else []), *inputs),
    )
    go_on_alike(scratch, device, params.precision)
    log.info("%s: %d steps, %.2f epochs of %.0f s", entry.name, steps, entry.params.epochs, train.epoch_seconds)

    def losses(batch: MomBatch) -> dict[str, Tensor]:
        return mixit.training_losses(separator, torch.from_numpy(batch.mixtures), entry.params, params, device)

    mixit_alone = entry.params.model_copy(update={"diversity": 0.0, "sparsity": 0.0})  # chooses the weights

    def validation_loss() -> float:
        total, count = 0.0, 0
        with torch.inference_mode():
            for moms in held_out.moms:
                for n in range(min(moms.n_batches, math.ceil(params.n_validation_moms / params.batch_size))):
                    with loading(f"batch {n} of the validation"):
                        batch = moms.batch(n)
                    mixtures = torch.from_numpy(batch.mixtures)
                    terms = mixit.training_losses(separator, mixtures, mixit_alone, params, device)
                    total += float(terms["mixit"]) * len(batch.mixtures)
                    count += len(batch.mixtures)
        if not math.isfinite(total):
            raise FloatingPointError(f"{entry.name}: the validation loss is {total}")
        return total / count

    def heard(n: int) -> Tensor:
        with loading(f"batch {n}"):
            return torch.from_numpy(train.load(n, params.seed).mixtures).sum(dim=1)

    def redraw(n: int) -> None:
        if params.redraw_every_steps and n and n % params.redraw_every_steps == 0:
            separator.redraw(n, params.seed)

    config: dict[str, Any] = {
        "architecture": entry.params.architecture,
        "model": entry.model,
        "data": entry.data,
        "mixtures": entry.params.mixtures,
        "sample_rate": train.sample_rate,
        "segment_seconds": list(train.seconds),
        "pretrained": entry.params.pretrained,
        "diversity": entry.params.diversity,
        "sparsity": entry.params.sparsity,
        "sparsity_form": entry.params.sparsity_form,
        "n_sources": separator.n_sources,
        "n_parameters": sum(p.numel() for p in separator.parameters()),
    }

    def learn() -> Fitted:
        if not entry.params.pretrained:
            separator.learn_statistics(heard(n) for n in range(STATISTICS_BATCHES))
        separator.to(device)
        return fit(
            separator,
            mixit.build_optimizer(separator, params.learning_rate, params.weight_decay),
            lambda n: train.load(n, params.seed),
            losses,
            loss_weights=mixit.loss_weights(entry.params),
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
            validation=Validation(
                validation_loss, params.validate_every_steps or train.steps(1.0, params.batch_size), params.patience
            ),
            before_step=redraw,
        )

    finished = scratch / "finished"
    remove(finished)  # by a run that was killed
    finished.mkdir(parents=True)
    fitted, why = None, "in its pretraining"
    if untried:  # from scratch it would be another entry
        config["pretraining"] = "out_of_memory"
    else:
        try:
            fitted = learn()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            blame_neighbours(error, device)
            why = str(error)
        told["training_peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        if device.type == "cuda":
            told["cuda_allocated_bytes"] = float(torch.cuda.max_memory_allocated(device))
            told["cuda_reserved_bytes"] = float(torch.cuda.max_memory_reserved(device))
    if fitted is None:
        log.error("%s: out of memory: %s", entry.name, why)
        config |= {"status": "out_of_memory", "steps": 0}
        write_curve(curve, [], validation=True)
    else:
        config |= {"status": "ok", "steps": fitted.steps, "best_step": fitted.best_step}
        state = {name: tensor.cpu().contiguous() for name, tensor in separator.state_dict().items()}
        write_atomic(finished / "weights.safetensors", save(state))
        if sed is not None:
            config |= equip_blind(finished, source, sed)
        if fitted.seconds_per_step is not None:
            heard_per_step = 2 * params.batch_size * sum(train.seconds) / len(train.seconds)
            told["seconds_per_audio_hour"] = fitted.seconds_per_step / heard_per_step * 3600
            told["minutes_per_epoch"] = fitted.seconds_per_step * train.steps(1.0, params.batch_size) / 60
    write_json(finished / "config.json", config)
    publish(finished, out)
    shutil.rmtree(scratch)  # `dvc repro --force` must train again
    return config


def _check_pretraining(entry: Entry, separator: Any, given: dict[str, Any], sample_rate: int) -> None:
    """Weights of another front end may have the same shapes, and would be taken for what they are not."""
    if given["sample_rate"] != sample_rate:
        raise ValueError(f"{entry.name} trains at {sample_rate} Hz, and was pretrained at {given['sample_rate']} Hz")
    for name, value in entry.model.items():
        if name not in separator.own_after_pretraining and given["model"][name] != value:
            raise ValueError(
                f"{entry.name}: {entry.params.model}.{name} is {value}, and {given['model'][name]} in its pretraining"
            )


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of the section")
    parser.add_argument("--data", choices=["music", "clips"], required=True)
    parser.add_argument("--source", type=Path, required=True, help="the index of the music, or anchors of train")
    parser.add_argument("--clips", type=Path, help="clips of train, for an entry of mixit_clips")
    parser.add_argument("--sed", type=Path, help="detector, for use elsewhere; of mixit_clips alone")
    parser.add_argument("--pretrained", type=Path, help="where stage pretrain_performer wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--curve", type=Path, required=True)
    args = parser.parse_args()
    if args.sed is not None:
        check_networks(args.sed, DETECTOR)
    entry = mixit.read_entry(args.name, args.data)
    params = load_params("mixit", MixitParams)
    music = load_params("music", MusicParams) if args.data == "music" else None
    pretrained = args.pretrained / f"pretrained_{str(entry.params.pretrained).lower()}" if args.pretrained else None
    with running(f"train_mixit@{args.name}", args.out) as told:
        config = train_mixit(
            entry,
            args.source,
            args.out,
            args.curve,
            params=params,
            music=music,
            pretrained=pretrained,
            told=told,
            clips=args.clips,
            sed=args.sed,
        )
        log.info("%s: %s", args.name, config)


if __name__ == "__main__":
    run_command(main)
