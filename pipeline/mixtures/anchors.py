"""The anchors directory: 2-s segments mined from clips, each with its clean query embedding, found by class or row.

    anchors-00000.tar ...   WebDataset shards: <key>.wav (int16 mono), <key>.npy (query, float32), <key>.json
    index.parquet           one row per anchor, sorted by class and clip: `SCHEMA`
    index.json              sample rate, lengths, and the classes that are left without anchors
    shards.json             count, bytes and sha256 of every shard

The shards stream like any WebDataset; the index says where in them each waveform and query lies, so that the sampler
reads any anchor by two `pread`s, of 128 kB and 8 kB.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int

from pipeline.core.runtime import read_json, write_atomic, write_json
from pipeline.mixtures.shards import ShardReader, decode_array, decode_waveform

SCHEMA = pa.schema(
    [
        pa.field("anchor", pa.string(), nullable=False),  # the key: <clip_id>-<class_index, three digits>
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("recording", pa.string(), nullable=False),  # that the clip was cut from: the unit that is independent
        pa.field("class_index", pa.int64(), nullable=False),
        pa.field("mid", pa.string(), nullable=False),  # of that class
        pa.field("labels", pa.string(), nullable=False),  # all mids of the clip, joined by ;
        pa.field("onset_seconds", pa.float64(), nullable=False),  # of the segment in its clip
        pa.field("score", pa.float64(), nullable=False),
        pa.field("purity", pa.float64(), nullable=False),
        pa.field("energy", pa.float64(), nullable=False),  # mean square, full scale 1
        pa.field("peak", pa.float64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("wav_offset", pa.int64(), nullable=False),  # of the member's bytes in the shard
        pa.field("wav_size", pa.int64(), nullable=False),
        pa.field("query_offset", pa.int64(), nullable=False),
        pa.field("query_size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the wav member
    ]
)


def anchor_key(clip_id: str, class_index: int) -> str:
    """Name of a clip's anchor for one class, unique in its split."""
    return f"{clip_id}-{class_index:03d}"


@dataclass(frozen=True)
class AnchorIndex:
    """Index of an anchors directory. Row r of `table`, and entry r of each column, is one anchor."""

    sample_rate: int  # Hz
    segment_samples: int
    query_dim: int
    empty_classes: tuple[str, ...]  # mids of the classes that clips are labelled with and that have no anchors
    table: pa.Table  # SCHEMA
    class_index: Int[np.ndarray, " anchors"]
    energy: Float[np.ndarray, " anchors"]
    keys: list[str]
    mids: list[str]
    clip_ids: list[str]
    recordings: list[str]
    labels: list[str]

    @classmethod
    def load(cls, directory: Path) -> "AnchorIndex":
        """Read index.parquet and index.json; ValueError where they are not an index."""
        header = read_json(directory / "index.json")
        table = pq.read_table(directory / "index.parquet")
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"{directory / 'index.parquet'} has the columns\n{table.schema}\nnot\n{SCHEMA}")
        class_index, clip_ids = table["class_index"].to_numpy(), table["clip_id"].to_pylist()
        order = list(zip(class_index.tolist(), clip_ids, strict=True))
        if order != sorted(order):
            raise ValueError(f"{directory / 'index.parquet'} is not sorted by class_index and clip_id")
        return cls(
            sample_rate=header["sample_rate"],
            segment_samples=header["segment_samples"],
            query_dim=header["query_dim"],
            empty_classes=tuple(header["empty_classes"]),
            table=table,
            class_index=class_index,
            energy=table["energy"].to_numpy(),
            keys=table["anchor"].to_pylist(),
            mids=table["mid"].to_pylist(),
            clip_ids=clip_ids,
            recordings=table["recording"].to_pylist(),
            labels=table["labels"].to_pylist(),
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def classes(self) -> list[int]:
        """Indices of the classes that have anchors, ascending."""
        return np.unique(self.class_index).tolist()

    def rows(self, class_index: int) -> range:
        """The class' rows, which lie together; none where it has no anchors."""
        return range(*np.searchsorted(self.class_index, [class_index, class_index + 1]).tolist())

    def row(self, key: str) -> int:
        """Row of the anchor of this key; KeyError where there is none."""
        return self._row_of_key[key]

    def anchor(self, row: SupportsIndex) -> str:
        """Key of the anchor in this row."""
        return self.keys[row]

    def pair_columns(self) -> dict[str, Any]:
        """Columns for the pair stream: `PairStream(**index.pair_columns(), seed=..., exclude=..., kin=...)`."""
        return {
            "class_index": self.class_index,
            "mids": self.mids,
            "clip_ids": self.clip_ids,
            "recordings": self.recordings,
            "labels": self.labels,
        }

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}


def write_index(
    directory: Path,
    anchors: Iterable[Mapping[str, Any]],
    *,
    sample_rate: int,
    segment_samples: int,
    query_dim: int,
    empty_classes: Sequence[str],
) -> None:
    """Write index.parquet and index.json from a mapping per anchor, in any order. The same anchors, the same bytes."""
    rows = sorted(anchors, key=lambda anchor: (anchor["class_index"], anchor["clip_id"]))
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    write_atomic(directory / "index.parquet", buffer.getvalue().to_pybytes())
    header = {
        "sample_rate": sample_rate,
        "segment_samples": segment_samples,
        "query_dim": query_dim,
        "anchors": len(rows),
        "classes": len(set(columns["class_index"])),
        "empty_classes": sorted(empty_classes),
    }
    write_json(directory / "index.json", header)


class AnchorReader:
    """Waveforms and queries of an anchors directory by row of its index. Safe to fork, to pickle, and in threads."""

    def __init__(self, directory: Path, index: AnchorIndex) -> None:
        self.index = index
        self._shards = ShardReader(directory)
        self._shard = index.table["shard"].to_pylist()
        names = ("wav_offset", "wav_size", "query_offset", "query_size")
        self._ranges = list(zip(*(index.table[name].to_pylist() for name in names), strict=True))

    def waveform(self, row: SupportsIndex) -> Float32[np.ndarray, " time"]:
        """The anchor's segment, full scale 1, `segment_samples` long; ValueError where that is not what is there."""
        offset, size, _, _ = self._ranges[row]
        waveform, sample_rate = decode_waveform(self._shards.read(self._shard[row], offset, size))
        if (sample_rate, len(waveform)) != (self.index.sample_rate, self.index.segment_samples):
            raise ValueError(
                f"anchor {self.index.anchor(row)} has {len(waveform)} samples at {sample_rate} Hz, "
                f"not {self.index.segment_samples} at {self.index.sample_rate}"
            )
        return waveform

    def query(self, row: SupportsIndex) -> Float32[np.ndarray, " query_dim"]:
        """The embedding of the anchor as it is, without an interferer."""
        _, _, offset, size = self._ranges[row]
        query = decode_array(self._shards.read(self._shard[row], offset, size))
        if query.shape != (self.index.query_dim,) or query.dtype != np.float32:
            raise ValueError(
                f"the query of anchor {self.index.anchor(row)} is {query.dtype} {query.shape}, "
                f"not float32 ({self.index.query_dim},)"
            )
        return query

    def waveforms(self, rows: Iterable[SupportsIndex]) -> Float32[np.ndarray, "batch time"]:
        """Read the segments of several anchors."""
        return np.stack([self.waveform(row) for row in rows])

    def queries(self, rows: Iterable[SupportsIndex]) -> Float32[np.ndarray, "batch query_dim"]:
        """Read the query embeddings of several anchors."""
        return np.stack([self.query(row) for row in rows])
