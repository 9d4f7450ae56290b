"""Where clips come from. The folder is the registry: `data.source: esc50` in params.yaml is datasets/esc50.py.

A dataset is a module with

    def clips(root: Path, subset: str, counts: Counter[str] | None = None) -> Iterator[Clip]

which yields the clips of one subset sorted by clip_id, those without audio included (path None). A mistake in the
metadata raises ValueError naming the file and the line. What was met and passed over is added to `counts`.

A dataset that makes its own files has, besides, `class Options(Params)`, its own section of params.yaml, and

    def prepare(root: Path, options: Options) -> None

which brings them about under `root`: it does nothing when they are there, and continues after a kill.
"""

import csv
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.core import ontology
from pipeline.core.registry import Registry

logger = logging.getLogger(__name__)

CLIP_ID = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_TAKE = re.compile(r"[1-5]-(\d+)-[A-Z](?:-\d+)?", re.ASCII)
_SEGMENT = re.compile(r"([A-Za-z0-9_-]{11})_\d+", re.ASCII)

# What soundfile, or ffmpeg where it is installed, can open: the suffix, and how such a file begins. Every reader and
# pipeline/datasets/_unpack.py go by this table. Of two files of one sound the first in this order is taken.
_AUDIO_KINDS = {
    ".wav": rb"(RIFF|RIFX|RF64|BW64).{4}WAVE",
    ".w64": rb"riff\x2e\x91\xcf\x11",
    ".flac": rb"fLaC",
    ".aiff": rb"FORM.{4}AIF[FC]",
    ".aif": rb"FORM.{4}AIF[FC]",
    ".au": rb"\.snd|dns\.",
    ".caf": rb"caff",
    ".ogg": rb"OggS",
    ".oga": rb"OggS",
    ".opus": rb"OggS",
    ".mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",  # MPEG 1, 2 or 2.5, layer III
    ".m4a": rb".{4}ftyp",
    ".aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    ".mp4": rb".{4}ftyp",
    ".mov": rb".{4}(ftyp|moov|mdat|wide)",
    ".webm": rb"\x1aE\xdf\xa3",
    ".mkv": rb"\x1aE\xdf\xa3",
    ".wma": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
}
AUDIO_SUFFIXES = tuple(_AUDIO_KINDS)


def audio_suffix(content: bytes) -> str | None:
    """Suffix of the kind of audio that content begins like; None when it is no kind that can be read."""
    kinds = _AUDIO_KINDS.items()
    return next((suffix for suffix, pattern in kinds if re.match(pattern, content, re.DOTALL)), None)


@dataclass(frozen=True, slots=True)
class Clip:
    """A weakly labelled excerpt: what is in it, not when."""

    clip_id: str
    """[A-Za-z0-9_-]+, unique in its subset. The key of a WebDataset sample: a dot would cut it."""

    labels: tuple[str, ...]
    """Mids of the 527 classes, without repetition, sorted by class index; at least one."""

    path: str | None
    """Relative to the root, with /; None: listed, but its audio is not there. It may name something that is not
    a regular file (a link, a pipe): whoever opens it looks first (lstat)."""

    start_seconds: float
    end_seconds: float
    """The excerpt's place in the recording that it was cut from; an infinite end is one that nobody has listed."""

    recording: str
    """The recording (upload, take) that the clip was cut from; the clip id where the source knows none. Train and eval
    share no recording, and statistics resample recordings, because clips of one recording are not independent."""

    def __post_init__(self) -> None:
        if not CLIP_ID.fullmatch(self.clip_id):
            raise ValueError(f"clip id {self.clip_id!r} holds other than letters, digits, _ and -")
        if not self.labels:
            raise ValueError(f"clip {self.clip_id!r} has no label")
        if not (self.recording and self.recording.isprintable()):
            raise ValueError(
                f"clip {self.clip_id!r} has the recording {self.recording!r}, which is not a printable name"
            )


