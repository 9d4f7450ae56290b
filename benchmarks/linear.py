"""The matrix products of nn.linear against torch.nn.functional.linear, and a training step of the Performer by either.

    python -m benchmarks.linear            one thread; a minute
    python -m benchmarks.linear --threads 2

Products are those of the networks that use it: rows x inputs -> outputs, fp32. Forward, then forward and backward, with
the gradients of inputs, weights and bias. The step is the MixIT Performer's of params.yaml on random mixtures of
mixtures: forward, MixIT loss, backward, AdamW.

The two ways are shown to agree, and are taken in turn; one thread is timed by its CPU time. Ratios are of the minima,
those of the medians in brackets. On a processor where pipeline.nn.linear is torch's own all ratios are 1.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mae import in_turn, torchs_linear
from pipeline.core.config import load_params
from pipeline.core.runtime import keep_freed_memory
from pipeline.nn.linear import linear, mkl_is_slower
from pipeline.separators import build_blind
from pipeline.training.mixit import MixitParams, build_optimizer, read_entry, training_losses

PRODUCTS = {
    "ViT-B, 8 x 513 tokens, feed-forward in": (8 * 513, 768, 3072),
    "ViT-B, 8 x 513 tokens, feed-forward out": (8 * 513, 3072, 768),
    "ViT-B in pretraining, 8 x 103 tokens": (8 * 103, 768, 3072),
    "default A-MAE, 16 x 103 tokens": (16 * 103, 64, 192),
    "default Performer, 4 x 517 tokens, feed-forward": (4 * 517, 128, 256),
    "default Performer, 4 x 517 tokens, masks": (4 * 517, 128, 4104),
}
TOLERANCE = 1e-4
CPU = torch.device("cpu")
SAMPLE_RATE, BATCH, SECONDS = 44100, 4, 3


def compare(ways: Mapping[str, Callable[[], Tensor]], repeats: int, calls: int, work: float | None = None) -> None:
    seconds = in_turn(ways, repeats, CPU, calls)
    torchs, ours = seconds.values()
    line = f"{min(torchs) / min(ours):.2f} (medians {statistics.median(torchs) / statistics.median(ours):.2f})"
    if work is None:
        line += f": {1e3 * min(torchs):.0f} ms, ours {1e3 * min(ours):.0f}"
    else:
        line += f": {work / min(torchs) / 1e9:.0f} GFLOP/s, ours {work / min(ours) / 1e9:.0f}"
    print(f"  {next(reversed(ways))}: ratio {line}")


def products(repeats: int) -> None:
    for name, (rows, n_in, n_out) in PRODUCTS.items():
        x = torch.randn(rows, n_in, requires_grad=True)
        weight = (torch.randn(n_out, n_in) * n_in**-0.5).requires_grad_()
        bias = torch.randn(n_out, requires_grad=True)
        errors = torch.randn(rows, n_out)

        def both(
            product: Callable[[Tensor, Tensor, Tensor], Tensor],
            parts: tuple[Tensor, Tensor, Tensor] = (x, weight, bias),
            errors: Tensor = errors,
        ) -> Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(product(*parts), parts, errors)])

        found, wanted = both(linear), both(F.linear)
        difference = float((found - wanted).norm() / wanted.norm())
        assert difference < TOLERANCE, f"{name}: the gradients differ by {difference:.1e} of them"
        print(f"{name}: {rows} x {n_in} -> {n_out}")
        work, parts = 2.0 * rows * n_in * n_out, (x.detach(), weight.detach(), bias.detach())
        calls = max(1, int(2e9 / work))
        compare(
            {"torch": lambda p=parts: F.linear(*p), "forward": lambda p=parts: linear(*p)},  # type: ignore[misc]
            repeats, calls, work,
        )  # fmt: skip
        compare(
            {"torch": lambda f=both: f(F.linear), "forward and backward": lambda f=both: f(linear)},  # type: ignore[misc]
            repeats, calls, 3 * work,
        )  # fmt: skip


def step(repeats: int) -> None:
    entry, params = read_entry("performer", "music"), load_params("mixit", MixitParams)
    torch.manual_seed(0)
    mixtures = 0.1 * torch.randn(params.batch_size, 2, SECONDS * SAMPLE_RATE)
    networks = [build_blind("performer", sample_rate=SAMPLE_RATE, **entry.model).eval()]  # no dropout, which is random
    networks.append(copy.deepcopy(networks[0]))
    optimizers = [build_optimizer(network, params.learning_rate, params.weight_decay) for network in networks]

    def take(i: int) -> Tensor:
        loss = training_losses(networks[i], mixtures, entry.params, params, CPU)["mixit"]
        optimizers[i].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[i].step()
        return loss

    def plainly() -> Tensor:
        with torchs_linear():
            return take(0)

    wanted, found = plainly().item(), take(1).item()
    assert abs(found - wanted) < TOLERANCE, f"the losses differ by {abs(found - wanted):.1e} dB"
    print(f"Performer, a step of {params.batch_size} mixtures of mixtures of {SECONDS} s")
    compare({"torch": plainly, "step": lambda: take(1)}, repeats, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="of each way, after one that is not counted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    print(f"{args.threads} threads; nn.linear is {'oneDNN' if mkl_is_slower() else 'torch.nn.functional.linear'}")
    products(args.repeats)
    step(args.repeats)


if __name__ == "__main__":
    main()
