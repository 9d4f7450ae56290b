"""AudioSet, as people hold it on disk: segment lists as published or re-saved, files in any of the usual layouts.

    <root>/[metadata/]<subset>_segments.csv     or <subset>.csv; the subset in its own name, "balanced_train"
    <root>/**/<file>                            anywhere below the root

A file belongs to the segment whose id its name holds: an optional `Y`, `_Y` or `id_`, exactly 11 characters, and
nothing else or a start time or a start and an end (`_30.000_40.000`, `_30`, `-000030`, `_30000_40000` in ms). The id
must be in the list: cutting names at "_" or stripping "Y" goes wrong for one AudioSet id in six. Ids of another
length, in copies of other data laid out as AudioSet, must be the whole name.

Clips without audio are normal (videos disappear): they come out with path None.
"""

import csv
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.datasets import AUDIO_SUFFIXES, CLIP_ID, Clip, labels_of, recording_of, root_of, walk

logger = logging.getLogger(__name__)

_PREFIXES = ("", "Y", "_Y", "id_")
_SECONDS = r"\d{1,9}(?:\.\d{1,6})?"
_REMAINDER = re.compile(rf"(?:[_-]({_SECONDS})(?:[_-]{_SECONDS})?)?", re.ASCII)
_SUBSET = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*", re.ASCII)
_SHOWN = 5  # examples in a log line


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of a segments csv: one excerpt of one recording."""

    ytid: str
    start_seconds: float
    end_seconds: float
    labels: tuple[str, ...]


def clips(root: Path, subset: str, counts: Counter[str] | None = None) -> Iterator[Clip]:
    """The clips that `subset`'s list names, sorted by clip_id, each with its file where there is one.

    The clip id is the ytid; when the list has several segments of one ytid, `<ytid>_<start in ms>`. Of several files
    of one clip a wav is taken before a flac before the rest; the others count as `duplicate_files`. The recording is
    the ytid, or the upload that an id of ESC-50's form (1-100032-A) states, in copies of that data in this layout.
    """
    counts = Counter() if counts is None else counts
    segments = read_segments(segments_path(root, subset), counts)
    by_ytid: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_ytid[segment.ytid].append(segment)
    paths = _find(root, by_ytid, counts)

    found = []
    for segment in segments:
        alone = len(by_ytid[segment.ytid]) == 1
        clip_id = segment.ytid if alone else f"{segment.ytid}_{round(segment.start_seconds * 1000)}"
        place = segment.start_seconds, segment.end_seconds
        found.append(Clip(clip_id, segment.labels, paths.get(segment), *place, recording_of(segment.ytid)))
    found.sort(key=lambda clip: clip.clip_id)
    for one, other in pairwise(found):
        if one.clip_id == other.clip_id:
            raise ValueError(
                f"{segments_path(root, subset)}: two segments would both be called {one.clip_id!r} "
                f"({one.recording!r} from {one.start_seconds} s, {other.recording!r} from {other.start_seconds} s)"
            )
    yield from found


def segments_path(root: Path, subset: str) -> Path:
    """The file that lists `subset`."""
    if not _SUBSET.fullmatch(subset):
        raise ValueError(f"subset {subset!r} is not a name; 'balanced_train' is one, for balanced_train_segments.csv")
    root_of(root, f"{subset}_segments.csv and the audio that it lists")
    tried = [root / place / f"{subset}{end}.csv" for place in ("", "metadata") for end in ("_segments", "")]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no list of the subset {subset!r}: none of {', '.join(map(str, tried))} is a file")


def read_segments(path: Path, counts: Counter[str]) -> list[Segment]:
    """The rows of a segments csv, in any of the forms it is found in.

    With 3 or fewer header lines, with or without spaces after the commas, byte order mark, CR LF, `empty` lines;
    labels quoted, unquoted, or with quotes and padding commas as left by a spreadsheet. A row repeated is dropped
    and counted; rows of one segment that differ in their labels (copies list one label per row) are joined. Rows
    whose labels are all outside the 527 are dropped and counted. Anything else raises ValueError with file and line.
    """
    segments: dict[tuple[str, float, float], Segment] = {}
    begun = False
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                fields = _fields(line, where)
                if not fields or (not begun and _is_header(fields)) or fields[0].startswith("# "):
                    continue
                if fields == ["empty"]:
                    counts["empty_rows"] += 1
                    continue
                begun = True
                segment = _segment(fields, where, counts)
                key = segment.ytid, segment.start_seconds, segment.end_seconds
                if (known := segments.get(key)) is not None:
                    counts["duplicate_rows"] += 1
                    both = labels_of((*known.labels, *segment.labels), where, counts)
                    segment = Segment(*key, both)
                segments[key] = segment
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8, after line {number}: {error}") from None
    unlabelled = [key for key, segment in segments.items() if not segment.labels]
    for key in unlabelled:
        del segments[key]
    counts["segments_without_label"] += len(unlabelled)
    if not segments:
        raise ValueError(f"{path} lists no segment")
    return list(segments.values())


def _fields(line: str, where: str) -> list[str]:
    """The fields of one line without those that pad it. Lines are parsed one by one: a quote that is never closed
    must not swallow the lines after it.
    """
    if "\0" in line:
        raise ValueError(f"{where}: a NUL byte; this is not a csv file")
    try:
        fields = next(csv.reader([line.strip()], skipinitialspace=True), [])
        if fields and "," in fields[0]:  # the whole row in one pair of quotes
            fields = next(csv.reader([fields[0]], skipinitialspace=True)) + fields[1:]
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from None
    fields = [field.strip() for field in fields]
    while fields and not fields[-1]:
        fields.pop()
    return fields


def _is_header(fields: Sequence[str]) -> bool:
    """A comment, or the names of the columns. Spreadsheets turn ids such as -0RWZT-miFs into `#NAME?`, which is
    neither.
    """
    if fields[0].startswith("#"):
        return fields[0] != "#NAME?"
    return len(fields) > 1 and re.fullmatch(r"start\w*", fields[1], re.ASCII | re.IGNORECASE) is not None


def _segment(fields: Sequence[str], where: str, counts: Counter[str]) -> Segment:
    if len(fields) < 3:
        raise ValueError(f"{where}: a row should be YTID, start_seconds, end_seconds, labels; got {list(fields)}")
    ytid = fields[0].strip('"')
    if not CLIP_ID.fullmatch(ytid):
        raise ValueError(f"{where}: {ytid!r} is not an id (letters, digits, _ and -)")
    start, end = (_seconds(field, where) for field in fields[1:3])
    if end <= start:
        raise ValueError(f"{where}: {ytid} ends at {end} s, not after its start at {start} s")
    mids = [mid.strip() for mid in ",".join(fields[3:]).replace('"', "").split(",")]
    return Segment(ytid, start, end, labels_of(filter(None, mids), where, counts))


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text.strip('"'))
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a time in seconds") from None
    if not (math.isfinite(value) and 0 <= value < 1e9):
        raise ValueError(f"{where}: {text!r} is not a time in seconds from 0 on")
    return value


def resolve(name: str, segments: Mapping[str, Sequence[Segment]]) -> list[tuple[Segment, bool]]:
    """The segments that a file of this name (without its suffix) holds, and whether the name tells them by a time.

    None for a name that is no listed id's, or that tells another time than the list. A name without a time stands
    for every segment of its id. Two ids only where the name can honestly be read as either.
    """
    # An id of any length may be the whole name, and then nothing else is read into it.
    if name in segments:
        return [(segment, False) for segment in segments[name]]
    found = []
    for prefix in _PREFIXES:
        ytid, rest = name[len(prefix) : len(prefix) + 11], name[len(prefix) + 11 :]
        if not name.startswith(prefix) or len(ytid) != 11 or ytid not in segments:
            continue
        if (match := _REMAINDER.fullmatch(rest)) is None:
            continue
        if (start := match.group(1)) is None:
            found += [(segment, False) for segment in segments[ytid]]
        else:
            close = [(_apart(start, s.start_seconds), s.start_seconds, s.end_seconds, s) for s in segments[ytid]]
            apart, *_, segment = min(close, key=lambda entry: entry[:3])
            found += [(segment, True)] if apart < 1 else []
    return found


def _apart(text: str, start_seconds: float) -> float:
    """How far the time in a name is from `start_seconds`, read as seconds, or as milliseconds when it fits exactly.

    Some tools cut the fraction of a second off, so that a second is not yet another time; in milliseconds it would
    make `_30` a name for 0 s.
    """
    if "." not in text and int(text) == round(start_seconds * 1000):
        return 0.0
    return abs(float(text) - start_seconds)


def _find(root: Path, segments: Mapping[str, Sequence[Segment]], counts: Counter[str]) -> dict[Segment, str]:
    """The file of each segment that has one; one walk over the tree."""
    best: dict[Segment, tuple[bool, bool, int, str]] = {}
    spare, ambiguous = [], []
    for path, regular in walk(root, counts):
        stem, suffix = os.path.splitext(os.path.basename(path))
        counts["audio_files"] += 1
        held = resolve(stem, segments)
        if len({segment.ytid for segment, _ in held}) > 1:
            ambiguous.append(path)
            continue
        if not held:
            counts["files_of_no_listed_segment"] += 1
        for segment, by_time in held:
            # A file cut to the segment goes before one that may be the whole recording.
            several = len(segments[segment.ytid]) > 1
            rank = not regular, several and not by_time, AUDIO_SUFFIXES.index(suffix.lower()), path
            if segment in best:
                spare.append(max(rank, best[segment])[3])
                rank = min(rank, best[segment])
            best[segment] = rank
    # The whole recording, it is to be hoped: its reader cuts it by the times where it is longer than a segment.
    shared = [path for path, n in Counter(rank[3] for rank in best.values()).items() if n > 1]
    kinds = {"duplicate_files": spare, "ambiguous_names": ambiguous, "files_of_several_segments": shared}
    for name, paths in kinds.items():
        counts[name] += len(paths)
        if paths:
            logger.warning("%s: %d %s, such as %s", root, len(paths), name.replace("_", " "), sorted(paths)[:_SHOWN])
    return {segment: rank[3] for segment, rank in best.items()}
