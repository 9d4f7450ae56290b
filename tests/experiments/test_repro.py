"""Stages side by side: in what order they start, what a failure and an interrupt do, and that DVC agrees in the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.experiments import repro
from pipeline.experiments.repro import run_side_by_side, share_of_cores

ROOT = Path(__file__).parents[2]

#   a -> b -> c -> e        x -> y -> e
GRAPH = {"x": set(), "a": set(), "b": {"a"}, "y": {"x"}, "c": {"b"}, "e": {"c", "y"}}


class Recorder:
    """Notes what starts and ends; a stage ends when `release` says so."""

    def __init__(self, failing=(), meet=0):
        self.events, self.failing = [], failing
        self.lock, self.active, self.most = threading.Lock(), 0, 0
        self.meeting = threading.Barrier(meet) if meet else None

    def __call__(self, name):
        with self.lock:
            self.events.append(name)
            self.active += 1
            self.most = max(self.most, self.active)
        if self.meeting is not None and name in ("x", "a"):
            self.meeting.wait(timeout=30)  # passes only when two are inside at once
        with self.lock:
            self.active -= 1
        return name not in self.failing


def test_a_stage_starts_after_all_that_it_waits_for():
    run = Recorder()
    assert run_side_by_side(GRAPH, run, jobs=3) == []
    assert sorted(run.events) == sorted(GRAPH)
    for name, before in GRAPH.items():
        assert all(run.events.index(other) < run.events.index(name) for other in before)


def test_two_that_do_not_wait_for_each_other_run_at_once_and_never_more():
    run = Recorder(meet=2)
    assert run_side_by_side(GRAPH, run, jobs=2) == []
    assert run.most == 2


def test_the_longest_chain_goes_first():
    run = Recorder()
    run_side_by_side(GRAPH, run, jobs=1)
    assert run.events == ["a", "x", "b", "y", "c", "e"]


def test_after_a_failure_nothing_starts_and_what_runs_ends():
    failed, seen, ended = threading.Event(), [], []

    def run(name):
        seen.append(name)
        if name == "a":
            failed.set()
            return False
        failed.wait(30)
        time.sleep(0.2)  # it runs on while the failure is seen, with a place free for the third
        ended.append(name)
        return True

    assert run_side_by_side({"a": set(), "x": set(), "z": set()}, run, jobs=2) == ["a"]
    assert (sorted(seen), ended) == (["a", "x"], ["x"])


def test_an_error_of_the_runner_itself_is_raised():
    def run(name):
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        run_side_by_side(GRAPH, run, jobs=2)


@pytest.mark.parametrize(("cores", "jobs", "expected"), [(2, 2, ("1", "0")), (2, 4, ("1", "0")), (8, 2, ("4", "4"))])
def test_each_job_gets_its_share_of_the_cores(monkeypatch, cores, jobs, expected):
    monkeypatch.setattr(repro, "cpu_count", lambda: cores)
    monkeypatch.setattr(repro, "has_gpu", lambda: False)
    assert tuple(share_of_cores(jobs).values()) == expected
    monkeypatch.setattr(repro, "has_gpu", lambda: True)
    assert set(share_of_cores(jobs)) == {"OMP_NUM_THREADS"}  # how many networks a GPU holds is the stage's to say


STAGES = """
stages:
  first: {cmd: python step.py first, deps: [step.py, input, remark], outs: [out/first]}
  second:
    foreach: [1, 2]
    do: {cmd: "python step.py second${item} out/first", deps: [step.py, out/first], outs: ["out/second${item}"]}
  other: {cmd: python step.py other, deps: [step.py], outs: [out/other]}
  last:
    cmd: python step.py last out/second1 out/second2 out/other
    deps: [step.py, out/second1, out/second2, out/other]
    outs: [out/last]
"""
STEP = """
import os, pathlib, sys, time
name, *deps = sys.argv[1:]
print("threads", os.environ["OMP_NUM_THREADS"])
if pathlib.Path("fail").exists() and pathlib.Path("fail").read_text() == name:
    sys.exit("this went wrong")
if pathlib.Path("hang").exists():
    pathlib.Path(f"hanging.{os.getpid()}").touch()
    time.sleep(60)
