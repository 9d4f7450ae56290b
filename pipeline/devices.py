"""Where a network runs, and how exactly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from pipeline.runtime import cpu_count

# fp32   float32 throughout
# tf32   on a GPU, convolutions and matrix products of float32 round what they multiply to 10 bits of mantissa; on a CPU
#        the same as fp32
# bf16   autocast to bfloat16; what stays in float32 is exact
Precision = Literal["fp32", "tf32", "bf16"]


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one; ValueError for cuda asked for by name where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU; use device: auto or cpu")
    return torch.device(name)


def use_available_cores() -> None:
    """As many threads as this process may use cores, where OMP_NUM_THREADS does not say: torch counts the host's."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(cpu_count())


def use_precision(precision: Precision) -> None:
    """What float32 means to this process from here on: cuDNN's own default is TF32 for convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Within it a network's forward pass runs in that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 within, whatever the process has chosen: for front ends and for evaluation, 10 bits are 60 dB."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
