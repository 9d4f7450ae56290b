"""One run at a time, a clean end by signals, whole files, and names of runs that change when they should."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core import runtime
from pipeline.core.config import Params
from pipeline.core.runtime import (
    AlreadyRunning,
    fingerprint,
    outside,
    publish,
    read_json,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from pipeline.core.runtime import running, scratch_dir

with running("hold", Path("data/out")):
    scratch = scratch_dir("hold", "abc")
    (scratch / "state").write_text("x")
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("clean", flush=True)
"""


def start(code: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# ----------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "a", b"1")
    write_atomic(tmp_path / "new" / "a", "ü\n")
    assert (tmp_path / "new" / "a").read_bytes() == b"\xc3\xbc\n"
    assert os.listdir(tmp_path / "new") == ["a"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="too large"):
            write_atomic(tmp_path / "a", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_json_depends_on_the_value_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": {"y": [0.1], "x": "ü"}})
    write_json(tmp_path / "b", {"a": {"x": "ü", "y": [0.1]}, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text().endswith("}\n")
    assert json.loads((tmp_path / "a").read_text()) == {"b": 1, "a": {"y": [0.1], "x": "ü"}}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", {"sdr": number})
    assert os.listdir(tmp_path) == []


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert runtime.sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


@pytest.mark.parametrize("before", ["nothing", "directory", "link", "file"])
def test_publish_replaces_whatever_was_there(tmp_path: Path, before: str) -> None:
    out, new = tmp_path / "data" / "out", tmp_path / "scratch" / "new"
    if before == "directory":
        (out / "old").mkdir(parents=True)
    elif before != "nothing":
        out.parent.mkdir()
        out.symlink_to(tmp_path) if before == "link" else out.touch()
    (new / "sub").mkdir(parents=True)
    (new / "sub" / "a").write_text("1")
    publish(new, out)
    assert not out.is_symlink()
    assert [str(path.relative_to(out)) for path in sorted(out.rglob("*"))] == ["sub", "sub/a"]
    assert os.listdir(out.parent) == ["out"]
    assert not new.exists()
    assert tmp_path.exists()


def test_publish_copies_between_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source) == tmp_path / "new":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("1")
    publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_linked_file_outlives_its_first_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    runtime.link_or_copy(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").unlink()
    assert (tmp_path / "b").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        runtime.link_or_copy(tmp_path / "a", tmp_path / "c")


# -------------------------------------------------------------------------------------------------- identity


class Rate(Params):
    lr: float
    steps: int


def test_a_fingerprint_changes_with_params_files_and_values(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    params = Rate(lr=0.1, steps=3)
    prints = [
        fingerprint(params, tmp_path / "a", "x"),
        fingerprint(Rate(lr=0.1, steps=4), tmp_path / "a", "x"),
        fingerprint(params, tmp_path / "b", "x"),
        fingerprint(params, tmp_path / "a", "y"),
        fingerprint(params, tmp_path / "a", None),
        fingerprint(params, tmp_path / "a"),
        fingerprint(tmp_path / "a", params, "x"),
    ]
    assert len(set(prints)) == len(prints)
    (tmp_path / "b").write_text("1")
    assert fingerprint(params, tmp_path / "b", "x") == prints[0]
    assert all(len(one) == 32 and int(one, 16) for one in prints)


def test_neighbours_do_not_run_into_each_other() -> None:
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("1") != fingerprint(1) != fingerprint(1.0) != fingerprint(True)


def test_what_has_no_stable_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"set|\{1, 2\}"):  # a TypeError, where types are not checked before
        fingerprint({1, 2})  # type: ignore[arg-type]
    with pytest.raises(IsADirectoryError):
        fingerprint(tmp_path)


def test_a_fingerprint_is_of_the_code_that_runs(tmp_path: Path) -> None:
    package = tmp_path / "pipeline"
    for name in ("", "core", "stages"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "core" / "runtime.py").write_bytes((ROOT / "pipeline" / "core" / "runtime.py").read_bytes())
    (package / "other.py").write_text("x = 1\n")
    (package / "stages" / "one.py").write_text(
        "from pipeline.core.runtime import fingerprint\nif __name__ == '__main__':\n    print(fingerprint())\n"
    )

    def run() -> str:
        command = [sys.executable, "-m", "pipeline.stages.one"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first = run()
    (package / "other.py").write_text("x = 2\n")
    assert run() == first, "other.py is not loaded"
    source = (package / "stages" / "one.py").read_text()
    (package / "stages" / "one.py").write_text(f"# changed\n{source}")
    assert run() != first, "the stage itself runs as __main__"


# ----------------------------------------------------------------------------------------------- one at a time


def test_a_second_run_on_the_same_output_is_refused_and_told_by_whom(workspace: Path) -> None:
    other = start(HOLD, workspace)
    try:
        assert first_line(other) == "ready"
        for out in (Path("data/out"), workspace / "data" / "x" / ".." / "out"):
            with pytest.raises(AlreadyRunning, match=f"pid {other.pid} on "), running("mine", out):
                pass
        with running("mine", Path("data/another")), pytest.raises(AlreadyRunning, match=f"pid {other.pid} on "):
            scratch_dir("hold", "abc")
        assert (workspace / "data/scratch/hold/abc/state").exists()
    finally:
        other.kill()
        other.communicate()
    with running("mine", Path("data/out")):  # killed, so nothing of it is in the way
        assert (scratch_dir("hold", "abc") / "state").exists()


def test_locks_are_not_in_the_output_and_are_gone_afterwards(workspace: Path) -> None:
    with running("one", Path("data/out")):
        assert not Path("data/out").exists()
        with pytest.raises(AlreadyRunning, match="this very process"), running("two", Path("data/out")):
            pass
    with running("one", Path("data/out")):
        pass
    assert os.listdir("data/scratch/locks") == []


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(workspace: Path) -> None:
    # The child speaks, not its parent: what a fork does in it is done by then.
    forks = HOLD.replace('print("ready"', "import os; os.fork() and time.sleep(60); print(os.getpid()")
    other = start(forks, workspace)
    child = int(first_line(other))
    try:
        other.kill()
        other.wait()
        os.kill(child, 0)  # it lives
        with running("mine", Path("data/out")):
            assert len(os.listdir("data/scratch/locks")) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        other.communicate()


def test_what_a_copy_of_the_workspace_lacks_is_the_originals(tmp_path, monkeypatch):
    original, copy = tmp_path / "original", tmp_path / "copy"
    (original / "data" / "music").mkdir(parents=True)
    (copy / "data").mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(original))
    monkeypatch.chdir(copy)
    assert outside("data/music") == original / "data" / "music"
    assert outside("data/nowhere") == Path("data/nowhere")  # as params.yaml has it, for the error message
    assert outside(original / "data") == original / "data"
    (copy / "data" / "music").mkdir()
    assert outside("data/music") == Path("data/music")


def test_scratch_of_the_run_before_is_kept_and_older_ones_are_not(workspace: Path) -> None:
    for number, name in enumerate(["a", "b", "a", "c"]):
        with running("train", Path("out")):
            scratch = scratch_dir("train", name)
            (scratch / "checkpoint").touch()
            os.utime(scratch.with_name(f"{name}.lock"), (number, number))
    assert sorted(os.listdir("data/scratch/train")) == ["a", "a.lock", "c", "c.lock"]
    with running("train", Path("out")):
        assert scratch_dir("train", "a") == scratch_dir("train", "a") == workspace / "data/scratch/train/a"
        with running("other", Path("other")):
            scratch_dir("other", "x").rmdir()
    assert os.listdir("data/scratch/other") == []


def test_scratch_that_a_live_run_holds_is_not_swept(workspace: Path) -> None:
    other = start(HOLD, workspace)
    try:
        assert first_line(other) == "ready"
        with running("hold", Path("data/mine")):
            scratch_dir("hold", "def", keep=0)
            assert sorted(os.listdir("data/scratch/hold")) == ["abc", "abc.lock", "def", "def.lock"]
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_a_stages_name_is_plain(workspace: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a stage's name"), running(name, Path("out")):
        pass
    with pytest.raises(ValueError, match="not a stage's name"):
        scratch_dir(name, "abc")


# ------------------------------------------------------------------------------------------------------ signals


def test_sigterm_ends_a_stage_as_an_exception_does(workspace: Path) -> None:
    stage = start(HOLD, workspace)
    assert first_line(stage) == "ready"
    stage.terminate()
    out, err = stage.communicate(timeout=20)
    assert (stage.returncode, out) == (143, "clean\n")
    assert "Traceback" not in err
    assert not Path("data/timings").exists()
    assert os.listdir("data/scratch/locks") == []


STARTER = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print(p.pid); p.wait()"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("under_dvc", [True, False])
def test_a_stage_ends_with_its_parent_unless_started_by_hand_to_stay(workspace: Path, under_dvc: bool) -> None:
    stay = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + HOLD.replace("sleep(60)", "sleep(3)")
    code = STARTER.replace("sys.argv[1]", repr(stay)).replace("print(p.pid)", "print(p.pid, flush=True)")
    parent = start(code, workspace, **({"DVC_STAGE": "hold"} if under_dvc else {}))
    child = int(first_line(parent))
    assert first_line(parent) == "ready"
    parent.kill()
    started = time.monotonic()
    out, err = parent.communicate(timeout=20)  # until the child, which has the same stdout, has ended too
    assert out == "clean\n"
    assert (time.monotonic() - started < 2) == under_dvc, err
    assert child != parent.pid


def test_handlers_are_as_before_afterwards(workspace: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with running("one", Path("out")):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_may_run_in_a_thread(workspace: Path) -> None:
    def stage() -> None:
        with running("one", Path("out")):
            pass

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert Path("data/timings/one.json").exists()


# ------------------------------------------------------------------------------------------------------ timings


def test_a_stage_that_succeeds_leaves_what_it_took(workspace: Path) -> None:
    with running("one", Path("out")):
        time.sleep(0.1)
    timing = json.loads(Path("data/timings/one.json").read_text())
    assert 0.1 <= timing["seconds"] < 5
    assert 0 <= timing["cpu_seconds"] < 0.1  # it slept
    assert 2e7 < timing["peak_rss_bytes"] < 1e11
    with pytest.raises(RuntimeError, match="no"), running("two", Path("out")):
        raise RuntimeError("no")
    assert os.listdir("data/timings") == ["one.json"]


def test_the_time_of_processors_is_that_of_its_ended_children_too(workspace: Path) -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    with running("one", Path("out")):
        subprocess.run([sys.executable, "-c", spin], check=True)
    assert json.loads(Path("data/timings/one.json").read_text())["cpu_seconds"] >= 0.25


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        read_json(path)
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(path) == {"a": "ü"}


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("2,1", 2), (None, 5), ("", 5), ("0", 5), ("many", 5)])
def test_threads_are_what_openmp_is_told_or_the_cores(said, threads, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_count", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert runtime.thread_count() == threads


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("params.yaml is wrong:\n  a: b"), 2, "error: params.yaml is wrong:; a: b\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "error: [Errno 2] No such file or directory: 'x'\n",
        ),
        (runtime.AlreadyRunning("it is alive"), 2, "error: it is alive\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; run it again, it goes on\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, code, line):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("USS_DEBUG", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        runtime.run_command(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, line)
    monkeypatch.setenv("USS_DEBUG", "1")
    with pytest.raises(type(error)):
        runtime.run_command(main)


def test_notes_of_an_error_are_in_its_line(monkeypatch, capsys):
    """Who caught it on its way knew the part and the clip, which the error itself does not name."""
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("USS_DEBUG", raising=False)

    def main():
        error = runtime.disk_full(Path("here"))
        error.add_note("clip 'a'\n")
        error.add_note("in part '00001'")
        raise error

    with pytest.raises(SystemExit):
        runtime.run_command(main)
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*no space left on the disk at /.*'here'; clip 'a'; in part '00001'\n", said)


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with pytest.raises(ZeroDivisionError):
        runtime.run_command(lambda: 1 // 0)
