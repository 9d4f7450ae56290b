"""Two trainings side by side on a share of the cores each, against one after the other on all: what `make repro` does.

    python -m benchmarks.side_by_side
    python -m benchmarks.side_by_side --jobs 4 --steps 20

A training is that of params.yaml's ResUNet: its network, batch, optimiser, threads as OMP_NUM_THREADS says. The
processes stay, and the two ways take turns, so that both meet the same noise of a busy machine. Without stages' start,
which needs one core only: side by side it is shared out, too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from pipeline.core.config import load_params
from pipeline.core.runtime import cpu_count, keep_freed_memory
from pipeline.experiments.repro import share_of_cores
from pipeline.nn.features import SAMPLE_RATE
from pipeline.nn.losses import l1_loss
from pipeline.separators import build, model_params
from pipeline.stages.train_separator import TrainParams
from pipeline.training.loop import build_optimizer

QUERY_DIM = 128


def train(steps: int) -> None:
    """Take so many steps whenever a line comes in, and say so when they are done."""
    keep_freed_memory()
    torch.manual_seed(0)
    params, model = load_params("train", TrainParams), load_params("separators.resunet.model", model_params("resunet"))
    network = build("resunet", query_dim=QUERY_DIM, **model.model_dump()).train()
    optimizer = build_optimizer(params.optimizer, network.parameters(), params.learning_rate)
    mixture = torch.randn(params.batch_size, round(params.segment_seconds * SAMPLE_RATE))
    target, query = torch.randn_like(mixture), torch.randn(params.batch_size, QUERY_DIM)
    for _ in sys.stdin:
        for _ in range(steps):
            optimizer.zero_grad()
            l1_loss(network(mixture, query), target).mean().backward()
            optimizer.step()
        print("done", flush=True)


def start(steps: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--train", str(steps)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def seconds(processes: list[subprocess.Popen[str]]) -> float:
    """Until the last of these has taken its steps."""
    began = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "done\n"
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of each training, in each of the rounds")
    parser.add_argument("--rounds", type=int, default=7, help="after one that is not counted")
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train)
        return
    alone = start(args.steps, {"OMP_NUM_THREADS": str(cpu_count())})
    beside = [start(args.steps, share_of_cores(args.jobs)) for _ in range(args.jobs)]
    ratios = []
    for _ in range(args.rounds + 1):
        ratios.append(args.jobs * seconds([alone]) / seconds(beside))
    for process in [alone, *beside]:
        process.stdin.close()
        process.wait()
    spread = f"{min(ratios[1:]):.2f} to {max(ratios[1:]):.2f}"
    print(f"{args.jobs} trainings, {args.steps} steps each, {cpu_count()} cores, {args.rounds} rounds: {spread}")
    print(f"ratio: {statistics.median(ratios[1:]):.2f} (one after the other / side by side)")


if __name__ == "__main__":
    main()
