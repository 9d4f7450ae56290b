"""Stage resample: every listed recording becomes a mono clip of one rate inside a WebDataset shard, or a line in the
quarantine list that says why not.

A listed clip's shard is sha256(clip_id) mod n_shards, so what is in a shard depends neither on the number of workers
nor on which other clips there are. A shard is one part: a run that is killed finds its finished shards again.

Out of a split come

    clips-00000.tar ...   <clip_id>.flac or .wav (16 bit) and <clip_id>.json
    shards.json           clips, bytes and SHA-256 of each shard
    manifest.csv          every clip that scan found, sorted by id: its status (ok, or a reason of pipeline/audio.py),
                          where it lies, the SHA-256 of its samples, and the seconds of a long one that are not used
    quarantine.csv        those that are not ok

`missing` (listed, and gone when its turn came) is counted apart from bad: recordings that are not there are normal in
AudioSet, recordings that cannot be read are not. So are clips of train with the samples of a clip of eval.

Clips of one split with the same samples, under whatever names, are of one recording from here on: they never meet in a
mixture, and count as one in statistics.
"""

import argparse
import csv
import json
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int16
from pydantic import Field

from pipeline.audio import Long, Segment, ffmpeg, is_below, level_db, locate, read_segments, resample, to_int16
from pipeline.audio.badclip import BadClip, Reason
from pipeline.core.config import AudioParams, DataParams, Params, load_params
from pipeline.core.parts import run_parts
from pipeline.core.runtime import (
    fingerprint,
    link_or_copy,
    outside,
    publish,
    remove,
    run_command,
    running,
    scratch_dir,
    write_json,
)
from pipeline.mixtures.manifest import LISTED as LISTED  # scripts that make a list of their own have it from here
from pipeline.mixtures.manifest import MANIFEST, Row, merge, read_rows, split_manifest
from pipeline.mixtures.shards import INDEX, encode_flac, encode_json, encode_wav, write_shard

logger = logging.getLogger(__name__)

TRANSIENT = ("missing", "unreadable")  # of the machine, not of the file: looked at again by the next run
NOT_BAD = ("missing", "also_in_eval")  # counted apart
STATE = "state.json"  # of a part: what its clips depend on beside params, code and manifest
ENCODERS = {"flac": encode_flac, "wav": encode_wav}


class ResampleParams(Params):
    """Section `resample:` of params.yaml."""

    format: Literal["flac", "wav"]
    n_shards: int = Field(gt=0, le=100_000)
    max_bad_fraction: float = Field(ge=0, le=1)
    silence_db: float = Field(ge=-300, le=0)
    long: Long = "first"  # the one default: lists of parameters from before it mean that


class TooManyBadClips(RuntimeError):
    """More of the present clips are bad than `resample.max_bad_fraction` allows."""


# ------------------------------------------------------------------------------------------------ one clip


def make_clips(
    row: Row, root: Path, split: str, audio: AudioParams, params: ResampleParams, held_out: Mapping[str, str]
) -> Iterator[tuple[Row, bytes, bytes]]:
    """For each clip of a listed one its row of manifest.csv (all but where it lies), its encoded audio and its JSON.

    There are several with `resample.long: cut`, of which the silent ones are left out: `<clip_id>-piece1` and so on,
    of one recording and with the labels of the whole. The last row says how many seconds were left out of all.
    BadClip, also for samples whose SHA-256 is in `held_out`, with the clip id that has it there.
    """
    clip: tuple[Row, bytes, bytes] | None = None
    times = float(row["start_seconds"]), float(row["end_seconds"])
    parts = read_segments(locate(root, row["path"]), *times, audio.clip_seconds, params.long)
    kept_seconds, bad, segment = 0.0, BadClip("no_samples"), None
    for number, segment in enumerate(parts, start=1):
        is_piece = params.long == "cut" and segment.whole_seconds > 0
        try:
            pcm, notes = _samples(segment, audio, params)
        except BadClip as silent:
            if not is_piece:
                raise
            bad = silent
            continue
        if clip is not None:
            yield clip
        kept_seconds += len(segment.waveform) / segment.sample_rate
        clip_id = f"{row['clip_id']}-piece{number}" if is_piece else row["clip_id"]
        clip = _described(row | {"clip_id": clip_id, "split": split}, segment, pcm, notes, audio, params)
        if (other := held_out.get(clip[0]["sha256"])) is not None:
            raise BadClip("also_in_eval", f"the samples of {other}")
    if clip is None:
        raise bad
    if segment is not None and segment.whole_seconds:
        clip[0]["dropped_seconds"] = repr(round(segment.whole_seconds - kept_seconds, 6))
    yield clip


