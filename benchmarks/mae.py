"""The Audio-MAE's encoder and its filter bank, as this project computes them, against the original's way.

    python -m benchmarks.mae                      one thread; a quarter of an hour

attention     ViT-B (12 x 768) on 8 clips of 1024 frames (513 tokens), no gradients, fp32: ours, with fused attention,
              against the original's: q k^T, softmax and the product with v one by one. Same weights, same Linear
encoder       the same against all of the original's way, with torch's own Linear (see pipeline/nn/linear.py: on Intel's
              processors that is what ours has, too)
precision     ours in bf16 against ours in fp32: weights held in bf16, as `bf16_frozen` does, and autocast
filter bank   16 clips of 2 s at 16 kHz in one call (ours) against torchaudio's Kaldi filter bank, clip by clip

Everything is measured twice: with glibc's allocator as it comes, and with runtime.keep_freed_memory, which the stages
that run networks call. On a CPU fresh memory costs more than much of the arithmetic that is compared here.

What is compared is first shown to be equal: to 1e-4 for attention and filter bank; for bf16 the difference is printed.
The ways are taken in turn, so that all meet the same noise of a busy machine; one thread on a CPU is timed by its
CPU time, which leaves out when others have the core. Minima and medians are given; each ratio is that of the minima,
with that of the medians in brackets.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchaudio.compliance import kaldi

from pipeline.core.runtime import keep_freed_memory
from pipeline.nn import linear
from pipeline.nn.fbank import HOP_SAMPLES, N_MELS, SAMPLE_RATE, fbank
from pipeline.upstreams.mae import MAX_FRAMES, Attention, Encoder

VIT_B = {"dim": 768, "depth": 12, "heads": 12}
ENCODER_BATCH, FBANK_BATCH, FBANK_SECONDS = 8, 16, 2
FBANK_CALLS = 10  # in each turn: one is only milliseconds
TOLERANCE = 1e-4
BARS = {"attention": 1.2, "encoder": 1.2, "precision": 2.5, "filter bank": 1.2}
NEEDS_AMX = "precision"  # its bar is for a CPU with AMX: AVX-512 alone multiplies bf16 at twice the speed of fp32
CPUINFO = Path("/proc/cpuinfo")


class PlainAttention(nn.Module):
    """The attention of the original (timm's of 2020), on the very weights of ours."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = ours.heads, ours.qkv, ours.proj

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        size = dim // self.heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * size**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


def plain(encoder: Encoder) -> Encoder:
    """The same encoder, and the same weights in memory, with the original's attention."""
    shared = {id(p): p for p in encoder.parameters()}
    other = copy.deepcopy(encoder, memo=shared)  # type: ignore[arg-type]
    for block in other.blocks:
        block.attn = PlainAttention(block.attn)
    assert all(id(p) in shared for p in other.parameters())
    return other


def encode(encoder: Encoder, features: Tensor) -> Tensor:
    return encoder.norm(encoder.hidden(features)[-1])


def autocast(encoder: Encoder, features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, torch.bfloat16):
        return encode(encoder, features)


@contextmanager
def torchs_linear() -> Iterator[None]:
    """Within it every Linear is torch's own."""
    ours = linear.mkl_is_slower
    linear.mkl_is_slower = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        linear.mkl_is_slower = ours


def encode_as_original(encoder: Encoder, features: Tensor) -> Tensor:
    with torchs_linear():
        return encode(encoder, features)


def one_by_one(clips: Tensor) -> Tensor:
    """As AudioMAE's data set does."""
    return torch.stack(
        [
            kaldi.fbank(
                clip[None],
                htk_compat=True,
                sample_frequency=SAMPLE_RATE,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=N_MELS,
                dither=0.0,
                frame_shift=1000 * HOP_SAMPLES / SAMPLE_RATE,
            )
            for clip in clips
        ]
    )


def in_turn(
    ways: Mapping[str, Callable[[], Tensor]], repeats: int, device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of one call, `repeats` times each, after a turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = now(device)
            for _ in range(calls):
                way()
            seconds[name].append((now(device) - start) / calls)
    return {name: values[1:] for name, values in seconds.items()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def show(seconds: Mapping[str, list[float]]) -> None:
    for name, values in seconds.items():
        print(f"  {name}: minimum {1e3 * min(values):.1f} ms, median {1e3 * statistics.median(values):.1f} ms")


def ratio(bar: str, seconds: Mapping[str, list[float]], slow: str, fast: str) -> None:
    minima = min(seconds[slow]) / min(seconds[fast])
    medians = statistics.median(seconds[slow]) / statistics.median(seconds[fast])
    verdict = "met" if minima >= BARS[bar] else "missed"
    if bar == NEEDS_AMX and not (CPUINFO.is_file() and "amx_bf16" in CPUINFO.read_text()):
        verdict = "for a CPU with AMX, which this is not"
    print(f"ratio: {minima:.2f} (medians {medians:.2f}; {slow} / {fast}; bar {BARS[bar]}: {verdict})")


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="of each way, after one that is not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    clips = 0.1 * torch.randn(FBANK_BATCH, FBANK_SECONDS * SAMPLE_RATE, device=device)
    difference = float((fbank(clips) - one_by_one(clips)).abs().max())
    assert difference < TOLERANCE, f"the filter banks differ by {difference:.1e}"
    print(f"{device.type}, {args.threads} threads")
    print(f"filter bank, {FBANK_BATCH} x {FBANK_SECONDS} s: differs from torchaudio's by at most {difference:.0e}")

    ours = Encoder(**VIT_B).to(device).eval()
    original = plain(ours)
    held = copy.deepcopy(ours).to(torch.bfloat16)
    features = 0.5 * torch.randn(ENCODER_BATCH, MAX_FRAMES, N_MELS, device=device)
    wanted = encode(ours, features)
    difference = float((encode_as_original(original, features) - wanted).abs().max())
    assert difference < TOLERANCE, f"the plain encoder is another one: they differ by {difference:.1e}"
    between = float((encode(original, features) - wanted).abs().max())
    assert between < TOLERANCE, f"with the same products they differ by {between:.1e}"
    print(f"encoder, {ENCODER_BATCH} x {wanted.shape[1]} tokens: at most {difference:.0e} from the original's way;")
    for name, found in {"held": encode(held, features), "autocast": autocast(ours, features)}.items():
        print(f"  bf16 {name} differs from fp32 by {relative(found, wanted):.4f} of it (root mean square)")

    banks: dict[str, Callable[[], Tensor]] = {"one by one": lambda: one_by_one(clips), "batch": lambda: fbank(clips)}
    encoders: dict[str, Callable[[], Tensor]] = {
        "original fp32": lambda: encode_as_original(original, features),
        "plain fp32": lambda: encode(original, features),
        "ours fp32": lambda: encode(ours, features),
        "ours bf16 held": lambda: encode(held, features),
        "ours bf16 autocast": lambda: autocast(ours, features),
    }
    for kept in (False, True):
        print("freed memory kept, as in the stages" if kept else "memory as it comes")
        if kept:
            keep_freed_memory()
        seconds = in_turn(banks, 5 * args.repeats, device, FBANK_CALLS)
        seconds |= in_turn(encoders, args.repeats, device)
        show(seconds)
        ratio("attention", seconds, "plain fp32", "ours fp32")
        ratio("encoder", seconds, "original fp32", "ours fp32")
        ratio("precision", seconds, "ours fp32", "ours bf16 held")
        ratio("precision", seconds, "ours fp32", "ours bf16 autocast")
        ratio("filter bank", seconds, "one by one", "batch")


if __name__ == "__main__":
    main()
