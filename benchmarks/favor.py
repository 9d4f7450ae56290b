"""FAVOR+ against exact attention: time and memory of the attention core, forward and backward, as the tokens grow.

    python -m benchmarks.favor               500 to 20,000 tokens, one thread
    python -m benchmarks.favor --threads 2
    python -m benchmarks.favor --encoder     the whole encoder of the report: 12 layers of 512, to 5,000 tokens

    favor       favor_attention, 256 random features, stabiliser "full"
    recomputed  the same with its features computed again in the backward pass
    sdpa        torch's fused scaled_dot_product_attention

One layer of 8 heads x 64, batch 1, float32; queries, keys and values are given. Each cell is a process of its own:

ms      the shortest step, in CPU time, which other processes disturb less; with several threads, in wall-clock time.
        A step of more than 10 s is taken once, with memory that is still cold
kept    MiB of resident memory that the forward pass adds: what every layer of a network holds until its backward pass
peak    MiB at the highest point of the step above that before it (ru_maxrss, which never falls). Includes the gradients
        of queries, keys and values, 6 KiB per token

The exponents are slopes of least squares in log-log, of the rows from 2000 tokens on and of all rows; the cross-over is
where the lines between two rows meet.
"""

import argparse
import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from pipeline.nn.favor import PerformerEncoder, favor_attention, orthogonal_features

HEADS, HEAD_DIM, N_FEATURES = 8, 64, 256
TOKENS = (500, 1000, 2000, 5000, 10_000, 20_000)
KINDS = ("favor", "recomputed", "sdpa")
SECONDS_PER_CELL, LEAST_STEPS, MOST_STEPS = 1.0, 4, 10  # the first two find memory that is still cold
LONG_STEP_SECONDS = 10.0  # is not taken again
# Of glibc's mallopt: free memory at the end of the heap, and blocks of so many bytes, go back to the system at once;
# and how many such blocks there may be.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
DEPTH, MLP_RATIO, ENCODER_TOKENS = 12, 4.0, (500, 1000, 2000, 5000)
FIT_FROM = 2000  # tokens: below, what every process needs anyway is seen


def attention(kind: str, sizes: Sequence[int]) -> Callable[[int], torch.Tensor]:
    """The core alone, on queries, keys and values of these numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    projection = orthogonal_features(N_FEATURES, HEAD_DIM, generator)
    # Entries as small as the encoder's norm of queries and keys makes them.
    leaves = {
        n: [(0.35 * torch.randn(1, HEADS, n, HEAD_DIM, generator=generator)).requires_grad_() for _ in range(3)]
        for n in sizes
    }

    def forward(tokens: int) -> torch.Tensor:
        q, k, v = leaves[tokens]
        if kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return favor_attention(q, k, v, projection, stabiliser="full", eps=1e-8, recompute=kind == "recomputed")

    return forward


def encoder(kind: str, sizes: Sequence[int]) -> Callable[[int], torch.Tensor]:
    """The encoder of the report, without its dropout."""
    torch.manual_seed(0)
    network = PerformerEncoder(
        dim=HEADS * HEAD_DIM,
        depth=DEPTH,
        heads=HEADS,
        mlp_ratio=MLP_RATIO,
        dropout=0.0,
        attention="sdpa" if kind == "sdpa" else "favor",
        n_features=N_FEATURES,
        stabiliser="full",
        eps=1e-8,
        qk_norm=True,
        recompute=kind == "recomputed",
    )
    inputs = {n: torch.randn(1, n, HEADS * HEAD_DIM).requires_grad_() for n in sizes}

    def forward(tokens: int) -> torch.Tensor:
        out: torch.Tensor = network(inputs[tokens])
        return out

    return forward


def cell(kind: str, tokens: int, threads: int, whole: bool) -> dict[str, float]:
    """Seconds of the shortest step, MiB after the forward pass, MiB at the peak."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    forward = (encoder if whole else attention)(kind, (8, tokens))
    shape = (1, tokens, HEADS * HEAD_DIM) if whole else (1, HEADS, tokens, HEAD_DIM)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    process = psutil.Process()

    def step(tokens: int) -> tuple[float, int]:
        start = clock()
        out = forward(tokens)
        resident = process.memory_info().rss
        out.backward(gradient[..., :tokens, :])
        return clock() - start, resident

    step(8)  # what the libraries set up once
    # Otherwise the holes that small blocks leave are counted too, more of them for few tokens than for many.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    before, at_peak = process.memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, resident = step(tokens)
    kept = resident - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_peak
    # And from now on the process keeps what it had once: the time is the arithmetic's, not the page faults'.
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    begin, times = time.perf_counter(), [first]
    while first < LONG_STEP_SECONDS and len(times) < MOST_STEPS:
        if len(times) >= LEAST_STEPS and time.perf_counter() - begin > SECONDS_PER_CELL:
            break
        times.append(step(tokens)[0])
    return {"seconds": min(times), "kept": kept / 2**20, "peak": peak / 2**10}


