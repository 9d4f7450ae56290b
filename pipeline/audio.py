"""Recordings as people have them on disk -> the mono segment that a clip is made of, or the reason why there is none.

Files are not trusted. What a header says of its length is never allocated or believed: samples are read in blocks, up
to what the clip needs. Only regular files are opened (a pipe called x.wav never answers), and a rate is checked before
anything is resampled from it (a header of 1 Hz makes days of audio out of a small file).

libsndfile decodes wav, flac, ogg, opus, mp3, aiff and the like, whatever the file is called; mp4, webm and raw aac go
through the ffmpeg command where there is one.

This module must not import torch: the workers that resample load it.
"""

import contextlib
import io
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

Reason = Literal[
    "missing",  # was listed, is not there
    "outside_root",  # an absolute path, one with .., or one through a link that leads out of the corpus
    "not_regular_file",  # a link, a pipe, a device, a directory
    "unreadable",  # the system refuses: permissions, a failing disk
    "undecodable",  # not audio, or damaged
    "unsupported_container",  # mp4, webm, aac, and no ffmpeg here
    "rate_out_of_bounds",
    "no_samples",
    "truncated",  # the file ends before the audio that it announces
    "too_short",  # under a second of what should be longer
    "outside_segment",  # a whole recording that ends before the segment begins
    "non_finite",
    "peak_out_of_range",
    "silent",
]
Note = Literal[
    "cut",  # out of a longer recording, by the segment's times
    "short",  # under 90 % of the listed duration, in a file that does not contradict itself
    "antiphase",  # the mean of the channels cancels: the left one instead
    "clipped",  # went over full scale in 16 bits
    "ffmpeg",  # not decoded by libsndfile
]

MIN_RATE, MAX_RATE = 4_000, 384_000  # Hz
MAX_PEAK = 4.0  # +12 dBFS. Lossy codecs overshoot by a few dB; 16-bit integers written as floats are far over
MIN_SECONDS = 1.0
MAX_LISTED_SECONDS = 30.0  # no list's segments are longer; a bound of what is read to tell a segment from a recording
MARGIN_SECONDS = 1.5  # a file this much longer than its segment is still that segment: cutters keep up to 0.7 s
COMPLETE = 0.9  # of the announced duration
CANCELLED = 1e-2  # power of the mean over that of the left channel (-20 dB); lossy codecs leave -30 dB
FFMPEG_SECONDS = 60.0
FFMPEG_BYTES = 64 << 20

_BLOCK_SAMPLES = 1 << 17  # half a megabyte of floats: down-mixed while still in the cache
_UNKNOWN_FRAMES = 1 << 36  # what FLAC's 36 bits can say, and more, is a header that does not know


class BadClip(Exception):
    """A file that no clip can be made of: a reason of the closed list above, and the particulars in words."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())  # one line

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Segment:
    """The part of a recording that a clip wants, mono, at the rate of the file."""

    waveform: Float32[np.ndarray, " time"]
    sample_rate: int
    channels: int
    notes: tuple[Note, ...]


def locate(root: Path, path: str) -> Path:
    """The regular file at `path` (relative, with /) under `root`; BadClip for everything else.

    Nothing is opened: a link to /etc/passwd and a pipe are told by lstat.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise BadClip("outside_root", f"{path!r} is not a path inside the root")
    full = root / path
    if not Path(os.path.realpath(full.parent)).is_relative_to(os.path.realpath(root)):
        raise BadClip("outside_root", "a directory on the way is a link that leads out of the root")
    try:
        mode = os.lstat(full).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise BadClip("missing") from None
    except OSError as error:
        raise BadClip("unreadable", os.strerror(error.errno or 0)) from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "link", stat.S_IFIFO: "pipe", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket"}
        raise BadClip("not_regular_file", kinds.get(stat.S_IFMT(mode), "device"))
    return full