def _samples(
    segment: Segment, audio: AudioParams, params: ResampleParams
) -> tuple[Int16[np.ndarray, " time"], list[str]]:
    """The clip's samples, and notes. BadClip for a silent one."""
    waveform = resample(segment.waveform, segment.sample_rate, audio.sample_rate)
    waveform = waveform[: round(audio.clip_seconds * audio.sample_rate)]
    # Before: a constant rings where resampling cuts it off. After: a tone above the new Nyquist frequency is gone.
    if is_below(segment.waveform, params.silence_db) or is_below(waveform, params.silence_db):
        raise BadClip("silent", f"{min(level_db(segment.waveform), level_db(waveform)):.0f} dB")
    is_clipped = waveform.max() > 1 or waveform.min() < -1
    return to_int16(waveform), [*segment.notes, *(["clipped"] if is_clipped else [])]


def _described(
    listed: Row, segment: Segment, pcm: Int16[np.ndarray, " time"], notes: list[str], audio: AudioParams,
    params: ResampleParams,
) -> tuple[Row, bytes, bytes]:  # fmt: skip
    duration_seconds = len(pcm) / audio.sample_rate
    place = f"from {segment.start_seconds:g} s on, of {segment.whole_seconds:g} s" if segment.whole_seconds else ""
    row = {name: listed[name] for name in ("clip_id", "recording", "split", "labels", "path")} | {
        "status": "ok",
        "detail": place,
        "duration_seconds": repr(duration_seconds),
        "source_rate": str(segment.sample_rate),
        "source_channels": str(segment.channels),
        "note": ";".join(notes),
        "sha256": sha256(pcm.data).hexdigest(),
    }
    about = {
        "duration_seconds": duration_seconds, "labels": listed["labels"].split(";"), "split": listed["split"],
    }  # fmt: skip
    return row, ENCODERS[params.format](pcm, audio.sample_rate), encode_json(about)


# ------------------------------------------------------------------------------------------------ one part


def shard_name(number: int) -> str:
    """Name of a shard."""
    return f"clips-{number:05d}.tar"