def recording_of(name: str) -> str:
    """Recording that the name of a clip or recording states, else the name itself; the same for a recording's own name.

    Two rules of naming state one: ESC-50's <fold>-<upload>-<take>[-<category>], and the audioset reader's
    <11 characters>_<start in ms>.
    """
    if match := _TAKE.fullmatch(name):
        return match[1]
    return match[1] if (match := _SEGMENT.fullmatch(name)) else name


def clip_id_of(name: str, counts: Counter[str]) -> str:
    """The id of a clip of this name: the name, or where that cannot be one its letters and digits with eight of a hash.

    The ways to write an accent are one name. Names that are no ids are counted.
    """
    if CLIP_ID.fullmatch(name):
        return name
    counts["names_that_are_no_ids"] += 1
    name = unicodedata.normalize("NFC", name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    digest = sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9-]+', '_', plain)[:64]}_{digest}"


def files_by_name(root: Path, counts: Counter[str], folder: str) -> dict[str, str]:
    """Paths of the audio in `folder`, as `walk` gives them, by the path as a list may write it (accents in NFC)."""
    return {unicodedata.normalize("NFC", path): path for path, _ in walk(root, counts, folder)}


REGISTRY = Registry(__name__, __file__, "dataset")
load = REGISTRY.module


def labels_of(mids: Iterable[str], where: str, counts: Counter[str]) -> tuple[str, ...]:
    """The classes among `mids`, once each, by class index.

    A node of the ontology that is not one of the 527 (FSD50K has some) is left out and counted. What is no node
    at all is a slip of somebody's pen, and an error at `where`: a class must not lose its clips to a typo.
    """
    known = set()
    for mid in mids:
        if ontology.is_class(mid):
            known.add(mid)
        elif ontology.is_node(mid):
            counts["labels_outside_the_527"] += 1
        else:
            raise ValueError(f"{where}: {mid!r} is not a label of AudioSet (a mid such as '/m/09x0r')")
    return tuple(sorted(known, key=lambda mid: ontology.class_of(mid).index))


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a csv file with a header, each with its place for messages ("dev.csv:7").

    ValueError, with the place, for a column that is not there, a row of another length, or what is not text.
    """
    number = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if absent := [column for column in columns if column not in header]:
                raise ValueError(f"{path}: no column {absent[0]!r} in {header}")
            for fields in reader:
                number = reader.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ValueError(f"{path}:{number}: {len(fields)} fields under {len(header)} columns")
                yield f"{path}:{number}", dict(zip(header, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a csv file in UTF-8, after line {number}: {error}") from None


def root_of(root: Path, expected: str) -> Path:
    """`root`, if it is a folder. FileNotFoundError or NotADirectoryError says what should lie there otherwise."""
    if not root.exists():
        raise FileNotFoundError(f"data.root {str(root)!r} does not exist; it should hold {expected}")
    if not root.is_dir():
        raise NotADirectoryError(f"data.root {str(root)!r} is not a folder; it should hold {expected}")
    return root


def walk(root: Path, counts: Counter[str], folder: str = "") -> Iterator[tuple[str, bool]]:
    """Every entry with an audio suffix under `root`/`folder`: its path relative to root, and is it a regular file.

    One scandir per folder and no stat, sorted. Links are never followed, whatever they lead to; a link, a pipe or
    a folder called `x.wav` comes out as not regular. Hidden entries are not looked at. FileNotFoundError or
    NotADirectoryError when there is no such folder.
    """
    if folder and (root / folder).is_symlink():
        raise NotADirectoryError(f"{root / folder} is a link; links below data.root are not followed")
    todo = [folder]
    while todo:
        inside = todo.pop()
        try:
            with os.scandir(root / inside) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except PermissionError:
            logger.warning("%s: no permission to look inside", root / inside)
            counts["unreadable_folders"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                todo.append(path)
            elif entry.is_symlink():
                counts["links_not_followed"] += 1
            if os.path.splitext(entry.name)[1].lower() not in AUDIO_SUFFIXES:
                continue
            # Control characters and bytes that are no UTF-8 would not survive the manifest.
            if not path.isprintable():
                logger.warning("%r: the name cannot be written down; passed over", path)
                counts["unprintable_names"] += 1
                continue
            yield path, entry.is_file(follow_symlinks=False)
