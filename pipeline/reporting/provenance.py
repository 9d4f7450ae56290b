"""Where the numbers come from: code, params, data, machine. No host name, no user, no absolute path."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from pipeline.core import profiles
from pipeline.core.config import read_document
from pipeline.core.runtime import sha256_file

LIBRARIES = ("torch", "numpy", "scipy", "soundfile", "soxr", "fast-bss-eval", "dvc")
# What a run itself rewrites does not make its code dirty.
_WRITTEN_BY_RUNS = ("reports", "dvc.lock", "data")


def provenance(root: Path, params: Path, data: Iterable[Path], threads: Iterable[int]) -> dict[str, Any]:
    """Everything needed to say which run this was. `root` is the checkout; `data` the manifests that name the data.

    `threads` are those of each training: the last bits of trained weights depend on them.
    """
    return {
        "code": code(root),
        "params": {"sha256": sha256_file(params), "profile": profile(root, params)},
        "data_sha256": data_hash(data),
        "hardware": hardware(),
        "training_threads": sorted(set(threads)),
        "versions": versions(),
    }


def code(root: Path) -> dict[str, Any]:
    """Git revision, its date, and which files differ from it; revision None where this is no checkout."""
    revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if revision is None:
        return {"revision": None, "date": None, "dirty": None, "changed_files": []}
    excluded = [f":(exclude,top){path}" for path in _WRITTEN_BY_RUNS]
    status = _output(["git", "-C", str(root), "status", "--porcelain", "--", ":(top)", *excluded])
    changed = sorted(line[3:].split(" -> ")[-1].strip('"') for line in (status or "").splitlines())
    date = _output(["git", "-C", str(root), "show", "-s", "--format=%cs", "HEAD"])
    return {"revision": revision, "date": date, "dirty": bool(changed), "changed_files": changed}


def profile(root: Path, params: Path) -> str | None:
    """Name of the profile whose settings params.yaml has, if there is one."""
    settings = read_document(params)
    return next((name for name in profiles.names(root) if profiles.document(name, root) == settings), None)


def data_hash(manifests: Iterable[Path]) -> str | None:
    """One SHA-256 over the manifests that are there, in their order; None where none is.

    Those of the clips list the SHA-256 of every clip's samples.
    """
    found = [sha256_file(path) for path in manifests if path.is_file()]
    return hashlib.sha256("".join(f"{digest}\n" for digest in found).encode()).hexdigest() if found else None


def hardware() -> dict[str, Any]:
    """The machine that wrote the report, as far as it bears on speed."""
    gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus.splitlines() if gpus else [],
    }


def versions() -> dict[str, str]:
    """Python and the libraries that make the numbers. Read from the installed metadata: importing torch takes 6 s."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or "unknown"


def _output(command: list[str]) -> str | None:
    """Output of a command, or None where it is not there, fails, or takes longer than 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")
