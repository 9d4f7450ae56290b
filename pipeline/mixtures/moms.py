"""Mixtures of mixtures from the chain's own shards: food for mixture-invariant training.

    ClipMoms     a piece of a clip, whatever sounds in it, of any place in it    ->  x1
                 one of a clip of another recording, at a random level           ->  x2      x = x1 + x2

    AnchorMoms   siren  purr   [...]     1 to max_stems anchors of different classes and clips  ->  x1
                 hum    [...]            others, at a random level                              ->  x2

Clips are mixtures as they were found: no label, detector or isolated sound has a part in them. Anchors are isolated
sources: what is known of them serves to score, and to learn from easier mixtures; labels keep a class from meeting
itself. tracks.py does the same with music. All give MomBatch.
"""

import hashlib
from math import ceil
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from pipeline.audio import is_below
from pipeline.datasets import recording_of
from pipeline.mixtures.anchors import AnchorReader
from pipeline.mixtures.shards import ClipReader
from pipeline.mixtures.tracks import SILENCE_DB, TRIES, MomBatch

Part = Literal["train", "validation", "all"]

VALIDATION_SHARE = 10  # one train recording in so many is held out for the choice of the best weights
ATTEMPTS = 100  # to find anchors that may meet, before there are to be fewer of them


@runtime_checkable
class Moms(Protocol):
    """Batches of mixtures of mixtures by number."""

    @property
    def n_batches(self) -> int:
        """Number of batches: of a fixed set, or of one epoch of a stream."""

    def batch(self, n: int) -> MomBatch:
        """Batch number n, a function of n alone."""

    def describe(self, n: int) -> list[tuple[str, str]]:
        """Where batch n comes from, pair by pair, for an error message."""


def is_validation(name: str) -> bool:
    """Whether a recording of train is held out, given its name or that of a clip that states it (`recording_of`).

    A function of the recording alone, whatever other recordings there are: its clips all lie on one side.
    """
    digest = hashlib.sha256(recording_of(name).encode()).digest()
    return int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0


class ClipMoms:
    """Mixtures of mixtures of clips as they are; item j is a function of (seed, j).

    x1 and x2 are `segment_samples` from anywhere in two clips of different recordings, where they sound; x2 is brought
    to a level `snr_range` dB (uniform) below x1. Clips shorter than a segment are left out. No stems are told.

    part        train: clips whose recording is not held out; validation: the others; all
    n_items     of a fixed set: its size; None is an endless stream

    ValueError when there are fewer than two recordings.
    """

    def __init__(
        self,
        reader: ClipReader,
        *,
        seed: int,
        segment_samples: int,
        batch_size: int,
        snr_range: tuple[float, float] = (-5.0, 5.0),
        part: Part = "all",
        n_items: int | None = None,
    ) -> None:
        shortest = segment_samples / reader.sample_rate
        clips = [
            clip
            for clip in reader.clips.values()
            if clip.duration_seconds >= shortest
            and (part == "all" or is_validation(clip.recording) == (part == "validation"))
        ]
        # The clips of a recording lie together.
        clips.sort(key=lambda clip: (clip.recording, clip.clip_id))
        self._ids, self._recordings = [clip.clip_id for clip in clips], [clip.recording for clip in clips]
        _, first, counts = np.unique(self._recordings, return_index=True, return_counts=True)
        if len(first) < 2:
            raise ValueError(
                f"{len(clips)} clips of {shortest:g} s or more, of {len(first)} recordings, in {part}: a pair needs two"
            )
        self._first, self._count = np.repeat(first, counts), np.repeat(counts, counts)
        self.seconds = sum(clip.duration_seconds for clip in clips)
        """Seconds of audio in this part."""
        self._reader, self._seed, self._batch_size = reader, seed, batch_size
        self._samples, self._snr_range, self._n_items = segment_samples, snr_range, n_items

    @property
    def n_batches(self) -> int:
        """Number of batches: of the fixed set, or those that hear as much audio as there is, an epoch."""
        segments = self.seconds * self._reader.sample_rate / self._samples
        return ceil((segments / 2 if self._n_items is None else self._n_items) / self._batch_size)

    def describe(self, n: int) -> list[tuple[str, str]]:
        """Ids of the clips of batch n, pair by pair. Reads no audio."""
        pairs = [self._draw(item)[0] for item in _items(n, self._batch_size, self._n_items)]
        return [(self._ids[a], self._ids[b]) for a, b in pairs]

    def batch(self, n: int) -> MomBatch:
        """Batch number n (>= 0)."""
        items = _items(n, self._batch_size, self._n_items)
        mixtures, snr_db = np.zeros((len(items), 2, self._samples), np.float32), np.zeros(len(items), np.float32)
        recordings = []
        for i, item in enumerate(items):
            pair, rng = self._draw(item)
            snr_db[i] = rng.uniform(*self._snr_range)
            for side, row in enumerate(pair):
                mixtures[i, side] = _unit(self._piece(self._ids[row], rng))
            mixtures[i, 1] *= np.float32(10 ** (-float(snr_db[i]) / 20))
            mixtures[i] *= _to_half_scale(mixtures[i].sum(axis=0))
            recordings.append((self._recordings[pair[0]], self._recordings[pair[1]]))
        stems, n_stems = np.zeros((len(items), 2, 0, self._samples), np.float32), np.zeros((len(items), 2), np.int64)
        unnamed = tuple(((), ()) for _ in items)
        return MomBatch(mixtures, stems, n_stems, tuple(self.describe(n)), tuple(recordings), unnamed, snr_db)

    def _draw(self, item: int) -> tuple[tuple[int, int], np.random.Generator]:
        """Two clips, each as likely as any other of its choice, and the generator for what else is drawn."""
        rng = np.random.default_rng([self._seed, item])
        row = int(rng.integers(len(self._ids)))
        first, count = int(self._first[row]), int(self._count[row])
        other = int(rng.integers(len(self._ids) - count))
        return (row, other if other < first else other + count), rng

    def _piece(self, clip_id: str, rng: np.random.Generator) -> Float32[np.ndarray, " samples"]:
        """A piece that is not silent; after so many tries the loudest one there is."""
        waveform = self._reader.waveform(clip_id)
        latest = len(waveform) - self._samples
        for _ in range(TRIES):
            start = int(rng.integers(latest, endpoint=True))
            if not is_below(waveform[start : start + self._samples], SILENCE_DB):
                return waveform[start : start + self._samples]
        energy = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
        start = int(np.argmax(energy[self._samples :] - energy[: latest + 1]))
        return waveform[start : start + self._samples]


