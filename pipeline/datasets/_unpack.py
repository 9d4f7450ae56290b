"""AudioSet out of the containers it is handed around in, into files that `data.source: audioset` reads.

    python -m pipeline unpack --out data/audioset/audio <file> ...

    *.parquet      Hugging Face's agkphysics/AudioSet: the encoded file of each row, as it is
    *.tar          WebDataset shards: the audio of each sample, as it is
    *.h5, *.hdf5   PANNs' packed waveforms, 16-bit integers, as FLAC: the same samples

A file of the output is there whole or not at all, and one that is there is not written again: what was killed is run
again. Another sound under a name that is taken is written as `<name>-other-<hash of its content>`. Rows without audio
are normal (PANNs keeps them as zeros without a name); every one that is passed over is counted with its reason, by
container, in `<out>/unpacked.json`. A container that is cut off or damaged is an error that says what was kept of it.
The segment lists are not in these containers: the published ones (`balanced_train_segments.csv`, ...) go into
`data.root`, above the output.

Containers are not trusted: nothing outside of them is read, and a recording of more than 256 MiB is passed over.
"""

import argparse
import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import soundfile
from tqdm import tqdm

from pipeline.core.runtime import log_to_stderr, read_json, run_command, write_atomic, write_json
from pipeline.datasets import AUDIO_SUFFIXES, audio_suffix

logger = logging.getLogger(__name__)

Entry = tuple[str, bytes] | str
"""The name and the content of a file; or why there is none in this row."""

MAX_BYTES = 256 << 20  # of a recording; 10 s of 8 channels at 192 kHz and 32 bits are 61 MB
MAX_EXPANSION = 100  # times the container's size: a few kB that are compressed can become any number of GB
_MAX_HEADER = 1 << 20  # bytes of a tar's long name
_RATES = range(4_000, 384_001)  # Hz
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}", re.ASCII)
_SUMMARY = "unpacked.json"
_COLUMNS = ["video_id", "audio.bytes", "audio.path"]
# What a reader raises at damaged content, that of libraries included; a fault in writing is none of the container's.
_FAULTS = (OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, EOFError, tarfile.TarError)


def unpack(containers: Sequence[Path], out: Path) -> dict[str, dict[str, int]]:
    """Write the recordings of every container into `out`; return counts by container, then by what became of a row.

    ValueError names a container that cannot be read to its end, and counts what was met until there; that stays.
    """
    for path in containers:
        if path.suffix not in READERS:
            raise ValueError(f"{path}: not a container of this kind; there are {sorted(READERS)}")
    summary = read_json(out / _SUMMARY) if (out / _SUMMARY).exists() else {}
    for path in containers:
        counts: Counter[str] = Counter()
        try:
            for entry in tqdm(_entries(path, counts), desc=path.name, unit="file", disable=None):
                counts[entry if isinstance(entry, str) else _keep(*entry, out)] += 1
        except ValueError:
            _record(path, counts, summary, out)
            raise
        _record(path, counts, summary, out)
        logger.info("%s: %s", path, _in_words(counts))
    return summary


def _entries(path: Path, counts: Counter[str]) -> Iterator[Entry]:
    """Entries of a container, within the bounds. ValueError names it and what was counted before a fault."""
    left = MAX_BYTES
    try:
        left += MAX_EXPANSION * path.stat().st_size
        for entry in READERS[path.suffix](path):
            if not isinstance(entry, str):
                left -= len(entry[1])
                if len(entry[1]) > MAX_BYTES:
                    entry = "too_large"
                elif left < 0:
                    raise ValueError(f"its recordings are more than {MAX_EXPANSION} times its size")
            yield entry
    except _FAULTS as error:
        what = " ".join(str(error).split()) or type(error).__name__
        kept = _in_words(counts)
        counts["broken_off"] = 1
        raise ValueError(f"{path}: {what}; until there: {kept}") from error


def _record(path: Path, counts: Counter[str], summary: dict[str, dict[str, int]], out: Path) -> None:
    summary[str(path)] = dict(sorted(counts.items()))
    write_json(out / _SUMMARY, summary)


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing"


