"""Recordings as people have them on disk -> the mono segment that a clip is made of, or the reason why there is none.

Files are not trusted. What a header says of its length is never allocated or believed: samples are read in blocks, up
to what the clip needs. Only regular files are opened (a pipe called x.wav never answers), and a rate is checked before
anything is resampled from it (a header of 1 Hz makes days of audio out of a small file).

pipeline/audio/recording.py is the reader: libsndfile decodes wav, flac, ogg, opus, mp3, aiff and the like, whatever the
file is called; what it does not know goes through the ffmpeg command where there is one.

This module must not import torch: the workers that resample load it.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import soxr
from jaxtyping import Float32, Int16

from pipeline.audio import recording
from pipeline.audio.badclip import BadClip
from pipeline.audio.recording import Recording

Note = Literal[
    "cut",  # out of a longer recording, by the segment's times
    "short",  # under 90 % of the listed duration, in a file that does not contradict itself
    "long",  # a part of what is longer than a clip
    "antiphase",  # somewhere the mean of the channels cancels: there the left one, or the first that sounds
    "clipped",  # went over full scale in 16 bits
    "ffmpeg",  # not decoded by libsndfile
]

Long = Literal["first", "cut", "best"]
"""What is taken of a segment that is longer than a clip: its beginning, all of it in pieces, or its loudest part."""

MAX_PEAK = 4.0  # +12 dBFS. Lossy codecs overshoot by a few dB; 16-bit integers written as floats are far over
MIN_SECONDS = 1.0
MAX_LISTED_SECONDS = 30.0  # no list's segments are longer; a bound of what is read to tell a segment from a recording
MARGIN_SECONDS = 1.5  # a file this much longer than its segment is still that segment: cutters keep up to 0.7 s
COMPLETE = 0.9  # of the announced duration
FFMPEG_SECONDS = 60.0
FFMPEG_BYTES = 64 << 20

_BLOCK_SAMPLES = 1 << 17
_STEPS_READ = 16  # at once, to find the loudest part


@dataclass(frozen=True)
class Segment:
    """The part of a recording that a clip wants, mono, at the rate of the file."""

    waveform: Float32[np.ndarray, " time"]
    sample_rate: int
    channels: int
    notes: tuple[Note, ...]
    start_seconds: float = 0.0
    """Where in the listed segment this part of it begins."""
    whole_seconds: float = 0.0
    """Length of the listed segment where this is a part of it, else 0."""


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
    """The first part of a segment, as `read_segments` gives it."""
    return next(read_segments(path, start_seconds, end_seconds, max_seconds, "first"))


def read_segments(
    path: Path, start_seconds: float, end_seconds: float, max_seconds: float, long: Long
) -> Iterator[Segment]:
    """Mono audio of the segment [start, end) of the recording that the file was cut from, `max_seconds` at most.

    Most files are the segment already; one longer by more than MARGIN_SECONDS is the whole recording, and is read
    from `start_seconds` on. A file that ends early is kept with its true length and noted `short`, unless it says
    itself that there was more (`truncated`) or less than a second is left (`too_short`). An infinite `end_seconds`
    is an end that nobody has listed: such a file is as long as it is.

    Of a segment longer than `max_seconds` comes what `long` says, noted `long`: one part, or with `cut` several that
    follow each other, without a last one of less than MIN_SECONDS.

    Raises BadClip, with `cut` perhaps after some parts. ValueError when the times are not a segment.
    """
    if not 0 <= start_seconds < end_seconds or start_seconds == inf:
        raise ValueError(f"a segment from {start_seconds} to {end_seconds} s")
    listed = end_seconds - start_seconds
    seconds = min(listed, max_seconds)
    whole = max(seconds, min(listed, MAX_LISTED_SECONDS))
    with open_recording(path) as file:
        first, offset = _segment(file, start_seconds, seconds, whole, listed < inf)
        n = total = len(first.waveform)
        if listed > seconds and n == round(seconds * file.rate):
            total = file.frames - offset
            total = total if listed == inf else min(total, round(listed * file.rate))
        if total <= n:
            yield first
            return
        for at in _places(file, offset, total, n, long):
            part = first if at == 0 else _part(file, offset + at, min(n, total - at), first.notes)
            yield replace(
                part,
                notes=(*part.notes, "long"),
                start_seconds=at / file.rate,
                whole_seconds=total / file.rate,
            )


def _places(file: Recording, offset: int, total: int, frames: int, long: Long) -> list[int]:
    """Where in the `total` frames behind `offset` the parts of at most `frames` begin."""
    if long == "first":
        return [0]
    if long == "cut":
        return [at for at in range(0, total, frames) if total - at >= MIN_SECONDS * file.rate or not at]
    step = max(1, min(frames, file.rate))  # a second
    energies = list[float]()
    for at in range(0, total, _STEPS_READ * step):
        mono = file.read(offset + at, min(_STEPS_READ * step, total - at))
        energies += [float(np.dot(piece, piece)) for piece in (mono[k : k + step] for k in range(0, len(mono), step))]
    sums = np.cumsum([0.0, *energies])
    starts = np.arange((total - frames) // step + 1)
    ends = np.minimum(starts + frames // step, len(energies))
    return [step * int(np.argmax(sums[ends] - sums[starts]))]


def _part(file: Recording, at: int, frames: int, notes: tuple[Note, ...]) -> Segment:
    """Another part of a file whose first one has these notes."""
    mono = file.read(at, frames)
    if len(mono) < COMPLETE * frames:
        raise BadClip(
            "truncated", f"{len(mono) / file.rate:.3f} s of {frames / file.rate:g} from {at / file.rate:g} s on"
        )
    _check_samples(mono)
    kept: list[Note] = [note for note in notes if note != "antiphase"]
    if file.cancelled:
        kept.append("antiphase")
    return Segment(mono, file.rate, file.channels, tuple(kept))


def open_recording(path: Path) -> Recording:
    """The recording in a file, of which pieces are read as mono. BadClip."""
    return recording.open_recording(path, FFMPEG_SECONDS, FFMPEG_BYTES)


def _segment(file: Recording, start: float, seconds: float, whole: float, listed: bool) -> tuple[Segment, int]:
    """The first `seconds` of the segment that begins at `start`, and the frame of the file that they begin at.

    `listed`: somebody says that there are `seconds` of it. A file that is longer than `whole`, the listed segment
    (of which no more than `seconds` may be wanted), is the recording that the segment was taken from.
    """
    notes: list[Note] = ["ffmpeg"] if file.by_ffmpeg else []
    margin = whole - seconds + MARGIN_SECONDS if start else 0.0
    rate = file.rate
    wanted, limit, offset = round(seconds * rate), round((seconds + margin) * rate), 0
    mono = file.read(0, limit)
    if margin and len(mono) == limit:
        offset = round(start * rate)
        mono = file.read(offset, wanted)
        notes.append("cut")
    promised = file.promised() - offset if len(mono) < COMPLETE * wanted else inf
    if file.cancelled:
        notes.append("antiphase")
    mono = mono[:wanted]

    if not len(mono):
        if offset:
            raise BadClip("outside_segment", f"it begins at {start:g} s, behind the end")
        raise BadClip("no_samples")
    _check_samples(mono)
    if len(mono) < COMPLETE * wanted:
        detail = f"{len(mono) / rate:.3f} s of {seconds:g}"
        if len(mono) < COMPLETE * min(wanted, promised):
            raise BadClip("truncated", detail)
        if listed:
            if len(mono) < MIN_SECONDS * rate:
                raise BadClip("too_short", detail)
            notes.append("short")
    return Segment(mono, rate, file.channels, tuple(notes)), offset


def _check_samples(mono: Float32[np.ndarray, " time"]) -> None:
    peak = max(float(mono.max()), -float(mono.min()))
    if not np.isfinite(peak):
        raise BadClip("non_finite")
    if peak > MAX_PEAK:
        raise BadClip("peak_out_of_range", f"{peak:.3g} times full scale")


def resample(
    waveform: Float32[np.ndarray, " time"], sample_rate: int, new_sample_rate: int
) -> Float32[np.ndarray, " new_time"]:
    """Resample a sound to another rate, ceil(time * new / old) samples of it; soxr HQ (20 bits, linear phase)."""
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
