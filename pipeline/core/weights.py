"""Published weights, read safely: checked before they are unpickled, and nothing but tensors comes out.

A .pth or .ckpt is a pickle, which can run any code when it is opened. So a file is opened only when its SHA-256 is the
expected one, and then by torch's restricted unpickler. Nothing here uses the network.
"""

import argparse
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.runtime import outside, writing


@dataclass(frozen=True)
class Published:
    """Facts about a published file; None: nobody has published it. A SHA-256 must then come from params.yaml."""

    size_bytes: int | None
    sha256: str | None
    source: str


_ZENODO = "https://zenodo.org/records/3987831"
_USS = "https://huggingface.co/RSNuts/Universal_Source_Separation (folder uss_material)"
PUBLISHED = {
    "Cnn14_mAP=0.431.pth": Published(
        327_428_481, "0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31", _ZENODO
    ),
    "Cnn14_DecisionLevelMax_mAP=0.385.pth": Published(
        327_428_481, "dd3b4043a87d4ec13df8082c0fcfee3fb5084151808e47e060987a95eabdd142", _ZENODO
    ),
    "pretrained.pth": Published(
        None, None, "the README of github.com/facebookresearch/AudioMAE; CC-BY-NC 4.0: not for commercial use"
    ),
    # Its queries are Cnn14's embeddings, as here; those of the next one are 527 probabilities.
    "ss_model=resunet30,querynet=emb,data=balanced,devices=1,steps=1000000.ckpt": Published(None, None, _USS),
    "ss_model=resunet30,querynet=at_soft,data=full,devices=8,step=1000000.ckpt": Published(1_121_024_828, None, _USS),
}

# Beside its tensors a PANNs checkpoint holds the state of the sampler: lists of int64 arrays and integers. These are
# the types that takes; the old names are those of numpy 1, which wrote the published files.
_SAMPLER_STATE: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.Int64DType,
    _reconstruct,
    scalar,
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (scalar, "numpy.core.multiarray.scalar"),
]
# AudioMAE's holds the arguments of its training. A Namespace is attributes and no code.
_ARGUMENTS: list[Any] = [argparse.Namespace]


def check(path: Path, sha256: str | None) -> None:
    """Hold a weights file to its SHA-256 (None: that of PUBLISHED, by file name), without opening its content.

    Raises FileNotFoundError or ValueError naming the file, what was expected, what is there and where to get it.
    """
    known = PUBLISHED.get(path.name)
    source = f"; get it from {known.source}" if known else ""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{source}")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: its download failed{source}")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
        if start.startswith(b"<"):
            raise ValueError(f"{path} is a web page, not weights: it starts with {start[:16]!r}{source}")
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not weights: fetch the file that it points to{source}")
        if known and known.size_bytes not in (None, size) and sha256 in (None, known.sha256):
            raise ValueError(f"{path} has {size} bytes, not {known.size_bytes}: truncated or another file{source}")
        file.seek(0)
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    expected = sha256 or (known.sha256 if known else None)
    if expected is None:
        raise ValueError(
            f"{path}: its sha256 is not known, so it is not opened. The file's own is {actual}; "
            "put it into params.yaml if the file comes from whom you trust"
        )
    if actual != expected.lower():
        raise ValueError(f"{path} has sha256 {actual}, not {expected}: truncated, changed or another file{source}")


def read_tensors(path: Path, *, sha256: str | None, entry: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors under `entry` of a checkpoint whose names start with `prefix`, without the prefix, on the CPU.

    `entry` is "model" in PANNs' files and "state_dict" in Lightning's, "" where the file is the mapping itself; a
    .safetensors file has none, and it is not used. The file passes `check` first. Raises ValueError if it holds
    anything but the expected types.
    """
    path = outside(path)
    check(path, sha256)
    if path.suffix == ".safetensors":
        state: object = read_safetensors(path)
    else:
        state = _unpickle(path, entry)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: {entry!r} is a {type(state).__name__}, not a mapping of names to tensors")
    selected = {name: value for name, value in state.items() if isinstance(name, str) and name.startswith(prefix)}
    if not selected:
        raise ValueError(f"{path}: {entry!r} has no name that starts with {prefix!r}, but {sorted(state)[:5]}")
    for name, value in selected.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    # Cloned, for the file is mapped into memory: what is not selected is never read.
    return {name.removeprefix(prefix): value.detach().clone().contiguous() for name, value in selected.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that a stage wrote. FileNotFoundError, or ValueError that names a file cut or changed."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def _unpickle(path: Path, entry: str) -> object:
    try:
        with torch.serialization.safe_globals([*_SAMPLER_STATE, *_ARGUMENTS]):
            # PANNs' files are of torch's format before 1.6, which is not a zip and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Of torch's message only the finding: the rest is advice on how to open the file unsafely.
        finding = re.search(r"GLOBAL [\w.]+|operand \d+", str(error))
        reason = f"it needs {finding[0]}" if finding else f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(
            f"{path} cannot be read as plain tensors, and is not opened in any other way: {reason}"
        ) from None
    if entry == "":
        return content
    if not isinstance(content, Mapping) or entry not in content:
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} has no entry {entry!r}, but {found}")
    return content[entry]


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors without pickle: the whole file or none, and the same bytes for the same tensors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
