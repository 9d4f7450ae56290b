"""Parallel work in a stage, cut into named parts that survive a crash.

A part is a directory of files made by one call of a function. It is written under a temporary name and renamed, with
a sidecar (done.json) of its files' SHA-256, so it is there whole or not at all; a run that was killed finds its
finished parts and makes the others. What a part contains may depend on its item alone: never on the number of workers,
on other parts, or on the order of execution.

    directories = run_parts(partial(resample_part, params=params), {"00000": [...], "00001": [...]}, scratch)

Where the work runs is the machine's affair and comes from the environment, never from params.yaml:
`DASK_SCHEDULER_ADDRESS` names a running Dask cluster (same code, same packages, shared file system); without it
`USS_WORKERS` processes are started here, or with 0 none, and the parts run in this process. Not said: one per core,
and none for the work of a single part, which a process of its own would only end seconds later.

This module must not import torch, nor Dask before it is needed (one second).
"""

import contextlib
import importlib
import io
import json
import logging
import os
import pickle
import queue
import re
import sys
import time
import types
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.core import runtime

logger = logging.getLogger(__name__)

T = TypeVar("T")
Task = Callable[[T, Path], Mapping[str, str] | None]
DONE = "done.json"
_LOG_SECONDS = 30.0
_MAX_DEATHS = 3


def run_parts(task: Task[T], parts: Mapping[str, T], scratch: Path) -> dict[str, Path]:
    """Call `task(item, directory)` for every part that is not finished; return each part's directory, in their order.

    `task` writes its files into `directory` and is a function at the top level of a module (or a functools.partial of
    one): workers import it. It may return {name: SHA-256} of files that it hashed while it wrote them. Items travel to
    the workers pickled: names and offsets, not audio. A task's own exception is raised here, with a note that names the
    part; parts that were finished by then stay finished. A part whose worker process is killed is run again, three
    times at most.
    """
    for name in parts:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"{name!r} is not a part's name: letters, digits, _ and - only")
    scratch = Path(scratch).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    with runtime.locked(scratch):
        _sweep(scratch)
        with ThreadPoolExecutor(max_workers=min(8, runtime.cpu_count())) as threads:
            finished = dict(zip(parts, threads.map(lambda name: is_finished(scratch / name), parts), strict=True))
        todo = {name: item for name, item in parts.items() if not finished[name]}
        for name in todo:
            runtime.remove(scratch / name)
        if todo:
            try:
                _run(task, todo, scratch, n_finished=len(parts) - len(todo))
            finally:
                _sweep(scratch)
    return {name: scratch / name for name in parts}


def is_finished(directory: Path) -> bool:
    """Whether a part's files are exactly those that its sidecar lists, byte for byte."""
    try:
        listed = json.loads((directory / DONE).read_bytes())
        return listed == _hashes(directory, {})
    except (OSError, ValueError):
        return False


def _sweep(scratch: Path) -> None:
    """Remove what killed workers left. Whoever calls holds the lock, so no live run of ours writes there."""
    for leftover in scratch.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # a remote worker may be removing the same
            runtime.remove(leftover)


