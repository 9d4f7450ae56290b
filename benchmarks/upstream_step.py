"""One training step of the separators with an upstream against that of the baseline: time, multiply-adds, memory.

    python -m benchmarks.upstream_step            sizes, batch and seconds of params.yaml
    python -m benchmarks.upstream_step --full     of profiles/audioset.yaml (the paper's); batch 2 without a GPU

resunet                the baseline
mae_resunet            with the frozen A-MAE of `model:`
mae_resunet_updated    the A-MAE learns too, as it does after `unfreeze_step`
mae_resunet_aligned    frozen; the features of the frames where they belong (crop), as a second channel
mae_resunet_interferer   frozen; the features tell what else sounds, which is learned beside the separation

A step is forward, L1, backward and Adam in fp32 (a frozen A-MAE as `bf16_frozen` says), on the same random mixtures for
all. Steps are taken in turn, so that all meet the same noise of a busy machine; one thread on a CPU is timed by its CPU
time, which leaves out when others have the core. Minima and medians are given, and ratios of the medians (of the minima
in brackets). A step's multiply-adds are from evaluation.cost, times 3 where weights learn (backward is two products for
each of forward), once in a frozen upstream. Norms, transforms and Adam are in the time and not in that count. The
upstream's own part is what lies between mixture and features: resampling, filter bank, encoder, pooling.

Peak memory is that of two steps in a process of its own, above what this held when the network was built: activations,
gradients, Adam's moments, and what libraries keep; the median of `--memory-runs` processes, for a CPU's varies.
"""

import argparse
import atexit
import ctypes
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import psutil
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from benchmarks.mae import now
from pipeline.core import profiles
from pipeline.core.config import AudioParams, load_params
from pipeline.core.runtime import keep_freed_memory
from pipeline.evaluation.cost import cost
from pipeline.separators import Batch, QuerySeparator, build, mae_resunet
from pipeline.stages.sed import SedParams
from pipeline.stages.train_separator import SeparatorParams, TrainParams, read_mae_entry
from pipeline.training.loop import build_optimizer
from pipeline.training.mae import PretrainParams
from pipeline.upstreams.mae import encoder_sizes

SMALL = Path("params.yaml")
BASELINE = "resunet"
NAMES = [BASELINE, "mae_resunet", "mae_resunet_updated", "mae_resunet_aligned", "mae_resunet_interferer"]
PANNS_QUERY_DIM = 2048
MB = 2**20


class UpstreamOnly(nn.Module):
    """What a separator computes before it begins: the features of its upstream."""

    def __init__(self, separator: nn.Module) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, mixture: Tensor, query: Tensor) -> Tensor:
        return self.separator.features(mixture)


@cache
def full() -> Path:
    """The paper's sizes: profiles/audioset.yaml as a params.yaml, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="profile-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "params.yaml").write_text(profiles.text("audioset", Path()))
    return folder / "params.yaml"


def query_dim(path: Path) -> int:
    sed = load_params("sed", SedParams, path)
    return sed.embedding_dim if sed.query_weights is None else PANNS_QUERY_DIM


def new(name: str, path: Path) -> QuerySeparator:
    """The network of that name, with random weights."""
    torch.manual_seed(0)
    if name in YAML(typ="safe").load(path)["separators"]:
        entry = load_params(f"separators.{name}", SeparatorParams, path)
        return build(entry.architecture, query_dim=query_dim(path), **entry.model)
    mae, body, settings = read_mae_entry(name, path)
    if settings["upstream"] != "mae":
        raise ValueError(f"{path}: {mae.settings}.upstream is {settings['upstream']!r}; this benchmark measures mae")
    sizes = encoder_sizes(load_params("pretrain_mae", PretrainParams, path).model.model_dump())
    config = {**sizes, "mae_input": settings["mae_input"], "drop_path": settings["drop_path"]}
    return build(mae.architecture, query_dim=query_dim(path), upstream_config=config, body=body, **settings)


def takes_features(network: nn.Module) -> TypeGuard[mae_resunet.Separator]:
    return isinstance(network, mae_resunet.Separator) and network.upstream is not None


class Step:
    """Training steps of one network; `upstream` has the seconds of each step's features."""

    def __init__(self, network: QuerySeparator, learning_rate: float, device: torch.device) -> None:
        self.network, self.device = network.to(device).train(), device
        self.optimizer = build_optimizer("adam", network.parameter_groups(learning_rate), learning_rate)
        self.upstream: list[float] = []
        if takes_features(network):
            features = network.features

            def timed(mixture: Tensor) -> Tensor:
                start = now(device)
                found = features(mixture)
                self.upstream.append(now(device) - start)
                return found

            network.features = timed

    def __call__(self, mixture: Tensor, target: Tensor, query: Tensor) -> float:
        """Seconds of one step, as stage train_separator takes it: of the part of the mixture that has a target."""
        start = now(self.device)
        part = slice(0, target.shape[1])
        terms = self.network.losses(
            Batch(mixture, part, target, query, query.flip(0), torch.zeros(len(query), dtype=torch.bool)), ["l1"]
        )
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return now(self.device) - start


