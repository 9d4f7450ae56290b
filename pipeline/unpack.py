"""AudioSet out of the containers it is handed around in, into files that `data.source: audioset` reads.

    python -m pipeline.unpack --out data/audioset/audio <file> ...

    *.parquet      Hugging Face's agkphysics/AudioSet: the encoded file of each row, as it is
    *.tar          WebDataset shards: the audio of each sample, as it is
    *.h5, *.hdf5   PANNs' packed waveforms, 16-bit integers, as FLAC: the same samples

A file of the output is there whole or not at all, and one that is there is not written again: what was killed is run
again. Rows without audio are normal (PANNs keeps them as zeros without a name); every one that is passed over is
counted with its reason, by container, in `<out>/unpacked.json`. The segment lists are not in these containers: the
published ones (`balanced_train_segments.csv`, ...) go into `data.root`, above the output.
"""

import argparse
import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from pipeline.datasets import AUDIO_SUFFIXES, audio_suffix
from pipeline.runtime import log_to_stderr, read_json, run_command, write_atomic, write_json

logger = logging.getLogger(__name__)

Entry = tuple[str, Callable[[], bytes]] | str
"""The name of a file and what gives its bytes; or why there is none in this row."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", re.ASCII)
_SUMMARY = "unpacked.json"


def unpack(containers: Sequence[Path], out: Path) -> dict[str, dict[str, int]]:
    """Write the recordings of every container into `out`; return what was met, by container, then by what came of it.

    ValueError names a container that cannot be read to its end. What came before it stays.
    """
    for path in containers:
        if path.suffix not in READERS:
            raise ValueError(f"{path}: not a container of this kind; there are {sorted(READERS)}")
    summary = read_json(out / _SUMMARY) if (out / _SUMMARY).exists() else {}
    for path in containers:
        counts: Counter[str] = Counter()
        try:
            for entry in tqdm(READERS[path.suffix](path), desc=path.name, unit="file", disable=None):
                counts[entry if isinstance(entry, str) else _keep(*entry, out)] += 1
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            raise ValueError(f"{path}: {error}, after {counts.total()} rows") from error
        summary[str(path)] = dict(sorted(counts.items()))
        write_json(out / _SUMMARY, summary)
        logger.info("%s: %s", path, ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing")
    return summary


def _keep(name: str, content: Callable[[], bytes], out: Path) -> str:
    if not _NAME.fullmatch(name):  # a name is of the container's making: it must not lead out of `out`
        return "unusable_name"
    if (out / name).exists():
        return "already_there"
    write_atomic(out / name, content())
    return "written"


def of_parquet(path: Path) -> Iterator[Entry]:
    """Rows of `video_id` and `audio` {bytes, path}."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16, columns=["video_id", "audio"]):
        for row in batch.to_pylist():
            audio = row["audio"] or {}
            content = audio.get("bytes")
            if not (row["video_id"] and content):
                yield "without_audio"
                continue
            suffix = os.path.splitext(audio.get("path") or "")[1].lower()
            if suffix not in AUDIO_SUFFIXES:
                suffix = audio_suffix(content) or ""
            yield (f"{row['video_id']}{suffix}", partial(bytes, content)) if suffix else "of_unknown_kind"


def of_tar(path: Path) -> Iterator[Entry]:
    """Members with an audio suffix, by the last part of their name; what lies beside them (.json, .txt) is no audio."""
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isfile():
                yield "not_a_regular_file"
            elif os.path.splitext(member.name)[1].lower() not in AUDIO_SUFFIXES:
                yield "not_audio"
            else:
                yield os.path.basename(member.name), partial(_member, tar, member)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    content = file.read()
    if len(content) != member.size:
        raise ValueError(f"{member.name} is cut off")
    return content


def of_hdf5(path: Path) -> Iterator[Entry]:
    """Rows of `audio_name` and `waveform` (rows, samples) int16, at the attribute `sample_rate` or 32 kHz."""
    import h5py

    with h5py.File(path) as file:
        names, waveforms = file["audio_name"], file["waveform"]
        if waveforms.dtype != "int16" or waveforms.ndim != 2 or len(names) != len(waveforms):
            raise ValueError(
                f"waveform should be int16 (rows, samples), a row for each of {len(names)} names; "
                f"it is {waveforms.dtype} {waveforms.shape}"
            )
        rate = int(file.attrs.get("sample_rate", 32000))
        for row, name in enumerate(names):
            stem = os.path.splitext(os.path.basename(name.decode(errors="replace")))[0]
            yield (f"{stem}.flac", partial(_flac, waveforms, row, rate)) if stem else "without_audio"


def _flac(waveforms: Any, row: int, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveforms[row], rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".parquet": of_parquet,
    ".tar": of_tar,
    ".h5": of_hdf5,
    ".hdf5": of_hdf5,
}


def main() -> None:
    """Unpack the containers that the command line names."""
    log_to_stderr()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder below data.root")
    parser.add_argument("containers", nargs="+", type=Path)
    args = parser.parse_args()
    try:
        unpack(args.containers, args.out)
    except ValueError as error:
        raise SystemExit(f"unpack: {error}") from None


if __name__ == "__main__":
    run_command(main)