def exponent(values: dict[int, float], first: int = FIT_FROM) -> float:
    """p of a * tokens^p, from `first` tokens on."""
    points = [(math.log(n), math.log(value)) for n, value in values.items() if n >= first]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def cross_over(favor: dict[int, float], sdpa: dict[int, float]) -> float | None:
    """Tokens from which favor is the faster one, interpolated in log-log; None where it never gets so far."""
    ratio = {n: math.log(favor[n] / sdpa[n]) for n in sorted(favor)}
    slower = [n for n in ratio if ratio[n] >= 0]
    faster = [n for n in ratio if not slower or n > slower[-1]]
    if not faster:
        return None
    if not slower:
        return float(faster[0])
    low, high = slower[-1], faster[0]
    share = ratio[low] / (ratio[low] - ratio[high])
    return float(low * (high / low) ** share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encoder", action="store_true", help="all of it, in place of one layer's attention")
    parser.add_argument("--cell", nargs=2, metavar=("KIND", "TOKENS"), help="one of them, as JSON")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.cell[0], int(args.cell[1]), args.threads, args.encoder)))
        return
    sizes = ENCODER_TOKENS if args.encoder else TOKENS

    found: dict[str, dict[str, dict[int, float]]] = {
        kind: {quantity: {} for quantity in ("seconds", "kept", "peak")} for kind in KINDS
    }
    layers = f"{DEPTH} layers of " if args.encoder else ""
    print(f"{layers}{HEADS} heads x {HEAD_DIM}, {N_FEATURES} features, {args.threads} thread(s), forward and backward")
    print("  tokens" + "".join(f"{kind + ' ms':>16}{'kept':>7}{'peak':>7}" for kind in KINDS))
    for tokens in sizes:
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.favor", "--threads", str(args.threads)]
            command += ["--encoder"] if args.encoder else []
            done = subprocess.run([*command, "--cell", kind, str(tokens)], check=True, capture_output=True, text=True)
            for quantity, value in json.loads(done.stdout).items():
                found[kind][quantity][tokens] = value
        rows = [[found[kind][quantity][tokens] for quantity in ("seconds", "kept", "peak")] for kind in KINDS]
        print(f"{tokens:8}" + "".join(f"{1e3 * s:16.1f}{k:7.0f}{p:7.0f}" for s, k, p in rows), flush=True)
    for kind in KINDS:
        slopes = (
            f"{name} ~ tokens^{exponent(values):.2f} (from {sizes[0]} on: {exponent(values, sizes[0]):.2f})"
            for name, values in found[kind].items()
        )
        print(f"{kind}: " + ", ".join(slopes))
    for kind in KINDS[:-1]:
        at = cross_over(found[kind]["seconds"], found["sdpa"]["seconds"])
        print(f"{kind} is faster than sdpa " + (f"from {at:.0f} tokens on" if at else "nowhere"))
    most = max(sizes)
    ratio = found["sdpa"]["seconds"][most] / found["favor"]["seconds"][most]
    print(f"ratio: {ratio:.2f} (sdpa / favor, {most} tokens)")


if __name__ == "__main__":
    main()
