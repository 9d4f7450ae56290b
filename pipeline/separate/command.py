"""The command `separate`: recordings in, a file per sound out."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.separate.files import SUFFIX_OF, Format, Recording, StemWriter, find_recordings, open_recording
from pipeline.separate.model import Separator
from pipeline.separate.stream import Blocks
from pipeline.separate.targets import Unusable

ROOT = Path(__file__).parents[2]
MODELS, METRICS = ROOT / "data/separators", ROOT / "reports/metrics.json"
REST = "residual"
DETECTED_SECONDS = 600  # of a recording that the detector is given at most


@dataclass
class Outcome:
    """Files written, kept and failed in one run."""

    done: list[dict[str, Any]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: all done, 1: some recordings failed, 2: nothing could be begun."""
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Build the command line; flags that demucs has too mean what they mean there."""
    parser = argparse.ArgumentParser(prog="separate", description="Separate recordings into the sounds that you name.")
    parser.add_argument("tracks", nargs="*", type=Path, help="files, or folders with files")
    parser.add_argument(
        "-n", "--name", help="a folder, a model of data/separators, or a cached Hugging Face repository"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("separated"))
    parser.add_argument("--filename", default="{track}/{stem}.{ext}", help="default: %(default)s")
    what = parser.add_argument_group("what to separate")
    what.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME", help="a class; repeatable"
    )
    what.add_argument("--two-stems", metavar="NAME", help="this class, and the rest")
    what.add_argument("--query", action="append", default=[], type=Path, metavar="FILE", help="an example; repeatable")
    what.add_argument("--auto", action="store_true", help="what the detector finds")
    what.add_argument("--threshold", type=float, default=0.5, help="of --auto (default %(default)s)")
    what.add_argument("--top-k", type=int, default=3, help="of --auto (default %(default)s)")
    what.add_argument("--residual", action="store_true", help="also what is left")
    how = parser.add_argument_group("how")
    how.add_argument("--segment", type=float, metavar="SECONDS", help="length of a block without its context")
    how.add_argument("--overlap", type=float, metavar="SHARE", help="of a block that is cross-faded")
    how.add_argument("-d", "--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    files = parser.add_argument_group("files")
    kinds = files.add_mutually_exclusive_group()
    for kind in ("int24", "float32", "flac", "mp3"):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="int16")
    files.add_argument("--clip-mode", choices=["rescale", "clamp"], default="rescale")
    files.add_argument("--force", action="store_true", help="write over files that are there")
    files.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.add_argument("--list-classes", action="store_true", help="the model's classes (with --json as JSON)")
    parser.add_argument("--list-models", action="store_true", help="the models that are here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    if args.list_models:
        print("\n".join(f"{name}\t{score}" for name, score in models()))
        return 0
    separator = Separator.from_pretrained(chosen_model(args.name), device=args.device)
    if args.list_classes:
        rows = [vars(one) for one in separator.classes]
        print(
            json.dumps(rows, indent=1)
            if args.json
            else "\n".join(f"{r['index']}\t{r['mid']}\t{r['name']}" for r in rows)
        )
        return 0
    if not args.tracks:
        raise Unusable("no recording is named; `separate --help` shows how")
    if not (args.classes or args.query or args.auto or args.two_stems):
        raise Unusable("nothing is asked for: --class NAME, --query EXAMPLE, --two-stems NAME or --auto")
    queries = named_queries(separator, args)
    outcome = Outcome()
    for path in find_recordings(args.tracks):
        try:
            outcome.done.append(separate_file(separator, path, dict(queries), args, outcome))
        except (Unusable, OSError) as error:
            said = str(error) if isinstance(error, Unusable) else f"{path}: {error.strerror or error}"
            outcome.failed.append(said)
            print(f"error: {said}", file=sys.stderr)
    if args.json:
        print(json.dumps({"done": outcome.done, "kept": outcome.kept, "failed": outcome.failed}, indent=1))
    n_files = sum(len(done["stems"]) for done in outcome.done)
    print(
        f"{n_files} files from {len(outcome.done)} recordings in {args.out}; {len(outcome.kept)} files were there, "
        f"{len(outcome.failed)} recordings failed",
        file=sys.stderr,
    )
    return 1 if outcome.failed else 0


def models() -> list[tuple[str, str]]:
    """List the trained models with their SDRi in dB, the best first, as far as the last report knows it."""
    metrics = json.loads(METRICS.read_text()) if METRICS.is_file() else {}
    found = [path.parent.name for path in sorted(MODELS.glob("*/config.json"))]
    scores = {name: metrics.get(f"{name}.average.sdri_class_mean_mean") for name in found}
    order = sorted(found, key=lambda name: scores.get(name) or -np.inf, reverse=True)
    return [(name, "" if scores[name] is None else f"{scores[name]:.2f} dB") for name in order]


def chosen_model(name: str | None) -> str:
    """Choose the named model, or the best one that is here; Unusable, saying how to get one, where there is none."""
    if name is not None:
        return str(MODELS / name) if (MODELS / name / "config.json").is_file() else name
    if not (found := models()):
        raise Unusable("there is no trained model here: `make repro` trains some; or -n FOLDER")
    return str(MODELS / found[0][0])


def named_queries(separator: Separator, args: argparse.Namespace) -> list[tuple[str, torch.Tensor]]:
    """Look up what the command line asks of every recording, by the names of the stems."""
    names = [*args.classes, *([args.two_stems] if args.two_stems else [])]
    queries = [separator.query(name) for name in names]
    if args.query:
        examples = []
        for path in args.query:
            example = open_recording(path)
            examples.append((np.concatenate(list(example.blocks()), axis=1), example.sample_rate))
        embedded = [separator.query_of([audio], rate) for audio, rate in examples]
        queries.append((args.query[0].stem if len(args.query) == 1 else "query", torch.stack(embedded).mean(dim=0)))
    return queries


def separate_file(
    separator: Separator,
    path: Path,
    queries: dict[str, torch.Tensor],
    args: argparse.Namespace,
    outcome: Outcome,
) -> dict[str, Any]:
    """Separate one recording into files; return what was written. Nothing is left half-written."""
    recording = open_recording(path)
    found = {}
    if args.auto:
        found = detected(separator, recording, args)
        queries |= {name: separator.query(name)[1] for name in found}
        if not queries:
            raise Unusable(f"{path}: the detector finds no class with a probability of {args.threshold:g}")
    names = list(queries)
    stems = [*names, *([REST] if args.residual or args.two_stems else [])]
    targets = {stem: target_path(args, path, stem) for stem in stems}
    there = [str(target) for target in targets.values() if target.exists()]
    if there and not args.force:
        outcome.kept += there
        if len(there) == len(targets):
            return {"track": str(path), "stems": {}, "detected": found}
    wanted = {stem: target for stem, target in targets.items() if args.force or not target.exists()}
    writers = {
        stem: StemWriter(target, recording.sample_rate, recording.channels, args.kind, args.clip_mode)
        for stem, target in wanted.items()
    }
    began = time.monotonic()
    try:
        n_samples = pump(separator, recording, names, queries, writers, chosen_blocks(separator, args))
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    seconds = n_samples / recording.sample_rate
    return {
        "track": str(path),
        "seconds": round(seconds, 3),
        "real_time_factor": round((time.monotonic() - began) / max(seconds, 1e-9), 4),
        "stems": {stem: str(target) for stem, target in wanted.items()},
        "detected": found,
    }


def pump(
    separator: Separator,
    recording: Recording,
    names: list[str],
    queries: dict[str, torch.Tensor],
    writers: dict[str, StemWriter],
    blocks: Blocks,
) -> int:
    """Drive a recording through a stream into the writers, with a bar; return its length in samples."""
    stream = separator.stream(
        torch.stack([queries[name] for name in names]),
        channels=recording.channels,
        sample_rate=recording.sample_rate,
        blocks=blocks,
    )
    waiting = np.zeros((recording.channels, 0), np.float32)
    n_samples = 0

    def put(estimates: np.ndarray) -> None:
        nonlocal waiting
        ready, waiting = waiting[:, : estimates.shape[2]], waiting[:, estimates.shape[2] :]
        for name, estimate in zip(names, estimates, strict=True):
            if name in writers:
                writers[name].write(estimate)
        if REST in writers:
            rest = ready.astype(np.float64) - estimates.sum(axis=0, dtype=np.float64)
            writers[REST].write(rest.astype(np.float32))

    total = None if recording.frames is None else recording.frames / recording.sample_rate
    with tqdm(
        total=total, unit="s", desc=recording.path.name[:30], disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for block in recording.blocks():
            waiting = np.concatenate([waiting, block], axis=1)
            n_samples += block.shape[1]
            put(stream.push(block))
            bar.update(block.shape[1] / recording.sample_rate)
        put(stream.flush())
    return n_samples


def chosen_blocks(separator: Separator, args: argparse.Namespace) -> Blocks:
    """Take the model's own block sizes, or those of the command line."""
    if args.segment is None and args.overlap is None:
        return separator.blocks
    core = args.segment or separator.blocks.core / 32000
    if core <= 0 or not 0 <= (args.overlap or 0) < 1:
        raise Unusable("--segment is a number of seconds above 0, --overlap a share from 0 to below 1")
    fade = separator.blocks.fade / 32000 if args.overlap is None else args.overlap * core
    return separator.blocks_of(core, fade)


