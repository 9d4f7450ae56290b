"""Where in a file its recordings lie: an MP3, Ogg, FLAC or WAV file may hold several, one behind the other.

A decoder that opens such a file reads the first recording and calls it the whole, or guesses the length of an MP3 from
its first frames. A Part is a stretch of the file that a decoder reads right; together the parts are all of its sound.

    ID3 | Xing | frame frame ...           counted by its first frame: read as it is
    frame frame frame ...                  a counted first frame is put before it
    OggS(first) OggS ... OggS(last) | OggS(first) ...       a part for each chain of pages
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from math import inf

UNKNOWN_FRAMES = 1 << 36  # what FLAC's 36 bits can say, and more, is a header that does not know
STRAY = 1024  # bytes: what lies between two MPEG frames and is longer is damage
_SEARCHED = 1 << 16  # bytes in which the first MPEG frame must begin
_CHAIN = 4  # frames, one behind the other, are no accident
_CHUNK = 1 << 20

# kbit/s by the index in the header: MPEG 1 layers I, II, III; MPEG 2 layer I; MPEG 2 layers II and III.
_BITRATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)


class Damaged(ValueError):
    """The recordings of a file cannot be told apart, since there is something else in between."""


@dataclass(frozen=True)
class Part:
    """Bytes from `start` to `stop` of a file, behind the bytes `head`, are one recording."""

    start: int
    stop: int
    head: bytes = b""
    frames: int = 0
    """Samples per channel that are there, where they were counted."""
    promised: int = 0
    """Samples per channel that the recording says it has, where a decoder is not told."""


def parts(file: BufferedReader, size: int) -> Iterator[Part]:
    """The recordings of a file of `size` bytes, in order; all of the file as one, where nothing else is known of it.

    Each is looked for when the one before is used up. Damaged when an MPEG stream is interrupted by something else.
    """
    file.seek(0)
    start = behind_id3(file, 0)
    file.seek(start)
    head = file.read(12)
    if head[:4] == b"OggS":
        return _ogg(file, start, size)
    if head[:4] == b"fLaC":
        return _flac(file, start, size)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return _riff(file, size)
    if _Frame.read(head[:4]) is not None:
        return _mpeg_or_whole(file, size)
    return iter((Part(0, size),))


def behind_id3(file: BufferedReader, at: int) -> int:
    """Where the ID3 tags that begin there end."""
    while True:
        file.seek(at)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
            return at
        footer = 10 if head[5] & 0x10 else 0
        at += 10 + footer + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])


# ----------------------------------------------------------------------------------------------------------- MPEG audio


@dataclass(frozen=True, slots=True)
class _Frame:
    """An MPEG frame, as the four bytes of its header describe it."""

    version: int
    layer: int
    rate: int
    mono: bool
    size: int

    @staticmethod
    def read(header: bytes) -> "_Frame | None":
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
            return None
        version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
        bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
        if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
            return None
        kind = 1 if version == 3 else 2
        hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
        bits = 1000 * _BITRATES[kind, layer][bitrate]
        padding = header[2] >> 1 & 1
        if layer == 1:
            size = (12 * bits // hertz + padding) * 4
        else:
            size = (72 if layer == 3 and kind == 2 else 144) * bits // hertz + padding
        return _Frame(version, layer, hertz, header[3] >> 6 == 3, size)

    @property
    def samples(self) -> int:
        return 384 if self.layer == 1 else 576 if self.layer == 3 and self.version != 3 else 1152

    @property
    def side_size(self) -> int:
        """Bytes of side information in a frame of layer III."""
        return (17 if self.mono else 32) if self.version == 3 else (9 if self.mono else 17)

    def goes_with(self, other: "_Frame | None") -> bool:
        """Whether the other is of the same stream. Its channels may differ, as in joint stereo."""
        return other is not None and (self.version, self.layer, self.rate) == (other.version, other.layer, other.rate)


@dataclass(frozen=True)
class _Count:
    """A first frame without sound that says how many follow (of Xing, of LAME or of Fraunhofer)."""

    frames: int | None
    size: int | None
    """In bytes, this frame included."""
    understood: bool
    """libsndfile reads it."""


def _count(file: BufferedReader, at: int, frame: _Frame) -> _Count | None:
    if frame.layer != 3:
        return None
    file.seek(at)
    content = file.read(frame.size)
    tag = content[4 + frame.side_size :][:16]
    if tag[:4] in (b"Xing", b"Info"):
        flags, found = int.from_bytes(tag[4:8]), tag[8:]
        frames = int.from_bytes(found[:4]) if flags & 1 else None
        found = found[4:] if flags & 1 else found
        return _Count(frames or None, (int.from_bytes(found[:4]) or None) if flags & 2 else None, True)
    if content[36:40] == b"VBRI":
        return _Count(int.from_bytes(content[50:54]) or None, int.from_bytes(content[46:50]) or None, False)
    return None


def mpeg(file: BufferedReader, size: int) -> Iterator[Part]:
    """The recordings of an MP3 file, whatever lies before the first frame; none without a chain of frames."""
    at = _find(file, behind_id3(file, 0), size, _SEARCHED)
    while at is not None:
        file.seek(at)
        frame = _Frame.read(file.read(4))
        assert frame is not None
        count = _count(file, at, frame)
        end = at + count.size if count and count.size and count.frames and count.understood else None
        if count and end and (end >= size or _is_boundary(file, end, size)):
            yield Part(at, min(end, size))
            at = _next(file, min(end, size), size)
            continue
        first = at + frame.size if count else at
        end, n = _walk(file, first, size, frame)
        if n:
            head = _counted(file, first, n) if frame.layer == 3 else b""
            promised = count.frames if count and count.frames else 0
            yield Part(first, end, head, n * frame.samples, promised * frame.samples)
        at = _next(file, end, size)


def _mpeg_or_whole(file: BufferedReader, size: int) -> Iterator[Part]:
    """The recordings of an MP3 file; all of it where its frames do not say how long they are."""
    found = False
    for part in mpeg(file, size):
        found = True
        yield part
    if not found:
        yield Part(0, size)


def _walk(file: BufferedReader, at: int, size: int, first: _Frame) -> tuple[int, int]:
    """Where the frames of a stream end, and how many there are. A frame that is cut at the end of the file counts."""
    n = 0
    while at < size:
        file.seek(at)
        frame = _Frame.read(file.read(4))
        if frame is None or not first.goes_with(frame):
            break
        if n and _count(file, at, frame):
            break
        if at + frame.size > size:
            return size, n
        at, n = at + frame.size, n + 1
    return at, n


def _counted(file: BufferedReader, at: int, n: int) -> bytes:
    """A first frame for the frames that begin there, that says that they are `n`."""
    file.seek(at)
    header = bytearray(file.read(4))
    header[1] |= 1  # no checksum
    header[2] = 9 << 4 | header[2] & 0x0C
    frame = _Frame.read(bytes(header))
    assert frame is not None
    content = bytes(header) + bytes(frame.side_size) + b"Xing" + (1).to_bytes(4) + n.to_bytes(4)
    return content + bytes(frame.size - len(content))


def _next(file: BufferedReader, at: int, size: int) -> int | None:
    """Where the next stream of MPEG frames begins, behind tags, zeros and a little of anything else."""
    at = _behind_tags(file, at, size)
    if at >= size:
        return None
    found = _find(file, at, size, size)
    if found is None:
        return None
    file.seek(at)
    left = found - at
    while left > 0:
        stray = file.read(min(left, _CHUNK))
        if not stray:
            break
        if found - at > STRAY and stray.strip(b"\0"):
            raise Damaged(f"{found - at} bytes from byte {at} on are no MPEG frames")
        left -= len(stray)
    return found


def _behind_tags(file: BufferedReader, at: int, size: int) -> int:
    while at < size:
        before, at = at, behind_id3(file, at)
        file.seek(at)
        head = file.read(32)
        if head[:3] == b"TAG":
            at += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            header = head[23] & 0x20  # this is the header, behind which is the rest; or a footer alone
            at += 32 + (int.from_bytes(head[12:16], "little") if header else 0)
        if at == before:
            break
    return at


def _is_boundary(file: BufferedReader, at: int, size: int) -> bool:
    """Whether a stream can end there: tags to the end of the file follow, or another stream."""
    after = _behind_tags(file, at, size)
    if after >= size:
        return True
    file.seek(after)
    frame = _Frame.read(file.read(4))
    return frame is not None and _count(file, after, frame) is not None


def _find(file: BufferedReader, at: int, size: int, within: int) -> int | None:
    """The first place in the next `within` bytes where a chain of frames begins."""
    stop = min(size, at + within)
    while at < stop:
        file.seek(at)
        content = file.read(min(_CHUNK, stop - at + 3))
        place = content.find(b"\xff")
        while 0 <= place < len(content) - 3:
            if _Frame.read(content[place : place + 4]) and _is_chain(file, at + place, size):
                return at + place
            place = content.find(b"\xff", place + 1)
        at += max(1, len(content) - 3)
    return None


def _is_chain(file: BufferedReader, at: int, size: int) -> bool:
    first = None
    for _ in range(_CHAIN):
        file.seek(at)
        frame = _Frame.read(file.read(4))
        if frame is None or (first is not None and not first.goes_with(frame)):
            return False
        first, at = first or frame, at + frame.size
        if at >= size:
            break
    return True


# ------------------------------------------------------------------------------------------------------------- the rest


def _ogg(file: BufferedReader, start: int, size: int) -> Iterator[Part]:
    """A part for each chain of pages: it begins with the pages that call themselves first."""
    at, in_head = start, True
    while at < size:
        file.seek(at)
        head = file.read(27)
        if len(head) < 27 or head[:4] != b"OggS":
            found = _search(file, b"OggS", at + 1, size)
            if found is None:
                break
            at = found
            continue
        is_first = bool(head[5] & 2)
        if is_first and not in_head:
            yield Part(start, at)
            start = at
        in_head = is_first
        at += 27 + head[26] + sum(file.read(head[26]))
    yield Part(start, size)


_FLAC = b"fLaC\0\0\0\x22"  # and the header of the block of stream info, which comes first


def _flac(file: BufferedReader, start: int, size: int) -> Iterator[Part]:
    """A part for each header. The second is looked for behind the samples that the first has announced."""
    file.seek(start)
    head = file.read(26)
    total = int.from_bytes(head[18:26]) & (1 << 36) - 1
    following = None
    if not 0 < total < (1 << 36) - 1:
        following = _search(file, _FLAC, start + 8, size)
        yield Part(0, following or size)
    else:
        yield Part(0, size)
        following = _search(file, _FLAC, start + 8, size)
    while following is not None:
        start, following = following, _search(file, _FLAC, following + 8, size)
        yield Part(start, following or size)


def _riff(file: BufferedReader, size: int) -> Iterator[Part]:
    """The first form, and those that follow right behind it."""
    start = 0
    while True:
        file.seek(start)
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        stop = start + 8 + int.from_bytes(head[4:8], "little")
        stop += stop & 1
        yield Part(start, size if start == 0 else min(stop, size))
        start = stop


def _search(file: BufferedReader, what: bytes, at: int, size: int) -> int | None:
    while at < size:
        file.seek(at)
        content = file.read(_CHUNK)
        place = content.find(what)
        if place >= 0:
            return at + place
        if len(content) < _CHUNK:
            return None
        at += len(content) - len(what) + 1
    return None


def promised_frames(log: str, frames: int, part: Part) -> float:
    """Frames that a part announces.

    libsndfile shortens the count to what is there, and leaves what it shortened in its log.
    """
    if "Last page lacks an end-of-stream bit" in log:
        return inf
    if part.promised > frames:
        return float(part.promised)
    # 0xFFFFFFFF and the like are what a writer into a pipe puts there: it could not know.
    for name in ("data", r"\s*SSND", r"\s*BODY", r"\s*Data Size\s*", "riff"):
        if found := re.search(rf"^{name} : (\d+) \(should be (\d+)\)", log, re.MULTILINE):
            stated, there = int(found[1]), int(found[2])
            return frames * stated / there if there > 0 and (stated < 0x7FFF_0000 or name == "riff") else 0.0
    for pattern in (r"frame count \d+ does not match value from 'ds64' chunk of (\d+)", r"^\s*Frames\s*: (\d+)"):
        if (found := re.search(pattern, log, re.MULTILINE)) and frames < int(found[1]) < UNKNOWN_FRAMES - 1:
            return float(found[1])
    return float(frames) if frames < UNKNOWN_FRAMES - 1 else 0.0