text = "".join(pathlib.Path(d).read_text() for d in deps) or pathlib.Path("input").read_text()
pathlib.Path("out", name).write_text(text + name)
"""


@pytest.fixture
def project(tmp_path):
    """Five stages and their graph; returns a function that runs them."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "input").write_text("1")
    (tmp_path / "remark").write_text("")
    (tmp_path / "out").mkdir()
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "DVC_NO_ANALYTICS": "1", "DVC_ROOT": str(tmp_path), "OMP_NUM_THREADS": "3",
    }  # fmt: skip

    def run(*command):
        return subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert run("dvc", "init", "--no-scm", "-q").returncode == 0
    run.path, run.env = tmp_path, env
    return run


@pytest.mark.slow
def test_dvc_finds_nothing_to_do_after_it_and_only_what_changed_is_run(project):
    result = project("pipeline.experiments.repro", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (project.path / "out" / "last").read_text() == "1firstsecond11firstsecond21otherlast"
    (project.path / "out" / "last").unlink()
    assert "last | done" in project("pipeline", "repro", "--jobs", "2").stdout  # by the one door
    assert "last | done; 5 of 5 stages" in result.stdout
    assert "other | threads 3" in result.stdout  # what the environment says stays
    assert "Updating lock file" not in result.stdout
    assert "up to date" in project("dvc", "repro").stdout
    assert project("pipeline.experiments.repro", "--jobs", "2").stdout == "Data and pipelines are up to date.\n"

    # A change that makes no other bytes stops there: what waits for it is looked at, and not run.
    (project.path / "remark").write_text("of no consequence")
    changed = project("pipeline.experiments.repro", "--jobs", "2", "second@1").stdout
    assert "first | Running" in changed
    assert "second@1 | Running" not in changed
    assert "second@1 | done; 2 of 2 stages" in changed
    assert "second@2" not in changed
    (project.path / "input").write_text("2")
    assert "Running stage 'last'" in project("pipeline.experiments.repro", "--jobs", "1").stdout
    # `other` does not say that it reads the input, so DVC has no cause to run it.
    assert (project.path / "out" / "last").read_text() == "2firstsecond12firstsecond21otherlast"


@pytest.mark.slow
def test_a_stage_that_fails_is_named_and_what_needs_it_is_not_started(project):
    (project.path / "fail").write_text("second1")
    result = project("pipeline.experiments.repro", "--jobs", "2")
    assert result.returncode == 1
    assert "second@1 | this went wrong" in result.stdout
    assert "failed: second@1" in result.stderr
    assert "last" not in result.stdout
    (project.path / "fail").unlink()
    assert "first |" not in project("pipeline.experiments.repro", "--jobs", "2").stdout  # done before, and not again
    assert "up to date" in project("dvc", "repro").stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_when_it_is_ended_so_are_its_stages_and_the_next_run_goes_on(project, number):
    (project.path / "hang").touch()

    def heed() -> None:  # what a shell's background, or nohup, has told this process to ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command, quiet = [sys.executable, "-m", "pipeline.experiments.repro", "--jobs", "2"], subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=project.path, env=project.env, stdout=quiet, stderr=quiet, preexec_fn=heed
    ) as process:
        deadline = time.monotonic() + 60
        while len(found := list(project.path.glob("hanging.*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(found) == 2
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    stages = [int(path.suffix[1:]) for path in found]
    while any(Path(f"/proc/{pid}").exists() for pid in stages) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in stages)
    (project.path / "hang").unlink()
    result = project("pipeline.experiments.repro", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "up to date" in project("dvc", "repro").stdout


@pytest.mark.slow
def test_a_lock_that_a_kill_left_short_is_put_back_by_the_next_run(project):
    assert project("pipeline.experiments.repro", "--jobs", "2").returncode == 0
    lock = project.path / "dvc.lock"
    (project.path / ".dvc" / "tmp" / "dvc.lock.whole").write_bytes(lock.read_bytes())
    lock.write_bytes(lock.read_bytes()[:100])
    assert project("dvc", "repro").returncode != 0
    result = project("pipeline.experiments.repro", "--jobs", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "dvc.lock was cut off" in result.stdout
    assert "up to date" in project("dvc", "repro").stdout


def test_a_run_beside_another_one_says_so(workspace):
    held = repro.hold_alone()
    with pytest.raises(ValueError, match=rf"another `make repro` runs in this folder \(pid {os.getpid()}\)"):
        repro.hold_alone(seconds=0.0)
    os.close(held)
    os.close(repro.hold_alone(seconds=0.0))