def read_segment(path: Path, start_seconds: float, end_seconds: float, max_seconds: float) -> Segment:
    """Mono audio of the segment [start, end) of the recording that the file was cut from, `max_seconds` at most.

    Most files are the segment already; one longer by more than MARGIN_SECONDS is the whole recording, and is read
    from `start_seconds` on. A file that ends early is kept with its true length and noted `short`, unless it says
    itself that there was more (`truncated`) or less than a second is left (`too_short`). An infinite `end_seconds`
    is an end that nobody has listed: such a file is as long as it is.

    Raises BadClip. ValueError when the times are not a segment.
    """
    if not 0 <= start_seconds < end_seconds or start_seconds == inf:
        raise ValueError(f"a segment from {start_seconds} to {end_seconds} s")
    listed = end_seconds - start_seconds
    try:
        # O_NONBLOCK: should it have become a pipe since the lstat, open returns.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadClip("missing") from None
    except OSError as error:
        raise BadClip("unreadable", os.strerror(error.errno or 0)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadClip("not_regular_file")
        if status.st_size == 0:
            raise BadClip("no_samples", "the file is empty")
        seconds = min(listed, max_seconds)
        whole = max(seconds, min(listed, MAX_LISTED_SECONDS))
        return _read_segment(path, descriptor, start_seconds, seconds, whole, listed < inf)
    finally:
        os.close(descriptor)


def _read_segment(
    path: Path, descriptor: int, start_seconds: float, seconds: float, whole: float, listed: bool
) -> Segment:
    def open_at(start: float, _: float) -> _Sequential:
        os.lseek(descriptor, 0, os.SEEK_SET)
        file = _Sequential(descriptor, closefd=False)
        if start:
            frame = round(start * file.samplerate)
            if frame >= file.frames:
                raise BadClip("outside_segment", f"{file.frames / file.samplerate:.1f} s, and it begins at {start} s")
            file.seek(frame)
        return file

    try:
        return _segment(open_at, start_seconds, seconds, whole, listed)
    except soundfile.LibsndfileError as error:
        try:
            container = _container(os.pread(descriptor, 12, 0))
        except OSError as failure:
            raise BadClip("unreadable", os.strerror(failure.errno or 0)) from None
        if container is None:
            # Not str(error): that has the descriptor's number in it.
            raise BadClip("undecodable", error.error_string.strip().rstrip(".")) from None
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise BadClip("unsupported_container", f"{container}, and there is no ffmpeg")
    executable = ffmpeg  # a str, for the closure

    def convert(start: float, seconds: float) -> _Sequential:
        output, complained = _ffmpeg(executable, path, container, start, seconds)
        file = _Sequential(io.BytesIO(output))
        file.damaged = complained
        return file

    try:
        segment = _segment(convert, start_seconds, seconds, whole, listed)
    except soundfile.LibsndfileError as error:
        raise BadClip("undecodable", f"ffmpeg's output: {error.error_string.strip()}") from None
    return Segment(segment.waveform, segment.sample_rate, segment.channels, ("ffmpeg", *segment.notes))


def _segment(
    open_at: Callable[[float, float], "_Sequential"], start: float, seconds: float, whole: float, listed: bool
) -> Segment:
    """`open_at(start, seconds)` is the decoded file from `start` on, at least `seconds` of it where it has them.

    `listed`: somebody says that there are `seconds` of it. A file that is longer than `whole`, the listed segment
    (of which no more than `seconds` may be wanted), is the recording that the segment was taken from.
    """
    notes: list[Note] = []
    margin = whole - seconds + MARGIN_SECONDS if start else 0.0
    with open_at(0.0, seconds + margin) as file:
        rate, channels = int(file.samplerate), int(file.channels)
        if not MIN_RATE <= rate <= MAX_RATE:
            raise BadClip("rate_out_of_bounds", f"{rate} Hz")
        wanted, limit = round(seconds * rate), round((seconds + margin) * rate)
        mono, cancelled = _read_mono(file, limit)
        promised = _promised_frames(file) if len(mono) < COMPLETE * wanted else inf
    offset = 0.0
    if margin and len(mono) == limit:
        offset = start
        with open_at(offset, seconds) as file:
            mono, cancelled = _read_mono(file, wanted)
            promised = _promised_frames(file) - round(offset * rate) if len(mono) < COMPLETE * wanted else inf
        notes.append("cut")
    if cancelled:
        if not np.isfinite(mono).all():  # which may be the other channel's fault
            raise BadClip("non_finite")
        notes.append("antiphase")
        with open_at(offset, seconds) as file:
            mono, _ = _read_mono(file, wanted, left=True)
    mono = mono[:wanted]

    if not len(mono):
        raise BadClip("outside_segment" if offset else "no_samples")
    peak = max(float(mono.max()), -float(mono.min()))
    if not np.isfinite(peak):
        raise BadClip("non_finite")
    if peak > MAX_PEAK:
        raise BadClip("peak_out_of_range", f"{peak:.3g} times full scale")
    if len(mono) < COMPLETE * wanted:
        detail = f"{len(mono) / rate:.3f} s of {seconds:g}"
        if len(mono) < COMPLETE * min(wanted, promised):
            raise BadClip("truncated", detail)
        if listed:
            if len(mono) < MIN_SECONDS * rate:
                raise BadClip("too_short", detail)
            notes.append("short")
    return Segment(mono, rate, channels, tuple(notes))


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file read to its end, not to where its header puts the end.

    As long as a SoundFile calls itself seekable, each read is cut at `frames` and followed by a seek. That ends a FLAC
    without a total (valid: ffmpeg writes it into a pipe) at its last whole block, with an error, and gives a damaged
    Ogg its full length, filled with what was in the buffer.
    """

    damaged = False  # whoever made the file complained

    def seekable(self) -> bool:
        return False


def _read_mono(file: soundfile.SoundFile, limit: int, left: bool = False) -> tuple[Float32[np.ndarray, " time"], bool]:
    """The mean of the channels (or the left one) of the next `limit` frames, and does that mean cancel."""
    channels = file.channels
    # libsndfile takes 0.9 ms to make floats of a 10 s stereo wav of 16 bits, and 0.1 to hand the integers over.
    integers = file.subtype == "PCM_16"
    full_scale = np.float32(32768.0 if integers else 1.0)
    samples = np.empty((max(1, _BLOCK_SAMPLES // channels), channels), np.int16 if integers else np.float32)
    mono = np.empty(limit, np.float32)
    n, power, power_left = 0, 0.0, 0.0
    with np.errstate(all="ignore"):  # of samples that are not finite
        while n < limit:
            wanted = samples[: limit - n]
            frames = wanted[: file.buffer_read_into(wanted, samples.dtype.name)]
            if not len(frames):
                break
            mixed = mono[n : n + len(frames)]
            n += len(frames)
            if left or channels == 1:
                np.divide(frames[:, 0], full_scale, out=mixed, dtype=np.float32)
                continue
            _mean_of_channels(frames, full_scale, mixed)
            every = mixed[::8], frames[::8, 0] / full_scale  # will do to compare by, in a tenth of the time
            power += float(np.dot(every[0], every[0]))
            power_left += float(np.dot(every[1], every[1]))
    return mono[:n], power < CANCELLED * power_left


def _mean_of_channels(
    frames: Int16[np.ndarray, "time channels"] | Float32[np.ndarray, "time channels"],
    full_scale: np.float32,
    out: Float32[np.ndarray, " time"],
) -> None:
    """Write the mean of two or more channels, as parts of full scale."""
    scale = 1 / (full_scale * np.float32(frames.shape[1]))
    if frames.shape[1] > 2:
        np.matmul(frames.astype(np.float32, copy=False), np.full(frames.shape[1], scale), out=out)
    elif frames.dtype == np.int16:
        # A frame is one integer of 32 bits, its halves the two channels: read in one go, not every second sample.
        both = np.ascontiguousarray(frames).view(np.int32).ravel()
        total = both >> 16
        total += both.astype(np.int16)
        np.multiply(total, scale, out=out, dtype=np.float32, casting="unsafe")
    else:
        np.multiply(frames[:, 0], scale, out=out)  # before they are added: their sum may be more than a float holds
        out += frames[:, 1] * scale


def _promised_frames(file: _Sequential) -> float:
    """Frames that the file itself announces; infinite when it only says that it is not complete, 0 when nothing.

    libsndfile shortens the count to what is there, and leaves what it shortened in its log.
    """
    log = file.extra_info
    if file.damaged or "Last page lacks an end-of-stream bit" in log:
        return inf
    if found := re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        stated, there = int(found[1]), int(found[2])
        # 0xFFFFFFFF and the like are what a writer into a pipe puts there: it could not know.
        return file.frames * stated / there if there and stated < 0x7FFF_0000 else 0.0
    return float(file.frames) if file.frames < _UNKNOWN_FRAMES - 1 else 0.0


def _container(head: bytes) -> str | None:
    """ffmpeg's name of a container that libsndfile does not know, by its first bytes."""
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    return None


def _ffmpeg(executable: str, path: Path, container: str, start: float, seconds: float) -> tuple[bytes, bool]:
    """The first audio track as float WAV, from `start` on; and has ffmpeg complained.

    The demuxer is fixed and only local files may be opened, so a playlist in disguise cannot make ffmpeg read others.
    """
    command = [executable, "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe", "-threads", "1"]
    command += ["-f", container]
    command += ["-ss", f"{start:.6f}"] if start else []  # at 0 it would count AAC's 1,024 samples of priming
    command += ["-i", f"file:{os.path.abspath(path)}"]  # "file:": ids begin with "-"
    command += ["-map", "0:a:0", "-t", f"{seconds:.6f}", "-threads", "1", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            timer = threading.Timer(FFMPEG_SECONDS, process.kill)
            timer.start()
            try:
                output = process.stdout.read(FFMPEG_BYTES + 1)
                if len(output) > FFMPEG_BYTES:
                    process.kill()
                code = process.wait()
            finally:
                expired = timer.finished.is_set()
                timer.cancel()
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        if expired:
            raise BadClip("undecodable", f"ffmpeg took more than {FFMPEG_SECONDS:g} s")
        if len(output) > FFMPEG_BYTES:
            raise BadClip("undecodable", f"ffmpeg wrote more than {FFMPEG_BYTES} bytes")
        errors.seek(0)
        said = errors.read(4096).decode(errors="replace").strip()
    if code:
        line = re.sub(r" @ 0x[0-9a-f]+", "", said.partition("\n")[0])  # an address: another one each time
        raise BadClip("undecodable", f"ffmpeg: {line[:200]}".replace(str(path), path.name))
    return output, bool(said)


def resample(
    waveform: Float32[np.ndarray, " time"], sample_rate: int, new_sample_rate: int
) -> Float32[np.ndarray, " new_time"]:
    """The same sound at another rate, ceil(time * new / old) samples of it; soxr HQ (20 bits, linear phase)."""
    if sample_rate == new_sample_rate:
        return waveform
    length = ceil(len(waveform) * new_sample_rate / sample_rate)
    resampled = soxr.resample(waveform, sample_rate, new_sample_rate, "HQ")
    if len(resampled) < length:  # soxr rounds half of the lengths down; with zeros behind them it goes on
        padded = np.pad(waveform, (0, ceil(2 * sample_rate / new_sample_rate)))
        resampled = soxr.resample(padded, sample_rate, new_sample_rate, "HQ")
    return resampled[:length]


def level_db(waveform: Float32[np.ndarray, " time"]) -> float:
    """RMS about the mean in dB of full scale (a full-scale square wave is 0): a constant has no level."""
    n, mean = max(1, len(waveform)), float(waveform.mean())
    power = float(np.dot(waveform, waveform)) / n
    if power - mean**2 < 1e-3 * power:  # the difference has lost its digits
        centred = waveform - np.float32(mean)
        power = float(np.dot(centred, centred)) / n
    else:
        power -= mean**2
    return 10.0 * float(np.log10(power)) if power > 0 else -inf


def is_below(waveform: Float32[np.ndarray, " time"], db: float) -> bool:
    """Whether `level_db` is less than this. Most recordings are told to be louder by a sixteenth of them."""
    part = waveform[len(waveform) // 2 :][: len(waveform) // 16]
    # Power about the mean only grows with what is added to the part; a tenth of a dB is for rounding.
    if len(part) and level_db(part) - 10.0 * np.log10(len(waveform) / len(part)) > db + 0.1:
        return False
    return level_db(waveform) < db


def to_int16(waveform: Float32[np.ndarray, " time"]) -> Int16[np.ndarray, " time"]:
    """16-bit samples, little-endian: rint(32767 x), clipped."""
    samples = np.empty(len(waveform), "<i2")
    scaled = np.empty(min(len(waveform), _BLOCK_SAMPLES), np.float32)
    for start in range(0, len(waveform), _BLOCK_SAMPLES):
        block = waveform[start : start + _BLOCK_SAMPLES]
        here = scaled[: len(block)]
        np.multiply(block, np.float32(32767), out=here)
        np.rint(here, out=here)
        np.clip(here, -32768, 32767, out=here)
        samples[start : start + len(block)] = here
    return samples
