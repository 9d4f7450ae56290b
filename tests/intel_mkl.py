"""Makes MKL take the code path of Intel's processors on any x86-64 one, for this process alone.

MKL asks `mkl_serv_intel_cpu_true` for the maker of the processor and on others runs different kernels, whose float32
results differ in the last bits. What the original implementations wrote on an Intel machine can then be compared to
the bit elsewhere. It must run before the first operation of torch; it is for tests only.
"""

import ctypes
import mmap
from pathlib import Path

import torch

_YES = bytes.fromhex("b801000000c3")  # mov eax, 1; ret
_READ_WRITE_EXECUTE = 7


class NoMKL(RuntimeError):
    """This torch has no MKL whose path can be chosen, or its code cannot be written to."""


def take_intel_path() -> None:
    """Rewrite MKL's question, in place. NoMKL where there is none to rewrite."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    except OSError as error:
        raise NoMKL(str(error)) from None
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu"):
        try:
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        except AttributeError:
            raise NoMKL(f"libtorch_cpu.so has no {name}") from None
        assert address is not None
        page = address - address % mmap.PAGESIZE
        length = address + len(_YES) - page
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(length), _READ_WRITE_EXECUTE):
            raise NoMKL(f"mprotect: errno {ctypes.get_errno()}")
        ctypes.memmove(address, _YES, len(_YES))
