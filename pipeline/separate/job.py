"""One recording of the command: what is asked of it, its stream from file to files, and what came of it."""

import argparse
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float
from tqdm import tqdm

from pipeline.separate.files import SUFFIX_OF, Format, Recording, StemWriter, open_recording
from pipeline.separate.model import Detection, Query, Separator
from pipeline.separate.stream import Blocks, Stream
from pipeline.separate.targets import Unusable

REST = "residual"
MAX_CHANNELS = 64


@dataclass
class Job:
    """A command line, as it is asked of every recording; `queries` are those that depend on none."""

    separator: Separator
    args: argparse.Namespace
    queries: dict[str, Query]
    without: Query | None
    stopped: threading.Event = field(default_factory=threading.Event)
    bars: bool = True

    def separate(self, path: Path) -> dict[str, Any]:
        """Separate one recording into files; return what was written, kept and measured. Nothing is half-written."""
        args, recording = self.args, open_recording(path)
        if recording.channels > MAX_CHANNELS:
            raise Unusable(f"{path}: it has {recording.channels} channels, more than {MAX_CHANNELS}")
        queries, detected = dict(self.queries), {}
        if args.auto or args.levels:
            found = self.separator.detect_in(recording.blocks(), recording.sample_rate)
            loudest = found.loudest(args.threshold, args.top_k)
            detected = {one.name: round(probability, 4) for one, probability in loudest}
            queries |= self._found(found)
            if not queries:
                raise Unusable(f"{path}: the detector finds no class with a probability of {args.threshold:g}")
        names = list(queries) if self.separator.takes_queries else _sources(self.separator)
        stems = [*names, *([REST] if args.residual or args.two_stems else [])]
        targets = {stem: target_path(args, path, stem) for stem in stems}
        if len(set(targets.values())) < len(targets):
            raise Unusable(f"--filename {args.filename!r} gives several stems one name: it needs {{stem}}")
        kept = [] if args.force else [str(target) for target in targets.values() if target.exists()]
        outcome = {"track": str(path), "stems": {}, "kept": kept, "detected": detected}
        wanted = {stem: target for stem, target in targets.items() if str(target) not in kept}
        return outcome | (self._write(recording, queries, names, wanted) if wanted else {})

    def _found(self, found: Detection) -> dict[str, Query]:
        """Make the queries of what was detected: classes, or groups of the ontology."""
        args, queries = self.args, {}
        if args.auto:
            for one, _ in found.loudest(args.threshold, args.top_k):
                queries[one.name] = self.separator.query(one.name)[1]
        return queries | self.separator.level_queries(args.levels or [], found, args.threshold)

    def _write(
        self, recording: Recording, queries: dict[str, Query], names: list[str], wanted: dict[str, Path]
    ) -> dict[str, Any]:
        args, began, cpu = self.args, time.monotonic(), time.process_time()
        before = psutil.Process().memory_info().rss
        blocks = chosen_blocks(self.separator, args)
        stacked, without = torch.stack(list(queries.values())) if queries else None, self.without
        if stacked is not None and not self.queries:  # what was detected, and therefore sounds
            without = self.separator.what_else_sounds(stacked, without)
        stream = self.separator.stream(
            stacked,
            without=without,
            channels=recording.channels,
            sample_rate=recording.sample_rate,
            blocks=blocks,
            stereo=args.stereo,
            shifts=args.shifts,
        )
        writers = {}
        try:
            for stem, target in wanted.items():
                writers[stem] = StemWriter(target, recording.sample_rate, recording.channels, args.kind, args.clip_mode)
            n_samples = self._pump(stream, recording, names, writers)
            if not self.separator.takes_queries:
                self._rename(recording, names, writers)
            written = {stem: writer for stem, writer in writers.items() if args.force or not writer.path.exists()}
            for writer in written.values():
                if args.spectrogram:
                    from pipeline.separate.spectrogram import draw

                    draw(writer.blocks(), recording.sample_rate, writer.path.with_suffix(".png"))
                writer.finish()
        finally:
            for writer in writers.values():
                writer.close()
        seconds, taken = n_samples / recording.sample_rate, time.monotonic() - began
        return {
            "stems": {stem: str(writer.path) for stem, writer in written.items()},
            "seconds": round(seconds, 3),
            "real_time_factor": round(taken / max(seconds, 1e-9), 4),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "latency_seconds": round(stream.latency_seconds, 3),
            "memory_mb": max(0, peak_memory() - before) // 2**20,
        }

    def _pump(self, stream: Stream, recording: Recording, names: list[str], writers: dict[str, StemWriter]) -> int:
        """Drive a recording through a stream into the writers, with a bar; return its length in samples."""
        waiting = np.zeros((recording.channels, 0), np.float32)
        n_samples = 0
        total = None if recording.frames is None else recording.frames / recording.sample_rate
        shown = self.bars and not self.args.json
        with tqdm(
            total=total, unit="s", desc=recording.path.name[:30], disable=None if shown else True, leave=False
        ) as bar:
            for block in _and_end(recording.blocks()):
                if self.stopped.is_set():
                    raise KeyboardInterrupt
                estimates = stream.flush() if block is None else stream.push(block)
                if block is not None:
                    waiting = np.concatenate([waiting, block], axis=1)
                    n_samples += block.shape[1]
                    bar.update(block.shape[1] / recording.sample_rate)
                ready, waiting = waiting[:, : estimates.shape[2]], waiting[:, estimates.shape[2] :]
                _put(writers, names, ready, estimates)
        return n_samples

    def _rename(self, recording: Recording, names: list[str], writers: dict[str, StemWriter]) -> None:
        """Name the sounds of a model without queries: by their energy, and by what the detector takes each for."""
        order = sorted((name for name in names if name in writers), key=lambda name: -writers[name].energy)
        found = self.separator.ranked_names([writers[name].blocks() for name in order], recording.sample_rate)
        for name, stem in zip(order, found, strict=True):
            writers[name].path = target_path(self.args, recording.path, stem)
        renamed = {stem: writers.pop(name) for name, stem in zip(order, found, strict=True)}
        writers |= renamed


