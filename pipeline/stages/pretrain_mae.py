"""Stage pretrain_mae: train an audio masked autoencoder on all train clips, without their labels (Huang et al. 2022).

Or, with `weights`, check and convert a published encoder (AudioMAE, EAT, SSLAM). What comes out is the same: a folder
with weights.safetensors, config.json and a few reconstructions. The labels are used for one number only: a linear probe
of the encoder before and after.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pipeline.core.config import AudioParams, load_params
from pipeline.core.devices import choose_device, go_on_alike, use_available_cores, use_precision
from pipeline.core.runtime import (
    fingerprint,
    keep_freed_memory,
    publish,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.evaluation.probing import described, difference, probe_upstreams
from pipeline.mixtures.shards import ClipReader
from pipeline.training.loop import write_curve
from pipeline.training.mae import (
    FilterBanks,
    PretrainParams,
    mean_patch,
    reconstruction_loss,
    reconstructions,
    train,
    untrained,
)
from pipeline.upstreams import check_sample_rate
from pipeline.upstreams.mae import MAX_FRAMES, MaskedAutoencoder, Upstream, encoder_sizes, encoder_state, read_published

log = logging.getLogger(__name__)


def as_upstream(sizes: dict[str, Any], state: dict[str, Tensor]) -> Upstream:
    """The encoder as the probe hears it: as many frames as the clip has."""
    upstream = Upstream(mae_input="crop", **encoder_sizes(sizes))
    upstream.load_state_dict(encoder_state(state))
    return upstream


def pretrain_mae(
    train_clips: Path, eval_clips: Path, out: Path, curve: Path, *, audio: AudioParams, params: PretrainParams
) -> dict[str, Any]:
    """Write the encoder (and decoder) to `out`; return the summary."""
    check_sample_rate(audio.sample_rate)
    keep_freed_memory()
    use_available_cores()
    use_precision(params.precision)
    device = choose_device(params.device)
    scratch = scratch_dir(
        "pretrain_mae", fingerprint(audio, params, train_clips / "manifest.csv", eval_clips / "manifest.csv")
    )
    go_on_alike(scratch, device, params.precision)
    heard, held_out = (ClipReader(path, audio.sample_rate) for path in (train_clips, eval_clips))
    summary: dict[str, Any] = {"n_train_clips": len(heard.clips), "n_eval_clips": len(held_out.clips)}
    if params.weights is None:
        sizes = params.model.model_dump()
        epochs = round(params.steps * params.batch_size / max(1, len(heard.clips)), 2)
        summary |= {"weights": None, "steps": params.steps, "epochs": epochs}
        model = untrained(sizes, params)
    else:
        sizes, published = read_published(
            Path(params.weights), sha256=params.weights_sha256, layout=params.weights_format
        )
        summary |= {"weights": f"{params.weights_format}: {Path(params.weights).name}", "steps": 0, "epochs": 0}
        params = params.model_copy(update={"frames": MAX_FRAMES})  # nothing is trained; its decoder's windows need them
        model = untrained(sizes, params)
        model.load_state_dict(published)
        write_curve(curve, [])
    before = as_upstream(sizes, untrained(sizes, params).state_dict())
    model.to(device)
    finished = scratch / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    if isinstance(model, MaskedAutoencoder):
        train_data = FilterBanks(heard, scratch / "train.npy", short=params.short)
        if params.weights is None:
            train(model, train_data, params, scratch=scratch, curve=curve)
        model.eval()
        eval_data = FilterBanks(held_out, scratch / "eval.npy", short=params.short)
        loss, guessed = reconstruction_loss(model, eval_data, mean_patch(train_data), params)
        summary |= {"loss": round(loss, 6), "loss_of_mean_patch": round(guessed, 6)}
        if params.n_reconstructions:
            write_atomic(finished / "reconstructions.npz", reconstructions(model, eval_data, params))
    model.eval().cpu()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    clip_samples = round(audio.clip_seconds * audio.sample_rate)
    probes = probe_upstreams(
        [before, as_upstream(sizes, state)], heard, held_out, params.probe, clip_samples=clip_samples, device=device
    )
    summary["probe"] = {
        "before": described(probes[0]),
        "after": described(probes[1]),
        "difference": difference(probes[1], probes[0]),
    }
    summary["n_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write_atomic(finished / "weights.safetensors", save(state))
    write_json(finished / "config.json", {"model": sizes, "weights": params.weights_sha256, "steps": summary["steps"]})
    publish(finished, out)
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
    audio, params = load_params("audio", AudioParams), load_params("pretrain_mae", PretrainParams)
    with running("pretrain_mae", args.out):
        summary = pretrain_mae(args.train, args.evaluation, args.out, args.curve, audio=audio, params=params)
        write_json(args.summary, summary)
        log.info("%s", json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
