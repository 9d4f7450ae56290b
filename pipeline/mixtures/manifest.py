"""Tables of clips: what scan has listed, cut into a list per shard, and what became of each clip, merged again.

A corpus of millions is never in memory, but for the digests of its samples.
"""

import csv
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.runtime import remove
from pipeline.mixtures.repeats import join_by_sound
from pipeline.mixtures.shards import shard_number

LISTED = ("clip_id", "subset", "labels", "path", "size_bytes", "start_seconds", "end_seconds", "recording")
MANIFEST = (
    "clip_id", "recording", "split", "labels", "status", "detail", "duration_seconds", "source_rate",
    "source_channels", "note", "dropped_seconds", "sha256", "shard", "offset", "size",
)  # fmt: skip
QUARANTINE = ("clip_id", "path", "reason", "detail")
_ROWS_HELD = 100_000

Row = dict[str, str]


def read_rows(path: Path, chunk: int = 1 << 16) -> Iterator[Row]:
    """Rows of a CSV file without line breaks inside fields.

    The file is open only while a chunk is read, so as many as there are shards can be merged at a time.
    """
    position, header = 0, b""
    while True:
        with open(path, "rb") as file:
            header = header or file.readline()
            file.seek(max(position, len(header)))
            lines = file.readlines(chunk)
            position = file.tell()
        if not lines:
            return
        yield from csv.DictReader(line.decode() for line in (header, *lines))


def split_manifest(manifest: Path, lists: Path, n_shards: int) -> list[Path]:
    """Cut scan's manifest into a list per shard, `lists`/00000.csv ..., those without clips left out.

    ValueError, naming the line, when columns are not those of scan or the ids are not in order, each once.
    """
    remove(lists)
    lists.mkdir(parents=True)
    held: dict[int, list[list[str]]] = defaultdict(list)
    made: set[int] = set()

    def flush() -> None:
        for number, rows in sorted(held.items()):
            with open(lists / f"{number:05d}.csv", "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if number not in made:
                    writer.writerow(LISTED)
                writer.writerows(rows)
            made.add(number)
        held.clear()

    with open(manifest, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        if absent := [name for name in LISTED if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{manifest}: no column {absent[0]!r}; scan writes {','.join(LISTED)}")
        before = ""
        for count, row in enumerate(reader, start=1):
            clip_id = row["clip_id"]
            if not before < clip_id:
                raise ValueError(f"{manifest}, line {reader.line_num}: {clip_id!r} after {before!r}: unsorted or twice")
            if any("\n" in row[name] or "\r" in row[name] for name in LISTED):
                raise ValueError(f"{manifest}, line {reader.line_num}: a line break inside a field")
            before = clip_id
            held[shard_number(clip_id, n_shards)].append([row[name] for name in LISTED])
            if count % _ROWS_HELD == 0:
                flush()
    flush()
    return [lists / f"{number:05d}.csv" for number in sorted(made)]


def merge(parts: Iterable[Path], out: Path, sample_rate: int) -> Counter[str]:
    """Write manifest.csv and quarantine.csv of all parts; count clips, statuses, notes, samples and what was dropped.

    ValueError where a piece of a clip has the name of another clip.
    """
    parts = list(parts)
    counts: Counter[str] = Counter()
    joined, counts["repeated_sounds"] = join_recordings(parts)
    before = ""
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "manifest.csv", "w", newline="", encoding="utf-8") as manifest_file,
        open(out / "quarantine.csv", "w", newline="", encoding="utf-8") as quarantine_file,
    ):
        manifest = csv.DictWriter(manifest_file, MANIFEST, extrasaction="ignore", lineterminator="\n")
        quarantine = csv.DictWriter(quarantine_file, QUARANTINE, extrasaction="ignore", lineterminator="\n")
        manifest.writeheader()
        quarantine.writeheader()
        # 8 kB of each part at a time: 10,000 shards take 200 MB.
        for row in heapq.merge(*(read_rows(part / "rows.csv", 1 << 13) for part in parts), key=_clip_id):
            if row["clip_id"] == before:
                raise ValueError(f"two clips would be called {before!r}, a piece of one ({row['path']!r}) among them")
            before = row["clip_id"]
            row["recording"] = joined.get(row["recording"], row["recording"])
            manifest.writerow(row)
            counts["clips"] += 1
            counts[f"status {row['status']}"] += 1
            if row["status"] == "ok":
                counts["samples"] += round(float(row["duration_seconds"]) * sample_rate)
                counts["dropped_ms"] += round(1000 * float(row["dropped_seconds"] or 0))
                counts.update(f"note {note}" for note in row["note"].split(";") if note)
            else:
                quarantine.writerow(row | {"reason": row["status"]})
    return counts


def join_recordings(parts: Iterable[Path]) -> tuple[dict[str, str], int]:
    """The recording that stands for each that shares samples with others, and how many clips have another's samples."""
    return join_by_sound(
        (row["recording"], bytes.fromhex(row["sha256"]))
        for part in parts
        for row in read_rows(part / "rows.csv")
        if row["status"] == "ok"
    )


def _clip_id(row: Row) -> str:
    return row["clip_id"]
