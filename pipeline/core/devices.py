"""Where a network runs, how exactly, and whether it has the memory."""

import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
import torch

from pipeline.core.runtime import cpu_count, read_json, remove, write_json

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # malloc; CUDA; cuBLAS and cuDNN
# Of a device's memory, what the system, the driver and small programs may hold: more is a neighbour's.
FREE_FOR_OTHERS = 0.25

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
    """Set torch's threads to the cores this process may use, unless OMP_NUM_THREADS says (torch counts the host's)."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(cpu_count())


def use_precision(precision: Precision) -> None:
    """Set what float32 means to this process: cuDNN's own default is TF32 for convolutions."""
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


# --------------------------------------------------------------------------------------------- going on alike


def processor() -> str:
    """The kind of processor, as far as sums depend on it: its name, and the instructions that libraries may use."""
    name = platform.machine()
    with suppress(OSError):
        found = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        wide = [flag for flag in found.get("flags", "").split() if flag.startswith(("avx", "amx"))]
        name = " ".join([found.get("model name", name), *sorted(wide)])
    chosen = [f"{key}={os.environ[key]}" for key in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if key in os.environ]
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), *chosen])


def go_on_alike(scratch: Path, device: torch.device, precision: Precision) -> None:
    """Have a training whose state lies in `scratch` go on as it began, or else begin anew; either is logged.

    The last bits of sums depend on the number of threads, the kind of processor and the precision, so a training that
    goes on under others has weights that no whole run has. This process takes over the number of threads; what was
    begun on another device or processor, or in another precision, is removed. Call it before anything is computed.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    here = {"device": kind, "precision": precision, "processor": processor()}
    threads, file = torch.get_num_threads(), scratch / "began.json"
    began = None
    with suppress(FileNotFoundError, ValueError):
        began = read_json(file)
    left = [path for path in scratch.iterdir() if path != file]
    if left and began and began["on"] == here:
        if began["threads"] != threads:
            log.warning("goes on with %d threads, as it began, not with %d", began["threads"], threads)
        threads = began["threads"]
    elif left:
        was = began["on"] if began else {}
        changed = ", ".join(f"{key} {was.get(key)!r} -> {here[key]!r}" for key in here if was.get(key) != here[key])
        log.warning("what was begun is removed, and training begins anew: %s", changed)
        for path in left:
            remove(path)
    torch.set_num_threads(threads)  # also where it changes nothing: the libraries then no longer choose by themselves
    os.environ["OMP_NUM_THREADS"] = str(threads)
    write_json(file, {"on": here, "threads": threads})


# -------------------------------------------------------------------------------------------------------- memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the device's memory, or the machine's, giving out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)
    )


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Within it memory that gives out is a ValueError that names what was to be loaded: no model is to blame."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"the machine's memory does not hold {what}: batch_size or segment_seconds is too large, or something else "
            f"fills it ({str(error)[:200] or type(error).__name__})"
        ) from error


def memory_of_others(device: torch.device) -> tuple[int, int]:
    """(bytes of the device's memory that other processes hold, bytes that it has in all)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device), total
    memory, this = psutil.virtual_memory(), psutil.Process()
    own = 0  # bytes
    for process in (this, *this.children(recursive=True)):  # parts are scored in processes of their own
        with suppress(psutil.Error):
            own += process.memory_info().rss
    return memory.total - memory.available - own, memory.total


def blame_neighbours(error: BaseException, device: torch.device) -> None:
    """MemoryError where a model's step ran out of memory that other processes hold: alone it might have had enough."""
    others, total = memory_of_others(device)
    asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
    if others > FREE_FOR_OTHERS * total and (asked is None or int(asked[1]) < total):
        raise MemoryError(
            f"out of memory: other processes hold {others / 1e9:.1f} of {total / 1e9:.1f} GB: it is no result. "
            f"End them, or wait, and run it again ({str(error)[:200] or type(error).__name__})"
        ) from error
