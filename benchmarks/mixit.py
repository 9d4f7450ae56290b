"""The MixIT loss by Gram matrices, against writing out all 256 remixes of 8 outputs; forward and backward.

    python -m benchmarks.mixit                  batch 4, 3 s at 44.1 kHz, thresholded SNR, one thread
    python -m benchmarks.mixit --seconds 10     the plain form then takes one item at a time where memory is short

    ours    `mixit_loss`: one Gram matrix, all assignments from it, the best one evaluated and differentiated
    plain   one assignment after the other, as Asteroid's MixITLossWrapper goes through its partitions: the sources of
            either mixture are summed, the objective is taken of the sums, and the lowest of the stacked 256 values is
            differentiated. What each of them needs for the gradient is kept until then

The plain form is kinder to itself than Asteroid's: it leaves the means in, and so has less to keep.

Each form runs in a process of its own. Time is the median of the steps after the first one, of which the plain form
takes only the first. Memory is the peak of the process (ru_maxrss) after the first step, less its size before it with
the waveforms loaded. Both forms must agree in loss and gradient.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from pipeline.nn.losses import mixit_loss

SAMPLE_RATE, N_SOURCES, MAX_SNR_DB = 44_100, 8, 30.0
# Measured, per sample of the batch: four float32 waveforms per assignment and mixture.
PLAIN_BYTES_PER_SAMPLE = 256 * 2 * 4 * 4


def signals(batch: int, n_samples: int) -> tuple[Tensor, Tensor]:
    """Sources in two mixtures of four, and noisy estimates of them."""
    generator = torch.Generator().manual_seed(0)
    sources = 0.1 * torch.randn(batch, N_SOURCES, n_samples, generator=generator)
    estimates = sources + 0.05 * torch.randn(batch, N_SOURCES, n_samples, generator=generator)
    return estimates, torch.stack([sources[:, :4].sum(dim=1), sources[:, 4:].sum(dim=1)], dim=1)


def negative_snr(estimate: Tensor, mixture: Tensor) -> Tensor:
    power = mixture.square().sum(dim=-1)
    error = (mixture - estimate).square().sum(dim=-1)
    return 10 * torch.log10(error + 10 ** (-MAX_SNR_DB / 10) * power) - 10 * torch.log10(power)


def plain(estimates: Tensor, mixtures: Tensor) -> Tensor:
    """The lowest of the losses of all assignments, (batch,)."""
    losses = []
    for number in range(2**N_SOURCES):
        of_first = [n for n in range(N_SOURCES) if not number >> n & 1]
        of_second = [n for n in range(N_SOURCES) if number >> n & 1]
        remixes = torch.stack([estimates[:, of_first].sum(dim=1), estimates[:, of_second].sum(dim=1)], dim=1)
        losses.append(negative_snr(remixes, mixtures).mean(dim=1))
    return torch.stack(losses, dim=1).min(dim=1).values


def ours(estimates: Tensor, mixtures: Tensor) -> Tensor:
    return mixit_loss(estimates, mixtures, max_snr_db=MAX_SNR_DB).loss


def step(form: Callable[[Tensor, Tensor], Tensor], estimates: Tensor, mixtures: Tensor, at_once: int) -> Tensor:
    """Losses of the batch, `at_once` items at a time; the gradient is left in estimates.grad."""
    estimates.grad = None
    losses = []
    for items in torch.arange(len(estimates)).split(at_once):
        span = slice(int(items[0]), int(items[-1]) + 1)
        loss = form(estimates[span], mixtures[span])
        loss.sum().backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, batch: int, n_samples: int, at_once: int, steps: int, out: Path) -> None:
    form = {"plain": plain, "ours": ours}[name]
    small, small_mixtures = signals(1, 64)
    step(form, small.requires_grad_(), small_mixtures, 1)
    estimates, mixtures = signals(batch, n_samples)
    estimates.requires_grad_()
    before = psutil.Process().memory_info().rss
    seconds = []
    losses = torch.zeros(batch)
    for index in range(steps):
        start = time.perf_counter()
        losses = step(form, estimates, mixtures, at_once)
        seconds.append(time.perf_counter() - start)
        if index == 0:
            first_peak = peak_bytes()
    assert estimates.grad is not None
    torch.save({"loss": losses, "gradient": estimates.grad}, out / f"{name}.pt")
    record = {"seconds": statistics.median(seconds[1:] or seconds), "bytes": first_peak - before}
    (out / f"{name}.json").write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of ours; the plain form takes one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n_samples = round(args.seconds * SAMPLE_RATE)
    if args.measure:
        measure(args.measure, args.batch, n_samples, args.at_once, args.steps, args.out)
        return

    fits = psutil.virtual_memory().available > 1.2 * PLAIN_BYTES_PER_SAMPLE * args.batch * n_samples
    at_once = {"ours": args.batch, "plain": args.batch if fits else 1}
    steps = {"ours": args.steps, "plain": 1}
    with tempfile.TemporaryDirectory() as folder:
        for name in at_once:
            command = [sys.executable, "-m", "benchmarks.mixit", "--measure", name, "--out", folder]
            for key in ("seconds", "batch", "threads"):
                command += [f"--{key}", str(getattr(args, key))]
            subprocess.run([*command, "--at-once", str(at_once[name]), "--steps", str(steps[name])], check=True)
        found = {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in at_once}
        result = {name: torch.load(Path(folder) / f"{name}.pt") for name in at_once}

    apart_db = float((result["ours"]["loss"] - result["plain"]["loss"]).abs().max())
    difference = (result["ours"]["gradient"] - result["plain"]["gradient"]).norm()
    apart = float(difference / result["plain"]["gradient"].norm())
    assert apart_db < 1e-3, f"the losses differ by {apart_db:.1e} dB"
    assert apart < 1e-4, f"the gradients differ by {apart:.1e}"

    print(f"batch {args.batch} x {args.seconds:g} s, {N_SOURCES} sources, 2 mixtures, {args.threads} threads")
    print(f"  losses differ by {apart_db:.0e} dB, gradients by {apart:.0e} of their norm")
    for name, record in found.items():
        items = "" if at_once[name] == args.batch else f", {at_once[name]} item at a time, as memory is short"
        print(f"  {name}: {record['seconds']:.3f} s, {record['bytes'] / 2**20:.0f} MiB{items}")
    memory = found["plain"]["bytes"] / found["ours"]["bytes"] * args.batch / at_once["plain"]
    if at_once["plain"] < args.batch:
        print(f"  the memory ratio counts the plain form's {args.batch} times, for the whole batch")
    print(f"ratio: {found['plain']['seconds'] / found['ours']['seconds']:.0f} (time, plain / ours)")
    print(f"ratio: {memory:.0f} (memory above the process, plain / ours)")


if __name__ == "__main__":
    main()
