"""Audio files in blocks: by the one reader, or PyAV where ffmpeg is missing; stems appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from jaxtyping import Float

from pipeline import audio
from pipeline.audio.badclip import BadClip
from pipeline.separate.targets import Unusable, one_line

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".mkv", ".aif", ".aiff", ".aac")
BLOCK_FRAMES = 1 << 17
CODEC_DELAY = 4 * 1152  # samples that a decoder of MP3 may leave out of those that are announced

Format = Literal["int16", "int24", "float32", "flac", "mp3"]
SUFFIX_OF: dict[Format, str] = {"int16": "wav", "int24": "wav", "float32": "wav", "flac": "flac", "mp3": "mp3"}
_SUBTYPE = {"int16": "PCM_16", "int24": "PCM_24", "float32": "FLOAT", "flac": "PCM_24", "mp3": "MPEG_LAYER_III"}

Block = Float[np.ndarray, "channels time"]


@dataclass(frozen=True)
class Recording:
    """A readable audio file; `frames` is None where only decoding it would say how long it is."""

    path: Path
    sample_rate: int
    channels: int
    frames: int | None
    by_av: bool = False  # PyAV decodes it

    def blocks(self) -> Iterator[Block]:
        """Decode it block by block, float32; Unusable where it cannot be decoded, is cut off or is not finite."""
        done = 0
        for block in (_av_blocks if self.by_av else _blocks)(self.path):
            if not np.isfinite(block).all():
                raise Unusable(f"{self.path}: a sample near {done / self.sample_rate:.2f} s is not finite")
            done += block.shape[1]
            yield block
        if not done:
            raise Unusable(f"{self.path}: it holds no sound")


def open_recording(path: Path) -> Recording:
    """Open a file; Unusable, with its name and why, where it is none that can be read."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise Unusable(f"{path}: it is a directory")
        if not path.is_file():
            raise Unusable(f"{path}: it is no regular file")
        if not os.access(path, os.R_OK):
            raise Unusable(f"{path}: no permission to read it")
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from error
    if size == 0:
        raise Unusable(f"{path}: it is empty")
    try:
        with audio.open_recording(path.resolve()) as file:
            return Recording(path, file.rate, file.channels, None if file.by_ffmpeg else file.frames)
    except BadClip as bad:
        if bad.reason == "unsupported_container":  # there is no ffmpeg
            return _open_av(path)
        raise _unusable(path, bad) from bad


def find_recordings(paths: list[Path]) -> list[Path]:
    """List the files of `paths`, folders with all that lies below them by a suffix that is read, each once."""
    found: dict[Path, None] = {}
    for path in paths:
        if os.path.isdir(path):
            for folder, folders, names in os.walk(path):  # links to folders are not followed
                folders.sort()
                found |= {Path(folder, n): None for n in sorted(names) if Path(n).suffix.lower() in SUFFIXES}
        else:
            found[path] = None
    return list(found)


class StemWriter:
    """Takes one stem block by block into a temporary file, and makes the audio file of it in the end.

    clip   rescale: a stem that exceeds full scale is made quieter as a whole. clamp: its peaks are cut. Float files
           hold what is above full scale as it is
    """

    def __init__(self, path: Path, sample_rate: int, channels: int, kind: Format, clip: str) -> None:
        self.path, self.sample_rate, self.channels, self.kind, self.clip = path, sample_rate, channels, kind, clip
        self.peak, self.energy = 0.0, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._raw = tempfile.TemporaryFile(dir=path.parent)

    def write(self, block: Block) -> None:
        """Append a block (channels, time)."""
        self.peak = max(self.peak, float(np.abs(block).max(initial=0.0)))
        self.energy += float(np.square(block, dtype=np.float64).sum())
        self._raw.write(np.ascontiguousarray(block.T, np.float32).tobytes())

    def finish(self) -> Path:
        """Write the audio file under its name, whole; return its path."""
        gain = np.float32(1 / self.peak if self.peak > 1 and self.clip == "rescale" and self.kind != "float32" else 1)
        handle, temporary = tempfile.mkstemp(
            prefix=".separate-", suffix=f".{SUFFIX_OF[self.kind]}", dir=self.path.parent
        )
        os.close(handle)
        try:
            with soundfile.SoundFile(
                temporary, "w", self.sample_rate, self.channels, _SUBTYPE[self.kind], format=_format(self.kind)
            ) as file:
                for block in self.blocks():
                    file.write((block.T * gain) if self.kind == "float32" else (block.T * gain).clip(-1, 1))
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, self.path)
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, soundfile.LibsndfileError | TypeError | ValueError):
                raise Unusable(f"{self.path}: {one_line(error)}") from error
            raise
        finally:
            self.close()
        return self.path

    def blocks(self) -> Iterator[Block]:
        """Read back what was written, block by block."""
        self._raw.seek(0)
        while chunk := self._raw.read(BLOCK_FRAMES * 4 * self.channels):
            yield np.frombuffer(chunk, np.float32).reshape(-1, self.channels).T

    def close(self) -> None:
        """Throw the temporary file away."""
        self._raw.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _format(kind: Format) -> str:
    return {"flac": "FLAC", "mp3": "MP3"}.get(kind, "WAV")


def _blocks(path: Path) -> Iterator[Block]:
    try:
        with audio.open_recording(path.resolve()) as file:
            done = 0
            for block in file.blocks(BLOCK_FRAMES):
                done += block.shape[1]
                yield block
            promised = file.promised()
    except BadClip as bad:
        raise _unusable(path, bad) from bad
    spare = CODEC_DELAY if path.suffix.lower() == ".mp3" else 0
    if done + spare < promised < np.inf:
        raise Unusable(f"{path}: it is cut off after {done} of {promised:.0f} samples")


def _unusable(path: Path, bad: BadClip) -> Unusable:
    return Unusable(f"{path}: {str(bad).replace('_', ' ')}")


def _open_av(path: Path) -> Recording:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise Unusable(f"{path}: it holds no sound")
            context = container.streams.audio[0].codec_context
            if context is None:
                raise Unusable(f"{path}: its sound is of a kind that cannot be decoded")
            rate, channels = context.sample_rate, context.channels
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"{path}: it is no audio file that can be read ({one_line(error)})") from error
    if not rate or not channels:
        raise Unusable(f"{path}: it states no sample rate or no channels")
    return Recording(path, rate, channels, None)


def _av_blocks(path: Path) -> Iterator[Block]:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            channels = stream.codec_context.channels
            layout: Any = stream.codec_context.layout
            planes = av.AudioResampler(format="fltp", layout=layout, rate=stream.codec_context.sample_rate)
            for frame in container.decode(stream):
                for converted in planes.resample(frame):
                    yield converted.to_ndarray().reshape(channels, -1)
            for converted in planes.resample(None):
                yield converted.to_ndarray().reshape(channels, -1)
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"{path}: {one_line(error)}") from error
