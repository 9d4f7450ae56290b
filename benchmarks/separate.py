"""Ratios of `separate`, measured in one run: seams, batching, length, memory. `python -m benchmarks.separate MODEL...`.

seams     SNR in dB at each seam of the blockwise output to one unblocked pass, on a recording that is loud and quiet
batching  time of all targets together by that of one after the other, each of them resampled, mixed down, transformed
          and encoded anew
length    memory above the process, and time per second of audio, of a long recording and of one of a minute: 44.1 kHz,
          stereo, from file to files
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from pipeline.separate import Separator

RATE = 44100


def recording(seconds: float, seed: int = 0) -> np.ndarray:
    """Stereo noise whose loudness changes by up to 40 dB every 3 s, float32 (channels, time)."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(10 ** (rng.uniform(-40, 0, int(seconds / 3) + 1) / 20), 3 * RATE)[: int(seconds * RATE)]
    return (0.1 * loudness * rng.standard_normal((2, len(loudness)))).astype(np.float32)


def seams(separator: Separator, seconds: float = 40.0) -> list[float]:
    """SNR in dB in the 20 ms around each seam."""
    audio = recording(seconds)[:1]
    query = separator.averages[:1]
    rate = separator.sample_rate
    with torch.inference_mode():
        whole = separator.network(torch.from_numpy(audio), separator.network.joint_query(query))[0].numpy()
    found = separator.separate(audio, rate, {"it": query[0]})["it"][0]
    error, level = np.square(found - whole), np.square(whole)
    places = range(separator.blocks.core, audio.shape[1] - rate // 50, separator.blocks.core)
    spans = [slice(place - rate // 100, place + rate // 100) for place in places]
    return [10 * np.log10(level[span].mean() / (error[span].mean() + 1e-20)) for span in spans]


def batching(separator: Separator, n_targets: int, seconds: float = 24.0) -> tuple[float, float]:
    """CPU seconds of a recording's targets together, and one after the other."""
    audio, names = recording(seconds), [one.name for one in separator.classes[:n_targets]]
    separator.separate(audio[:, : 4 * RATE], RATE, names[:1])
    took = []
    for groups in ([names], [[name] for name in names]):
        began = time.process_time()
        for group in groups:
            separator.separate(audio, RATE, group)
        took.append(time.process_time() - began)
    return took[0], took[1]


def length(model: str, minutes: float, folder: Path) -> dict[str, float]:
    """What the command measures of a recording of so many minutes, in a process of its own."""
    path = folder / f"{minutes:g}min.wav"
    with soundfile.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
        for minute in range(max(1, round(minutes))):
            file.write(recording(60.0 * min(1.0, minutes), seed=minute).T)
    first = json.loads(command(model, "--list-classes", "--json"))[0]["name"]
    asked = ["-o", str(folder / "out"), "--two-stems", first, "--force", "--json"]
    done = json.loads(command(model, str(path), *asked))["done"][0]
    path.unlink()
    return {key: done[key] for key in ("seconds", "real_time_factor", "cpu_seconds", "memory_mb")}


def command(model: str, *arguments: str) -> str:
    """Standard output of the command."""
    done = [sys.executable, "-m", "pipeline.separate", "-n", model, *arguments]
    return subprocess.run(done, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders")
    parser.add_argument("--minutes", type=float, default=60, help="of the long recording; 0: leave it out")
    parser.add_argument("--targets", type=int, default=4)
    args = parser.parse_args()
    for model in args.models:
        separator = Separator.from_pretrained(model, device="cpu")
        core, context = (x / separator.sample_rate for x in (separator.blocks.core, separator.blocks.context))
        print(f"{model}: blocks of {core:.2f} s, with {context:.2f} s of context on either side")
        print("  seams, dB: " + " ".join(f"{snr:.0f}" for snr in seams(separator)))
        together, apart = batching(separator, args.targets)
        print(f"  {args.targets} targets: {together:.1f} s together, {apart:.1f} s apart, ratio {apart / together:.2f}")
        with tempfile.TemporaryDirectory() as folder:
            for minutes in [1.0, *([args.minutes] if args.minutes else [])]:
                found = length(model, minutes, Path(folder))
                share = found["cpu_seconds"] / found["seconds"]
                print(
                    f"  {minutes:g} min: real-time factor {found['real_time_factor']}, {share:.4f} s of CPU a second, "
                    f"{found['memory_mb']} MB"
                )


if __name__ == "__main__":
    main()
