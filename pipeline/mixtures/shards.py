"""The on-disk sample: WebDataset tars that anyone can stream, and that we read at random by byte offset.

A shard is a tar of regular files `<key>.<ext>`; the members of one sample (equal key) lie side by side:

    clips-00003.tar
        4vG0ATGz9Qw.flac     waveform, 32 kHz mono
        4vG0ATGz9Qw.json     {"labels": [...], "duration_seconds": 10.0, ...}
        ...
    shards.json              {"clips-00003.tar": {"bytes": ..., "count": <samples>, "sha256": ...}, ...}

tar has no checksums of its data and no count: a shard cut between two members reads without an error and with samples
missing. So shards.json says what there must be, and `verify` compares. A shard without samples has no file (an empty
tar makes `webdataset` raise) and the count 0 in shards.json.

Members are decoded by functions named here, never by webdataset's `.decode()`, which unpickles what is in an archive,
and no path is ever built from a member's name.

This module must not import torch: the workers that resample load it.
"""

import csv
import io
import json
import os
import re
import struct
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from jaxtyping import Float32, Int16

from pipeline.core.runtime import let_go, read_json, sha256_file, sync, write_json, writing

KEY = re.compile(r"[A-Za-z0-9_-]+")  # no dot: webdataset ends the key at the first one, and would merge samples
EXT = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
SHARD = re.compile(r"[A-Za-z0-9_-]+\.tar")
INDEX = "shards.json"
_BLOCK = 512
_HELD = 4 << 20  # bytes; more of a shard is not left to pile up in memory, from where a corpus would drive all else


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a shard: its data are the bytes [offset, offset + size) of the tar."""

    key: str
    ext: str
    offset: int
    size: int


def shard_number(key: str, n_shards: int) -> int:
    """Shard that a key belongs to: sha256(key) mod n_shards, the same on any machine and for any set of keys."""
    return int.from_bytes(sha256(key.encode()).digest()) % n_shards


# --------------------------------------------------------------------------------------------------- write


def write_shard(
    path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], update: Callable[[bytes], object] | None = None
) -> list[Member]:
    """Write (key, {ext: content}) samples as a tar, atomically; return where each member's data lie.

    `update`, of a hash, gets every byte that is written. The same samples give the same bytes. No samples: no file,
    and []. ValueError for a key or an extension that webdataset would read differently, and for a repeated key. An
    error leaves neither a shard nor a temporary file.
    """
    path = Path(path)
    if not SHARD.fullmatch(path.name):
        raise ValueError(f"{path.name!r} is not a shard's name: letters, digits, _ and -, then .tar")
    members: list[Member] = []
    seen: set[str] = set()
    held = 0
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path), open(temporary, "wb") as file:

            def write(content: bytes) -> None:
                nonlocal held
                file.write(content)
                held += len(content)
                if held > _HELD:
                    let_go(file.fileno())
                    held = 0
                if update:
                    update(content)

            # Headers are tarfile's, contents are written whole: its addfile copies them 16 kB at a time.
            for key, contents in samples:
                if not KEY.fullmatch(key):
                    raise ValueError(f"{path}: {key!r} is not a key: letters, digits, _ and - only")
                if key in seen:
                    raise ValueError(f"{path}: two samples have the key {key!r}")
                if not contents:
                    raise ValueError(f"{path}: sample {key!r} has no members")
                seen.add(key)
                for ext, content in sorted(contents.items()):
                    if not EXT.fullmatch(ext):
                        raise ValueError(f"{path}: {ext!r} is not an extension: lower case letters and digits")
                    header = tarfile.TarInfo(f"{key}.{ext}")  # mtime 0, no owner: the content decides every byte
                    header.size = len(content)
                    write(header.tobuf(tarfile.PAX_FORMAT))
                    members.append(Member(key, ext, file.tell(), len(content)))
                    write(content)
                    write(bytes(-len(content) % _BLOCK))
            end = file.tell() + 2 * _BLOCK  # two empty blocks, and whole records of twenty
            write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))
            file.flush()
            os.fsync(file.fileno())
        if members:
            os.replace(temporary, path)
        else:
            temporary.unlink()
            path.unlink(missing_ok=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return members


# ---------------------------------------------------------------------------------------------------- read


def members(path: Path) -> Iterator[Member]:
    """Members of a shard in their order, data not read. See `read_shard` for what is refused."""
    with open(path, "rb") as file:
        yield from _members(file, path)


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples (key, {ext: content}) of a shard in their order.

    ValueError, naming the shard, for anything but a whole tar of regular files `<key>.<ext>`: links, devices,
    directories, names with a path, repeated keys, a header that does not agree with its checksum, a missing end.
    """
    with open(path, "rb") as file:
        key, sample = "", dict[str, bytes]()
        for member in _members(file, path):
            if member.key != key and sample:
                yield key, sample
                sample = {}
            key = member.key
            file.seek(member.offset)
            sample[member.ext] = file.read(member.size)
        if sample:
            yield key, sample


