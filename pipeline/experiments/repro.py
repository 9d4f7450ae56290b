"""`make repro`: what `dvc repro` does, with stages that do not wait for each other side by side.

    python -m pipeline repro                    # everything, two stages at a time; with a GPU one
    python -m pipeline repro --jobs 4 report    # four, and the targets of `dvc repro`; with 1 it is `dvc repro`

DVC runs one stage after the other. On a CPU that leaves cores idle: two small trainings on one core each get a fifth
to a third more done than one after the other on both (`benchmarks/side_by_side.py`), and what every stage spends on
starting up needs one core only. Each job gets its share of the cores, by OMP_NUM_THREADS and USS_WORKERS where the
environment does not set them.

What is to be run, and whether it really has changed, is DVC's to say: `dvc status` first, then for a stage, as soon as
those that it waits for are done, `dvc repro --single-item`. The jobs share dvc.lock, and wait for DVC's own lock. A
stage that fails starts no other; those that run beside it end first, as with `make -j`. DVC is loaded once, and every
job is a fork of the process that did. However this process ends, its jobs end their stages, DVC writes down what is
done, and a next run waits for that.
"""

import argparse
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait as wait_for_processes
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.core.dvc_internals import plan, restore, run_dvc
from pipeline.core.runtime import cpu_count, run_command

# What DVC says after every stage, and here would say thirty times over.
HINTS = (
    "Updating lock file",
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
)

INTERRUPTED = 252  # DVC's exit status after Ctrl-C

# What a job needs: DVC imports most of its parts only when they are used.
PRELOADED = ["networkx", "dvc.cli.parser", "dvc.repo.reproduce", "dvc.repo.plots", "dvc.scm", "dvc.utils.strictyaml"]


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


def _dvc_repro(name: str, output: Any, lifeline: Any, alone: Any) -> None:
    """In a process of its own: run one stage, with all that it and DVC say going to `output` (a DupFd, as the others).

    SIGTERM, and the end of the run that `lifeline` is a pipe from, end the stage and not DVC, which sees that the stage
    has failed, or writes down that it is done. `alone` is the run's lock, which stays held as long as this process.
    """
    os.setsid()  # a group of this process and all that the stage starts
    descriptor, life = output.detach(), lifeline.detach()
    alone.detach()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    ended = False

    def end_stage(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        ended = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        signal.signal(signal.SIGTERM, end_stage)

    def follow_the_run() -> None:
        os.read(life, 1)  # nothing is written: it returns when the run is gone, however that has ended
        while True:  # again, in case DVC was just about to start the stage
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    signal.signal(signal.SIGTERM, end_stage)
    threading.Thread(target=follow_the_run, daemon=True).start()
    code = run_dvc("--wait-for-lock", "repro", "--single-item", name)
    sys.exit(code or ended)


class Jobs:
    """Stages as processes of their own; each line that they say is printed behind the stage's name."""

    def __init__(self, total: int, alone: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.total = total
        self.alone = alone  # descriptor of the run's lock
        self.life, self.life_held = os.pipe()  # no other process has the second one
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
            process = self.context.Process(
                target=_dvc_repro, args=(name, DupFd(write), DupFd(self.life), DupFd(self.alone))
            )
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
        """End the stages that run, and wait for DVC to write down what is done; a second Ctrl-C does not wait.

        Stages go on from where they are when they are run again.
        """
        with self.lock:
            self.stopped = True
        try:
            while alive := [process for process in self.processes if process.is_alive()]:
                self._signal(alive, signal.SIGTERM)
                wait_for_processes([process.sentinel for process in alive], timeout=1)
        except BaseException:
            self._signal(self.processes, signal.SIGKILL)
            raise

    def _signal(self, processes: Iterable[BaseProcess], number: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                if process.pid and process.is_alive():
                    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)


def hold_alone(seconds: float = 30) -> int:
    """Descriptor of the lock that a run and its jobs hold; ValueError where another run keeps it for longer."""
    path = Path(".dvc/tmp/repro.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode().strip()
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another `make repro` runs in this folder ({owner}): wait for it, or end it"
                ) from None
            time.sleep(0.1)
        else:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
            return descriptor


def has_gpu() -> bool:
    """Whether NVIDIA's driver is there. Asked of it and not of torch, whose import takes seconds."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def share_of_cores(jobs: int) -> dict[str, str]:
    """Environment that tells each of so many jobs how many threads and processes it may have.

    One core is used by the stage's own process: a worker beside it would only have to start first. With a GPU the
    stages choose their processes themselves, one for networks.
    """
    share = max(1, cpu_count() // jobs)
    workers = {} if has_gpu() else {"USS_WORKERS": str(share) if share > 1 else "0"}
    return {"OMP_NUM_THREADS": str(share)} | workers


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def check_first() -> None:
    """Check params.yaml before DVC reads it, where the graph has that stage: DVC makes commands and paths of it."""
    if not Path("dvc.yaml").is_file():
        raise ValueError(f"no dvc.yaml in {Path.cwd()}: run this in the project's folder")
    if "pipeline check" in Path("dvc.yaml").read_text():
        # A process of its own: torch takes memory.
        code = subprocess.run([sys.executable, "-m", "pipeline.experiments.check"]).returncode
        if code:
            sys.exit(code)


def say_what_is_left(reports: Path) -> None:
    """Say where the page is, and that results are committed before another experiment writes over them."""
    if (page := reports / "report.html").is_file():
        print(f"\nThe report: {page.absolute()}")
        print(
            "Before another experiment, which writes over these results, commit them:\n"
            "  git add . && git commit -m 'results'"
        )


def run(targets: Sequence[str], jobs: int) -> None:
    """Run what has changed of the targets, `jobs` stages at a time; exit with 1 where a stage failed."""
    alone = hold_alone()
    if done := restore():
        print(done, flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _end)
    check_first()
    if jobs == 1:
        if (code := run_dvc("repro", *targets)) == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            sys.exit("failed: what the stage said is above")
        say_what_is_left(Path("reports"))
        return
    waits_for = plan(targets)
    if not waits_for:
        print("Data and pipelines are up to date.")
        say_what_is_left(Path("reports"))
        return
    os.environ.update(share_of_cores(jobs) | dict(os.environ))
    side = Jobs(len(waits_for), alone)
    try:
        failed = run_side_by_side(waits_for, side.run, jobs)
    except BaseException:
        side.stop()
        raise
    if failed:
        sys.exit(f"failed: {', '.join(failed)}. What they said is above, behind their names.")
    say_what_is_left(Path("reports"))


def main() -> None:
    """Check params.yaml, then run what has changed; exit with 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="stages, as for `dvc repro`; none: all")
    parser.add_argument(
        "--jobs", type=int, default=1 if has_gpu() else 2, help="stages at a time: 2, or 1 with a GPU, which one fills"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not 1 or more")
    run(args.targets, args.jobs)


if __name__ == "__main__":
    from pipeline.experiments import repro  # by its own name, under which the jobs find what they run

    run_command(repro.main)