def data(path: Path, batch: int, samples: int, part: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mixture of `samples`, target of the first `part` of them, query."""
    generator = torch.Generator().manual_seed(1)
    target, interferer = 0.1 * torch.randn(2, batch, samples, generator=generator)
    query = torch.randn(batch, query_dim(path), generator=generator)
    return (target + interferer).to(device), target[:, :part].to(device), query.to(device)


def multiply_adds(network: QuerySeparator, path: Path, samples: int, part: int) -> dict[str, int]:
    """Of one mixture, of which a part is separated: forward, the upstream's share of it, and a step."""
    dim, heard = query_dim(path), samples if takes_features(network) and network.settings.context == "anchor" else part
    forward = cost(network, query_dim=dim, samples=part).macs
    upstream = 0
    if takes_features(network):
        only = UpstreamOnly(network)
        upstream = cost(only, query_dim=dim, samples=heard).macs
        forward += upstream - cost(only, query_dim=dim, samples=part).macs
    factor = 1 if upstream and network.settings.freeze_mae else 3
    return {"forward": forward, "upstream": upstream, "step": 3 * (forward - upstream) + factor * upstream}


def measure_memory(name: str, path: Path, learning_rate: float, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Bytes that two steps need above what there was before the first; alone in its process."""
    device = inputs[0].device
    step = Step(new(name, path), learning_rate, device)
    # What building has freed goes back first: it would be room for the steps, and not be counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    keep_freed_memory()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    for _ in range(2):  # Adam's moments come with the first
        step(*inputs)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the paper's sizes")
    parser.add_argument("--steps", type=int, default=7, help="of each network, after one that is not counted")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seconds", type=float, help="of the part of each mixture that is separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--memory", choices=NAMES, help="only the peak memory of this network, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, path = torch.device(args.device), full() if args.full else SMALL
    params, audio = load_params("train", TrainParams, path), load_params("audio", AudioParams, path)
    batch = args.batch or (2 if args.full and device.type != "cuda" else params.batch_size)
    seconds = args.seconds or params.segment_seconds
    part = round(seconds * audio.sample_rate)
    samples = max(part, round(audio.segment_seconds * audio.sample_rate))
    inputs = data(path, batch, samples, part, device)
    if args.memory:
        print(json.dumps(measure_memory(args.memory, path, params.learning_rate, inputs)))
        return

    keep_freed_memory()
    document = YAML(typ="safe").load(path)
    names = [name for name in NAMES if name in {**document["separators"], **document["mae_separators"]}]
    # First: Linux counts what the parent held at the fork into ru_maxrss, and here that is still little.
    memory: dict[str, dict[str, int]] = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.upstream_step", *sys.argv[1:], "--memory", name]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for _ in range(args.memory_runs)
        ]
        memory[name] = sorted(runs, key=lambda run: run["peak"])[len(runs) // 2]

    networks = {name: new(name, path) for name in names}
    macs = {name: multiply_adds(network, path, samples, part) for name, network in networks.items()}
    steps = {name: Step(network, params.learning_rate, device) for name, network in networks.items()}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.steps + 1):
        for name, step in steps.items():
            taken[name].append(step(*inputs))
    median = {name: statistics.median(values[1:]) for name, values in taken.items()}
    minimum = {name: min(values[1:]) for name, values in taken.items()}

    print(f"{path}, batch {batch} x {seconds:g} s, fp32, {device.type}, {args.threads} threads")
    for name in names:
        giga = {key: f"{value / 1e9:.2f}" for key, value in macs[name].items()}
        mega = {key: f"{value / MB:.0f}" for key, value in memory[name].items()}
        print(f"  {name}: median {median[name]:.3f} s, minimum {minimum[name]:.3f} s")
        print(
            f"    GMACs of a mixture: step {giga['step']}, forward {giga['forward']}, of which upstream "
            f"{giga['upstream']}; peak memory {mega['peak']} MB above {mega['before']} MB"
        )

    def against(name: str, table: dict[str, Any], key: str) -> float:
        return table[name][key] / table[BASELINE][key]

    for name in names[1:]:
        print(
            f"ratio: {median[name] / median[BASELINE]:.2f} ({minimum[name] / minimum[BASELINE]:.2f}) "
            f"of the baseline's time, "
            f"{against(name, macs, 'step'):.2f} of its multiply-adds, "
            f"{against(name, memory, 'peak'):.2f} of its memory ({name})"
        )
    frozen, updated = names[1:3]
    print(
        f"ratio: {median[frozen] / median[updated]:.2f} ({minimum[frozen] / minimum[updated]:.2f}) of the time of "
        f"{updated} ({frozen})"
    )
    for name in names[1:]:
        if not networks[name].settings.freeze_mae:
            continue  # its backward cannot be told from the rest
        time_share = statistics.median(steps[name].upstream[1:]) / median[BASELINE]
        macs_share = macs[name]["upstream"] / macs[BASELINE]["step"]
        print(
            f"ratio: {time_share / macs_share:.2f} ({name}: its frozen upstream takes {time_share:.3f} of the "
            f"baseline's time / {macs_share:.3f} of its multiply-adds)"
        )


if __name__ == "__main__":
    main()
