"""`make repro`: what `dvc repro` does, with stages that do not wait for each other side by side.

    python -m pipeline.repro                    # everything, two stages at a time; with a GPU one
    python -m pipeline.repro --jobs 4 report    # four, and the targets of `dvc repro`; with 1 it is `dvc repro`

DVC runs one stage after the other. On a CPU that leaves cores idle: two small trainings on one core each get a fifth
to a third more done than one after the other on both (`benchmarks/side_by_side.py`), and what every stage spends on
starting up needs one core only. Each job gets its share of the cores, by OMP_NUM_THREADS and USS_WORKERS where the
environment does not set them.

What is to be run, and whether it really has changed, is DVC's to say: `dvc status` first, then for a stage, as soon as
those that it waits for are done, `dvc repro --single-item`. The jobs share dvc.lock, and wait for DVC's own lock. A
stage that fails starts no other; those that run beside it end first, as with `make -j`. DVC is loaded once, and every
job is a fork of the process that did.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import FrameType
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
from dvc.repo import Repo  # type: ignore[import-untyped]

from pipeline.runtime import cpu_count

# What DVC says after every stage, and here would say thirty times over.
HINTS = (
    "Updating lock file",
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
)

# What a job needs: DVC imports most of its parts only when they are used.
PRELOADED = ["networkx", "dvc.cli.parser", "dvc.repo.reproduce", "dvc.repo.plots", "dvc.scm", "dvc.utils.strictyaml"]


def plan(targets: Sequence[str]) -> dict[str, set[str]]:
    """The stages that may have to run, in DVC's order, each with those of them that it waits for.

    These are the stages that `dvc status` calls changed and all that wait for them: whether the outputs of the former
    will be other ones is not known yet.
    """
    with Repo() as repo:
        changed = set(repo.status())
        graph = nx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)  # edges to what a stage waits for
        wanted = set(graph)
        if targets:
            named = {stage.addressing for target in targets for stage in repo.stage.collect(target)}
            wanted = named.union(*(nx.descendants(graph, name) for name in named))
    stale = changed.union(*(nx.ancestors(graph, name) for name in changed)) & wanted
    order = [name for name in nx.dfs_postorder_nodes(graph) if name in stale]
    return {name: set(graph.successors(name)) & stale for name in order}


def run_side_by_side(waits_for: Mapping[str, set[str]], run: Callable[[str], bool], jobs: int) -> list[str]:
    """`run` every key once all that it waits for have returned True, at most `jobs` at a time; return what failed.

    Of those that may start, the one with the longest chain of others behind it goes first. After a failure nothing
    more is started, and what runs is waited for; an error in `run`, or an interrupt, is raised at once.
    """

    @cache
    def chain(name: str) -> int:
        return 1 + max((chain(other) for other in waits_for if name in waits_for[other]), default=0)

    waiting = sorted(waits_for, key=chain, reverse=True)  # stable: equals stay in the caller's order
    running: dict[Future[bool], str] = {}
    done: set[str] = set()
    failed: list[str] = []
    pool = ThreadPoolExecutor(jobs)
    try:
        while running or (waiting and not failed):
            if not failed:
                ready = [name for name in waiting if waits_for[name] <= done]
                for name in ready[: jobs - len(running)]:
                    waiting.remove(name)
                    running[pool.submit(run, name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if future.result():
                    done.add(name)
                else:
                    failed.append(name)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def _dvc_repro(name: str, output: Any) -> None:
    """In a process of its own: run one stage, with all that it and DVC say going to `output` (DupFd)."""
    os.setsid()  # a group that can be ended with all that the stage has started
    descriptor = output.detach()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    from dvc.cli import main  # type: ignore[import-untyped]

    sys.exit(main(["--wait-for-lock", "repro", "--single-item", name]))


class Jobs:
    """Stages as processes of their own; each line that they say is printed behind the stage's name."""

    def __init__(self, total: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.total = total
        self.ended = 0
        self.processes: list[BaseProcess] = []
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, name: str) -> bool:
        """Whether the stage is as it should be now: run, or seen to need no run."""
        with self.lock:
            if self.stopped:
                return False
            read, write = os.pipe()
            process = self.context.Process(target=_dvc_repro, args=(name, DupFd(write)))
            process.start()
            os.close(write)
            self.processes.append(process)
        with open(read, errors="replace") as lines:
            for line in lines:
                if line.strip() and not line.startswith(HINTS):
                    print(f"{name} | {line.rstrip()}", flush=True)
        process.join()
        code = process.exitcode
        with self.lock:
            self.ended += 1
            how = "done" if code == 0 else f"FAILED, exit status {code}"
            print(f"{name} | {how}; {self.ended} of {self.total} stages", flush=True)
        return code == 0

    def stop(self) -> None:
        """End what still runs. Stages go on from where they are when they are run again."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                if process.pid and process.is_alive():
                    try:
                        os.killpg(process.pid, signal.SIGTERM)
                    except ProcessLookupError:  # it has no group of its own yet, or has ended in between
                        process.terminate()


def has_gpu() -> bool:
    """Whether NVIDIA's driver is there. Asked of it and not of torch, whose import takes seconds."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def share_of_cores(jobs: int) -> dict[str, str]:
    """What tells each of so many jobs how many threads and processes it may have.

    One core is used by the stage's own process: a worker beside it would only have to start first. With a GPU the
    stages choose their processes themselves, one for networks.
    """
    share = max(1, cpu_count() // jobs)
    workers = {} if has_gpu() else {"USS_WORKERS": str(share) if share > 1 else "0"}
    return {"OMP_NUM_THREADS": str(share)} | workers


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Exit with 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="stages, as for `dvc repro`; none: all")
    parser.add_argument(
        "--jobs", type=int, default=1 if has_gpu() else 2, help="stages at a time: 2, or 1 with a GPU, which one fills"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not 1 or more")
    if args.jobs == 1:
        os.execv(sys.executable, [sys.executable, "-m", "dvc", "repro", *args.targets])
    waits_for = plan(args.targets)
    if not waits_for:
        print("Data and pipelines are up to date.")
        return
    os.environ.update(share_of_cores(args.jobs) | dict(os.environ))
    jobs = Jobs(len(waits_for))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _end)
    try:
        failed = run_side_by_side(waits_for, jobs.run, args.jobs)
    except BaseException:
        jobs.stop()
        raise
    if failed:
        sys.exit(f"failed: {', '.join(failed)}. What they said is above, behind their names.")


if __name__ == "__main__":
    main()
