"""Parallel parts: the same bytes whatever runs them and whatever is killed, errors that name the part, nothing left."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import parts
from pipeline.core.parts import run_parts

ROOT = Path(__file__).parents[2]
PARTS = {f"{i:05d}": i for i in range(6)}


@dataclass(frozen=True)
class Job:
    """What a part is told to do; `log` counts the calls."""

    number: int
    log: str
    what: str = "write"


def work(job: Job, directory: Path) -> None:
    with open(job.log, "a") as file:
        file.write(f"{job.number}\n")
    (directory / "sub").mkdir()
    (directory / "sub" / "numbers.txt").write_text("".join(f"{job.number * n}\n" for n in range(100)))
    if job.what == "fail":
        raise FileNotFoundError(f"no file number {job.number}")
    if job.what == "die once" and Path(job.log).read_text().count(f"{job.number}\n") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    (directory / "number.json").write_text(json.dumps({"number": job.number}))


def jobs(tmp_path: Path, **what: str) -> dict[str, Job]:
    return {name: Job(n, str(tmp_path / "log"), what.get(f"part{n}", "write")) for name, n in PARTS.items()}


def calls(tmp_path: Path) -> list[int]:
    return sorted(map(int, (tmp_path / "log").read_text().split()))


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("expected")
    os.environ["USS_WORKERS"] = "0"
    run_parts(work, jobs(directory), directory / "scratch")
    return tree(directory / "scratch")


def start_stage(tmp_path: Path, workers: int = 2) -> subprocess.Popen[str]:
    """`python -m toolbox.stage scratch`, as a stage is run."""
    package = tmp_path / "toolbox"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "stage.py").write_text(STAGE)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "toolbox.stage", str(tmp_path / "scratch")],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "USS_WORKERS": str(workers)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_stage(tmp_path: Path, workers: int) -> str:
    stage = start_stage(tmp_path, workers)
    _, err = stage.communicate(timeout=120)
    assert stage.returncode == 0, err
    return err


STAGE = """
import os, sys, time
from functools import partial
from pathlib import Path

from pipeline.core.config import Params
from pipeline.core.parts import run_parts
from pipeline.core.runtime import running

with open("imported", "a") as file:
    file.write(__name__ + "\\n")


class StageParams(Params):
    scale: int


class Item:
    def __init__(self, number):
        self.number = number


def part(item, directory, params):
    assert type(item) is Item and type(params) is StageParams, "classes of another copy of this module"
    (directory / "x").write_text(f"{item.number * params.scale} {os.environ['OMP_NUM_THREADS']}")
    with open("log", "a") as file:
        file.write(f"{item.number}\\n")
    if Path("sleep").exists() and str(item.number) in Path("sleep").read_text():
        time.sleep(60)