def peak_memory() -> int:
    """Most bytes that this process has held at once.

    From the kernel's own account where there is one: what getrusage says, a process inherits from the one it began as.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _put(
    writers: dict[str, StemWriter],
    names: list[str],
    mixture: Float[np.ndarray, "channels time"],
    estimates: Float[np.ndarray, "targets channels time"],
) -> None:
    for name, estimate in zip(names, estimates, strict=True):
        if name in writers:
            writers[name].write(estimate)
    if REST in writers:
        rest = mixture.astype(np.float64) - estimates.sum(axis=0, dtype=np.float64)
        writers[REST].write(rest.astype(np.float32))


def _and_end(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray | None]:
    yield from blocks
    yield None


def _sources(separator: Separator) -> list[str]:
    """Name the sounds of a model without queries until they are known."""
    return [f"source {i + 1}" for i in range(int(separator.network.n_sources))]  # type: ignore[arg-type]


def chosen_blocks(separator: Separator, args: argparse.Namespace) -> Blocks:
    """Take the model's own block sizes, or those of the command line."""
    if args.segment is None and args.overlap is None:
        return separator.blocks
    own = separator.blocks
    core = own.core / own.sample_rate if args.segment is None else args.segment
    overlap = 0 if args.overlap is None else args.overlap
    if not (0 < core < math.inf and 0 <= overlap < 1):
        raise Unusable("--segment is a number of seconds above 0, --overlap a share from 0 to below 1")
    fade = own.fade / own.sample_rate if args.overlap is None else args.overlap * core
    context = -(-round(own.context + max(0, fade * own.sample_rate - own.fade)) // separator.unit) * separator.unit
    return separator.blocks_of(core, fade, context)


def target_path(args: argparse.Namespace, path: Path, stem: str) -> Path:
    """Make the name of a stem's file; Unusable for a pattern with other names in braces, or where it is the input."""
    safe = "".join(c if c.isalnum() or c in " ,.()-_'" else "_" for c in stem)
    kind: Format = args.kind
    try:
        name = args.filename.format(track=path.stem, trackext=path.suffix[1:], stem=safe, ext=SUFFIX_OF[kind])
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise Unusable(
            f"--filename {args.filename!r}: {{track}}, {{trackext}}, {{stem}} and {{ext}} are known"
        ) from error
    target: Path = args.out / name
    if target.resolve() == path.resolve():
        raise Unusable(f"{path}: its stem would be written over it; choose another --out or --filename")
    return target
