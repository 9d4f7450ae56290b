"""What every stage needs of the machine: one run at a time, a clean end, atomic files, and a place to resume from.

A stage's main() is

    with running("resample_train", args.out):
        scratch = scratch_dir("resample_train", fingerprint(params, args.manifest))
        ...                       # work in `scratch`; a run that is killed finds its finished parts there
        publish(assembled, args.out)
        shutil.rmtree(scratch)

The stage's name carries its item ("resample_train", not "resample"): locks, timings and scratch are kept by that name.
DVC removes a stage's outputs before it runs, so nothing here lives inside them: locks and scratch are under
`data/scratch` of the repository (`$DVC_ROOT`, which stays the same in a temporary experiment's workspace).

This module must not import torch: the workers that resample load it, and torch costs each 0.7 GB and seconds.
"""

import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pydantic import BaseModel
from ruamel.yaml.error import YAMLError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2  # linux/prctl.h
_NUMERIC_LIBRARIES = ("numpy", "scipy", "soundfile", "soxr", "torch")
_held: dict[Path, int] = {}  # lock file -> descriptor; this process holds each of them


class AlreadyRunning(RuntimeError):
    """Another live process works on the same output or the same scratch directory."""


# ---------------------------------------------------------------------------------------------------- files


class DiskFull(OSError):
    """A disk or a quota has no room left; the message names the file and the disk."""


def disk_full(path: Path) -> DiskFull:
    """Make the error for a `path` that could not be written for want of room."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    mount = there.resolve()
    while not mount.is_mount():
        mount = mount.parent
    usage = shutil.disk_usage(there)
    room = f"{usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB are free"
    return DiskFull(
        errno.ENOSPC, f"no space left on the disk at {mount} ({room}); make some and run it again", str(path)
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a full disk raises DiskFull, whatever library wrote: many name no file, and none the disk.

    What is larger than the file system or `ulimit -f` lets a file be has its name, too.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG and error.filename is None:
            error.filename = str(path)
        said = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not said and "No space left on device" not in str(error) and "Disk quota exceeded" not in str(error):
            raise
        raise disk_full(Path(getattr(error, "filename", None) or path)) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that is there whole or not at all: written beside, synced to disk, renamed.

    The temporary name is fixed (`.<name>.tmp`), so what a killed run leaves is overwritten by the next one.
    """
    write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: none is renamed into its place before all are on the disk."""
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path), open(temporary[path], "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    for directory in {path.parent for path in files}:
        sync(directory)


def reserve(path: Path, size: int) -> None:
    """Give a file `size` bytes that the disk really has. DiskFull where it has not.

    A file that is only as long as that has holes: written through a memory map, the first one that finds no room kills
    the process by SIGBUS.
    """
    with writing(path), open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.seek(0, os.SEEK_END)
            while (left := size - file.tell()) > 0:
                file.write(bytes(min(left, 1 << 20)))


def write_json(path: Path, value: Any) -> None:
    """Write a value `as_json`, whole or not at all."""
    write_atomic(path, as_json(value))


def as_json(value: Any) -> str:
    """JSON whose bytes depend on the value alone: sorted keys, a newline at the end, NaN refused (ValueError)."""
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file. FileNotFoundError, or ValueError that names the file where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def let_go(descriptor: int) -> None:
    """Have an open file written to disk from now on, and what is there already dropped from memory; does not wait."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_tree(directory: Path) -> None:
    """Flush every file below a directory, and the directories, to disk."""
    for parent, _, files in os.walk(directory):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def remove(path: Path) -> None:
    """Delete a file, a link or a whole directory; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished file a second name, by a hard link where the file system allows, so that the first one stays."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with writing(target):
            shutil.copyfile(source, target)


def publish(directory: Path, out: Path) -> None:
    """Make `directory` the output `out`: synced, then renamed; what `out` was before is removed.

    A reader sees the old directory, none, or the whole new one. Between file systems the content is first copied
    beside `out`.
    """
    directory, out = Path(directory), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    old, new = out.with_name(f".{out.name}.old"), out.with_name(f".{out.name}.new")
    remove(old)
    remove(new)
    sync_tree(directory)
    try:
        os.rename(directory, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with writing(new):
            shutil.copytree(directory, new)
            sync_tree(new)
    if os.path.lexists(out):
        os.rename(out, old)
    os.rename(new, out)
    sync(out.parent)
    remove(old)
    remove(directory)


# ------------------------------------------------------------------------------------------------ identity


def fingerprint(*things: BaseModel | Path | str | int | float | None) -> str:
    """Name of a run: equal when the params, the input files and the code are, so its unfinished work can be used.

    Params count by their JSON, paths by the content of the file, everything else by its repr; the code is the source
    of the `pipeline` modules loaded at the time of the call (call it in main, after the imports). The versions of the
    libraries that compute the numbers count too. Never pass what may change freely: worker counts, dates, a directory.
    """
    digest = hashlib.sha256()

    def add(kind: str, content: bytes) -> None:
        digest.update(f"{kind} {len(content)}\n".encode())  # lengths, so that neighbours cannot run into each other
        digest.update(content)

    for thing in things:
        if isinstance(thing, BaseModel):
            add("params", json.dumps(thing.model_dump(mode="json"), sort_keys=True).encode())
        elif isinstance(thing, Path):
            add("file", bytes.fromhex(sha256_file(thing)))
        elif thing is None or isinstance(thing, str | int | float):
            add("value", repr(thing).encode())
        else:
            raise TypeError(f"a run cannot be named by a {type(thing).__name__}: pass params, a file's Path or a str")
    for name, source in sorted(_loaded_sources().items()):
        add(name, source.read_bytes())
    for name in _NUMERIC_LIBRARIES:
        add(name, _version(name).encode())
    return digest.hexdigest()[:32]


def _loaded_sources() -> dict[str, Path]:
    package = __name__.partition(".")[0]
    sources = {}
    for name, module in list(sys.modules.items()):
        name = import_name(module) if name == "__main__" else name
        file = getattr(module, "__file__", None)
        if (name == package or name.startswith(f"{package}.")) and file and Path(file).is_file():
            sources[name] = Path(file)
    return sources


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def import_name(module: ModuleType) -> str:
    """Name by which another process can import the module: `python -m a.b` runs a.b under the name `__main__`."""
    spec = getattr(module, "__spec__", None)
    return spec.name if spec is not None else module.__name__


# ------------------------------------------------------------------------------------------- places, locks


def checkout() -> Path:
    """The folder that this run belongs to: the repository's, which a temporary experiment's workspace shares."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def outside(path: str | Path) -> Path:
    """A path of params.yaml that is no output of the graph: where data or weights lie.

    A copy of the workspace (`dvc exp run --temp`, `--queue`) has what git and DVC know. What it has not is that of the
    workspace that it is a copy of.
    """
    path = Path(path)
    there = checkout() / path
    return there if not path.exists() and there.exists() else path


