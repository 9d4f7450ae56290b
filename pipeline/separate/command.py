"""The command `separate`: recordings in, a file per sound out."""

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from pipeline.core.devices import is_out_of_memory
from pipeline.separate import hub
from pipeline.separate.files import find_recordings, open_recording
from pipeline.separate.job import REST, Job
from pipeline.separate.model import Query, Separator
from pipeline.separate.targets import Unusable

__all__ = ["REST", "main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: all done, 1: some recordings failed, 2: nothing could be begun."""
    args = parser().parse_args(arguments)
    return_freed_memory()
    try:
        with interruptible():
            return run(args)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130


@contextmanager
def interruptible() -> Iterator[None]:
    """End on SIGTERM and SIGHUP as on Ctrl-C: with what is half-written taken away. One that is ignored stays so."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for one in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) == signal.SIG_DFL:
                before[one] = signal.signal(one, stop)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def return_freed_memory() -> None:
    """Have glibc give the kernel back every tensor that is freed, so that a recording's length costs no memory.

    By default freed tensors leave holes that others do not fit in: 30 s took ResUNet30 317 MB, and so 180. Does nothing
    without mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD (malloc.h)


def parser() -> argparse.ArgumentParser:
    """Build the command line; flags that demucs has too mean what they mean there."""
    parser = argparse.ArgumentParser(prog="separate", description="Separate recordings into the sounds that you name.")
    parser.add_argument("tracks", nargs="*", type=Path, help="files, or folders with files")
    parser.add_argument(
        "-n",
        "--name",
        help="a model of data/separators or data/mixit, a folder, a Hugging Face repository, a uss .ckpt",
    )
    parser.add_argument("--download", action="store_true", help="fetch the repository if it is not in the cache")
    parser.add_argument("--sha256", metavar="HEX", help="of the .ckpt, where its name does not say")
    parser.add_argument("-o", "--out", type=Path, default=Path("separated"))
    parser.add_argument("--filename", default="{track}/{stem}.{ext}", help="default: %(default)s")
    what = parser.add_argument_group("what to separate")
    what.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME", help="a class; repeatable"
    )
    what.add_argument("--two-stems", metavar="NAME", help="this class, and the rest")
    what.add_argument("--query", action="append", default=[], type=Path, metavar="FILE", help="an example; repeatable")
    what.add_argument("--not", dest="without", action="append", default=[], metavar="NAME", help="a class not wanted")
    what.add_argument("--auto", action="store_true", help="the classes that the detector finds")
    what.add_argument(
        "--levels", nargs="+", type=int, choices=[1, 2, 3], help="groups of classes that it finds, by ontology level"
    )
    what.add_argument("--threshold", type=float, default=0.5, help="probability to be found (default %(default)s)")
    what.add_argument("--top-k", type=int, default=3, help="of --auto (default %(default)s)")
    what.add_argument("--residual", action="store_true", help="also what is left")
    how = parser.add_argument_group("how")
    how.add_argument("--segment", type=float, metavar="SECONDS", help="length of a block without its context")
    how.add_argument("--overlap", type=float, metavar="SHARE", help="of a block that is cross-faded")
    how.add_argument("--shifts", type=int, default=1, metavar="N", help="average N shifted estimates, N times slower")
    how.add_argument(
        "--stereo", choices=["mid", "side", "channels"], default="mid", help="what of the channels is separated"
    )
    how.add_argument("-d", "--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    how.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    how.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="recordings at once")
    files = parser.add_argument_group("files")
    kinds = files.add_mutually_exclusive_group()
    for kind in ("int24", "float32", "flac", "mp3"):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="int16")
    files.add_argument("--clip-mode", choices=["rescale", "clamp"], default="rescale")
    files.add_argument("--force", action="store_true", help="write over files that are there")
    files.add_argument("--spectrogram", action="store_true", help="a picture beside each file")
    files.add_argument("--json", action="store_true", help="print what was done as JSON")
    files.add_argument("--benchmark", action="store_true", help="print real-time factor, latency and memory")
    parser.add_argument("--list-classes", action="store_true", help="the model's classes (with --json as JSON)")
    parser.add_argument("--list-models", action="store_true", help="the models that are here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    if args.list_models:
        print("\n".join(f"{name}\t{score}" for name, score in models()))
        return 0
    separator = Separator.from_pretrained(
        chosen_model(args.name),
        device=args.device,
        precision=args.precision,
        download=args.download,
        sha256=args.sha256,
    )
    if args.list_classes:
        rows = [vars(one) for one in separator.classes]
        lines = [f"{row['index']}\t{row['mid']}\t{row['name']}" for row in rows]
        print(json.dumps(rows, indent=1) if args.json else "\n".join(lines))
        return 0
    check(args, separator)
    without = separator.query_without(args.without)
    job = Job(separator, args, named_queries(separator, args), without, bars=args.jobs == 1)
    done, failed = separate_all(job, find_recordings(args.tracks))
    kept = [path for one in done for path in one["kept"]]
    if args.json:
        print(json.dumps({"done": done, "kept": kept, "failed": failed}, indent=1))
    if args.benchmark:
        for one in (one for one in done if one["stems"]):
            print(
                f"{one['track']}: {one['seconds']:.1f} s, real-time factor {one['real_time_factor']:.3f} "
                f"({one['cpu_seconds']:.1f} s of CPU), latency {one['latency_seconds']:.2f} s, {one['memory_mb']} MB",
                file=sys.stderr,
            )
    n_files = sum(len(one["stems"]) for one in done)
    print(
        f"{n_files} files from {len(done)} recordings in {args.out}; {len(kept)} files were there, "
        f"{len(failed)} recordings failed",
        file=sys.stderr,
    )
    return 1 if failed else 0


def check(args: argparse.Namespace, separator: Separator) -> None:
    """Unusable where the command line asks for nothing, or for what the model does not do."""
    if not args.tracks:
        raise Unusable("no recording is named; `separate --help` shows how")
    if args.shifts < 1 or args.jobs < 1 or args.top_k < 1:
        raise Unusable("--shifts, -j and --top-k are 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise Unusable(f"{args.out}: it is a file, not a folder for files")
    asked = args.classes or args.query or args.auto or args.two_stems or args.levels
    if separator.takes_queries and not asked:
        raise Unusable("nothing is asked for: --class NAME, --query EXAMPLE, --two-stems NAME, --levels 1 or --auto")
    if not separator.takes_queries and (asked or args.without):
        raise Unusable(f"{separator.folder} takes no queries: it gives all sounds, and nothing can be asked for")


def separate_all(job: Job, paths: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Separate recordings, as many at once as asked; a bad one is a line on stderr. Return (done, failed)."""
    done, failed, jobs = [], [], job.args.jobs
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        waiting: list[Future[dict[str, Any]]] = [pool.submit(job.separate, path) for path in paths]
        try:
            for path, future in zip(paths, waiting, strict=True):
                try:
                    done.append(future.result())
                except (Unusable, OSError, RuntimeError, MemoryError) as error:
                    failed.append(reason(path, error))
                    print(f"error: {failed[-1]}", file=sys.stderr)
        except KeyboardInterrupt:
            job.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)
    return done, failed


def reason(path: Path, error: Exception) -> str:
    """Say in one line that names the recording why it failed; what is no matter of the recording is raised again."""
    if isinstance(error, Unusable):
        text = str(error)
    elif is_out_of_memory(error):
        text = "the memory does not hold it; try a shorter --segment"
    elif isinstance(error, OSError):
        other = error.filename if error.filename and str(error.filename) != str(path) else None
        text = f"{other}: {error.strerror}" if other else (error.strerror or str(error))
    else:
        raise error
    text = text if text.startswith(f"{path}: ") else f"{path}: {text}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def models() -> list[tuple[str, str]]:
    """List the trained models with their SDRi in dB, the best first, as far as the last report knows it."""
    metrics = json.loads(hub.METRICS.read_text()) if hub.METRICS.is_file() else {}
    found = [path.parent.name for folder in hub.TRAINED for path in sorted(folder.glob("*/config.json"))]
    scores = {name: metrics.get(f"{name}.average.sdri_class_mean_mean") for name in found}
    order = sorted(found, key=lambda name: scores[name] or -np.inf, reverse=True)
    return [(name, "" if scores[name] is None else f"{scores[name]:.2f} dB") for name in order]


def chosen_model(name: str | None) -> str:
    """Choose the named model, or the best one that is here; Unusable, saying how to get one, where there is none."""
    if name is None:
        if not (found := models()):
            raise Unusable("there is no trained model here: `make repro` trains some; or -n FOLDER")
        name = found[0][0]
    here = [folder / name for folder in hub.TRAINED if (folder / name / "config.json").is_file()]
    return os.fspath(here[0]) if here else name


def named_queries(separator: Separator, args: argparse.Namespace) -> dict[str, Query]:
    """Look up what the command line asks of every recording, by the names of the stems."""
    names = [*args.classes, *([args.two_stems] if args.two_stems else [])]
    queries = dict(separator.query(name) for name in names)
    if args.query:
        embedded = []
        for path in args.query:
            example = open_recording(path)
            audio = np.concatenate(list(example.blocks()), axis=1)
            embedded.append(separator.query_of([audio], example.sample_rate))
        name = args.query[0].stem if len(args.query) == 1 else "query"
        queries[name] = torch.stack(embedded).mean(dim=0)
    return queries
