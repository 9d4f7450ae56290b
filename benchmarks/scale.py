"""What a study of the papers' size would take, from the cost of one unit of each stage: multiply-adds, or CPU seconds.

    python -m benchmarks.scale                     sizes of profiles/audioset.yaml
    python -m benchmarks.scale --rate 150e12       multiply-adds a second that a device does in training

Networks are counted once each (evaluation.cost's way: convolutions and matrix products) and multiplied by how often a
study applies them; a rate turns that into hours. The default rate is 30 % of an H200's dense bf16 peak, which
benchmarks.gpu replaces by what it measures. Decoding and resampling are timed on one core here. One JSON line a unit,
then hours for AudioSet's balanced set, for AudioSet and for 100 million clips of 10 s. The trainings' steps are the
profile's, whatever the number of clips.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.resample import make_corpus, run_stage, seconds
from benchmarks.upstream_step import full, multiply_adds, new
from pipeline.core.config import AudioParams, load_params
from pipeline.nn.panns import PannsQueryEncoder
from pipeline.stages.make_eval_pairs import MakeEvalPairsParams
from pipeline.stages.resample import ResampleParams
from pipeline.stages.train_separator import TrainParams
from pipeline.training.mae import PretrainParams
from pipeline.upstreams.mae import BANDS, PATCH, MaskedAutoencoder

CLIPS = {"22 k": 22_000, "2.1 M": 2_100_000, "100 M": 100_000_000}
CLASSES = 527
LABELS_PER_CLIP = 2.7  # of AudioSet, as many anchors a clip at most
SEPARATORS = ["resunet", "mae_resunet", "mae_resunet_updated"]
H200 = 0.3 * 989e12 / 2  # multiply-adds a second


def counted(network: nn.Module, *inputs: object) -> float:
    """Multiply-adds of one forward."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 2


def resampling() -> float:
    """CPU seconds of one core for a clip of 10 s: checks, decoding, resampling, hash, shard."""
    os.environ["USS_WORKERS"] = "0"
    audio = load_params("audio", AudioParams, full()).model_copy(update={"clip_seconds": 10.0})
    params = load_params("resample", ResampleParams, full())
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "corpus")
        root.mkdir()
        paths = make_corpus(root)
        return float(seconds(lambda: run_stage(paths, Path(directory, "scratch"), audio, params))[1]) / len(paths)


def units() -> dict[str, float]:
    """Multiply-adds of each unit of work."""
    audio, train = load_params("audio", AudioParams, full()), load_params("train", TrainParams, full())
    samples, part = (round(s * audio.sample_rate) for s in (audio.segment_seconds, train.segment_seconds))
    panns = PannsQueryEncoder(None)
    found = {
        "detector, a clip of 10 s": counted(panns.network, torch.zeros(1, 10 * audio.sample_rate)),
        "query encoder, an anchor": counted(panns.network, torch.zeros(1, samples)),
    }
    pretrain = load_params("pretrain_mae", PretrainParams, full())
    autoencoder = MaskedAutoencoder(**pretrain.model.model_dump()).eval()
    features = torch.randn(1, pretrain.frames, PATCH * BANDS)
    noise = torch.rand(1, pretrain.frames // PATCH * BANDS)
    found["A-MAE, a clip in training"] = 3 * counted(autoencoder, features, noise, pretrain.mask_ratio)
    for name in SEPARATORS:
        counts = multiply_adds(new(name, full()), full(), samples, part)
        found[f"{name}, a mixture in training"] = counts["step"]
        found[f"{name}, a pair of the evaluation"] = counts["forward"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=H200, help="multiply-adds a second (%(default).3g)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    per_clip, macs = resampling(), units()
    print(json.dumps({"unit": "resample, a clip of 10 s", "CPU-s": round(per_clip, 4)}))
    for name, count in macs.items():
        print(json.dumps({"unit": name, "Gmacs": round(count / 1e9, 2)}))
    train, pretrain = load_params("train", TrainParams, full()), load_params("pretrain_mae", PretrainParams, full())
    pairs = CLASSES * load_params("make_eval_pairs", MakeEvalPairsParams, full()).pairs_per_class
    for name, n in CLIPS.items():
        gpu = {
            "detect": n * macs["detector, a clip of 10 s"],
            "embed": n * LABELS_PER_CLIP * macs["query encoder, an anchor"],
            "pretrain": pretrain.steps * pretrain.batch_size * macs["A-MAE, a clip in training"],
            **{model: train.steps * train.batch_size * macs[f"{model}, a mixture in training"] for model in SEPARATORS},
            "evaluate": 2 * pairs * sum(macs[f"{model}, a pair of the evaluation"] for model in SEPARATORS),
        }
        hours = {key: round(value / args.rate / 3600, 2) for key, value in gpu.items()}
        print(json.dumps({"clips": name, "CPU-h resample": round(n * per_clip / 3600, 1), "GPU-h": hours}))


if __name__ == "__main__":
    main()