def _keep(name: str, content: bytes, out: Path) -> str:
    """Write a recording unless it is there already; return the name of the count that it belongs to."""
    if not _NAME.fullmatch(name):  # a name is of the container's making: it must not lead out of `out`
        return "unusable_name"
    stem, suffix = os.path.splitext(name)
    other = f"{stem}-other-{sha256(content).hexdigest()[:16]}{suffix}"
    for path, done in ((out / name, "written"), (out / other, "written_beside_another_of_its_name")):
        if not path.exists():
            write_atomic(path, content)
            if path.name != name:
                logger.warning("%s: a file of this name holds another sound; written as %s", name, other)
            return done
        if _is_same_sound(path, content):
            return "already_there"
    raise ValueError(f"{out / other}: not what its name says; remove it")


def _is_same_sound(path: Path, content: bytes) -> bool:
    with open(path, "rb") as file:
        there = file.read(len(content) + 1)
    # FLAC says its rate, length and the MD5 of its samples: another version of the encoder may give other bytes.
    both_flac = there[:4] == content[:4] == b"fLaC" and any(content[26:42])
    return there == content or (both_flac and there[18:42] == content[18:42])


def of_parquet(path: Path) -> Iterator[Entry]:
    """Entries of a parquet file with the columns `video_id` and `audio` {bytes, path}."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(file)
            for batch in file.iter_batches(batch_size=1, columns=_COLUMNS):  # a row may be of MAX_BYTES
                yield from map(_of_row, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _check_columns(file: Any) -> None:
    """Raise ValueError for columns that are not text and bytes, and for more audio than its rows may hold."""
    import pyarrow.types as kinds

    schema = file.schema_arrow
    types = {name: schema.field(name).type for name in schema.names}
    audio = types.get("audio")
    if audio is not None and kinds.is_struct(audio):
        types |= {f"audio.{field.name}": field.type for field in audio}
    text, content = (kinds.is_string, kinds.is_large_string), (kinds.is_binary, kinds.is_large_binary)
    for name, right, allowed in zip(_COLUMNS, ("text", "bytes", "text"), (text, content, text), strict=True):
        if name not in types:
            raise ValueError(f"no column {name}")
        if not any(is_right(types[name]) for is_right in (*allowed, kinds.is_null)):
            raise ValueError(f"column {name} should be {right}; it is {types[name]}")
    for group in (file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)):
        for column in (group.column(k) for k in range(group.num_columns)):
            if column.path_in_schema == "audio.bytes" and column.total_uncompressed_size > MAX_BYTES * group.num_rows:
                raise ValueError(f"{column.total_uncompressed_size} bytes of audio in {group.num_rows} rows")


def _of_row(row: dict[str, Any]) -> Entry:
    audio = row["audio"] or {}
    content = audio.get("bytes")
    if not (row["video_id"] and content):
        return "without_audio"
    suffix: str | None = os.path.splitext(audio.get("path") or "")[1].lower()
    if suffix not in AUDIO_SUFFIXES:
        suffix = audio_suffix(content)
    return (f"{row['video_id']}{suffix}", content) if suffix else "of_unknown_kind"


def of_tar(path: Path) -> Iterator[Entry]:
    """Entries of a tar: members with an audio suffix, by the last part of their name; .json and .txt are no audio."""
    with open(path, "rb") as file:
        for name, offset, size in _members(file):
            if offset is None:
                yield "not_a_regular_file"
            elif os.path.splitext(name)[1].lower() not in AUDIO_SUFFIXES:
                yield "not_audio"
            elif size > MAX_BYTES:
                yield "too_large"
            else:
                file.seek(offset)
                yield os.path.basename(name), file.read(size)


def _members(file: BinaryIO) -> Iterator[tuple[str, int | None, int]]:
    """Name, place (None for what is no regular file) and size of each member of a tar. ValueError unless it is whole.

    The members are not walked by tarfile: it ends quietly at a damaged header and at a cut between two members, and
    before Python 3.11.14 it never came back from a negative size (CVE-2025-8194).
    """
    end, at, long_name = os.fstat(file.fileno()).st_size, 0, ""
    while True:
        file.seek(at)
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE:
            raise ValueError(f"cut off at byte {end}: no end of archive")
        if not any(header):
            break
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(f"damaged header at byte {at}: {error}") from None
        no_content = member.type in tarfile.SUPPORTED_TYPES and not member.isreg() and member.type not in b"LKxgX"
        size, data = 0 if no_content else member.size, at + tarfile.BLOCKSIZE
        at = data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if size < 0 or member.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"{member.name!r} has {size} bytes, or is a sparse file")
        if at > end:
            raise ValueError(f"cut off at byte {end}: {member.name!r} ends at {data + size}")
        if member.type in b"LKxgX":
            long_name = _long_name(member.type, file.read(min(size, _MAX_HEADER))) or long_name
            continue
        yield long_name or member.name, data if member.isreg() else None, size
        long_name = ""
    if long_name or end - at < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"cut off at byte {end}: no end of archive")
    file.seek(at)
    while block := file.read(1 << 20):
        if any(block):
            raise ValueError(f"data after the end of the archive at byte {at}")


def _long_name(kind: bytes, content: bytes) -> str:
    """The name that an extended header (PAX x, GNU L) gives to the next member, where it gives one.

    ValueError for a size or for sparse content: no member that is taken needs them.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.split(b"\0")[0].decode(errors="surrogateescape")
    name = b""
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and content.strip(b"\0"):
        record = re.match(rb"(\d{1,7}) ([^=]+)=", content)
        if record is None or not record.end() < int(record[1]) <= len(content):
            raise ValueError(f"damaged extended header: {content[:40]!r}")
        if record[2] == b"size" or record[2].startswith(b"GNU.sparse"):
            raise ValueError(f"an extended header gives {record[2].decode(errors='replace')}: not a recording")
        if record[2] == b"path":
            name = content[record.end() : int(record[1]) - 1]
        content = content[int(record[1]) :]
    return name.decode(errors="surrogateescape")


