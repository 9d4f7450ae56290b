"""Tracks of music -> an index of segments -> mixtures of mixtures, the only input of mixture-invariant training.

    datasets.music  tracks_of    what there is, and where
    here            segments     a table: a row for each window of each track that can be read and is not silent
                    SegmentReader    the audio of a row, or of any other piece of its track
                    MomStream        pairs of pieces of different tracks: batch n is a function of (seed, n) alone

A mixture of mixtures (Wisdom et al., arXiv:2006.12701) of tracks A and B:

    whole      A's mix as it is  ->  x1,  B's at a random level  ->  x2        x = x1 + x2; no stem is read
    subsets    [vocals]  drums  [bass]  of A, others of B: sums of isolated stems, as many as the draw says

Subsets know a trap less: where there are always K stems on either side and 2K outputs, "everything minus one stem,
with its sign turned" solves the task to perfection without separating anything. Softmax masks cannot take that way.

Audio is read by seeking to the piece that is wanted; a whole track is never in memory. This module must not import
torch: processes that only read audio load it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64
from pydantic import Field, model_validator

from pipeline.audio import MAX_PEAK, is_below, level_db, locate, open_recording, resample, to_int16
from pipeline.audio.badclip import BadClip, Reason
from pipeline.audio.recording import Decoder, Recording
from pipeline.audio.stem_mp4 import StemStream
from pipeline.core.config import Params
from pipeline.datasets.music import Subset, Track, split_stream
from pipeline.mixtures.repeats import join_by_sound

How = Literal["track", "report", "source"]
"""Who decides what is trained on. `track`: whole tracks, all of an artist on one side. `source`: the source's own
split. `report`: segments, 80/20 to the letter of the report, with one 20 % as validation and test, so that windows of
one song fall on both sides; for comparison only."""

Mixtures = Literal["whole", "subsets"]
"""A mixture to learn from is a recording as it is, or a sum of isolated sources, stems or anchors."""

HELD_OUT = "held_out"
"""Split of the rows that are validation and test at once (how = "report")."""

REPORT_TRAIN = 0.8
SILENCE_DB = -60.0  # dB of full scale: a segment below is no mixture, a stem below is not active
TRIES = 8  # random places in a track, before the segment's own

COLUMNS = (
    "track_id",
    "recording",  # what is independent of all others: the artist's tracks together, or the track
    "split",
    "offset",  # of the window, in frames at the file's rate
    "frames",  # of the window
    "sample_rate",  # of the files
    "track_frames",
    "rms",  # of the mixture in the window
    "n_active_stems",  # above SILENCE_DB in the window; -1: no stems are known
    "active_stems",  # their names, joined by ;
    "stems",  # names of all stems of the track, joined by ;
    "bleeding_stems",
    "paths",  # JSON: the files of each stem, as in datasets.music.Stem
    "mixture",  # the ready mixture, or empty
)

Signal = Float32[np.ndarray, " samples"]


class MusicParams(Params):
    """Section `music:` of params.yaml."""

    source: str
    root: str = Field(min_length=1)
    view: Literal["all", "vdbo"]
    split: Literal["track", "report", "source"]
    fractions: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=3, max_length=3)
    seed: int = Field(ge=0, lt=2**31)
    segment_seconds: list[Annotated[float, Field(gt=0, le=3600)]] = Field(min_length=1)
    hop_seconds: float | None = Field(gt=0, le=3600)
    sample_rate: int = Field(gt=0, le=768_000)
    max_bad_fraction: float = Field(ge=0, le=1)
    synthetic_stems: dict[str, Any]

    @model_validator(mode="after")
    def _lengths(self) -> "MusicParams":
        if min(self.segment_seconds) <= 0 or len(set(self.segment_seconds)) < len(self.segment_seconds):
            raise ValueError("music.segment_seconds are lengths above 0, each once")
        return self


def index_file(index: Path, seconds: float) -> Path:
    """Where stage index_music writes the segments of this length."""
    return index / f"segments_{seconds:g}s.parquet"


# ------------------------------------------------------------------------------------------------------------- splits


def split_tracks(
    tracks: Iterable[Track],
    how: How,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    joined: Mapping[str, str] | None = None,
) -> dict[str, Subset]:
    """The split of each track, whatever order they come in. `joined`: artists or tracks that go with another one.

    `track` gives each artist (or track, where nobody knows) as a whole, in an order shuffled by the seed, to the split
    that is furthest from its fraction of the tracks; none with a fraction above 0 stays empty. ValueError when there
    are fewer artists than splits, or the source has no split of its own. `report` splits no tracks: ValueError.
    """
    tracks = sorted(tracks, key=lambda track: track.track_id)
    if how == "report":
        raise ValueError("music.split: 'report' splits segments, not tracks")
    if how == "source":
        if missing := [track.track_id for track in tracks if track.subset is None]:
            raise ValueError(f"music.split: 'source', but track {missing[0]!r} is in no split of its source")
        return {track.track_id: cast(Subset, track.subset) for track in tracks}
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"music.fractions: {fractions} are not three shares of the tracks that add up to 1")

    groups: dict[str, list[str]] = {}
    for track in tracks:
        recording = recording_of(track)
        groups.setdefault((joined or {}).get(recording, recording), []).append(track.track_id)
    names: tuple[Subset, Subset, Subset] = ("train", "validation", "test")
    quota = {name: fraction * len(tracks) for name, fraction in zip(names, fractions, strict=True) if fraction}
    if len(groups) < len(quota):
        raise ValueError(f"{len(groups)} artists or single tracks cannot be split into {', '.join(quota)}")
    split: dict[str, Subset] = {}
    given: Counter[Subset] = Counter()
    for left, key in zip(range(len(groups), 0, -1), sorted(groups, key=lambda key: _hash(seed, key)), strict=True):
        empty = [name for name in quota if not given[name]]
        to = max(empty if len(empty) == left else quota, key=lambda name: quota[name] - given[name])
        given[to] += len(groups[key])
        split.update(dict.fromkeys(groups[key], to))
    return split


def recording_of(track: Track) -> str:
    """Name of the track's independent unit: its artist, or the track itself where nobody knows the artist."""
    return f"track {track.track_id}" if track.artist is None else f"artist {track.artist.casefold()}"


