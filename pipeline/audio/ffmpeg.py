"""The ffmpeg command as a decoder: a process that writes samples into a pipe, as far as somebody reads them.

A playlist in disguise cannot make it read other files: only local ones may be opened, and only by demuxers that are
named here. Whether a failure is the file's or the machine's is told apart: an ffmpeg that does not start, is killed or
takes too long says nothing of the file.
"""

import contextlib
import errno
import functools
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float32

# Name of the demuxer by the bytes at a place of the file.
_CONTAINERS = (
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"FLV\x01", "flv"),
    (8, b"AVI ", "avi"),
    (0, b"\0\0\x01\xba", "mpeg"),
    (0, b"#!AMR", "amr"),
    (0, b"MAC ", "ape"),
    (0, b"wvpk", "wv"),
    (0, b"TTA1", "tta"),
    (0, b"MPCK", "mpc8"),
    (0, b"MP+", "mpc"),
    (0, b"DSD ", "dsf"),
    (0, b"\x0b\x77", "ac3"),
)
# Demuxers of everything else. Not mp3, which finds some sound in any bytes.
_PROBED = "mov,matroska,asf,flv,avi,mpeg,mpegts,ogg,flac,wav,w64,aiff,au,caf,aac,ac3,eac3,voc,iff,ape,wv,tta,oma,rm"
_LEAD_SECONDS = 1  # before the place that is wanted: AAC and Opus need what comes before
_MACHINE = (126, 127)  # exit codes of whoever could not start a program
_MACHINES = (errno.ENOMEM, errno.EIO, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ESTALE)
_MAX_CHANNELS = 1024


class Failure(Exception):
    """No sound came out of ffmpeg; `of_machine` where that is not the file's fault."""

    def __init__(self, text: str, of_machine: bool = False) -> None:
        super().__init__(text)
        self.text, self.of_machine = text, of_machine


def executable() -> str | None:
    """The ffmpeg command that is on the PATH."""
    return shutil.which("ffmpeg")


def version() -> str:
    """One line that says which ffmpeg is on the PATH; that of one that cannot start says so. Empty without any."""
    found = executable()
    if found is None:
        return ""
    status = os.stat(found)
    return _version(found, status.st_size, status.st_mtime_ns)


@functools.cache
def _version(found: str, size: int, mtime_ns: int) -> str:
    try:
        done = subprocess.run([found, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        text = f"exit code {done.returncode}: {(done.stdout + done.stderr)[:200]!r}"
    except (OSError, subprocess.TimeoutExpired) as error:
        text = type(error).__name__
    return f"{found} {size} {mtime_ns} {text}"


def container(head: bytes) -> str | None:
    """ffmpeg's name of a container that libsndfile does not know, by its first 16 bytes."""
    for at, magic, name in _CONTAINERS:
        if head[at : at + len(magic)] == magic:
            return name
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    return None


class Stream:
    """The first audio track of a file from second `start` on, as floats; silence where it begins later. Failure.

    `seconds` is how long it may be waited for, and for `n_bytes` more again.
    """

    def __init__(self, path: Path, demuxer: str | None, start: int, seconds: float, n_bytes: int) -> None:
        found = executable()
        if found is None:
            raise Failure("there is no ffmpeg", of_machine=True)
        lead = min(start, _LEAD_SECONDS)
        command = [found, "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe", "-threads", "1"]
        command += ["-f", demuxer] if demuxer else ["-format_whitelist", _PROBED]
        command += ["-ss", str(start - lead)] if start > lead else []  # at 0 it would count AAC's samples of priming
        command += ["-i", f"file:{os.path.abspath(path)}"]  # "file:": ids begin with "-"
        command += ["-map", "0:a:0", "-threads", "1", "-af", "aresample=async=1:first_pts=0:min_comp=0.02"]
        command += ["-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
        self._path, self._seconds, self._n_bytes = path, seconds, n_bytes
        self._waited, self._received, self._buffer = 0.0, 0, b""
        self.complained = False
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            self._errors.close()
            raise Failure(f"ffmpeg does not start: {error.strerror}", of_machine=True) from None
        try:
            self.rate, self.channels, self._left = self._header()
            self.skip(lead * self.rate)
        except BaseException:
            self.close()
            raise

    def read(self, frames: int) -> Float32[np.ndarray, "frames channels"]:
        """Read as many frames, or what is left."""
        size = 4 * self.channels
        content = self._take(min(frames * size, self._left))
        self._left -= len(content)
        if len(content) < frames * size:
            self._end()
        content = content[: len(content) // size * size]
        return np.frombuffer(content, "<f4").reshape(-1, self.channels).astype(np.float32, copy=False)

    def skip(self, frames: int) -> int:
        """Leave out as many frames; the number of those that were there."""
        left = frames
        while left > 0:
            n = len(self.read(min(left, 1 << 16)))
            if not n:
                break
            left -= n
        return frames - left

    def close(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _take(self, n: int) -> bytes:
        """The next `n` bytes, or what is left."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        pieces, have = [self._buffer], len(self._buffer)
        while have < n:
            begun = time.monotonic()
            allowed = self._seconds * (1 + self._received / self._n_bytes) - self._waited
            ready, _, _ = select.select([pipe], [], [], max(0.0, allowed))
            self._waited += time.monotonic() - begun
            if not ready:
                raise Failure(f"ffmpeg took more than {self._seconds:g} s", of_machine=True)
            piece = os.read(pipe, 1 << 20)
            if not piece:
                break
            pieces.append(piece)
            have += len(piece)
            self._received += len(piece)
        content = b"".join(pieces)
        self._buffer = content[n:]
        return content[:n]

    def _header(self) -> tuple[int, int, int]:
        """Rate, channels and bytes of samples of the WAV that is written."""
        rate = channels = 0
        head = self._take(12)
        known = head[:4] == b"RIFF" and head[8:] == b"WAVE"
        while known:
            name = self._take(4)
            n = int.from_bytes(self._take(4), "little")
            if name == b"data":
                known = 0 < channels <= _MAX_CHANNELS and rate > 0
                if known:
                    return rate, channels, n if n < 0xFFFF_FFFF else 1 << 62
            content = self._take(n + n % 2) if n < 1 << 16 else b""
            if name == b"fmt " and len(content) >= 16 and int.from_bytes(content[14:16], "little") == 32:
                channels, rate = (int.from_bytes(content[i:j], "little") for i, j in ((2, 4), (4, 8)))
            known = len(content) > 0
        while self._take(1 << 20):
            if self._received > self._n_bytes:
                raise Failure(f"ffmpeg wrote more than {self._n_bytes} bytes that are no WAV")
        self._end()
        raise Failure("ffmpeg's output is no WAV")

    def _end(self) -> None:
        """Nothing follows: Failure if ffmpeg says that there should."""
        try:
            code = self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"ffmpeg took more than {self._seconds:g} s", of_machine=True) from None
        self._errors.seek(0)
        said = self._errors.read(4096).decode(errors="replace").strip()
        self.complained = bool(said)
        if not code:
            return
        line = re.sub(r" @ 0x[0-9a-f]+", "", said.partition("\n")[0])  # an address: another one each time
        text = f"ffmpeg: {line[:200]}".replace(str(self._path), self._path.name)
        if code < 0:
            text = f"ffmpeg was ended by signal {-code}"
        of_machine = code < 0 or code in _MACHINE or any(os.strerror(number) in said for number in _MACHINES)
        raise Failure(text if said or code < 0 else f"ffmpeg ended with exit code {code}", of_machine)