def _members(file: BinaryIO, path: Path) -> Iterator[Member]:
    # tarfile is not used to read: it ends quietly at a damaged header, follows what we refuse, and before 3.11.14 never
    # came back from a member of negative size (CVE-2025-8194).
    end = os.fstat(file.fileno()).st_size
    offset, long_name, key = 0, None, ""
    finished: set[str] = set()
    exts: set[str] = set()
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise ValueError(f"{path}: cut off at byte {end}: no end of archive")
        if not any(header):
            break
        name, size, kind = _parse_header(header, path, offset)
        data, offset = offset + _BLOCK, offset + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if offset > end:
            raise ValueError(f"{path}: cut off at byte {end}: {name!r} ends at {data + size}")
        if kind == b"x":
            if size > 4096:
                raise ValueError(f"{path}: an extended header of {size} bytes")
            long_name = _parse_extended_header(file.read(size), path)
            continue
        if kind not in (b"0", b"\0"):
            raise ValueError(f"{path}: {name!r} is not a regular file (type {kind!r})")
        name, long_name = long_name or name, None
        member_key, _, ext = name.partition(".")
        if not KEY.fullmatch(member_key) or not EXT.fullmatch(ext):
            raise ValueError(f"{path}: {name!r} is not a <key>.<ext> member name")
        if member_key != key:
            finished.add(key)
            key, exts = member_key, set()
        if key in finished or ext in exts:
            raise ValueError(f"{path}: {name!r} repeats a sample's key")
        exts.add(ext)
        yield Member(key, ext, data, size)
    file.seek(offset)
    rest = 0
    while block := file.read(1 << 16):
        if any(block):
            raise ValueError(f"{path}: data after the end of the archive at byte {offset}")
        rest += len(block)
    if rest < 2 * _BLOCK or long_name is not None:
        raise ValueError(f"{path}: cut off at byte {end}: no end of archive")


def _parse_header(header: bytes, path: Path, offset: int) -> tuple[str, int, bytes]:
    """Name, size and type of a POSIX ustar header."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        # Octal digits only: int() would take a sign, and GNU's binary sizes are for members of 8 GiB.
        fields = [re.fullmatch(rb" *([0-7]+)[ \0]*", header[span])[1] for span in (slice(124, 136), slice(148, 156))]  # type: ignore[index]
        size, stated = (int(field, 8) for field in fields)
        if stated != checksum:
            raise ValueError("checksum")
        name = (header[:100].split(b"\0")[0]).decode("ascii")
        prefix = header[345:500].split(b"\0")[0].decode("ascii")
    except (TypeError, ValueError):
        raise ValueError(f"{path}: damaged header at byte {offset}") from None
    return (f"{prefix}/{name}" if prefix else name), size, header[156:157]


def _parse_extended_header(content: bytes, path: Path) -> str | None:
    """The path in a PAX header, which is how a name over 100 characters is written.

    Records are "<length> <key>=<value>" and a newline. Times may stand there too (webdataset's own writer
    puts the fraction of a second there). Sizes and links may not.
    """
    name = None
    while content:
        record = re.match(rb"(\d{1,4}) (path|[amc]time)=([A-Za-z0-9_.-]+)\n", content)
        if record is None or int(record[1]) != record.end():
            raise ValueError(f"{path}: an extended header that says more than a long name and times: {content[:80]!r}")
        if record[2] == b"path":
            name = record[3].decode()
        content = content[record.end() :]
    return name


# --------------------------------------------------------------------------------------------------- index


def write_index(directory: Path, shards: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Write shards.json: what `verify` compares with. `shards`: all names expected, those without samples included."""
    names = sorted(path.name for path in directory.glob("*.tar")) if shards is None else sorted(shards)
    index = {name: _describe(directory / name) for name in names}
    write_json(directory / INDEX, index)
    return index