def _hashes(directory: Path, told: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each file. One that is told is of what was to be written: should the disk have failed, it differs."""
    files = sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {str(path.relative_to(directory)): path for path in files if path.name != DONE}
    return {name: told.get(name) or runtime.sha256_file(path) for name, path in names.items()}


# ------------------------------------------------------------------------------------------- one part


def _run_part(task: Task[T], item: T, name: str, scratch: Path) -> None:
    final = scratch / name
    if is_finished(final):  # the worker that finished it died before it could say so
        return
    temporary = scratch / f".{name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        with _one_thread():
            made = task(item, temporary)
        runtime.write_json(temporary / DONE, _hashes(temporary, made or {}))
        runtime.sync_tree(temporary)
        try:
            os.rename(temporary, final)
        except OSError:
            # A worker that the scheduler had given up came back and was faster. The bytes are the same.
            if not is_finished(final):
                raise
    except BaseException as error:
        error.add_note(f"in part {name!r}")
        raise
    finally:
        runtime.remove(temporary)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Numerical libraries use one thread: with more, sums are split by their number and differ in the last bit."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    torch = sys.modules.get("torch")
    n_threads = torch.get_num_threads() if torch else 0
    with threadpool_limits(limits=1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(n_threads)


class _Pickler(pickle.Pickler):
    """Writes what a stage run by `python -m` defines under the name by which a worker can import it.

    In such a process the stage's functions and classes belong to `__main__`, which in a worker is another module.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | types.FunctionType) and value.__module__ == "__main__":
            main = sys.modules["__main__"]
            name = runtime.import_name(main)
            if name == "__main__":
                raise pickle.PicklingError(f"{value.__qualname__} is in a script: run it as a module, python -m ...")
            return _find, (name, value.__qualname__)
        return NotImplemented


def _find(module: str, qualname: str) -> Any:
    value: Any = importlib.import_module(module)
    for name in qualname.split("."):
        value = getattr(value, name)
    return value


def _pickle(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _run_pickled(work: bytes, name: str, scratch: str) -> None:
    task, item = pickle.loads(work)
    _run_part(task, item, name, Path(scratch))


def dask_setup(worker: Any) -> None:
    """Called by Dask when a local worker starts: it does not outlive a stage that was killed, and it logs as we do."""
    runtime.die_with_parent()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    runtime.log_to_stderr()


# ------------------------------------------------------------------------------------------- all parts


def _run(task: Task[T], todo: dict[str, T], scratch: Path, n_finished: int) -> None:
    address = os.environ.get("DASK_SCHEDULER_ADDRESS", "")
    n_workers = _n_workers(n_finished + len(todo))
    progress = _Progress(len(todo), n_finished)
    with progress:
        if not address and n_workers == 0:
            for name, item in todo.items():
                _run_part(task, item, name, scratch)
                progress.update()
        else:
            works = {name: _pickle((task, item)) for name, item in todo.items()}
            local = min(n_workers, len(todo))
            with _remote_client(address) if address else _local_client(local, scratch) as client:
                _run_on(client, works, scratch, progress)


def _n_workers(n_parts: int) -> int:
    text = os.environ.get("USS_WORKERS", "")
    if not text:
        return runtime.cpu_count() if n_parts > 1 else 0
    if not text.isdecimal():
        raise ValueError(f"USS_WORKERS is a number of processes, 0 or more, not {text!r}")
    return int(text)


@contextlib.contextmanager
def _remote_client(address: str) -> Iterator[Any]:
    from distributed import Client

    with Client(address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        yield client


@contextlib.contextmanager
def _local_client(n_workers: int, scratch: Path) -> Iterator[Any]:
    import dask

    with dask.config.set({"logging": {"distributed": "error", "distributed.nanny": "warning"}}):
        from distributed import Client, LocalCluster  # reads that when it is imported

    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    settings = {
        "distributed.nanny.pre-spawn-environ": threads,
        "distributed.scheduler.allowed-failures": _MAX_DEATHS,
        "distributed.scheduler.worker-ttl": None,  # a part may hold the GIL for minutes; a death is noticed anyway
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.use-file-locking": False,
        "distributed.comm.timeouts.connect": "120s",
    }
    temporary = scratch / f".dask.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    with (
        dask.config.set(settings),
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=n_workers,
            threads_per_worker=1,
            host="127.0.0.1",
            security=True,  # else any user of this machine could send our scheduler code to run
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            memory_limit=0,
            local_directory=str(temporary),
            silence_logs=logging.CRITICAL,
            preload=[__name__],
        ) as cluster,
        Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        yield client


def _run_on(client: Any, works: dict[str, bytes], scratch: Path, progress: "_Progress") -> None:
    from distributed import KilledWorker

    finished: queue.SimpleQueue[str] = queue.SimpleQueue()
    token = uuid.uuid4().hex
    futures = {}
    for name, work in works.items():
        futures[name] = client.submit(_run_pickled, work, name, str(scratch), key=f"part-{name}-{token}", pure=False)
        futures[name].add_done_callback(lambda _, name=name: finished.put(name))
    try:
        for _ in works:
            while True:
                try:
                    name = finished.get(timeout=_LOG_SECONDS)
                    break
                except queue.Empty:
                    progress.report()
                    if client.status != "running":
                        raise ConnectionError(f"the Dask scheduler is gone (client {client.status})") from None
            # Let go of: the scheduler would run a finished part again when the worker that holds its result dies.
            future = futures.pop(name)
            try:
                if not (scratch / name / DONE).exists():
                    future.result()
            except KilledWorker as error:
                dead = _deaths(works, scratch) or Counter({name: error.allowed_failures + 1})
                ((deadliest, n_deaths),) = dead.most_common(1)
                raise RuntimeError(
                    f"part {deadliest!r} was on each of {n_deaths} workers when they died: it crashes its process, "
                    "or takes more memory than there is"
                ) from error
            progress.update()
    finally:
        client.cancel(list(futures.values()))


def _deaths(names: Container[str], scratch: Path) -> Counter[str]:
    """How often each part was begun and not ended. Dask blames a part that only waited on the worker just the same."""
    begun = (leftover.name.split(".")[1] for leftover in scratch.glob(".*.tmp"))
    return Counter(name for name in begun if name in names)


class _Progress:
    """A bar on a terminal, elsewhere a log line every 30 s."""

    def __init__(self, total: int, n_finished: int) -> None:
        if n_finished:
            logger.info("%d of %d parts are finished already", n_finished, n_finished + total)
        self.bar = tqdm(total=total, unit="part", disable=None)
        self.done, self.total = 0, total
        self.start = self.last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self) -> None:
        self.done += 1
        self.bar.update()
        if time.monotonic() - self.last >= _LOG_SECONDS or self.done == self.total:
            self.report()

    def report(self) -> None:
        self.last = time.monotonic()
        if self.bar.disable:
            logger.info("%d of %d parts, %.0f s", self.done, self.total, self.last - self.start)