def _hash(seed: int, name: str) -> str:
    """A number for sorting: a shuffle in which a name keeps its place among the others when one more comes."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def _split_rows(rows: list[dict[str, object]], seed: int) -> list[str]:
    """The report's split: the first 80 % of the shuffled segments are trained on."""
    order = sorted(range(len(rows)), key=lambda k: _hash(seed, f"{rows[k]['track_id']} {rows[k]['offset']}"))
    train = set(order[: round(REPORT_TRAIN * len(rows))])
    return ["train" if k in train else HELD_OUT for k in range(len(rows))]


def of_split(manifest: pd.DataFrame, split: Subset) -> pd.DataFrame:
    """The rows of a split. They keep their labels in the index, by which a SegmentReader knows them."""
    wanted = [split] if split == "train" else [split, HELD_OUT]
    return manifest[manifest["split"].isin(wanted)]


# -------------------------------------------------------------------------------------------------------------- audio


class BadFile(BadClip):
    """A BadClip that knows which file."""

    def __init__(self, path: str, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {super().__str__()}"


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Whatever goes wrong inside is this file's fault."""
    try:
        yield
    except BadClip as bad:
        raise BadFile(path, bad.reason, bad.detail) from None
    except OSError as error:
        raise BadFile(path, "unreadable", os.strerror(error.errno or 0)) from None


class _Sound:
    """An open sound, of which pieces are read as mono. BadFile for whatever is wrong."""

    def __init__(self, path: str, recording: Recording) -> None:
        self.path, self._recording, self.rate = path, recording, recording.rate
        self.antiphase = False
        """Whether a channel stands in for a mean that cancels in what has been read."""

    @cached_property
    def frames(self) -> int:
        """Frames from beginning to end, none of which is missing."""
        with _blaming(self.path):
            frames, promised = self._recording.frames, self._recording.promised()
            if not frames:
                raise BadClip("no_samples")
            if frames < 0.99 * promised:
                raise BadClip("truncated", f"{frames} frames of {promised:.0f}")
        return frames

    def read(self, start: int, frames: int) -> Float32[np.ndarray, " frames"]:
        """`frames` from `start` on, zeros behind the end of the file."""
        mono = np.zeros(frames, np.float32)
        with _blaming(self.path):
            piece = self._recording.read(start, frames)
            if len(piece) < frames and start + len(piece) < self.frames:
                raise BadClip("truncated", f"{start + len(piece)} frames of {self.frames}")
            mono[: len(piece)] = piece
            peak = max(float(mono.max()), -float(mono.min()))
            if not np.isfinite(peak):
                raise BadClip("non_finite")
            if peak > MAX_PEAK:
                raise BadClip("peak_out_of_range", f"{peak:.3g} times full scale")
        self.antiphase = self.antiphase or self._recording.cancelled
        return mono

    def close(self) -> None:
        """Let go of files and processes."""
        self._recording.close()


class _StreamDecoder(Decoder):
    """A stream of a .stem.mp4 as the decoder of a recording."""

    def __init__(self, stream: StemStream) -> None:
        self._stream, self._at = stream, 0
        self.rate, self.channels = stream.rate, stream.channels

    def seek(self, frame: int) -> None:
        self._at = min(frame, self.frames)

    def read(self, frames: int) -> tuple[Float32[np.ndarray, "frames channels"], float]:
        block = self._stream.read(self._at, min(frames, self.frames - self._at))
        self._at += len(block)
        return block, 1.0

    @property
    def frames(self) -> int:
        return self._stream.frames

    def promised(self) -> float:
        return float(self.frames)

    def close(self) -> None:
        self._stream.close()


def _open(root: Path, path: str) -> _Sound:
    """The sound at a path of a Track."""
    file, stream = split_stream(path)
    with _blaming(path):
        if stream is None:
            return _Sound(path, open_recording(locate(root, path)))
        return _Sound(path, Recording(_StreamDecoder(StemStream(locate(root, file), stream))))


def _rms(waveform: Signal) -> float:
    """Linear, about the mean: a constant is silence."""
    return float(10 ** (level_db(waveform) / 20))


def _is_silent(waveform: Signal) -> bool:
    return is_below(waveform, SILENCE_DB)


# -------------------------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class Quarantined:
    """A track of which no segment is used, because one of its files is no good."""

    track_id: str
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Passed:
    """Counts of what segments() left out, and why."""

    counts: Counter[str] = field(default_factory=Counter)
    """silent_segments, short_tracks (without one whole window), antiphase_tracks (with a file of which one channel is
    taken somewhere, because the mean of all cancels), also_held_out (tracks that the source trains on, with the samples
    of one that it holds out) and, by reason, quarantined_<reason>."""

    repeats: Counter[str] = field(default_factory=Counter)
    """repeated_sounds: tracks with the samples of another one. They are used, and on its side of the split."""

    quarantine: list[Quarantined] = field(default_factory=list)
    """By track_id."""


def segments(
    tracks: Iterable[Track],
    root: Path,
    seconds: float,
    hop_seconds: float,
    *,
    how: How = "track",
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> tuple[pd.DataFrame, Passed]:
    """The index of the windows of `seconds`, one every `hop_seconds`, and what was left out of it.

    Columns: COLUMNS. Rows: by track_id and offset, whatever order the tracks come in. Left out are windows whose
    mixture lies below SILENCE_DB, what is left of a track behind its last whole window, and tracks with a file that
    cannot be read to its end. These keep their place in the split, so that a file that turns up later moves no other.

    Tracks with the same samples, under whatever names, are of one recording. Where the source has split them, those
    that it trains on are left out.
    """
    tracks = sorted(tracks, key=lambda track: track.track_id)
    splits = {} if how == "report" else split_tracks(tracks, how, fractions, seed)
    rows: list[dict[str, object]] = []
    passed = Passed()
    sounds: dict[str, bytes] = {}
    for track in tracks:
        found, bad = scan(track, root, seconds, hop_seconds, passed.counts, sounds)
        if bad is not None:
            passed.quarantine.append(bad)
            passed.counts[f"quarantined_{bad.reason}"] += 1
        rows += found
    of_track = {track.track_id: recording_of(track) for track in tracks}
    joined, passed.repeats["repeated_sounds"] = join_by_sound((of_track[name], sounds[name]) for name in sorted(sounds))
    for row in rows:
        row["recording"] = joined.get(str(row["recording"]), row["recording"])
    if how == "source":
        held_out = {sounds[name] for name, split in splits.items() if split != "train" and name in sounds}
        again = {name for name, sound in sounds.items() if splits[name] == "train" and sound in held_out}
        passed.counts.update({"also_held_out": len(again)} if again else {})
        rows = [row for row in rows if row["track_id"] not in again]
    elif how == "track" and joined:
        splits = split_tracks(tracks, how, fractions, seed, joined)
    named = _split_rows(rows, seed) if how == "report" else [splits[str(row["track_id"])] for row in rows]
    for row, split in zip(rows, named, strict=True):
        row["split"] = split
    return pd.DataFrame(rows, columns=list(COLUMNS)), passed


def scan(
    track: Track, root: Path, seconds: float, hop_seconds: float, counts: Counter[str], sounds: dict[str, bytes]
) -> tuple[list[dict[str, object]], Quarantined | None]:
    """The rows of one track, without their split; none, and the file to blame, if one cannot be used.

    Every file is read in blocks of a window to the end of the track, what lies outside of all windows included.
    `sounds` gets the SHA-256 of the mixture's samples, 16 bit, by track.
    """
    if not 0 < seconds or not 0 < hop_seconds:
        raise ValueError(f"windows of {seconds} s every {hop_seconds} s")
    local: Counter[str] = Counter()
    sound, heard = hashlib.sha256(), 0  # frames
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        try:
            files: dict[str, _Sound] = {}
            for path in [path for stem in track.stems for path in stem.paths] + [track.mixture or ""]:
                if path and path not in files:
                    files[path] = _open(root, path)
                    stack.callback(files[path].close)
            rate = next(iter(files.values())).rate
            if other := next((file for file in files.values() if file.rate != rate), None):
                raise BadFile(other.path, "rate_out_of_bounds", f"{other.rate} Hz, and others of its track {rate}")
            lengths = {path: file.frames for path, file in files.items()}
            total = lengths[track.mixture] if track.mixture else max(lengths.values())
            frames, hop = max(1, round(seconds * rate)), max(1, round(hop_seconds * rate))
            for offset, length, is_window in _blocks(total, frames, hop):
                sums: list[Signal] = []
                for stem in track.stems:
                    sums.append(_sum([files[path].read(offset, length) for path in stem.paths], length))
                mixture = files[track.mixture].read(offset, length) if track.mixture else _sum(sums, length)
                sound.update(to_int16(mixture[heard - offset :]).data)
                heard = max(heard, offset + length)
                if not is_window:
                    continue
                if _is_silent(mixture):
                    local["silent_segments"] += 1
                    continue
                names = [stem.name for stem in track.stems]
                active = [name for name, waveform in zip(names, sums, strict=True) if not _is_silent(waveform)]
                rows.append(
                    {
                        "track_id": track.track_id,
                        "recording": recording_of(track),
                        "offset": offset,
                        "frames": frames,
                        "sample_rate": rate,
                        "track_frames": total,
                        "rms": _rms(mixture),
                        "n_active_stems": len(active) if names else -1,
                        "active_stems": ";".join(active),
                        "stems": ";".join(names),
                        "bleeding_stems": ";".join(stem.name for stem in track.stems if stem.has_bleed),
                        "paths": json.dumps([list(stem.paths) for stem in track.stems], ensure_ascii=False),
                        "mixture": track.mixture or "",
                    }
                )
        except BadFile as bad:
            return [], Quarantined(track.track_id, bad.path, bad.reason, bad.detail)
        if any(file.antiphase for file in files.values()):
            local["antiphase_tracks"] += 1
    if total < frames:
        local["short_tracks"] += 1
    counts.update(local)
    sounds[track.track_id] = sound.digest()
    return rows, None


def _blocks(total: int, frames: int, hop: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is it a whole window): all windows in order, and what lies between and behind them."""
    at = 0  # up to where all has been read
    for offset in range(0, total - frames + 1, hop):
        for gap in range(at, offset, frames):
            yield gap, min(frames, offset - gap), False
        yield offset, frames, True
        at = offset + frames
    for rest in range(at, total, frames):
        yield rest, min(frames, total - rest), False


def _sum(waveforms: Sequence[Signal], n: int) -> Signal:
    total = np.zeros(n, np.float32)
    for waveform in waveforms:
        total += waveform
    return total


# ------------------------------------------------------------------------------------------------------------- reader


@dataclass(frozen=True)
class Row:
    """One row of the index, ready to read."""

    track_id: str
    recording: str
    offset: int
    frames: int
    sample_rate: int
    track_frames: int
    stems: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    mixture: str | None

    @property
    def start_seconds(self) -> float:
        """Where in the track the window begins."""
        return self.offset / self.sample_rate

    @property
    def track_seconds(self) -> float:
        """Length of the whole track in seconds."""
        return self.track_frames / self.sample_rate


class SegmentReader:
    """Audio of the rows of an index, mono, at one rate. Rows go by their label in the index of the table.

    Without `samples` a piece is as long as the row's window; without `start_seconds`, a place in the track, it begins
    where the window does. Nothing is kept open and nothing remembered: a reader may be used by many threads or
    processes. BadFile when a file cannot be read any more.
    """

    def __init__(self, root: Path, manifest: pd.DataFrame, sample_rate: int) -> None:
        if not manifest.index.is_unique:
            raise ValueError("the rows of an index of segments must have labels of their own")
        self.root, self.sample_rate = root, sample_rate
        self._rows: dict[int, Row] = {}
        known: dict[str, tuple[tuple[str, ...], ...]] = {}
        columns = [
            manifest[name]
            for name in ("track_id", "recording", "offset", "frames", "sample_rate", "track_frames", "stems")
        ]
        for label, track_id, recording, offset, frames, rate, total, stems, paths, mixture in zip(
            manifest.index, *columns, manifest["paths"], manifest["mixture"].fillna(""), strict=True
        ):
            if paths not in known:
                known[paths] = tuple(tuple(some) for some in json.loads(paths))
            names = tuple(stems.split(";")) if isinstance(stems, str) and stems else ()
            self._rows[int(label)] = Row(
                str(track_id),
                str(recording),
                int(offset),
                int(frames),
                int(rate),
                int(total),
                names,
                known[paths],
                mixture or None,
            )

    def row(self, label: int) -> Row:
        """Row of the index for this segment."""
        return self._rows[label]

    def samples(self, label: int) -> int:
        """Length of the row's window at the reader's rate."""
        row = self._rows[label]
        return round(row.frames * self.sample_rate / row.sample_rate)

    def stems(
        self, label: int, start_seconds: float | None = None, samples: int | None = None
    ) -> Float32[np.ndarray, "stems samples"]:
        """All stems of the piece, in the order of the index; of no stems for a track without."""
        row, samples = self._rows[label], self.samples(label) if samples is None else samples
        waveforms = np.zeros((len(row.stems), samples), np.float32)
        for k in range(len(row.stems)):
            waveforms[k] = self.stem(label, k, start_seconds, samples)
        return waveforms

    def stem(self, label: int, k: int, start_seconds: float | None = None, samples: int | None = None) -> Signal:
        """Stem number `k` of the piece alone."""
        return self._read(label, self._rows[label].paths[k], start_seconds, samples)

    def mixture(self, label: int, start_seconds: float | None = None, samples: int | None = None) -> Signal:
        """The piece of the ready mixture, or the sum of the stems where there is none."""
        row = self._rows[label]
        if row.mixture is not None:
            return self._read(label, (row.mixture,), start_seconds, samples)
        waveforms = self.stems(label, start_seconds, samples)
        return _sum(list(waveforms), waveforms.shape[1])

    def _read(self, label: int, paths: tuple[str, ...], start_seconds: float | None, samples: int | None) -> Signal:
        """The sum of these files from there on."""
        row = self._rows[label]
        samples = self.samples(label) if samples is None else samples
        start = row.offset if start_seconds is None else round(start_seconds * row.sample_rate)
        frames = ceil(samples * row.sample_rate / self.sample_rate)
        total = np.zeros(frames, np.float32)
        for path in paths:
            with closing(_open(self.root, path)) as file:
                if file.rate != row.sample_rate:
                    raise BadFile(path, "rate_out_of_bounds", f"{file.rate} Hz, {row.sample_rate} when it was indexed")
                total += file.read(start, frames)
        return resample(total, row.sample_rate, self.sample_rate)[:samples]


# ------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True)
class MomBatch:
    """Pairs of mixtures: their sum is what a network hears."""

    mixtures: Float32[np.ndarray, "batch 2 samples"]

    stems: Float32[np.ndarray, "batch 2 max_stems samples"]
    """What each mixture is the sum of, at its level; silence behind the first `n_stems`."""

    n_stems: Int64[np.ndarray, "batch 2"]
    """0 for a mixture as it is: of a track or clip whose stems nobody knows, or nobody asked for."""

    track_ids: tuple[tuple[str, str], ...]

    recordings: tuple[tuple[str, str], ...]
    """Independent units that each mixture is made of, joined by +: artists or tracks, or the clips' recordings."""

    stem_names: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Of each mixture's `n_stems` stems."""

    snr_db: Float32[np.ndarray, " batch"]
    """Level of the first mixture above the second."""


class MomStream:
    """Mixtures of mixtures from the rows of an index, of which `reader` knows at least these.

    x1 is as loud as it is on disk; x2 is brought to a level `snr_range` dB (uniform) below it. Item j is a function of
    (seed, j) and batch n holds the items from n * batch_size on: a run resumes by asking for its next batch.

    Training (`fixed` False): an endless stream. A row is drawn for x1, one of another track for x2, and in either
    track a piece at any place where something sounds. Of the stems that are active there, 1 to `max_stems` are summed
    (`random_subsets` False: always as many as there are, up to `max_stems`). `mixtures` "whole": the ready mixture, or
    the sum of all stems where there is none, and no stem is told. `random_offsets` False keeps to the rows'
    own places, as a split of segments (how = "report") demands: elsewhere in the track is what it holds out.

    Evaluation (`fixed` True): each row is x1 once, at its own place, with a row of another track; `n_batches` of them,
    the last one shorter. Pairs, levels and subsets depend on the seed and the rows, not on their order.

    A track without known stems gives its mixture as it is. ValueError if there are not two tracks to pair.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        reader: SegmentReader,
        *,
        seed: int,
        segment_samples: int,
        batch_size: int,
        max_stems: int,
        mixtures: Mixtures = "subsets",
        snr_range: tuple[float, float] = (-5.0, 5.0),
        random_subsets: bool = True,
        random_offsets: bool = True,
        fixed: bool = False,
    ) -> None:
        if snr_range[0] > snr_range[1]:
            raise ValueError(f"mom_snr_range: {snr_range[0]} dB is above {snr_range[1]} dB")
        if max_stems < 1 or batch_size < 1 or segment_samples < 1:
            raise ValueError(f"batches of {batch_size} with {max_stems} stems of {segment_samples} samples")
        rows = []
        for label, track_id, offset in zip(manifest.index, manifest["track_id"], manifest["offset"], strict=True):
            row = reader.row(int(label))
            if (row.track_id, row.offset) != (str(track_id), offset):
                raise ValueError(f"row {label} is of track {track_id!r} here and of {row.track_id!r} for the reader")
            rows.append((row.track_id, row.offset, int(label)))
        # From here on a row is its place in this order, in which the rows of a track are together.
        rows.sort()
        self._labels = [label for _, _, label in rows]
        self._tracks = [track_id for track_id, _, _ in rows]
        if len(set(self._tracks)) < 2:
            raise ValueError(f"{len(rows)} segments of {len(set(self._tracks))} track: a pair needs two tracks")
        counts = Counter(self._tracks)
        first: dict[str, int] = {}
        for k, track_id in enumerate(self._tracks):
            first.setdefault(track_id, k)
        self._span = {track_id: (first[track_id], first[track_id] + counts[track_id]) for track_id in counts}
        self._reader, self._seed, self._fixed = reader, seed, fixed
        self._samples, self._batch_size, self._max_stems = segment_samples, batch_size, max_stems
        self._snr_range, self._random_subsets, self._whole = snr_range, random_subsets, mixtures == "whole"
        self._tries = TRIES if random_offsets and not fixed else 0
        self._order = np.random.default_rng([seed, 0]).permutation(len(rows)).tolist() if fixed else []

    @property
    def n_batches(self) -> int:
        """Batches of a fixed set; of a stream, those that hold as many segments as there are rows, an epoch."""
        items = len(self._labels) if self._fixed else len(self._labels) / 2
        return ceil(items / self._batch_size)

    def describe(self, n: int) -> list[tuple[str, str]]:
        """The tracks of batch n, pair by pair. Reads no audio."""
        return [(self._tracks[a], self._tracks[b]) for a, b in map(self._pair, self._items(n))]

    def batch(self, n: int) -> MomBatch:
        """Batch number n (>= 0)."""
        items = self._items(n)
        shape = (len(items), 2, self._max_stems, self._samples)
        stems, mixtures = np.zeros(shape, np.float32), np.zeros((len(items), 2, self._samples), np.float32)
        n_stems, snr_db = np.zeros((len(items), 2), np.int64), np.zeros(len(items), np.float32)
        names: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for i, item in enumerate(items):
            named = []
            for side, place in enumerate(self._pair(item)):
                # A generator for each side: what is drawn for one depends on nothing of the other.
                rng = np.random.default_rng([self._seed, 2, item, side])
                some, parts = self._piece(self._labels[place], rng)
                named.append(some)
                n_stems[i, side] = len(some)
                stems[i, side, : len(some)] = parts[: len(some)]
                mixtures[i, side] = _sum(list(parts), self._samples)
            snr_db[i] = np.random.default_rng([self._seed, 3, item]).uniform(*self._snr_range)
            gain = _gain(mixtures[i, 0], mixtures[i, 1], float(snr_db[i]))
            mixtures[i, 1] *= gain
            stems[i, 1, : n_stems[i, 1]] *= gain
            names.append((named[0], named[1]))
        pairs = [tuple(self._reader.row(self._labels[place]).recording for place in self._pair(item)) for item in items]
        recordings = cast(tuple[tuple[str, str], ...], tuple(pairs))
        return MomBatch(mixtures, stems, n_stems, tuple(self.describe(n)), recordings, tuple(names), snr_db)

    def _items(self, n: int) -> range:
        last = (n + 1) * self._batch_size
        if n < 0 or (self._fixed and n >= self.n_batches):
            raise IndexError(f"no batch {n} in a set of {self.n_batches}")
        return range(n * self._batch_size, min(last, len(self._labels)) if self._fixed else last)

    def _pair(self, item: int) -> tuple[int, int]:
        """The rows of an item, of two tracks."""
        if self._fixed:
            at = self._order[item]
            others = (self._order[(item + k) % len(self._order)] for k in range(1, len(self._order)))
            return at, next(k for k in others if self._tracks[k] != self._tracks[at])
        rng = np.random.default_rng([self._seed, 1, item])
        at = int(rng.integers(len(self._labels)))
        first, last = self._span[self._tracks[at]]
        other = int(rng.integers(len(self._labels) - (last - first)))
        return at, other if other < first else other + last - first

    def _piece(
        self, label: int, rng: np.random.Generator
    ) -> tuple[tuple[str, ...], Float32[np.ndarray, "parts samples"]]:
        """Stems of a piece of the row's track with their names, or its mixture and no name."""
        row = self._reader.row(label)
        latest = row.track_seconds - self._samples / self._reader.sample_rate
        for _ in range(self._tries if latest > 0 else 0):
            names, parts = self._parts(label, rng, float(rng.uniform(0, latest)))
            if len(parts):
                return names, parts
        names, parts = self._parts(label, rng, None)
        if len(parts):
            return names, parts
        # Each stem is too quiet to count, but not their sum; or a shorter piece was cut from the window than indexed.
        return (), self._reader.mixture(label, None, self._samples)[None]

    def _parts(
        self, label: int, rng: np.random.Generator, start: float | None
    ) -> tuple[tuple[str, ...], Float32[np.ndarray, "parts samples"]]:
        """Stems that are active from there on, in the order of the index; none if nothing sounds."""
        names = () if self._whole else self._reader.row(label).stems
        if not names:
            mixture = self._reader.mixture(label, start, self._samples)
            return (), mixture[None] if not _is_silent(mixture) else mixture[None][:0]
        most = min(self._max_stems, len(names))
        wanted = int(rng.integers(1, most, endpoint=True)) if self._random_subsets else most
        found: dict[int, Signal] = {}
        # In a random order until there are enough: the other files need not be opened.
        for k in rng.permutation(len(names)).tolist():
            waveform = self._reader.stem(label, k, start, self._samples)
            if not _is_silent(waveform):
                found[k] = waveform
            if len(found) == wanted:
                break
        parts = np.zeros((len(found), self._samples), np.float32)
        for i, k in enumerate(sorted(found)):
            parts[i] = found[k]
        return tuple(names[k] for k in sorted(found)), parts


def _gain(first: Signal, second: Signal, snr_db: float) -> np.float32:
    """Compute the gain that brings the second signal to `snr_db` below the first; 1 if either is digital silence."""
    powers = [float(np.dot(signal, signal)) for signal in (first, second)]
    return np.float32(np.sqrt(powers[0] / powers[1]) * 10 ** (-snr_db / 20) if min(powers) > 0 else 1.0)
