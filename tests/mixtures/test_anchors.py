"""The anchors directory: what is written is found again, by class, row and key, and as any WebDataset."""

import gc
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.mixtures import shards
from pipeline.mixtures.anchors import SCHEMA, AnchorIndex, AnchorReader, anchor_key, write_index
from pipeline.mixtures.pairs import PairStream

MIDS = {3: "/m/0ytgt", 7: "/m/01h8n0", 20: "/m/03qtwd"}
SAMPLES, DIM = 640, 5


def waveform(clip: str, class_index: int) -> np.ndarray:
    rng = np.random.default_rng([int(clip[1:]), class_index])
    return rng.integers(-32768, 32768, SAMPLES).astype(np.int16)


def query(clip: str, class_index: int) -> np.ndarray:
    return np.random.default_rng([int(clip[1:]), class_index, 1]).standard_normal(DIM).astype(np.float32)


def write(directory: Path, labels: dict[str, list[int]], *, n_shards: int = 2, samples: int = SAMPLES) -> list[dict]:
    """An anchors directory with an anchor for each class of each clip; returns the rows given to `write_index`."""
    directory.mkdir()
    rows = []
    for number in range(n_shards):
        name = f"anchors-{number:05d}.tar"
        keys = [(clip, k) for clip, classes in labels.items() if int(clip[1:]) % n_shards == number for k in classes]
        content = [
            (
                anchor_key(clip, k),
                {
                    "wav": shards.encode_wav(waveform(clip, k)[:samples], 32000),
                    "npy": shards.encode_array(query(clip, k)),
                    "json": shards.encode_json({"class_index": k}),
                },
            )
            for clip, k in keys
        ]
        members = {(m.key, m.ext): m for m in shards.write_shard(directory / name, content)}
        for clip, k in keys:
            key = anchor_key(clip, k)
            wav, npy = members[key, "wav"], members[key, "npy"]
            rows.append(
                {
                    "anchor": key, "clip_id": clip, "recording": f"of {clip}", "class_index": k, "mid": MIDS[k],
                    "labels": ";".join(MIDS[other] for other in labels[clip]),
                    "onset_seconds": 0.5, "score": 0.9, "purity": 0.8, "energy": 0.1 * k, "peak": 1.0, "shard": name,
                    "wav_offset": wav.offset, "wav_size": wav.size, "query_offset": npy.offset, "query_size": npy.size,
                    "sha256": "",
                }
            )  # fmt: skip
    shards.write_index(directory)
    index(directory, rows)
    return rows


def index(directory: Path, rows: list[dict]) -> None:
    write_index(
        directory, rows, sample_rate=32000, segment_samples=SAMPLES, query_dim=DIM, empty_classes=["/m/z", "/m/a"]
    )


LABELS = {"c0": [3, 7], "c1": [3], "c2": [20], "c3": [3, 20], "c4": [20]}


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    write(tmp_path / "anchors", LABELS)
    return tmp_path / "anchors"


def test_every_anchor_is_read_as_it_was_written(anchors):
    found = AnchorIndex.load(anchors)
    reader = AnchorReader(anchors, found)
    assert found.keys == ["c0-003", "c1-003", "c3-003", "c0-007", "c2-020", "c3-020", "c4-020"]
    for row, (clip, k) in enumerate(zip(found.clip_ids, found.class_index.tolist(), strict=True)):
        np.testing.assert_array_equal(reader.waveform(row) * 32768, waveform(clip, k))
        np.testing.assert_array_equal(reader.query(row), query(clip, k))
        assert found.row(found.anchor(row)) == row
        assert found.energy[row] == 0.1 * k
    assert reader.waveforms([2, 0]).shape == (2, SAMPLES)
    np.testing.assert_array_equal(reader.queries(np.array([2, 0]))[1], reader.query(0))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_random_access_and_a_sequential_webdataset_read_agree(anchors):
    found = AnchorIndex.load(anchors)
    reader = AnchorReader(anchors, found)
    paths = [str(path) for path in sorted(anchors.glob("*.tar"))]
    seen = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        row = found.row(sample["__key__"])
        pcm, _ = shards.decode_waveform(sample["wav"])
        np.testing.assert_array_equal(reader.waveform(row), pcm)
        np.testing.assert_array_equal(reader.query(row), shards.decode_array(sample["npy"]))
        seen[row] = json.loads(sample["json"])["class_index"]
    assert [seen[row] for row in range(len(found))] == found.class_index.tolist()
    gc.collect()


def test_rows_are_found_by_class(anchors):
    found = AnchorIndex.load(anchors)
    assert found.classes == [3, 7, 20]
    assert [list(found.rows(k)) for k in (3, 7, 20)] == [[0, 1, 2], [3], [4, 5, 6]]
    assert [list(found.rows(k)) for k in (0, 8, 526)] == [[], [], []]
    assert (found.sample_rate, found.segment_samples, found.query_dim) == (32000, SAMPLES, DIM)
    assert found.empty_classes == ("/m/a", "/m/z")


def test_the_order_in_which_anchors_come_does_not_matter(tmp_path):
    rows = write(tmp_path / "a", LABELS)
    expected = {name: (tmp_path / "a" / name).read_bytes() for name in ("index.parquet", "index.json")}
    index(tmp_path / "a", rows[::-1])
    assert {name: (tmp_path / "a" / name).read_bytes() for name in expected} == expected


def test_an_index_feeds_the_pair_stream(anchors):
    found = AnchorIndex.load(anchors)
    draw = PairStream(**found.pair_columns(), seed=0, exclude="label", kin=lambda mid: ()).draw(3)
    assert found.mids[draw.target] not in found.labels[draw.interferer].split(";")


def test_a_reader_works_in_other_processes(anchors):
    reader = AnchorReader(anchors, AnchorIndex.load(anchors))
    expected = reader.waveform(1)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).waveform(1), expected)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(reader.waveform, (1,)), expected)


def test_a_wrong_segment_is_refused_with_its_name(tmp_path):
    write(tmp_path / "a", LABELS, samples=600)
    reader = AnchorReader(tmp_path / "a", AnchorIndex.load(tmp_path / "a"))
    with pytest.raises(ValueError, match="c0-003 has 600 samples at 32000 Hz, not 640 at 32000"):
        reader.waveform(0)


def test_a_truncated_shard_is_refused(anchors):
    reader = AnchorReader(anchors, AnchorIndex.load(anchors))
    path = anchors / "anchors-00000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"anchors-00000.tar"):
        reader.waveform(0)


def test_an_index_with_other_columns_or_order_is_refused(anchors):
    table = pq.read_table(anchors / "index.parquet")
    pq.write_table(table.drop(["purity"]), anchors / "index.parquet")
    with pytest.raises(ValueError, match="has the columns"):
        AnchorIndex.load(anchors)
    pq.write_table(table.take(pa.array([1, 0, 2, 3, 4, 5, 6])), anchors / "index.parquet")
    with pytest.raises(ValueError, match="not sorted by class_index and clip_id"):
        AnchorIndex.load(anchors)
    assert table.schema.equals(SCHEMA)