def read_index(directory: Path) -> dict[str, dict[str, Any]]:
    """shards.json: {shard: {"bytes", "count", "sha256"}}, sorted. ValueError when it does not look like that."""
    path = directory / INDEX
    index = read_json(path)
    if not isinstance(index, dict):
        raise ValueError(f"{path}: not an object")
    for name, entry in index.items():
        if not SHARD.fullmatch(name):
            raise ValueError(f"{path}: {name!r} is not a shard's name")
        if not isinstance(entry, dict) or sorted(entry) != ["bytes", "count", "sha256"]:
            raise ValueError(f"{path}: {name} should have bytes, count and sha256")
    return dict(sorted(index.items()))


def verify(directory: Path, content: bool = True) -> dict[str, dict[str, Any]]:
    """Compare the shards of a directory with its shards.json, and return that; ValueError names the first that differs.

    `content=False` leaves the sha256 out (half a second per GB): sizes and counts, which show truncation.
    """
    index = read_index(directory)
    if unknown := sorted({path.name for path in directory.glob("*.tar")} - set(index)):
        raise ValueError(f"{directory}: {unknown[0]} is not in {INDEX}")
    for name, entry in index.items():
        found = _describe(directory / name, content)
        for quantity, value in found.items():
            if entry[quantity] != value:
                raise ValueError(
                    f"{directory / name}: {quantity} is {value}, and {INDEX} says {entry[quantity]}: "
                    "the shard is truncated or damaged; run the stage that wrote it again"
                )
    return index


def _describe(path: Path, content: bool = True) -> dict[str, Any]:
    if not path.exists():
        empty: dict[str, Any] = {"bytes": 0, "count": 0}
        return empty | ({"sha256": ""} if content else {})
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    if content:
        found["sha256"] = sha256_file(path)
    try:
        found["count"] = len({member.key for member in members(path)})
    except ValueError as error:
        found["count"] = f"unknown ({error})"
    return found


# ------------------------------------------------------------------------------------------- random access


class _Descriptor:
    """An open file that is closed when its last user has let go of it, so eviction cannot pull it from under a read."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.number).st_size

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardReader:
    """Bytes of any member of a directory's shards, by shard, offset and size.

    At most `max_open` files are open at a time. Threads may share a reader; a copy in a forked or spawned process
    opens its own files.
    """

    def __init__(self, directory: Path, max_open: int = 64) -> None:
        self.directory = Path(directory)
        self.max_open = max_open
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of a shard; ValueError, naming it, when it does not have them."""
        descriptor = self._descriptor(shard)
        offset, size = int(offset), int(size)
        if offset < 0 or size < 0 or offset + size > descriptor.size:
            raise ValueError(
                f"{self.directory / shard} has {descriptor.size} bytes, not the {size} at {offset}: it is truncated, "
                "or its index is of another run"
            )
        parts = []
        while size:
            part = os.pread(descriptor.number, size, offset)
            if not part:
                raise ValueError(f"{self.directory / shard}: shrank while it was read")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _descriptor(self, shard: str) -> _Descriptor:
        if self._pid != os.getpid():  # forked: the lock may have been held by a thread that is not here
            self._reset()
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None:
                if not SHARD.fullmatch(shard):
                    raise ValueError(f"{shard!r} is not a shard's name")
                descriptor = self._open[shard] = _Descriptor(self.directory / shard)
                if len(self._open) > self.max_open:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return descriptor


