"""What this project needs of DVC beyond its command line; no other module touches DVC's insides.

    python -m pipeline.core.dvc_internals    # put back a dvc.lock that a killed run has left short

DVC rewrites dvc.lock in place after every stage: a process that is killed while it writes leaves a short file, and no
later `dvc repro` starts. `make repro` runs DVC in processes of its own, where `write_whole_files` makes every such file
appear whole or not at all. A plain `dvc repro` is not ours; what we own of it are the commands of its stages. Each of
them starts `watch` as a process that outlives DVC for a moment: it keeps a copy of the last whole dvc.lock, and puts it
back when DVC has ended and left a short one. A power cut ends both: the command above, or `make repro`, puts it back.

Tried with DVC 3.67; tests/test_dvc_internals.py says so when another one is installed.
"""

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.runtime import run_command, write_atomic

LOCK = Path("dvc.lock")
TEMPORARY = Path(".dvc/tmp")
COPY = TEMPORARY / "dvc.lock.whole"
OWN_WRITER = "USS_WHOLE_FILES"  # in the environment: DVC writes by `write_whole_files`, no stage starts a watch
TRIED = ("3.67",)  # versions of DVC whose insides are as this module expects them
REMEDY = "python -m pipeline.core.dvc_internals"


# ---------------------------------------------------------------------------------------------------- dvc.lock


def is_whole(content: bytes) -> bool:
    """Whether this is the content of a dvc.lock that DVC accepts and whose last line is complete."""
    if not content.endswith(b"\n"):
        return False
    try:
        document = YAML(typ="safe").load(content)
    except (YAMLError, UnicodeDecodeError):
        return False
    stages = document.get("stages") if isinstance(document, dict) and "schema" in document else None
    return isinstance(stages, dict) and all(isinstance(stage, dict) and "cmd" in stage for stage in stages.values())


def keep_copy() -> None:
    """Keep a copy of a whole dvc.lock; a short one, or none, changes nothing."""
    with suppress(FileNotFoundError):
        content = LOCK.read_bytes()
        if (not COPY.is_file() or COPY.read_bytes() != content) and is_whole(content):
            write_atomic(COPY, content)


def restore() -> str | None:
    """Put back what a killed DVC has left short, under DVC's own lock; return what was done, None for nothing.

    dvc.lock comes from the last copy, or from the last commit; stages that it does not know run again. The table of
    paths in use (.dvc/tmp/rwlock) is removed. ValueError where there is no whole dvc.lock to put back.
    """
    done = []
    with _dvc_lock():
        table = TEMPORARY / "rwlock"
        if table.is_file() and not _is_json(table.read_bytes()):
            table.unlink()
            done.append(f"{table} was cut off and is removed")
        if LOCK.is_file() and not is_whole(LOCK.read_bytes()):
            for source, content in _copies():
                if is_whole(content):
                    write_atomic(LOCK, content)
                    done.append(f"{LOCK} was cut off, by a run that was killed, and is put back from {source}")
                    break
            else:
                raise ValueError(
                    f"{LOCK} is cut off, and there is no copy of it: remove it, and every stage runs again"
                )
    return "; ".join(done) or None


def _copies() -> Iterator[tuple[str, bytes]]:
    if COPY.is_file():
        yield str(COPY), COPY.read_bytes()
    with suppress(FileNotFoundError):  # no git
        shown = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], capture_output=True)
        if shown.returncode == 0:
            yield "the last commit", shown.stdout


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


@contextmanager
def _dvc_lock(seconds: float = 10) -> Iterator[None]:
    """Hold the lock under which DVC writes; BlockingIOError where another process keeps it for longer."""
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(TEMPORARY / "lock", "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(f"{file.name} is held by a DVC that runs: wait until it has ended") from None
                time.sleep(0.05)
        yield


# --------------------------------------------------------------------------------------------------- the watch


def watch(pid: int) -> None:
    """Keep a copy of dvc.lock while DVC lives, and put it back where that has left it short.

    DVC is process `pid`, or the parent of the shell that `pid` is. One watch at a time: a second one returns at once.
    """
    dvc = _dvc_of(pid)
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    with open(TEMPORARY / "dvc.lock.watch", "a") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen = None
        while dvc is not None and _is_alive(dvc):
            with suppress(FileNotFoundError):
                now = LOCK.stat().st_mtime_ns
                if now != seen:
                    keep_copy()
                    seen = now
            time.sleep(0.1)
        restore()


def _dvc_of(pid: int) -> int | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for candidate in [process, *process.parents()][:2]:
            if candidate.name().startswith(("python", "dvc")):
                return int(candidate.pid)
    return None  # it has ended already


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ------------------------------------------------------------------------------------------------ DVC in Python


def write_whole_files() -> None:
    """Have DVC in this process write dvc.lock, and all that it writes as YAML or JSON, by `write_atomic`."""
    from dvc.utils.serialize import _common, _json, _toml, _yaml  # type: ignore[import-untyped]

    in_place = _common._dump_data

    def whole(path: Any, data: Any, dumper: Callable[..., Any], fs: Any = None, **options: Any) -> None:
        if fs is not None and fs.protocol != "local":
            in_place(path, data, dumper, fs=fs, **options)
            return
        text = io.StringIO()
        dumper(data, text, **options)
        write_atomic(Path(path), text.getvalue())

    for module in (_common, _json, _toml, _yaml):
        module._dump_data = whole
    os.environ[OWN_WRITER] = "1"


def plan(targets: Sequence[str]) -> dict[str, set[str]]:
    """The stages that may have to run, in DVC's order, each with those of them that it waits for.

    These are the stages that `dvc status` calls changed and all that wait for them: whether the outputs of the former
    will be other ones is not known yet. ValueError, in DVC's words, where the graph cannot be read.
    """
    import networkx as nx  # type: ignore[import-untyped]
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]
    from dvc.scm import SCMError  # type: ignore[import-untyped]

    try:
        with Repo() as repo:
            changed = set(repo.status())
            graph = nx.relabel_nodes(
                repo.index.graph, lambda stage: stage.addressing
            )  # edges to what a stage waits for
            wanted = set(graph)
            if targets:
                named = {stage.addressing for target in targets for stage in repo.stage.collect(target)}
                wanted = named.union(*(nx.descendants(graph, name) for name in named))
    except SCMError as error:
        raise ValueError(f"{error}: `git init`, or `dvc config core.no_scm true` to work without git") from None
    except DvcException as error:
        raise ValueError(f"DVC: {error}") from error
    stale = changed.union(*(nx.ancestors(graph, name) for name in changed)) & wanted
    order = [name for name in nx.dfs_postorder_nodes(graph) if name in stale]
    return {name: set(graph.successors(name)) & stale for name in order}


def run_dvc(*arguments: str) -> int:
    """DVC's command line in this process, with whole files; return its exit status."""
    from dvc.cli import main  # type: ignore[import-untyped]

    write_whole_files()
    return int(main([*arguments]))


def main() -> None:
    """Put back what a killed run has left short, or watch over a DVC that runs."""
    if sys.argv[1:2] == ["--watch"]:
        watch(int(sys.argv[2]))
    else:
        print(restore() or f"{LOCK} is whole")


if __name__ == "__main__":
    run_command(main)
