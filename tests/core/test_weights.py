"""Published weights: what is read, and all that is refused before or instead of being unpickled."""

import collections
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.core import weights
from pipeline.core.weights import PUBLISHED, Published, check, read_safetensors, read_tensors, write_safetensors


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state():
    return collections.OrderedDict(
        {
            "fc1.weight": torch.arange(6.0).reshape(2, 3),
            "fc1.bias": torch.ones(2),
            "bn0.num_batches_tracked": torch.tensor(7),
        }
    )


def sampler():
    """As the balanced sampler of audioset_tagging_cnn leaves it in its checkpoints."""
    return {
        "indexes_per_class": [np.arange(5), np.arange(2)],
        "queue": [3, 1, np.int64(2)],
        "pointers_of_classes": [0, 4],
    }


def panns_checkpoint(path, *, zipped=False, **change):
    """A .pth of the form of PANNs' (which are from before torch 1.6, so not zips)."""
    content = {"iteration": 600000, "model": state(), "sampler": sampler()} | change
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def lightning_checkpoint(path):
    """A .ckpt of the form of uss's: the separator beside frozen copies of PANNs and the optimizer."""
    parameters = {"ss_model.base.pre_conv.weight": torch.ones(2, 1), "ss_model.film.block->beta1.bias": torch.zeros(3)}
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": collections.OrderedDict(parameters | {"query_net.base.fc1.bias": torch.ones(4)}),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "dirpath": "/x"}},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 1)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"base_lrs": [0.001], "last_epoch": 1000}],
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_panns_checkpoint_gives_its_model_and_nothing_else(tmp_path, zipped):
    path = panns_checkpoint(tmp_path / "Cnn14.pth", zipped=zipped)
    tensors = read_tensors(path, sha256=sha256(path), entry="model")
    assert type(tensors) is dict
    assert list(tensors) == list(state())
    for name, tensor in state().items():
        assert torch.equal(tensors[name], tensor)


def test_a_checkpoint_of_numpy_1_is_read(tmp_path):
    """The published files are: numpy._core was numpy.core then."""
    path = panns_checkpoint(tmp_path / "Cnn14.pth")
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != path.read_bytes()
    path.write_bytes(old)
    assert list(read_tensors(path, sha256=sha256(path), entry="model")) == list(state())


def test_a_lightning_checkpoint_gives_one_model_without_its_prefix(tmp_path):
    path = lightning_checkpoint(tmp_path / "uss.ckpt")
    tensors = read_tensors(path, sha256=sha256(path), entry="state_dict", prefix="ss_model.")
    assert list(tensors) == ["base.pre_conv.weight", "film.block->beta1.bias"]
    path.unlink()
    assert torch.equal(tensors["base.pre_conv.weight"], torch.ones(2, 1))


def test_a_hash_may_be_in_capitals(tmp_path):
    path = panns_checkpoint(tmp_path / "Cnn14.pth")
    check(path, sha256(path).upper())