def main():
    with running("stage", Path("out")):
        items = {f"{n:05d}": Item(n) for n in range(4)}
        run_parts(partial(part, params=StageParams(scale=7)), items, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    ps = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(child) for child in ps.stdout.split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


# ------------------------------------------------------------------------------------------------ one process


def test_every_part_has_its_directory_in_the_order_given(tmp_path: Path) -> None:
    names = ["b", "a", "00001"]
    done = run_parts(work, {name: Job(3, str(tmp_path / "log")) for name in names}, tmp_path / "scratch")
    assert list(done) == names
    assert all((done[name] / "number.json").read_text() == '{"number": 3}' for name in names)


def test_no_parts_are_no_work(tmp_path: Path) -> None:
    assert run_parts(work, {}, tmp_path / "scratch") == {}


def test_finished_parts_are_kept_and_a_flipped_byte_rebuilds_only_its_part(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    run_parts(work, jobs(tmp_path), scratch)
    monkeypatch.setenv("USS_WORKERS", "7")  # with nothing to do no cluster is started
    run_parts(work, jobs(tmp_path), scratch)
    assert calls(tmp_path) == sorted(PARTS.values())

    monkeypatch.setenv("USS_WORKERS", "0")
    (scratch / "00002" / "sub" / "numbers.txt").write_text("0\n")
    (scratch / "00003" / "more").touch()
    (scratch / "00004" / "number.json").unlink()
    (scratch / "00005" / "done.json").write_text("{")
    run_parts(work, jobs(tmp_path), scratch)
    assert calls(tmp_path) == sorted([*PARTS.values(), 2, 3, 4, 5])
    assert tree(scratch) == expected


def test_a_part_without_files_is_a_part(tmp_path: Path) -> None:
    done = run_parts(lambda item, directory: None, {"a": 0}, tmp_path)
    assert os.listdir(done["a"]) == ["done.json"]


def test_a_hash_that_the_task_returns_is_taken_for_its_file_alone(tmp_path: Path) -> None:
    def task(item: int, directory: Path) -> dict[str, str]:
        (directory / "a").write_text("a")
        (directory / "b").write_text("b")
        return {"a": "told", "not there": "told"}

    done = run_parts(task, {"p": 0}, tmp_path)
    listed = json.loads((done["p"] / "done.json").read_text())
    assert listed == {"a": "told", "b": hashlib.sha256(b"b").hexdigest()}
    assert not parts.is_finished(done["p"])  # what is on disk is not what was told: it is made again


def test_an_error_names_its_part_and_keeps_the_finished_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file number 3") as error:
        run_parts(work, jobs(tmp_path, part3="fail"), tmp_path / "scratch")
    assert error.value.__notes__ == ["in part '00003'"]
    assert sorted(os.listdir(tmp_path / "scratch")) == ["00000", "00001", "00002"]
    run_parts(work, jobs(tmp_path), tmp_path / "scratch")
    assert calls(tmp_path) == [0, 1, 2, 3, 3, 4, 5]


def test_what_dead_runs_left_is_swept(tmp_path: Path, expected: dict[str, bytes]) -> None:
    for name in (".00001.0123.tmp", ".dask.4567.tmp"):
        (tmp_path / "scratch" / name / "sub").mkdir(parents=True)
        (tmp_path / "scratch" / name / "sub" / "file").touch()
    run_parts(work, jobs(tmp_path), tmp_path / "scratch")
    assert tree(tmp_path / "scratch") == expected


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "done.json"])
def test_a_parts_name_is_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a part's name"):
        run_parts(work, {name: Job(0, "")}, tmp_path)


@pytest.mark.parametrize("text", ["-1", "two", "1.5"])
def test_a_wrong_number_of_workers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("USS_WORKERS", text)
    with pytest.raises(ValueError, match=f"USS_WORKERS .* not '{text}'"):
        run_parts(work, jobs(tmp_path), tmp_path / "scratch")


def test_a_single_part_needs_no_worker_unless_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    monkeypatch.setattr(parts, "_local_client", None)
    monkeypatch.delenv("USS_WORKERS")
    one = dict(list(jobs(tmp_path).items())[:1])
    run_parts(work, one, tmp_path / "one")
    assert tree(tmp_path / "one").items() <= expected.items()
    with pytest.raises(TypeError):  # the client that is not there: of several parts, one that is left is one of several
        run_parts(work, jobs(tmp_path), tmp_path / "several")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(TypeError):
        run_parts(work, dict(list(jobs(tmp_path).items())[:2]), tmp_path / "two")
    monkeypatch.setenv("USS_WORKERS", "1")
    with pytest.raises(TypeError):
        run_parts(work, one, tmp_path / "asked")


def threads(_: None, directory: Path) -> None:
    import torch

    (directory / "threads").write_text(str(torch.get_num_threads()))


def test_a_part_has_one_torch_thread_and_the_process_its_own_again(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(2)
    try:
        done = run_parts(threads, {"a": None}, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (done["a"] / "threads").read_text() == "1"


# --------------------------------------------------------------------------------------------------- cluster


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], workers: int
) -> None:
    monkeypatch.setenv("USS_WORKERS", str(workers))
    run_parts(work, jobs(tmp_path), tmp_path / "scratch")
    assert tree(tmp_path / "scratch") == expected
    assert calls(tmp_path) == sorted(PARTS.values())


@pytest.mark.slow
def test_a_killed_worker_costs_its_part_a_second_run_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    monkeypatch.setenv("USS_WORKERS", "2")
    run_parts(work, jobs(tmp_path, part2="die once"), tmp_path / "scratch")
    assert tree(tmp_path / "scratch") == expected
    assert calls(tmp_path) == [0, 1, 2, 2, 3, 4, 5]


def test_an_error_in_a_worker_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USS_WORKERS", "1")
    with pytest.raises(FileNotFoundError, match="no file number 3") as error:
        run_parts(work, jobs(tmp_path, part3="fail"), tmp_path / "scratch")
    assert error.value.__notes__ == ["in part '00003'"]
    left = set(os.listdir(tmp_path / "scratch"))
    assert {"00000", "00001"} <= left <= {"00000", "00001", "00002", "00004", "00005"}


