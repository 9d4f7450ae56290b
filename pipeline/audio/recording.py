"""An open file of sound, read at any place, whoever decodes it. The only reader of recordings there is.

libsndfile decodes each of the file's parts (pipeline/audio/joined.py), and is never believed how long one is where it
only guesses. What it does not know goes to the ffmpeg command, where there is one.
"""

import contextlib
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float32

from pipeline.audio import ffmpeg, joined
from pipeline.audio.badclip import BadClip
from pipeline.audio.downmix import FADE_SECONDS, WINDOW_SECONDS, Block, Downmix

MIN_RATE, MAX_RATE = 4_000, 384_000  # Hz
MAX_SECONDS = 86_400.0  # of sound in one file
MAX_PARTS = 1_000
MAX_PIECE = 1 << 27  # samples that are read at once: half a gigabyte
_BLOCK_SAMPLES = 1 << 17  # half a megabyte of floats: down-mixed while still in the cache
_TRIMMED = 4 * 1152  # an MP3 decoder leaves out the delay of encoder and decoder
_LEAD_IN = 16 * 1152
_MALFORMED = 3  # libsndfile's number of that error


class Decoder(ABC):
    """Blocks of a sound that follow each other."""

    rate: int
    channels: int

    @abstractmethod
    def seek(self, frame: int) -> None:
        """Go to a frame, or to the end where there are fewer."""

    @abstractmethod
    def read(self, frames: int) -> tuple[Block, float]:
        """At most as many frames, none at the end only, and what full scale is in them."""

    @property
    @abstractmethod
    def frames(self) -> int:
        """Frames from beginning to end."""

    @abstractmethod
    def promised(self) -> float:
        """Frames that the file itself announces; infinite when it only says that it is not complete, 0 when nothing.

        Valid when the end has been reached.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of files and processes."""


