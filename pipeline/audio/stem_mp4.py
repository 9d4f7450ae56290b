"""One audio stream of an .mp4 file (Native Instruments' Stems: a mixture and its parts in one file), read by seeking.

Lossy streams have no samples to seek to: a packet decodes to the right 1,024 samples only behind the packets before it,
and noise that the encoder has left out is drawn by the decoder anew, with a state of its own. Therefore a stream is
decoded in blocks at fixed places, each by a decoder of its own that starts some packets earlier:

    packets    ... 27 | 28 29 30 31 | 32 33 34  ...  62 63 | 64 ...
                        lead-in       block 1                block 2

so that a sample is a function of its place alone, whatever was read before and in whatever order. One block is kept;
who reads on decodes no packet twice but the lead-in, and memory does not grow with the length of the file.

Sample n is what the file's own time line puts at n / rate, where an encoder's delay has a negative time and is left
out: the streams of a file stay aligned, whatever the delay of each.

FFmpeg decodes, through PyAV, imported when the first file is opened. It is told that it reads an mp4 from a local file,
so that a playlist in disguise cannot make it read others. This module must not import torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from pipeline.audio.badclip import BadClip
from pipeline.audio.recording import MAX_RATE, MIN_RATE

if TYPE_CHECKING:
    from av.audio.codeccontext import AudioCodecContext

BLOCK = 32 * 1024  # samples: 0.7 s. Smaller ones repeat more lead-in, larger ones decode more beside a short piece
LEAD_IN = 4 * 1024  # samples: four packets, of which the decoder needs one
SKIP_MANUAL = 1 << 29  # AV_CODEC_FLAG2_SKIP_MANUAL: the decoder cuts nothing off; time stamps tell what to leave out
COMPLETE = 0.99  # of the announced length


@contextmanager
def _decoding() -> Iterator[None]:
    """FFmpeg's errors as BadClip, without the path that they have in them."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as error:
        if isinstance(error, MemoryError):  # no fault of the file
            raise
        raise BadClip("unreadable" if isinstance(error, OSError) else "undecodable", error.strerror or "") from None


class StemStream:
    """Audio stream number `stream` of a file. BadClip for whatever is wrong with it."""

    def __init__(self, path: Path, stream: int) -> None:
        import av
        from av.stream import Discard

        size = path.stat().st_size
        if not size:
            raise BadClip("no_samples", "the file is empty")
        with _decoding():
            self._container = av.open(
                f"file:{os.path.abspath(path)}",
                "r",
                format="mp4",
                container_options={"protocol_whitelist": "file"},
                metadata_errors="ignore",  # titles in other alphabets than they say
            )
        try:
            found = self._container.streams.audio
            if stream >= len(found):
                raise BadClip("missing", f"the file has {len(found)} audio streams, and none of number {stream}")
            self._stream = found[stream]
            for other in self._container.streams:
                if other is not self._stream:
                    other.discard = Discard.all  # is not even read
            self._check(size)
        except BaseException:
            self._container.close()
            raise
        self._at, self._block = -1, np.zeros((0, self.channels), np.float32)

    def _check(self, size: int) -> None:
        """Rate, channels and frames, as far as they can be told without decoding."""
        stream, context = self._stream, self._stream.codec_context
        if context.name != "aac":
            raise BadClip("undecodable", f"{context.name}, not AAC")
        self.rate, self.channels = int(context.sample_rate), int(context.channels)
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise BadClip("rate_out_of_bounds", f"{self.rate} Hz")
        index = stream.index_entries
        assert stream.time_base is not None
        self._unit = stream.time_base * self.rate  # samples
        if not len(index) or not stream.duration:
            raise BadClip("no_samples")
        last = index[len(index) - 1]
        if last.pos + last.size > size:
            raise BadClip("truncated", f"{size} bytes of {last.pos + last.size}")
        stated = round(((stream.start_time or 0) + stream.duration) * self._unit)
        there = stated
        if len(index) > 1:
            there = round((2 * last.timestamp - index[len(index) - 2].timestamp) * self._unit)
        if there < COMPLETE * stated:
            raise BadClip("truncated", f"{max(0, there)} frames of {stated}")
        self.frames = min(there, stated)
        if self.frames <= 0:
            raise BadClip("no_samples")

    def read(self, start: int, frames: int) -> Float32[np.ndarray, "frames channels"]:
        """`frames` from `start` on, all of which lie inside of the stream."""
        piece = np.empty((frames, self.channels), np.float32)
        done = 0
        while done < frames:
            at, within = divmod(start + done, BLOCK)
            if at != self._at:
                self._block = self._decode(at * BLOCK, min(BLOCK, self.frames - at * BLOCK))
                self._at = at
            some = self._block[within : within + frames - done]
            piece[done : done + len(some)] = some
            done += len(some)
        return piece

    def _decode(self, start: int, frames: int) -> Float32[np.ndarray, "frames channels"]:
        """A block, by a new decoder. Zeros where the file's time line has a gap."""
        block = np.zeros((frames, self.channels), np.float32)
        decoder = self._decoder()
        reached = None
        with _decoding():
            self._container.seek(round((start - LEAD_IN) / self._unit), stream=self._stream)
            for packet in self._container.demux(self._stream):
                for frame in decoder.decode(packet if packet.size else None):
                    if frame.format.name != "fltp" or frame.sample_rate != self.rate or frame.pts is None:
                        raise BadClip("undecodable", f"{frame.format.name} at {frame.sample_rate} Hz in between")
                    samples = frame.to_ndarray()
                    if len(samples) != self.channels:
                        raise BadClip("undecodable", f"{len(samples)} channels of {self.channels} in between")
                    first = round(frame.pts * self._unit) - start
                    reached = first + samples.shape[1]
                    if reached > 0 and first < frames:
                        block[max(0, first) : reached] = samples[:, max(0, -first) : frames - first].T
                if reached is not None and reached >= frames:
                    return block
        raise BadClip("truncated", f"{max(0, start + (reached or 0))} frames of {self.frames}")

    def _decoder(self) -> "AudioCodecContext":
        import av

        context = self._stream.codec_context
        decoder = av.CodecContext.create("aac", "r")
        decoder.extradata = context.extradata
        decoder.sample_rate = context.sample_rate
        decoder.layout = context.layout
        decoder.flags2 = SKIP_MANUAL
        return decoder

    def close(self) -> None:
        """A file that is not closed goes with the object."""
        self._container.close()