@pytest.mark.slow
def test_a_part_that_kills_every_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USS_WORKERS", "2")
    with pytest.raises(RuntimeError, match="part '00002' was on each of 4 workers when they died"):
        run_parts(work, jobs(tmp_path, part2="die"), tmp_path / "scratch")
    assert calls(tmp_path).count(2) == 4
    assert "00002" not in os.listdir(tmp_path / "scratch")


def test_the_part_that_was_run_by_the_workers_that_died_is_named_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import KilledWorker

    class Dask:
        """Blames each part that is on a worker when it dies; the first is the first to be heard of."""

        def submit(self, _run: object, _work: bytes, name: str, scratch: str, **_: object) -> Future[None]:
            for death in range({"00002": 4, "00001": 1}.get(name, 0)):
                (Path(scratch) / f".{name}.{death}.tmp").mkdir()
            future: Future[None] = Future()
            future.set_exception(KilledWorker(name, None, 3))  # type: ignore[arg-type]
            return future

        def cancel(self, futures: list[Future[None]]) -> None:
            pass

    monkeypatch.setenv("USS_WORKERS", "2")
    monkeypatch.setattr(parts, "_local_client", lambda *_: contextlib.nullcontext(Dask()))
    with pytest.raises(RuntimeError, match="part '00002' was on each of 4 workers"):
        run_parts(work, jobs(tmp_path), tmp_path / "scratch")


def test_a_running_cluster_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    import dask
    from distributed import LocalCluster

    caplog.set_level(logging.CRITICAL)
    with (
        dask.config.set({"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}),
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=":0") as own,
    ):
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", own.scheduler_address)
        monkeypatch.setattr(parts, "_local_client", None)
        run_parts(work, jobs(tmp_path), tmp_path / "scratch")
    assert tree(tmp_path / "scratch") == expected


def test_what_cannot_travel_to_a_worker_is_refused_before_one_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USS_WORKERS", "2")
    monkeypatch.setattr(parts, "_local_client", None)
    with pytest.raises((AttributeError, parts.pickle.PicklingError), match="lambda"):
        run_parts(lambda item, directory: None, {"a": 0}, tmp_path)


# ----------------------------------------------------------------------------------------------------- stages


def test_a_stage_run_as_a_module_finds_its_own_functions_and_classes(tmp_path: Path) -> None:
    run_stage(tmp_path, workers=0)
    inline = tree(tmp_path / "scratch")
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "log").unlink()
    err = run_stage(tmp_path, workers=2)
    assert tree(tmp_path / "scratch") == inline
    assert inline["00003/x"] == b"21 1"
    assert calls(tmp_path) == [0, 1, 2, 3]
    # Log lines of ours only: one for the parts, one for the time.
    assert [line.split(" ")[3] for line in err.splitlines()] == ["pipeline.core.parts:", "pipeline.core.runtime:"], err


@pytest.mark.slow
def test_a_stage_that_is_killed_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "sleep").write_text("2 3")
    stage = start_stage(tmp_path)
    until(lambda: {"00000", "00001"} <= set(os.listdir(tmp_path / "scratch")) if (tmp_path / "scratch").exists() else 0)
    processes = descendants(stage.pid)
    assert len(processes) >= 2
    stage.kill()
    stage.communicate()
    until(lambda: not any(map(alive, processes)), 20)
    assert sorted(name for name in os.listdir(tmp_path / "scratch") if not name.startswith(".")) == ["00000", "00001"]

    (tmp_path / "sleep").unlink()
    run_stage(tmp_path, workers=0)
    assert calls(tmp_path) == [0, 1, 2, 2, 3, 3]
    assert sorted(os.listdir(tmp_path / "scratch")) == ["00000", "00001", "00002", "00003"]


@pytest.mark.slow
def test_a_stage_that_is_asked_to_end_stops_its_workers(tmp_path: Path) -> None:
    (tmp_path / "sleep").write_text("0 1 2 3")
    stage = start_stage(tmp_path)
    until(lambda: (tmp_path / "scratch").exists() and len(list((tmp_path / "scratch").glob(".0*.tmp"))) == 2)
    processes = descendants(stage.pid)
    stage.terminate()
    _, err = stage.communicate(timeout=30)
    assert stage.returncode == 143, err
    until(lambda: not any(map(alive, processes)), 20)
    assert os.listdir(tmp_path / "scratch") == []


def test_a_task_in_a_script_is_explained(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STAGE)
    run = subprocess.run(
        [sys.executable, "script.py", str(tmp_path / "scratch")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "USS_WORKERS": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "run it as a module, python -m" in run.stderr