def of_hdf5(path: Path) -> Iterator[Entry]:
    """Entries of an HDF5 file: `audio_name`, `waveform` (rows, samples) int16, at its `sample_rate` or 32 kHz."""
    import h5py

    with h5py.File(path) as file:
        names, waveforms = _dataset(file, "audio_name"), _dataset(file, "waveform")
        if waveforms.dtype != "int16" or waveforms.ndim != 2 or names.shape != waveforms.shape[:1]:
            raise ValueError(
                f"waveform should be int16 (rows, samples), a row for each of the {names.shape} names; "
                f"it is {waveforms.dtype} {waveforms.shape}"
            )
        if h5py.check_string_dtype(names.dtype) is None:
            raise ValueError(f"audio_name should be text; it is {names.dtype}")
        rate = file.attrs.get("sample_rate", 32000)
        if getattr(rate, "shape", ()) or rate not in _RATES:
            raise ValueError(f"sample_rate should be {_RATES.start} to {_RATES.stop - 1} Hz; it is {rate!r}")
        for row, name in enumerate(names):
            stem = os.path.splitext(os.path.basename(name.decode(errors="replace")))[0]
            yield (f"{stem}.flac", _flac(waveforms[row], int(rate))) if stem else "without_audio"


def _dataset(file: Any, name: str) -> Any:
    """A dataset whose content is in this file. ValueError for one elsewhere: it could be any file of the machine."""
    import h5py

    link = file.get(name, getlink=True)  # a link out of the file is not followed to see whether it leads anywhere
    if link is None:
        raise ValueError(f"no dataset {name}")
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is a link or a group, not a dataset of this file")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} lies in other files, which are not read")
    # Reading a row takes its chunk, which may be larger.
    n_bytes = dataset.dtype.itemsize * max(prod(dataset.shape[1:]), prod(dataset.chunks or ()))
    if n_bytes > MAX_BYTES:
        raise ValueError(f"{name} is read in pieces of {n_bytes} bytes; {MAX_BYTES} are the most that a recording has")
    return dataset


def _flac(samples: Any, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
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
    unpack(args.containers, args.out)


if __name__ == "__main__":
    run_command(main)