class Recording:
    """The sound of a file. BadClip for whatever is wrong with it, when it is opened or when it is read."""

    def __init__(self, decoder: Decoder, by_ffmpeg: bool = False) -> None:
        self._decoder, self.by_ffmpeg = decoder, by_ffmpeg
        self.rate, self.channels = decoder.rate, decoder.channels
        self.cancelled = False
        """Whether, in what was read last, a channel stands in for a mean that cancels."""
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise BadClip("rate_out_of_bounds", f"{self.rate} Hz")

    @property
    def frames(self) -> int:
        """Frames from beginning to end: counted where the file does not say, or only guesses."""
        with _blaming():
            frames = self._decoder.frames
        if frames > MAX_SECONDS * self.rate:
            raise BadClip("too_long", f"more than {MAX_SECONDS:g} s")
        return frames

    def promised(self) -> float:
        """Frames that the file announces, as Decoder has it."""
        with _blaming():
            return self._decoder.promised()

    def read(self, start: int, frames: int) -> Float32[np.ndarray, " time"]:
        """Read as many frames from `start` on, or what there is, as one channel."""
        if frames > MAX_PIECE and self.frames - start > MAX_PIECE:
            raise BadClip("too_long", f"more than {MAX_PIECE} samples are wanted of it at once")
        frames = min(frames, MAX_PIECE)
        window, fade = max(1, round(WINDOW_SECONDS * self.rate)), round(FADE_SECONDS * self.rate)
        at, end = start, start + frames
        if self.channels > 1:
            # From the window before the one that `start` lies in, to the end of a window.
            at, end = max(0, start // window - 1) * window, -(-end // window) * window
        mono = np.empty(end - at, np.float32)
        mixer = Downmix(window, fade)
        n = 0
        with _blaming(), np.errstate(all="ignore"):  # of samples that are not finite
            self._decoder.seek(at)
            while n < len(mono):
                left = window - (at + n) % window
                wanted = max(left, (_BLOCK_SAMPLES // self.channels - left) // window * window + left)
                block, full_scale = self._decoder.read(min(wanted, len(mono) - n))
                if not len(block):
                    break
                mixer.mix(block, full_scale, mono[n : n + len(block)])
                n += len(block)
        self.cancelled = mixer.cancelled
        return mono[start - at : min(n, start - at + frames)]

    def blocks(self, frames: int) -> Iterator[Float32[np.ndarray, "channels time"]]:
        """Read all of it with its channels, in pieces of at most as many frames."""
        with _blaming():
            self._decoder.seek(0)
        while True:
            with _blaming():
                block, full_scale = self._decoder.read(frames)
            if not len(block):
                return
            if block.shape[1] != self.channels:
                raise BadClip("undecodable", f"recordings of {self.channels} and {block.shape[1]} channels in one file")
            yield np.ascontiguousarray(block.T, np.float32) / np.float32(full_scale)

    def close(self) -> None:
        """Let go of files and processes."""
        self._decoder.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_recording(path: Path, ffmpeg_seconds: float, ffmpeg_bytes: int) -> Recording:
    """The recording in a regular file. BadClip.

    ffmpeg may take `ffmpeg_seconds` for each `ffmpeg_bytes` of samples.
    """
    try:
        # O_NONBLOCK: should it have become a pipe since it was looked at, open returns.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadClip("missing") from None
    except OSError as error:
        raise BadClip("unreadable", os.strerror(error.errno or 0)) from None
    with contextlib.ExitStack() as stack:
        with _blaming():
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise BadClip("not_regular_file")
            if not size:
                raise BadClip("no_samples", "the file is empty")
            file = _stretch(descriptor, joined.Part(0, size))
            try:
                recording = Recording(_Parts(descriptor, size, joined.parts(file, size)))
                stack.pop_all()
                return recording
            except _Guessed as guess:
                said, is_damaged = str(guess), False
            except soundfile.LibsndfileError as error:
                # Not str(error): that has the descriptor's number in it.
                said, is_damaged = error.error_string.strip().rstrip("."), error.code == _MALFORMED
            file.seek(joined.behind_id3(file, 0))
            container = ffmpeg.container(file.read(16))
            if container is None:
                with contextlib.suppress(soundfile.LibsndfileError, _Guessed):
                    recording = Recording(_Parts(descriptor, size, joined.mpeg(file, size)))
                    stack.pop_all()
                    return recording
        if ffmpeg.executable() is None:
            if container is None:
                raise BadClip("undecodable", said)
            raise BadClip("unsupported_container", f"{container}, and there is no ffmpeg")
        with _blaming():
            converted = _Converted(path, container, ffmpeg_seconds, ffmpeg_bytes, is_damaged)
        try:
            return Recording(converted, by_ffmpeg=True)
        except BadClip:
            converted.close()
            raise


@contextlib.contextmanager
def _blaming() -> Iterator[None]:
    """Turn the errors of decoders into BadClip."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise BadClip("undecodable", error.error_string.strip().rstrip(".")) from None
    except (joined.Damaged, _Guessed) as error:
        raise BadClip("undecodable", str(error)) from None
    except ffmpeg.Failure as failure:
        raise BadClip("unreadable" if failure.of_machine else "undecodable", failure.text) from None
    except OSError as error:
        raise BadClip("unreadable", os.strerror(error.errno or 0)) from None


# ----------------------------------------------------------------------------------------------------------- libsndfile


class _Guessed(Exception):
    """libsndfile takes a part to be shorter than it is."""


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file read to its end, not to where its header puts the end.

    As long as a SoundFile calls itself seekable, each read is cut at `frames` and followed by a seek. That ends a FLAC
    without a total (valid: ffmpeg writes it into a pipe) at its last whole block, with an error, and gives a damaged
    Ogg its full length, filled with what was in the buffer.
    """

    def seekable(self) -> bool:
        return False


class _Stretch(io.RawIOBase):
    """Some bytes, and behind them a stretch of a file: what libsndfile is given for a part."""

    def __init__(self, descriptor: int, part: joined.Part) -> None:
        self._descriptor, self._part, self._at = descriptor, part, 0
        self._size = len(part.head) + part.stop - part.start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        head = self._part.head[self._at : self._at + len(buffer)]
        place = self._part.start + max(0, self._at - len(self._part.head))
        wanted = max(0, min(len(buffer) - len(head), self._part.stop - place))
        content = head + (os.pread(self._descriptor, wanted, place) if wanted else b"")
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _stretch(descriptor: int, part: joined.Part) -> io.BufferedReader:
    """A part of a file to read from. The descriptor's own place, from which libsndfile reads, stays as it is."""
    return io.BufferedReader(_Stretch(descriptor, part), 1 << 16)


class _Parts(Decoder):
    """The parts of a file, one behind the other, each decoded by libsndfile."""

    def __init__(self, descriptor: int, size: int, parts: Iterator[joined.Part]) -> None:
        self._descriptor, self._size, self._parts, self._more = descriptor, size, parts, True
        self._known: list[joined.Part] = []
        self._lengths: list[int] = []
        self._sound: _Sequential | None = None
        self._at, self._place = -1, 0  # the part that is open, and the frame in it that comes next
        self._buffer = np.empty((0, 0), np.int16)
        try:
            if not self._open(0):
                raise _Guessed("no chain of MPEG frames")
            assert self._sound is not None
            self.rate, self.channels = int(self._sound.samplerate), int(self._sound.channels)
        except BaseException:
            self._let_go()
            raise

    def seek(self, frame: int) -> None:
        at = 0
        while self._open(at):
            length = self._length(at) if frame else 0
            if frame <= length or not self._is_there(at + 1):
                assert self._sound is not None
                if self._place != min(frame, length):
                    # An MP3 frame takes bits out of those before it, more of them than libsndfile goes back for.
                    lead = min(frame, length, _LEAD_IN if self._sound.format == "MP3" else 0)
                    self._sound.seek(min(frame, length) - lead)
                    if lead:
                        self._sound.buffer_read_into(np.empty((lead, self._sound.channels), np.float32), "float32")
                    self._place = min(frame, length)
                return
            frame, at = frame - length, at + 1

    def read(self, frames: int) -> tuple[Block, float]:
        while True:
            assert self._sound is not None
            # libsndfile takes 0.9 ms to make floats of a 10 s stereo wav of 16 bits, and 0.1 to hand the integers over.
            integers = self._sound.subtype == "PCM_16"
            shape, dtype = (frames, self._sound.channels), np.dtype(np.int16 if integers else np.float32)
            if self._buffer.dtype != dtype or self._buffer.shape[1] != shape[1] or len(self._buffer) < frames:
                self._buffer = np.empty(shape, dtype)
            wanted = self._buffer[: min(frames, self._left(frames))]
            n = self._sound.buffer_read_into(wanted, dtype.name) if len(wanted) else 0
            self._place += n
            if n or not frames or not self._open(self._at + 1):
                return wanted[:n], 32768.0 if integers else 1.0

    def _left(self, frames: int) -> int:
        """How many of the next `frames` frames the open part may be asked for."""
        assert self._sound is not None
        left = int(self._sound.frames) - self._place
        # libsndfile's FLAC decoder goes on into the next part's header, and gives up there.
        ends_inside = self._sound.format == "FLAC" and left < frames and self._is_there(self._at + 1)
        return max(0, left) if ends_inside else frames

    @property
    def frames(self) -> int:
        at = total = 0
        while self._is_there(at):
            self._open(at)
            total, at = total + self._length(at), at + 1
            if total > MAX_SECONDS * self.rate:
                break
        return total

    def promised(self) -> float:
        last = len(self._known) - 1
        self._open(last)
        assert self._sound is not None
        part, log = self._known[last], self._sound.extra_info
        own = joined.promised_frames(log, int(self._sound.frames), part)
        return sum(self._length_of_known(at) for at in range(last)) + own if own else 0.0

    def close(self) -> None:
        self._let_go()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _let_go(self) -> None:
        if self._sound is not None:
            self._sound.close()
        self._sound, self._at = None, -1

    def _is_there(self, at: int) -> bool:
        """Whether there is a part of this number."""
        while len(self._known) <= at and self._more:
            part = next(self._parts, None)
            if part is None:
                self._more = False
            else:
                self._known.append(part)
            if len(self._known) > MAX_PARTS:
                raise joined.Damaged(f"more than {MAX_PARTS} recordings in one file")
        return at < len(self._known)

    def _open(self, at: int) -> bool:
        """Open the part of this number, at its beginning; whether there is one."""
        if at != self._at:
            if not self._is_there(at):
                return False
            self._let_go()
            part = self._known[at]
            if part.head or (part.start, part.stop) != (0, self._size):
                self._sound = _Sequential(_stretch(self._descriptor, part))
            else:
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                self._sound = _Sequential(self._descriptor, closefd=False)
            self._at, self._place = at, 0
            if not part.head and self._sound.frames < part.frames - _TRIMMED:
                raise _Guessed(f"{self._sound.frames} frames of {part.frames}")
            if at and self._sound.samplerate != self.rate:
                raise joined.Damaged(f"recordings of {self.rate} and {self._sound.samplerate} Hz in one file")
        return True

    def _length(self, at: int) -> int:
        """Frames of the part that is open."""
        if at == len(self._lengths):
            assert self._sound is not None
            length, counted = int(self._sound.frames), self._known[at].frames
            length = min(length, counted) if counted else length
            if length >= joined.UNKNOWN_FRAMES - 1:
                length = self._counted()
            self._lengths.append(length)
        return self._lengths[at]

    def _counted(self) -> int:
        """Frames of the part that is open: it is decoded to know them, and opened again with its length."""
        assert self._sound is not None
        block = np.empty((max(1, _BLOCK_SAMPLES // self._sound.channels), self._sound.channels), np.float32)
        self._sound.seek(0)
        length = self._place = 0
        while (n := self._sound.buffer_read_into(block, "float32")) and length <= MAX_SECONDS * self.rate:
            length += n
        self._place = length
        part, at = self._known[self._at], self._at
        file = _stretch(self._descriptor, joined.Part(0, self._size))
        file.seek(start := joined.behind_id3(file, part.start))
        head = file.read(26)
        if head[:4] == b"fLaC" and length:
            fields = int.from_bytes(head[18:26]) >> 36 << 36 | length
            self._known[at] = joined.Part(start + 26, part.stop, head[:18] + fields.to_bytes(8), length)
            self._let_go()
            self._open(at)
        return length

    def _length_of_known(self, at: int) -> int:
        self._open(at)
        return self._length(at)


# --------------------------------------------------------------------------------------------------------------- ffmpeg


class _Converted(Decoder):
    """Decoder of a file that ffmpeg converts, by a process that is started at the place that is wanted."""

    def __init__(self, path: Path, container: str | None, seconds: float, n_bytes: int, is_damaged: bool) -> None:
        self._path, self._container, self._seconds, self._n_bytes = path, container, seconds, n_bytes
        self._stream = self._start(0)
        self._at, self._frames, self._complained = 0, -1, is_damaged
        self.rate, self.channels = self._stream.rate, self._stream.channels

    def _start(self, second: int) -> ffmpeg.Stream:
        return ffmpeg.Stream(self._path, self._container, second, self._seconds, self._n_bytes)

    def seek(self, frame: int) -> None:
        if not self._at <= frame <= self._at + self.rate:
            self._stream.close()
            self._at = frame // self.rate * self.rate
            self._stream = self._start(frame // self.rate)
            if (self._stream.rate, self._stream.channels) != (self.rate, self.channels):
                raise ffmpeg.Failure(f"{self._stream.rate} Hz, {self._stream.channels} channels in between")
        self._at += self._stream.skip(frame - self._at)

    def read(self, frames: int) -> tuple[Block, float]:
        block = self._stream.read(frames)
        self._at += len(block)
        self._complained = self._complained or self._stream.complained
        return block, 1.0

    @property
    def frames(self) -> int:
        if self._frames < 0:
            self.seek(0)
            most = int(MAX_SECONDS * self.rate) + 1
            self._frames = self._stream.skip(most)
            self._at = self._frames
            self._complained = self._complained or self._stream.complained
        return self._frames

    def promised(self) -> float:
        return np.inf if self._complained else 0.0

    def close(self) -> None:
        self._stream.close()
