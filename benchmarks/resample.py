"""Speed of the resample stage's work on a clip, as a fraction of that of decoding and soxr HQ alone.

Both sides read the same files in one process on one core, in turns: 10 s of stereo at 44.1 and 48 kHz as wav, flac and
ogg. One side is a part of the stage as a worker runs it: checks, down-mix, soxr, 16 bits, encoding, SHA-256, shard,
rows, sidecar, all synced to disk. The other reads each file with soundfile and resamples its left channel: no
down-mix, no checks, nothing written. A ratio is the median over rounds of that of one round, whose sides are seconds
apart: a machine that others use is not as fast in one minute as in the next.

    python -m benchmarks.resample
"""

import csv
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr

from pipeline.core.config import load_params
from pipeline.core.parts import run_parts
from pipeline.core.runtime import remove
from pipeline.mixtures.manifest import LISTED
from pipeline.stages.resample import AudioParams, ResampleParams, resample_part

ROUNDS = 7
FILES_PER_KIND = 25  # 150 clips in the part: about what a shard of AudioSet holds
KINDS = [(suffix, rate) for suffix in ("wav", "flac", "ogg") for rate in (44_100, 48_000)]


def recording(rng: np.random.Generator, rate: int) -> np.ndarray:
    """Ten seconds that cost a codec about what real recordings do: decaying notes, each in its place, over a hiss."""
    n = 10 * rate
    time_ = np.arange(n) / rate
    stereo = 0.003 * rng.standard_normal((n, 2))
    for onset in rng.uniform(0, 9, 12):
        note = np.where(time_ > onset, np.exp(-4 * (time_ - onset)), 0.0)
        pitch = rng.uniform(100, 2000)
        note = note * sum(np.sin(2 * np.pi * k * pitch * time_) / k for k in range(1, 6))
        stereo += 0.1 * note[:, None] * rng.uniform(0.2, 1.0, 2)
    return np.clip(stereo, -1, 1)


def make_corpus(root: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for suffix, rate in KINDS:
        waveform = recording(rng, rate)
        for i in range(FILES_PER_KIND):
            path = root / f"{suffix}-{rate}-{i}.{suffix}"
            soundfile.write(path, np.roll(waveform, i * 997, axis=0), rate)
            paths.append(path)
    return sorted(paths)


def decode_and_resample(paths: list[Path], rate: int) -> None:
    for path in paths:
        waveform, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
        soxr.resample(np.ascontiguousarray(waveform[:, 0]), source_rate, rate, "HQ")


def run_stage(paths: list[Path], scratch: Path, audio: AudioParams, params: ResampleParams) -> None:
    scratch.mkdir()
    listed = scratch / "00000.csv"
    with open(listed, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LISTED)
        writer.writerows(
            [path.stem, "train", "/m/09x0r", path.name, path.stat().st_size, 0, 10, path.stem] for path in paths
        )
    task = partial(resample_part, root=paths[0].parent, split="train", audio=audio, params=params)
    run_parts(task, {"00000": listed}, scratch / "parts")


def seconds(function: Callable[[], None]) -> np.ndarray:
    """Wall and CPU seconds of one call."""
    start = time.perf_counter(), time.process_time()
    function()
    return np.array([time.perf_counter() - start[0], time.process_time() - start[1]])


def ratio(taken: dict[tuple[str, str], list[np.ndarray]], group: str, form: str) -> np.ndarray:
    """Speed of the stage, of that of decoding and soxr alone: by wall and by CPU time."""
    return np.median(np.stack(taken[group, "alone"]) / np.stack(taken[group, form]), axis=0)


def main() -> None:
    os.environ["USS_WORKERS"] = "0"
    audio, params = load_params("audio", AudioParams), load_params("resample", ResampleParams)
    audio = audio.model_copy(update={"clip_seconds": 10.0})  # the whole of each file, as the other side does
    taken: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        root, scratch = Path(directory, "corpus"), Path(directory, "scratch")
        root.mkdir()
        paths = make_corpus(root)
        groups = {"all": paths} | {
            suffix: [path for path in paths if path.suffix == f".{suffix}"] for suffix in ("wav", "flac", "ogg")
        }
        for turn in range(ROUNDS + 1):
            for group, some in groups.items():
                times = {"alone": seconds(partial(decode_and_resample, some, audio.sample_rate))}
                for form in ("flac", "wav"):
                    changed = params.model_copy(update={"format": form})
                    times[form] = seconds(partial(run_stage, some, scratch, audio, changed))
                    remove(scratch)
                if turn:  # the first round fills the caches
                    for what, each in times.items():
                        taken[group, what].append(each / len(some))
    median = {key: np.median(values, axis=0) for key, values in taken.items()}
    print("           ms per clip                     speed of the stage / alone (CPU time)")
    print("sources      alone to flac  to wav         to flac       to wav")
    for group in groups:
        alone, flac, wav = (median[group, what] for what in ("alone", "flac", "wav"))
        ms = "".join(f"{1e3 * each[0]:8.2f}" for each in (alone, flac, wav))
        ratios = "".join("{:8.2f} ({:.2f})".format(*ratio(taken, group, form)) for form in ("flac", "wav"))
        print(f"{group:10s}{ms}    {ratios}")
    wall, cpu = ratio(taken, "all", params.format)
    print(
        f"resample to {params.format}: {wall:.2f} of the speed of decode + soxr alone (CPU time: {cpu:.2f}); bar 0.80"
    )


if __name__ == "__main__":
    main()
