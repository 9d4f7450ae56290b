"""Training, evaluation and pretraining at full size on one device: what a study of the papers' size would take on it.

    python -m benchmarks.gpu            sizes of profiles/audioset.yaml, on the GPU
    python -m benchmarks.gpu --small    of params.yaml, on a CPU: that it runs, not how fast

For every entry of `separators:` and `mae_separators:`, at the profile's batch and at four times that: mixtures a
second, the share of the device's own matrix rate that their multiply-adds come to, peak memory, and hours of
`train.steps` steps. Batches are noise that lies on the device: waiting for data is measured elsewhere. Then the same
for evaluation (forward alone, `pairs_per_class` pairs of 527 classes) and for a step of the A-MAE. The matrix rate is
that of one large bf16 product, measured first; a step counts three times the forward's multiply-adds where weights
learn, as benchmarks.upstream_step says. What does not fit the memory is said so.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ruamel.yaml import YAML

from benchmarks.upstream_step import SMALL, Step, data, full, multiply_adds, new
from pipeline.core.config import AudioParams, load_params
from pipeline.core.devices import Precision, autocast, is_out_of_memory, use_precision
from pipeline.separators import QuerySeparator
from pipeline.stages.make_eval_pairs import MakeEvalPairsParams
from pipeline.stages.train_separator import TrainParams
from pipeline.training.mae import PretrainParams, build_optimizer
from pipeline.upstreams.mae import BANDS, PATCH, MaskedAutoencoder

CLASSES = 527
MB = 2**20


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Mean seconds of one call, over as many as take `at_least` seconds, after two that are not counted."""
    for _ in range(2):
        work()
    count, start = 0, time.perf_counter()
    while True:
        work()
        count += 1
        if count % 4 == 0 or device.type == "cpu":
            if device.type == "cuda":
                torch.cuda.synchronize()
            if (taken := time.perf_counter() - start) >= at_least:
                return taken / count


def matrix_rate(device: torch.device, size: int) -> float:
    """Multiply-adds a second of a bf16 product of two square matrices."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return size**3 / seconds_of(lambda: a @ a, device, 1.0)


def peak(device: torch.device) -> float:
    """MB held at most since the last call, of a GPU; NaN of a CPU."""
    if device.type != "cuda":
        return float("nan")
    most = torch.cuda.max_memory_allocated() / MB
    torch.cuda.reset_peak_memory_stats()
    return most


def separators(path: Path) -> list[str]:
    document = YAML(typ="safe").load(path)
    return [*document["separators"], *document["mae_separators"]]


def training(name: str, path: Path, batch: int, precision: Precision, device: torch.device, at_least: float) -> dict:
    params, audio = load_params("train", TrainParams, path), load_params("audio", AudioParams, path)
    part = round(params.segment_seconds * audio.sample_rate)
    samples = max(part, round(audio.segment_seconds * audio.sample_rate))
    network = new(name, path)
    macs = multiply_adds(network, path, samples, part)["step"] * batch
    step, inputs = Step(network, params.learning_rate, device), data(path, batch, samples, part, device)
    use_precision(precision)
    with autocast(device, precision):
        seconds = seconds_of(lambda: step(*inputs), device, at_least)
    return {"mixtures/s": batch / seconds, "macs/s": macs / seconds, "hours": seconds * params.steps / 3600}


def evaluation(network: QuerySeparator, path: Path, batch: int, device: torch.device, at_least: float) -> dict:
    audio = load_params("audio", AudioParams, path)
    samples = round(audio.segment_seconds * audio.sample_rate)
    mixture, _, query = data(path, batch, samples, samples, device)
    network.to(device).eval()
    with torch.inference_mode(), autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        seconds = seconds_of(lambda: network(mixture, network.joint_query(query)), device, at_least)
    pairs = CLASSES * load_params("make_eval_pairs", MakeEvalPairsParams, path).pairs_per_class
    return {"mixtures/s": batch / seconds, "seconds of all pairs": pairs * seconds / batch}


def pretraining(path: Path, batch: int, device: torch.device, at_least: float) -> dict:
    params = load_params("pretrain_mae", PretrainParams, path)
    model = MaskedAutoencoder(**params.model.model_dump(), recompute=params.recompute).to(device).train()
    optimizer = build_optimizer(model, params)
    features = torch.randn(batch, params.frames, PATCH * BANDS, device=device)
    noise = torch.rand(batch, params.frames // PATCH * BANDS, device=device)

    def step() -> None:
        with autocast(device, params.precision):
            loss = model(features, noise, params.mask_ratio)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds = seconds_of(step, device, at_least)
    return {"clips/s": batch / seconds, "hours": seconds * params.steps * params.batch_size / batch / 3600}


def row(what: str, device: torch.device, measure: Callable[[], dict], rate: float) -> None:
    """Print one line of JSON: what was measured, or that it does not fit."""
    peak(device)
    try:
        found = measure()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = {"out of memory": True}
    if "macs/s" in found:
        found["of the matrix rate"] = found.pop("macs/s") / rate
    numbers = {key: value if isinstance(value, bool) else float(f"{value:.3g}") for key, value in found.items()}
    if device.type == "cuda":
        numbers["MB"] = round(peak(device))
        torch.cuda.empty_cache()
    print(json.dumps({"what": what} | numbers), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the default's sizes, half a second each, on a CPU")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small runs on a CPU")
    device = torch.device("cpu" if args.small else "cuda")
    path, at_least = (SMALL, 0.5) if args.small else (full(), 5.0)
    params = load_params("train", TrainParams, path)
    rate = matrix_rate(device, 512 if args.small else 8192)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, "bf16 matrix rate, TMAC/s": round(rate / 1e12, 3)}), flush=True)
    for model in separators(path):
        for batch in (params.batch_size,) if args.small else (params.batch_size, 4 * params.batch_size):
            for precision in ("fp32",) if args.small else ("tf32", "bf16"):
                what = f"train {model}, batch {batch}, {precision}"
                row(what, device, lambda m=model, b=batch, p=precision: training(m, path, b, p, device, at_least), rate)
    for model in separators(path):
        what, batch = f"evaluate {model}", 4 if args.small else 64
        row(what, device, lambda m=model, b=batch: evaluation(new(m, path), path, b, device, at_least), rate)
    pretrain = load_params("pretrain_mae", PretrainParams, path)
    for batch in (pretrain.batch_size,) if args.small else (64, 256):
        row(f"pretrain A-MAE, batch {batch}", device, lambda b=batch: pretraining(path, b, device, at_least), rate)


if __name__ == "__main__":
    main()