class AnchorMoms:
    """Mixtures of mixtures of anchors; item j is a function of (seed, j).

    x1 and x2 have 1 to `max_stems` anchors each (`random_subsets` False: `max_stems`). Within a mixture of mixtures no
    class and no recording comes twice, and no clip that is labelled with another anchor's class: where no such anchors
    are found, there are fewer. All anchors of a mixture get the same energy, and x2 a level `snr_range` dB (uniform)
    below x1. `segment_samples` of each anchor are used, from anywhere in it.

    part        train: the anchors whose recording is not held out; validation: the others; all
    n_items     of a fixed set: its size; None is an endless stream

    ValueError when there are fewer than 2 x max_stems classes, or the anchors are shorter than the segments.
    """

    def __init__(
        self,
        reader: AnchorReader,
        *,
        seed: int,
        segment_samples: int,
        batch_size: int,
        max_stems: int,
        snr_range: tuple[float, float] = (-5.0, 5.0),
        random_subsets: bool = True,
        part: Part = "all",
        n_items: int | None = None,
    ) -> None:
        index = reader.index
        if segment_samples > index.segment_samples:
            raise ValueError(
                f"segments of {segment_samples} samples: the anchors have {index.segment_samples} "
                f"({index.segment_samples / index.sample_rate} s)"
            )
        held_out = [is_validation(recording) for recording in index.recordings]
        wanted = [part == "all" or held == (part == "validation") for held in held_out]
        rows = np.flatnonzero(wanted)
        self._classes = np.unique(index.class_index[rows])
        if len(self._classes) < 2 * max_stems:
            raise ValueError(
                f"{len(self._classes)} classes have anchors in {part}: mixtures of up to {max_stems} anchors need "
                f"{2 * max_stems}"
            )
        self._members = [rows[index.class_index[rows] == c] for c in self._classes]
        self._labels = [frozenset(labels.split(";")) for labels in index.labels]
        self._reader, self._seed, self._batch_size = reader, seed, batch_size
        self._samples, self._max_stems, self._snr_range = segment_samples, max_stems, snr_range
        self._random_subsets, self._n_items, self._n_rows = random_subsets, n_items, len(rows)

    @property
    def n_anchors(self) -> int:
        """Number of anchors in this part."""
        return self._n_rows

    @property
    def n_batches(self) -> int:
        """Number of batches: of the fixed set, or those that hold as many mixtures as there are anchors, an epoch."""
        items = self._n_rows / 2 if self._n_items is None else self._n_items
        return ceil(items / self._batch_size)

    def describe(self, n: int) -> list[tuple[str, str]]:
        """Keys of the anchors of batch n, those of a mixture joined by +. Reads no audio."""
        keys = self._reader.index.keys
        drawn = [self._draw(item)[0] for item in _items(n, self._batch_size, self._n_items)]
        return [("+".join(keys[row] for row in a), "+".join(keys[row] for row in b)) for a, b in drawn]

    def batch(self, n: int) -> MomBatch:
        """Batch number n (>= 0)."""
        items, index = _items(n, self._batch_size, self._n_items), self._reader.index
        mixtures = np.zeros((len(items), 2, self._samples), np.float32)
        stems = np.zeros((len(items), 2, self._max_stems, self._samples), np.float32)
        n_stems, snr_db = np.zeros((len(items), 2), np.int64), np.zeros(len(items), np.float32)
        names, ids, recordings = [], [], []
        for i, item in enumerate(items):
            sides, rng = self._draw(item)
            for side, rows in enumerate(sides):
                for k, row in enumerate(rows):
                    start = int(rng.integers(index.segment_samples - self._samples, endpoint=True))
                    waveform = self._reader.waveform(row)[start : start + self._samples]
                    stems[i, side, k] = _unit(waveform)
                n_stems[i, side] = len(rows)
            snr_db[i] = rng.uniform(*self._snr_range)
            powers = [float(np.dot(mixture, mixture)) for mixture in stems[i].sum(axis=1)]
            if min(powers) > 0:
                stems[i, 1] *= np.float32(np.sqrt(powers[0] / powers[1]) * 10 ** (-float(snr_db[i]) / 20))
            stems[i] *= _to_half_scale(stems[i].sum(axis=(0, 1)))
            mixtures[i] = stems[i].sum(axis=1)
            names.append((self._mids(sides[0]), self._mids(sides[1])))
            ids.append(("+".join(index.keys[r] for r in sides[0]), "+".join(index.keys[r] for r in sides[1])))
            recordings.append((self._recordings(sides[0]), self._recordings(sides[1])))
        return MomBatch(mixtures, stems, n_stems, tuple(ids), tuple(recordings), tuple(names), snr_db)

    def _recordings(self, rows: list[int]) -> str:
        return "+".join(sorted(self._reader.index.recordings[row] for row in rows))

    def _mids(self, rows: list[int]) -> tuple[str, ...]:
        return tuple(self._reader.index.mids[row] for row in rows)

    def _draw(self, item: int) -> tuple[tuple[list[int], list[int]], np.random.Generator]:
        """Rows of the anchors on both sides of item j, and the generator for what else is drawn of it."""
        rng = np.random.default_rng([self._seed, item])
        fewest = 1 if self._random_subsets else self._max_stems
        counts = rng.integers(fewest, self._max_stems, size=2, endpoint=True)
        index = self._reader.index
        while True:
            total = int(counts.sum())
            for _ in range(ATTEMPTS):
                classes = rng.choice(len(self._classes), size=total, replace=False)
                rows = [int(rng.choice(self._members[c])) for c in classes]
                mids = {index.mids[row] for row in rows}
                recordings = {index.recordings[row] for row in rows}
                if len(recordings) == total and all(self._labels[row] & mids == {index.mids[row]} for row in rows):
                    return (rows[: counts[0]], rows[counts[0] :]), rng
            if total == 2:
                raise ValueError(f"no two anchors in {ATTEMPTS} pairs whose clips are free of each other's class")
            counts[counts.argmax()] -= 1


def _items(n: int, batch_size: int, n_items: int | None) -> range:
    """The items of batch n; IndexError behind the end of a fixed set."""
    first, last = n * batch_size, (n + 1) * batch_size
    if n < 0 or (n_items is not None and first >= n_items):
        raise IndexError(f"no batch {n} in a set of {ceil((n_items or 0) / batch_size)}")
    return range(first, last if n_items is None else min(last, n_items))


def _to_half_scale(mixture: Float32[np.ndarray, " samples"]) -> np.float32:
    """Find the gain that brings the loudest sample to half of full scale, as loud as clips are; 1 for silence."""
    peak = np.abs(mixture).max()
    return np.float32(0.5 / peak if peak > 0 else 1.0)


def _unit(waveform: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " samples"]:
    """At a root mean square of 1; silence stays."""
    power = float(np.dot(waveform, waveform)) / max(len(waveform), 1)
    return waveform / np.float32(np.sqrt(power)) if power > 0 else waveform