def target_path(args: argparse.Namespace, path: Path, stem: str) -> Path:
    """Make the name of a stem's file; Unusable for a pattern with other names in braces, or where it is the input."""
    safe = "".join(c if c.isalnum() or c in " ,.()-_'" else "_" for c in stem)
    kind: Format = args.kind
    try:
        name = args.filename.format(track=path.stem, trackext=path.suffix[1:], stem=safe, ext=SUFFIX_OF[kind])
    except (KeyError, IndexError, ValueError) as error:
        raise Unusable(
            f"--filename {args.filename!r}: {{track}}, {{trackext}}, {{stem}} and {{ext}} are known"
        ) from error
    target: Path = args.out / name
    if target.resolve() == path.resolve():
        raise Unusable(f"{path}: its stem would be written over it; choose another --out or --filename")
    return target


def detected(separator: Separator, recording: Recording, args: argparse.Namespace) -> dict[str, float]:
    """Detect the classes of (the first ten minutes of) a recording: probability by name."""
    kept, n = [], 0
    for block in recording.blocks():
        kept.append(block.mean(axis=0, keepdims=True))
        n += block.shape[1]
        if n > DETECTED_SECONDS * recording.sample_rate:
            break
    found = separator.detect(np.concatenate(kept, axis=1), recording.sample_rate)
    return {one.name: round(p, 4) for one, p in found.loudest(args.threshold, args.top_k)}