def scratch_dir(stage: str, fingerprint: str, keep: int = 1) -> Path:
    """Directory for the resumable state of one run, `data/scratch/<stage>/<fingerprint>`, locked by this process.

    Of the stage's other runs the `keep` most recently used stay, so that a training that was killed is still there
    after one experiment with other params; older ones are removed, unless a live process holds them.
    The lock is released when `running` ends, or with the process. The stage deletes the directory once it has
    published.
    """
    _check_name(stage)
    directory = checkout() / "data" / "scratch" / stage / fingerprint
    lock = _lock_beside(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if lock not in _held:
        _acquire(lock, f"another run of {stage} with the same inputs")
    directory.mkdir(exist_ok=True)
    others = sorted((path for path in directory.parent.glob("*.lock") if path != lock), key=_last_used)
    for other in others[: max(len(others) - keep, 0)]:
        with suppress(AlreadyRunning):
            _acquire(other, "it")
            remove(other.with_suffix(""))
            _release(other, delete=True)
    return directory


def _last_used(lock: Path) -> float:
    try:
        return lock.stat().st_mtime  # written when the lock is taken
    except FileNotFoundError:
        return 0


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a scratch directory; nothing more happens where this process holds it already."""
    lock = _lock_beside(directory.absolute())
    if lock in _held:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    _acquire(lock, f"another run working in {directory}")
    try:
        yield
    finally:
        _release(lock, delete=True)


def _lock_beside(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_@-]+", name):
        raise ValueError(f"{name!r} is not a stage's name: letters, digits, _, @ and - only")


def _acquire(lock: Path, what: str) -> None:
    if not _held:
        _forget_locks_in_children()
    if lock in _held:
        raise AlreadyRunning(f"{what} is this very process (lock {lock})")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise AlreadyRunning(f"{what} is alive: {owner or 'pid unknown'} (lock {lock})") from None
        try:
            same = os.path.samestat(os.stat(lock), os.fstat(descriptor))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its last owner deleted it between our open and our lock: take the new one
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}, {' '.join(sys.argv)}\n".encode(), 0)
    _held[lock] = descriptor


def _release(lock: Path, delete: bool = False) -> None:
    descriptor = _held.pop(lock)
    if delete:
        lock.unlink(missing_ok=True)
    os.close(descriptor)


@functools.cache
def _forget_locks_in_children() -> None:
    # A forked child (a data loader's worker) has a copy of each descriptor, and would keep the lock of a parent
    # that was killed. Closing the copy leaves the parent's lock alone.
    def forget() -> None:
        for descriptor in _held.values():
            os.close(descriptor)
        _held.clear()

    os.register_at_fork(after_in_child=forget)


# ------------------------------------------------------------------------------------------------- process


def log_to_stderr() -> None:
    """Log lines of level INFO and above, unless logging is set up already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def run_command(main: Callable[[], int | None]) -> None:
    """Run the main function of a command or stage: what the user can mend is one line and exit status 2.

    That is every ValueError and OSError, and AlreadyRunning, with the notes that were added to it. Ctrl-C is one line
    and exit status 130. USS_DEBUG=1 shows where it happened; other exceptions, which are faults of the code, always do.
    """
    debug = os.environ.get("USS_DEBUG", "") not in ("", "0")
    if "DVC_STAGE" in os.environ and "USS_WHOLE_FILES" not in os.environ:  # a plain `dvc repro`, which we cannot mend
        watch = [sys.executable, "-m", "pipeline.core.dvc_internals", "--watch", str(os.getppid())]
        environment = os.environ | {"USS_WHOLE_FILES": "1"}  # the watch starts no other
        no = subprocess.DEVNULL
        subprocess.Popen(watch, env=environment, stdin=no, stdout=no, stderr=no, start_new_session=True)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ninterrupted; run it again, it goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who read our output has gone, as `head` does
        sys.exit(141)
    except (ValueError, OSError, AlreadyRunning, YAMLError) as error:
        if debug:
            raise
        said = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
        lines = (line.strip() for text in said for line in text.splitlines())
        print(f"error: {'; '.join(line for line in lines if line)}", file=sys.stderr)
        sys.exit(2)


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send us `signum` when our parent dies. Does nothing where there is no prctl (not Linux).

    `dvc repro` that is killed leaves its stage running, and a second one starts beside it on the same files.
    """
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signum)
    if sys.platform == "linux" and os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signum)


def _prctl(option: int, argument: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one does not wait for the clean-up
    raise SystemExit(128 + signum)


@contextmanager
def running(stage: str, out: Path) -> Iterator[dict[str, float]]:
    """Run a stage: logging on, alone on `out`, ended by SIGTERM or its parent's death as by an exception.

    Raises AlreadyRunning, naming the other process, when another one works on `out`. Writes what the stage took to
    data/timings/<stage>.json once it has succeeded: seconds by the clock and of processors (its ended children's too),
    the peak memory of this process and of its largest child in bytes, the threads that it might use, and what the stage
    adds to the mapping that it is given.
    """
    _check_name(stage)
    told: dict[str, float] = {}
    log_to_stderr()
    locks = checkout() / "data" / "scratch" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    where = hashlib.sha256(os.fsencode(Path(out).resolve())).hexdigest()[:16]
    before = set(_held)
    lock = locks / f"{Path(out).name}-{where}.lock"
    _acquire(lock, f"another process that writes {out}")
    start, cpu_start = time.monotonic(), _cpu_seconds()
    try:
        with _ended_by_signals(), writing(out):
            yield told
    finally:
        for held in set(_held) - before:
            _release(held, delete=held == lock or not held.with_suffix("").exists())
    seconds = time.monotonic() - start
    peak, peak_child = (
        resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    timing = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_cpu_seconds() - cpu_start, 3),
        "peak_rss_bytes": peak,
        "peak_rss_child_bytes": peak_child,
        "threads": thread_count(),
    }
    write_json(Path("data") / "timings" / f"{stage}.json", timing | told)
    logger.info("%s: %.1f s, %.0f MB", stage, seconds, peak / 1e6)


def _cpu_seconds() -> float:
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), and comes also when the parent dies; as before afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous_death = ctypes.c_int(0)
    _prctl(_PR_GET_PDEATHSIG, ctypes.byref(previous_death))
    previous = signal.signal(signal.SIGTERM, _terminate)
    # Started by hand under nohup, a stage is meant to outlive its parent.
    if "DVC_STAGE" in os.environ or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        die_with_parent(signal.SIGTERM)
    try:
        yield
    finally:
        _prctl(_PR_SET_PDEATHSIG, previous_death.value)
        signal.signal(signal.SIGTERM, previous)


def thread_count() -> int:
    """Threads that this process's sums may use: OMP_NUM_THREADS, whose first of several levels counts, or the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(said) if said.isdecimal() and int(said) else cpu_count()


def cpu_count() -> int:
    """Cores that this process may use: those of its affinity mask, and of its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next batch, in place of returning it to the kernel.

    By default every tensor of more than 32 MB is fresh memory, page by page: measured, half of the CPU time of a
    network's forward on a batch of 16. Not for signals of any length: tensors of hundreds of MB do not fit into the
    holes that others leave, and a process on 30 s of audio takes twice the memory. Does nothing without mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h)
            mallopt(option, 1 << 30)