def sounds_of(clips: Path | None) -> Mapping[str, str]:
    """The clip id of each SHA-256 of samples in a directory of clips; none without one."""
    if clips is None:
        return {}
    manifest = clips / "manifest.csv"
    return _sounds_in(manifest, manifest.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # for the next part of this process
def _sounds_in(manifest: Path, mtime_ns: int) -> Mapping[str, str]:
    return {row["sha256"]: row["clip_id"] for row in read_rows(manifest) if row["status"] == "ok"}


def resample_part(
    listed: Path, directory: Path, *, root: Path, split: str, audio: AudioParams, params: ResampleParams,
    held_out: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the shard of the clips listed in a file, and rows.csv: the manifest's rows with the path in front.

    Returns the shard's SHA-256, so that run_parts need not read it again.

    A shard in which nothing is left has no file. An empty file `again` says that something could not be read now;
    STATE is what is_stale compares.
    """
    rows: dict[str, Row] = {}
    files: dict[str, list[int] | None] = {}
    name, others = shard_name(int(listed.stem)), sounds_of(held_out)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for row in read_rows(listed):
            clip_id = row["clip_id"]
            files[row["path"]] = file_state(root, row["path"])
            try:
                for described, content, about in make_clips(row, root, split, audio, params, others):
                    rows[described["clip_id"]] = described
                    yield described["clip_id"], {params.format: content, "json": about}
            except BadClip as bad:
                if bad.reason in TRANSIENT:
                    check_root(root)
                    (directory / "again").touch()
                rows[clip_id] = {
                    "path": row["path"], "clip_id": clip_id, "recording": row["recording"], "split": split,
                    "labels": row["labels"], "status": bad.reason, "detail": bad.detail,
                }  # fmt: skip
            except Exception as error:
                error.add_note(f"clip {clip_id!r}, {row['path']!r}")
                raise

    digest = sha256()
    for member in write_shard(directory / name, samples(), digest.update):
        if member.ext == params.format:
            rows[member.key] |= {"shard": name, "offset": str(member.offset), "size": str(member.size)}
    with open(directory / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("path", *MANIFEST), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[clip_id] for clip_id in sorted(rows))
    # Of a clip that is good without it, ffmpeg was not asked.
    asked = any(row["status"] != "ok" or "ffmpeg" in row["note"].split(";") for row in rows.values())
    write_json(directory / STATE, {"ffmpeg": ffmpeg.version() if asked else None, "files": files})
    return {name: digest.hexdigest()}


def file_state(root: Path, path: str) -> list[int] | None:
    """Size and times of a file, which change when it is written anew; None for one that is not there."""
    try:
        status = os.lstat(root / path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def is_stale(part: Path, root: Path) -> bool:
    """Whether a finished part may come out otherwise now: by another ffmpeg, other files, or a machine in order."""
    try:
        state = json.loads((part / STATE).read_bytes())
    except (OSError, ValueError):
        return True
    if (part / "again").exists() or state["ffmpeg"] not in (None, ffmpeg.version()):
        return True
    return any(file_state(root, path) != found for path, found in state["files"].items())


def check_root(root: Path) -> None:
    """FileNotFoundError when the corpus is not there at all: then its clips are not missing one by one."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root {str(root)!r} is not a directory now. If the corpus has moved, set data.root; if it was "
            "mounted or has changed, list it again with `dvc repro --force scan`, then `dvc repro`"
        )


# ----------------------------------------------------------------------------------------------- all parts


def summarise(counts: Counter[str], split: str, params: ResampleParams, sample_rate: int) -> dict[str, Any]:
    """Count what became of the clips, as the numbers of reports/resample_<split>.json."""
    kept, missing, held_out = (counts[f"status {status}"] for status in ("ok", *NOT_BAD))
    present = counts["clips"] - missing
    bad = present - kept - held_out
    return {
        "split": split,
        "format": params.format,
        "clips": counts["clips"],
        "missing": missing,
        "present": present,
        "kept": kept,
        "bad": bad,
        "bad_fraction": bad / present if present else 0.0,
        "bad_reasons": {
            reason: n for reason in get_args(Reason) if reason not in NOT_BAD and (n := counts[f"status {reason}"])
        },
        "also_in_eval": held_out,
        "repeated_sounds": counts["repeated_sounds"],
        "notes": {key.removeprefix("note "): n for key, n in sorted(counts.items()) if key.startswith("note ")},
        "audio_seconds": round(counts["samples"] / sample_rate, 3),
        "dropped_seconds": counts["dropped_ms"] / 1000,
    }


def check_bad_fraction(summary: dict[str, Any], quarantine: Path, params: ResampleParams) -> None:
    """TooManyBadClips with the counts and examples, or ValueError when no clip is left."""
    if summary["kept"] and summary["bad_fraction"] <= params.max_bad_fraction:
        return
    total: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(quarantine):
        total[row["reason"]] += 1
        if len(examples[row["reason"]]) < 3:
            examples[row["reason"]].append(repr(row["path"]))
    lines = [f"  {reason}: {n}, such as {', '.join(examples[reason])}" for reason, n in sorted(total.items())]
    lists = "\n".join([*lines, f"All of them: {quarantine}"])
    counts = (
        f"of {summary['clips']} {summary['split']} clips {summary['missing']} are missing, {summary['bad']} of the "
        f"{summary['present']} present are bad ({summary['bad_fraction']:.1%})"
    )
    if not summary["kept"]:
        raise ValueError(f"no clip is left: {counts}\n{lists}")
    raise TooManyBadClips(
        f"{counts}; resample.max_bad_fraction is {params.max_bad_fraction:.1%}\n{lists}\n"
        "Nothing that is done is lost: repair or remove the files and run `dvc repro --force scan`, then `dvc repro`, "
        "or raise the bound."
    )


def resample_split(
    manifest: Path, root: Path, split: str, out: Path, scratch: Path, audio: AudioParams, params: ResampleParams,
    held_out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make `out` from scan's manifest of one split; return the summary.

    What has the samples of a clip in the clips directory `held_out` is left out. `scratch` holds what is finished, and
    after TooManyBadClips the quarantine list; the caller deletes it.
    """
    check_root(root)
    parts_dir = scratch / "parts"
    for part in sorted(parts_dir.glob("[0-9]*")):
        if is_stale(part, root):
            remove(part)
    lists = split_manifest(manifest, scratch / "lists", params.n_shards)
    if not lists:
        raise ValueError(f"{manifest} lists no clip: scan found no audio for split {split!r} under {root}")
    others = None if held_out is None else held_out.absolute()
    task = partial(resample_part, root=root.absolute(), split=split, audio=audio, params=params, held_out=others)
    parts = run_parts(task, {path.stem: path.absolute() for path in lists}, parts_dir)

    assembled = scratch / "assembled"
    remove(assembled)
    counts = merge(parts.values(), assembled, audio.sample_rate)
    summary = summarise(counts, split, params, audio.sample_rate)
    check_bad_fraction(summary, assembled / "quarantine.csv", params)
    write_json(assembled / INDEX, gather_shards(parts, assembled, params.n_shards))
    publish(assembled, out)
    return summary


def gather_shards(parts: dict[str, Path], directory: Path, n_shards: int) -> dict[str, dict[str, Any]]:
    """Give the parts' shards a name in `directory`; return shards.json."""
    index: dict[str, dict[str, Any]] = {}
    for number in range(n_shards):
        name = shard_name(number)
        index[name] = {"bytes": 0, "count": 0, "sha256": ""}
        part = parts.get(f"{number:05d}")
        if part is None or not (part / name).exists():
            continue
        # run_parts has compared the file with this digest, or the file was just written from what it is the digest of.
        digest = json.loads((part / "done.json").read_bytes())[name]
        link_or_copy(part / name, directory / name)
        count = sum(row["status"] == "ok" for row in read_rows(part / "rows.csv"))
        index[name] = {"bytes": os.stat(part / name).st_size, "count": count, "sha256": digest}
    return index


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="scan's directory")
    parser.add_argument("--split", required=True)
    parser.add_argument("--held-out", type=Path, help="clips whose samples must not come again in this split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    root = Path(load_params("data", DataParams).root)
    audio, params = load_params("audio", AudioParams), load_params("resample", ResampleParams)
    stage, manifest = f"resample_{args.split}", args.manifest / f"{args.split}.csv"

    with running(stage, args.out):
        # A raised bound must find the finished shards.
        numbers = params.model_dump_json(exclude={"max_bad_fraction"})
        others = None if args.held_out is None else args.held_out / "manifest.csv"
        run = fingerprint(audio, numbers, str(root), args.split, manifest, others)
        scratch = scratch_dir(stage, run)
        summary = resample_split(manifest, outside(root), args.split, args.out, scratch, audio, params, args.held_out)
        write_json(args.summary, summary)
        shutil.rmtree(scratch)
    if summary["also_in_eval"]:
        logger.warning(
            "%d clips have the samples of clips of eval: left out, and named in quarantine.csv", summary["also_in_eval"]
        )
    if summary["repeated_sounds"]:
        logger.warning(
            "%d clips have the samples of others, and count as of their recording", summary["repeated_sounds"]
        )
    if summary["notes"].get("long"):
        logger.info(
            "%d clips are of longer ones, of which %.0f s are not used (resample.long: %s)",
            summary["notes"]["long"], summary["dropped_seconds"], params.long,
        )  # fmt: skip
    for key in ("bad_reasons", "notes"):
        logger.info("%s: %s", key, ", ".join(f"{name} {n}" for name, n in summary[key].items()) or "none")
    logger.info(
        "%s: %d clips kept (%.0f s), %d bad, %d missing",
        args.split, summary["kept"], summary["audio_seconds"], summary["bad"], summary["missing"],
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