# -------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """A clip that is in the shards: a row of manifest.csv with status ok."""

    clip_id: str
    recording: str  # the clip id where the manifest names none
    labels: tuple[str, ...]
    duration_seconds: float
    shard: str
    offset: int
    size: int


class ClipReader:
    """Waveforms of a clips directory (manifest.csv, shards) by clip id. `clips` is sorted by clip id.

    Safe to fork and pickle, as ShardReader is.
    """

    def __init__(self, directory: Path, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.clips: dict[str, ClipEntry] = {}
        self._shards = ShardReader(directory)
        path = Path(directory) / "manifest.csv"
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                try:
                    if row["status"] != "ok":
                        continue
                    self.clips[row["clip_id"]] = ClipEntry(
                        clip_id=row["clip_id"],
                        recording=row.get("recording") or row["clip_id"],
                        labels=tuple(filter(None, row["labels"].split(";"))),
                        duration_seconds=float(row["duration_seconds"]),
                        shard=row["shard"],
                        offset=int(row["offset"]),
                        size=int(row["size"]),
                    )
                except (KeyError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from None

    def waveform(self, clip_id: str) -> Float32[np.ndarray, " time"]:
        """The whole clip at `sample_rate`; KeyError for a clip that is not there, ValueError for another rate."""
        clip = self.clips[clip_id]
        waveform, rate = decode_waveform(self._shards.read(clip.shard, clip.offset, clip.size))
        if rate != self.sample_rate:
            raise ValueError(f"clip {clip_id} is at {rate} Hz, not {self.sample_rate}")
        return waveform


# ------------------------------------------------------------------------------------------------- content


def encode_wav(pcm: Int16[np.ndarray, " time"], sample_rate: int) -> bytes:
    """16-bit mono WAV with the plain 44-byte header."""
    data = np.ascontiguousarray(pcm, dtype="<i2").data
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + data.nbytes, b"WAVE", b"fmt ", 16, 1, 1, sample_rate,
                         2 * sample_rate, 2, 16, b"data", data.nbytes)  # fmt: skip
    return b"".join((header, data))


def encode_flac(pcm: Int16[np.ndarray, " time"], sample_rate: int) -> bytes:
    """16-bit mono FLAC. ValueError for no samples: a FLAC file cannot say that."""
    if not len(pcm):
        raise ValueError("a FLAC file needs at least one sample")
    file = io.BytesIO()
    soundfile.write(file, pcm, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_waveform(content: bytes) -> tuple[Float32[np.ndarray, " time"], int]:
    """Waveform in [-1, 1) and sample rate of a mono WAV or FLAC member. 16-bit samples are divided by 32768.

    Raises ValueError for anything else. The WAVs written here are read without libsndfile: 0.01 ms for 2 s, not 0.25.
    """
    if len(content) >= 44 and content[:4] == b"RIFF" and content[8:16] == b"WAVEfmt " and content[36:40] == b"data":
        length, kind, channels, rate, _, _, bits = struct.unpack_from("<IHHIIHH", content, 16)
        (size,) = struct.unpack_from("<I", content, 40)
        if (length, kind, channels, bits) == (16, 1, 1, 16) and size == len(content) - 44 and size % 2 == 0:
            return np.frombuffer(content, "<i2", offset=44).astype(np.float32) * np.float32(1 / 32768), rate
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.channels != 1:
                raise ValueError(f"a shard's audio is mono, not of {file.channels} channels")
            return file.read(dtype="float32"), file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f"a member that is not audio: {error.error_string}") from None


def encode_array(array: np.ndarray) -> bytes:
    """The array as .npy."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_array(content: bytes) -> np.ndarray:
    """The array in a .npy; ValueError for one that would run code (an object array)."""
    return np.load(io.BytesIO(content), allow_pickle=False)


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys, NaN refused."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
