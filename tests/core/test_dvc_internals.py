"""DVC's files appear whole or not at all, and a short dvc.lock is put back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dvc
import pytest

from pipeline.core import dvc_internals
from pipeline.core.dvc_internals import COPY, LOCK, TRIED, is_whole, keep_copy, restore

ROOT = Path(__file__).parents[2]
WHOLE = b"schema: '2.0'\nstages:\n  a:\n    cmd: x\n    deps:\n    - path: b\n"


def test_it_was_tried_with_the_dvc_that_is_installed():
    """DVC has no promise about its insides: with another version, run the slow tests of this file and of test_repro."""
    assert dvc.__version__.rsplit(".", 1)[0] in TRIED


@pytest.mark.parametrize("cut", [0, 1, 13, 14, 20, 30, 40, len(WHOLE) - 1])
def test_a_cut_lock_is_not_whole(cut):
    assert is_whole(WHOLE)
    assert not is_whole(WHOLE[:cut])


def test_a_short_lock_is_put_back_from_the_last_copy_that_was_whole(workspace):
    LOCK.write_bytes(WHOLE)
    keep_copy()
    assert restore() is None
    LOCK.write_bytes(WHOLE[:20])
    keep_copy()  # a short one replaces no copy
    assert "put back from .dvc/tmp/dvc.lock.whole" in restore()
    assert LOCK.read_bytes() == WHOLE


def test_a_short_lock_without_a_copy_is_put_back_from_the_last_commit_or_refused(workspace):
    LOCK.write_bytes(b"")
    with pytest.raises(ValueError, match=r"dvc\.lock is cut off, and there is no copy of it: remove it"):
        restore()
    LOCK.write_bytes(WHOLE)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "dvc.lock"], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    LOCK.write_bytes(b"")
    assert "from the last commit" in restore()
    assert LOCK.read_bytes() == WHOLE


def test_a_cut_table_of_paths_in_use_is_removed(workspace):
    table = Path(".dvc/tmp/rwlock")
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    assert restore() is None
    assert table.exists()
    table.write_text('{"read": {"/a')
    assert "rwlock was cut off and is removed" in restore()
    assert not table.exists()


def test_dvc_writes_whole_files(workspace, monkeypatch):
    """A writer that fails in the middle leaves what was there."""
    from dvc.utils.serialize import _common, _json, _toml, _yaml, dump_yaml, modify_yaml

    monkeypatch.setenv(dvc_internals.OWN_WRITER, "")  # which the call sets
    for module in (_common, _json, _toml, _yaml):
        monkeypatch.setattr(module, "_dump_data", module._dump_data)
    dvc_internals.write_whole_files()
    LOCK.write_bytes(WHOLE)
    with modify_yaml("dvc.lock") as document:
        document["stages"]["b"] = {"cmd": "y"}
    assert is_whole(LOCK.read_bytes())
    assert b"cmd: y" in LOCK.read_bytes()
    before = LOCK.read_bytes()
    with pytest.raises(Exception, match="cannot represent"):
        dump_yaml("dvc.lock", {"a": 1, "b": object()})
    assert LOCK.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_watch_puts_back_what_a_killed_dvc_leaves_short_and_ends(workspace, number):
    """As a plain `dvc repro`: a process whose name is python's starts a stage's command, and is killed as it writes."""
    LOCK.write_bytes(WHOLE)
    stage = "from pipeline.core.runtime import run_command; run_command(lambda: __import__('time').sleep(2))"
    writer = (
        f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {stage!r}]); "
        "file = open('dvc.lock', 'w'); print('short', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"DVC_STAGE": "a", "PYTHONPATH": str(ROOT)}
    environment.pop(dvc_internals.OWN_WRITER, None)
    with subprocess.Popen(
        [sys.executable, "-c", writer], env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout.readline() == b"short\n"
        assert COPY.read_bytes() == WHOLE
        os.killpg(process.pid, number)
    deadline = time.monotonic() + 20
    while LOCK.read_bytes() != WHOLE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert LOCK.read_bytes() == WHOLE
