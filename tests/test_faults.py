"""Faults of the machine: full disks, damaged checkpoints, other threads or processors, memory that gives out."""

import ast
import errno
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core import devices, runtime
from pipeline.core.devices import blame_neighbours, go_on_alike, loading
from pipeline.core.runtime import DiskFull, write_together, writing
from pipeline.training import loop as training
from pipeline.training.loop import rows_on_disk
from tests.corpora import write_anchors
from tests.stages.test_train_separator import run as train_separator
from tests.training.test_loop import Killed, run

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    yield
    torch.set_num_threads(threads)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------------------------------------------------- full disks


def test_rows_on_disk_have_their_room_before_they_are_written_to(tmp_path):
    """A file with holes, written through a memory map on a full disk, kills the process."""
    rows = rows_on_disk(tmp_path / "a" / "rows.npy", (100, 200), np.float16)
    file = tmp_path / "a" / "rows.npy"
    assert file.stat().st_blocks * 512 >= file.stat().st_size >= 40_000
    assert rows.shape == (100, 200)
    assert rows.dtype == np.float16
    assert not rows.any()
    rows[3] = 2
    rows.flush()
    assert np.load(file)[3].tolist() == [2] * 200


def test_a_disk_without_room_for_rows_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", no_space, raising=False)
    with pytest.raises(DiskFull, match=r"no space left on the disk at /.* MB are free.*rows\.npy"):
        rows_on_disk(tmp_path / "rows.npy", (100, 200), np.float16)


def test_no_other_memory_map_is_made():
    made = [path.name for path in (ROOT / "pipeline").rglob("*.py") if "open_memmap(" in path.read_text()]
    assert made == ["loop.py"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # of safetensors
    ],
)
def test_whoever_finds_a_disk_full_the_error_names_file_and_disk(tmp_path, error):
    with pytest.raises(DiskFull, match=rf"no space left on the disk at /.*{tmp_path}/deep/file'") as caught:
        with writing(tmp_path / "deep" / "file"):
            raise error
    assert caught.value.errno == errno.ENOSPC


def test_a_stage_on_a_full_disk_names_its_output(workspace):
    with pytest.raises(DiskFull, match=r"no space left on the disk at .*data/out'"):
        with runtime.running("stage", Path("data/out")):
            no_space()
    with pytest.raises(OSError, match="Permission denied"):
        with runtime.running("stage", Path("data/out")):
            raise PermissionError(errno.EACCES, "Permission denied")


