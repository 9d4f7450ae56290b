"""Where a network runs."""

import os

import torch

from pipeline.runtime import cpu_count


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