# Files that are not what they should be


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small file that counts as published under its name."""
    path = panns_checkpoint(tmp_path / "Tiny_mAP=0.1.pth")
    known = Published(path.stat().st_size, sha256(path), "https://example.org/record/1")
    monkeypatch.setitem(PUBLISHED, path.name, known)
    return path


def test_a_published_file_is_known_by_its_name(published):
    assert list(read_tensors(published, sha256=None, entry="model")) == list(state())


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def web_page(path):
    path.write_bytes(b"\n<!DOCTYPE html><html>404</html>")


def lfs_pointer(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 327428481\n")


def one_byte_changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such file"),
        (empty, "is empty: its download failed"),
        (truncated, r"has \d+ bytes, not \d+: truncated"),
        (web_page, "is a web page, not weights"),
        (lfs_pointer, "is a Git LFS pointer"),
        (one_byte_changed, r"has sha256 [0-9a-f]{64}, not [0-9a-f]{64}"),
    ],
)
def test_a_damaged_file_is_refused_before_it_is_opened(published, damage, message, monkeypatch):
    damage(published)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"Tiny_mAP=0\.1\.pth.*{message}.*example\.org/record/1"):
        read_tensors(published, sha256=None, entry="model")


def test_a_hash_in_the_params_rules_over_the_published_one(published):
    """A file trained further may keep its name: then its own hash says that this is meant."""
    mine = panns_checkpoint(published, model={"other": torch.ones(9)})
    with pytest.raises(ValueError, match="bytes, not"):
        read_tensors(mine, sha256=None, entry="model")
    assert list(read_tensors(mine, sha256=sha256(mine), entry="model")) == ["other"]


def test_an_unknown_file_is_not_opened_without_a_hash(tmp_path):
    path = panns_checkpoint(tmp_path / "unknown.pth")
    with pytest.raises(ValueError, match=f"sha256 is not known.*own is {sha256(path)}"):
        read_tensors(path, sha256=None, entry="model")


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("entry", ["model", "sampler"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, entry, zipped):
    """With the right hash: someone may have been talked into it."""
    trace = tmp_path / "trace"
    path = panns_checkpoint(tmp_path / "evil.pth", zipped=zipped, **{entry: {"a": torch.ones(1), "b": Evil(trace)}})
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read as plain tensors.*it needs GLOBAL posix\.mkdir"):
        read_tensors(path, sha256=sha256(path), entry="model")
    assert not trace.exists()
    # It is evil: the plain unpickler does run it.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.random.RandomState(0),
        np.array([{"any": "object"}], dtype=object),
        np.array(["text"]),
        collections.deque([1]),
        Path("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_that_no_panns_checkpoint_has_are_refused(tmp_path, value):
    path = panns_checkpoint(tmp_path / "odd.pth", sampler=value)
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_tensors(path, sha256=sha256(path), entry="model")


def test_what_is_allowed_is_allowed_only_while_reading(tmp_path):
    path = panns_checkpoint(tmp_path / "Cnn14.pth")
    read_tensors(path, sha256=sha256(path), entry="model")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle at all" * 9, "cannot be read as plain tensors"),
        (b"PK\x03\x04 not a zip", "cannot be read as plain tensors"),
        (pickle.dumps({"model": {"a": 1}}, protocol=2), "cannot be read as plain tensors"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.pth {message}"):
        read_tensors(path, sha256=sha256(path), entry="model")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"weights": {}}, {}, r"has no entry 'model', but \['weights'\]"),
        ([1, 2], {}, "has no entry 'model', but list"),
        ({"model": 3}, {}, "'model' is a int, not a mapping"),
        ({"model": {}}, {}, "'model' has no name that starts with ''"),
        ({"model": {"a": torch.ones(1)}}, {"prefix": "b."}, r"has no name that starts with 'b\.', but \['a'\]"),
        ({"model": {"a": torch.ones(1), "b": 2.0}}, {}, "b is a float, not a tensor"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused(tmp_path, content, options, message):
    path = tmp_path / "form.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_tensors(path, sha256=sha256(path), entry="model", **options)


# Safetensors


def test_tensors_are_written_and_read_again(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"b": torch.arange(4.0).reshape(2, 2).T, "a": torch.tensor(3)}
    write_safetensors(tensors, path)
    again = read_tensors(path, sha256=sha256(path), entry="")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

    first = path.read_bytes()
    write_safetensors(dict(reversed(tensors.items())), path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file"):
        read_tensors(path, sha256=sha256(path), entry="")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_safetensors({"a": torch.ones(1)}, path)
    before = path.read_bytes()

    def disk_full(tensors, temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left on the disk"):
        write_safetensors({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 4, 50, -1])
def test_a_stages_own_weights_that_are_cut_are_named(tmp_path, kept):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    assert torch.equal(read_safetensors(path)["a"], torch.arange(100.0))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file"):
        read_safetensors(path)