def test_files_that_belong_together_are_written_all_or_none(tmp_path, monkeypatch):
    write_together({tmp_path / "a": "old a", tmp_path / "b": b"old b"})
    synced, fsync = [], os.fsync

    def full_at_the_second(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            no_space()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(DiskFull, match=rf"{tmp_path}/b'"):
        write_together({tmp_path / "a": "new a", tmp_path / "b": b"new b", tmp_path / "c": "new c"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old a", "b": "old b"}


def test_the_report_writes_its_files_together():
    """One call: a file written beside it would be there without the others."""
    calls = [
        node.func.id
        for node in ast.walk(ast.parse((ROOT / "pipeline" / "stages" / "report.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("write_")
    ]
    assert calls == ["write_together"]


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def cut(content):
    return content[: len(content) // 2]


def spoilt(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


@pytest.mark.parametrize("damage", [lambda content: b"", cut, spoilt, lambda content: b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(tmp_path, caplog, damage):
    whole, rows = run(tmp_path, name="whole")
    with pytest.raises(Killed):
        run(tmp_path, name="killed", kill_at=6)
    checkpoint = tmp_path / "killed-scratch" / "checkpoint.pt"
    content = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(content)
    again, again_rows = run(tmp_path, name="killed")
    assert again_rows == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert f"{checkpoint} is damaged" in caplog.text
    assert "training begins anew" in caplog.text
    assert checkpoint.with_name("damaged_checkpoint.pt").read_bytes() == content


def test_a_checkpoint_of_another_network_leaves_nothing_of_itself(tmp_path, caplog):
    """Tensors are copied one by one: what fits is in the network before what does not is found."""
    whole, _ = run(tmp_path, name="whole")
    with pytest.raises(Killed):
        run(tmp_path, name="killed", kill_at=6)
    checkpoint = tmp_path / "killed-scratch" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["3.bias"] = torch.zeros(7)
    torch.save(state, checkpoint)
    again, _ = run(tmp_path, name="killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert "is damaged" in caplog.text


def test_memory_that_gives_out_over_a_checkpoint_does_not_lose_it(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(tmp_path, name="killed", kill_at=6)

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 900 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(training.torch, "load", no_memory)
        with pytest.raises(RuntimeError, match="can't allocate"):
            run(tmp_path, name="killed")
    assert (tmp_path / "killed-scratch" / "checkpoint.pt").exists()


# ----------------------------------------------------------------------------------------------------- going on alike


@pytest.fixture
def begun(tmp_path):
    """A scratch directory with the state of a training that began on one thread of this processor."""
    torch.set_num_threads(1)
    go_on_alike(tmp_path, CPU, "fp32")
    (tmp_path / "checkpoint.pt").write_text("state")
    return tmp_path


def test_a_training_goes_on_with_the_threads_that_it_began_with(begun, caplog):
    torch.set_num_threads(2)
    go_on_alike(begun, CPU, "fp32")
    assert torch.get_num_threads() == runtime.thread_count() == 1
    assert "goes on with 1 threads, as it began, not with 2" in caplog.text
    assert (begun / "checkpoint.pt").exists()


@pytest.mark.parametrize("change", ["processor", "precision", "damaged", "not said"])
def test_what_was_begun_otherwise_is_begun_anew_and_said(begun, caplog, monkeypatch, change):
    if change == "processor":
        monkeypatch.setattr(devices, "processor", lambda: "another")
    elif change == "damaged":
        (begun / "began.json").write_text("{")
    elif change == "not said":
        (begun / "began.json").unlink()
    torch.set_num_threads(2)
    go_on_alike(begun, CPU, "bf16" if change == "precision" else "fp32")
    assert torch.get_num_threads() == 2
    assert [path.name for path in begun.iterdir()] == ["began.json"]
    assert "training begins anew" in caplog.text
    assert json.loads((begun / "began.json").read_text())["threads"] == 2


def test_nothing_is_said_where_nothing_changed_or_nothing_was_begun(begun, tmp_path_factory, caplog):
    go_on_alike(begun, CPU, "fp32")
    go_on_alike(tmp_path_factory.mktemp("new"), CPU, "fp32")
    assert (begun / "checkpoint.pt").exists()
    assert not caplog.records


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_instructions_that_are_left_out_are_another_processor(monkeypatch, variable):
    before = devices.processor()
    monkeypatch.setenv(variable, "SOMETHING_ELSE")
    assert devices.processor() != before


def test_killed_on_one_thread_and_gone_on_with_two_a_training_ends_in_the_same_bytes(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    anchors = write_anchors(tmp_path / "anchors", 4)
    often = {"checkpoint_every_seconds": 1e-9}
    train_separator(anchors, tmp_path / "whole", **often)
    torch.set_num_threads(1)

    from pipeline.stages import train_separator as stage

    load = stage.Batches.load

    def dies(self, n):
        if n == 4:
            raise Killed
        return load(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Batches, "load", dies)
        with pytest.raises(Killed):
            train_separator(anchors, tmp_path / "killed", **often)
    torch.set_num_threads(2)
    train_separator(anchors, tmp_path / "killed", **often)
    assert "goes on with 1 threads" in caplog.text
    assert "resumed at step 4" in caplog.text
    files = [tmp_path / name / "weights.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_stage_that_trains_goes_on_alike():
    stages = {path.stem: path.read_text() for path in (ROOT / "pipeline" / "stages").glob("*.py")}
    trains = {name for name, text in stages.items() if "scratch=scratch" in text or "scratch, curve" in text}
    assert trains == {"sed", "pretrain_mae", "train_separator", "pretrain_performer", "train_mixit"}
    assert all("go_on_alike(scratch, " in stages[name] for name in trains)


# --------------------------------------------------------------------------------------------------- memory gives out

NO_MEMORY = [
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type int64"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 900 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 21.00 GiB."),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_gives_out_over_loading_is_named_and_no_models_result(error):
    with pytest.raises(ValueError, match="memory does not hold batch 3: batch_size or segment_seconds is too large"):
        with loading("batch 3"):
            raise error
    with pytest.raises(RuntimeError, match="another"):
        with loading("batch 3"):
            raise RuntimeError("another")


def test_a_loader_that_runs_out_of_memory_names_its_batch(tmp_path):
    def load(n):
        raise MemoryError

    with pytest.raises(ValueError, match="memory does not hold batch 0"):
        run(tmp_path, load=load)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_others_hold_is_no_result(monkeypatch, error):
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (6 * 10**9, 10**10))
    with pytest.raises(MemoryError, match=r"other processes hold 6\.0 of 10\.0 GB: it is no result"):
        blame_neighbours(error, CPU)
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (10**9, 10**10))
    assert blame_neighbours(error, CPU) is None


def test_a_step_that_the_whole_machine_does_not_hold_is_a_result_whoever_else_is_there(monkeypatch):
    monkeypatch.setattr(devices, "memory_of_others", lambda device: (6 * 10**9, 10**10))
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99000000000 bytes")
    assert blame_neighbours(error, CPU) is None


def test_this_process_is_not_its_own_neighbour():
    others, total = devices.memory_of_others(CPU)
    assert 0 < others < total
