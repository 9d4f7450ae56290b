"""Stage mine_anchors: with a detector that hears loudness, whose answers are known, and with small random networks."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.core.ontology import class_of
from pipeline.mixtures import shards
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mining import random_start
from pipeline.nn import panns
from pipeline.stages import mine_anchors as stage
from pipeline.stages.mine_anchors import AudioParams, MineAnchorsParams, Networks, mine_anchors

ROOT = Path(__file__).parents[2]
RATE = 32000
AUDIO = AudioParams(sample_rate=RATE, clip_seconds=4.0, segment_seconds=1.0)
PARAMS = MineAnchorsParams(
    mode="area",
    smoothing_seconds=1.01,
    min_score=0.0,
    min_purity=0.0,
    min_relative_energy=0.0,
    short="skip",
    batch_size=3,
    seed=0,
    device="cpu",
)
SIREN, HUM, DOG, BARK = "/m/03kmc9", "/m/07rcgpl", "/m/0bt9lr", "/m/05tny_"
INDICES = sorted(class_of(mid).index for mid in (SIREN, HUM, DOG, BARK))


def change(**values) -> MineAnchorsParams:
    return MineAnchorsParams.model_validate(PARAMS.model_dump() | values)


def counts(**dropped: int) -> dict[str, int]:
    """The counts of the summary by reason, zero where nothing is said."""
    return {"unknown_class": 0, "short": 0, "low_score": 0, "low_purity": 0, "silent": 0, "low_energy": 0} | dropped


def write_clips(directory: Path, clips: dict[str, tuple[list[str], np.ndarray]], n_shards: int = 2) -> None:
    """A clips directory as stage resample leaves it, with a quarantined clip in its manifest."""
    directory.mkdir(parents=True)
    names = [f"clips-{n:05d}.tar" for n in range(n_shards)]
    rows = []
    for n, name in enumerate(names):
        own = {c: clips[c] for c in sorted(clips) if shards.shard_number(c, n_shards) == n}
        samples = [
            (clip, {"wav": shards.encode_wav(pcm, RATE), "json": shards.encode_json({"labels": labels})})
            for clip, (labels, pcm) in own.items()
        ]
        places = {m.key: m for m in shards.write_shard(directory / name, samples) if m.ext == "wav"}
        for clip, (labels, pcm) in own.items():
            place = {"shard": name, "offset": places[clip].offset, "size": places[clip].size}
            rows.append(
                {"clip_id": clip, "recording": f"of {clip}", "labels": ";".join(labels), "status": "ok", **place}
            )
            rows[-1]["duration_seconds"] = len(pcm) / RATE
    rows.append({"clip_id": "broken", "labels": SIREN, "status": "decode_error"})
    with open(directory / "manifest.csv", "w", newline="") as file:
        columns = ["clip_id", "recording", "labels", "status", "duration_seconds", "shard", "offset", "size"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["clip_id"]))
    shards.write_index(directory, names)


def burst(onset_seconds: float, *, seed: int = 0, level: float = 0.5, clip_seconds: float = 4.0) -> np.ndarray:
    """A second of noise in a clip that is otherwise nearly silent."""
    rng = np.random.default_rng(seed)
    waveform = 1e-3 * rng.standard_normal(round(clip_seconds * RATE))
    start = round(onset_seconds * RATE)
    waveform[start : start + RATE] += level * rng.uniform(-1, 1, RATE)[: len(waveform) - start]
    return (waveform.clip(-1, 1) * 32767).astype(np.int16)


class Loudness(panns.Detector, panns.QueryEncoder):
    """Every class is as probable as the sound is loud, times `factor`; the query is the mean power and a constant."""

    query_dim = 2
    segment_samples = panns.FRAME_SAMPLES

    def __init__(self, factors: dict[str, float]) -> None:
        super().__init__()
        by_index = {class_of(mid).index: factor for mid, factor in factors.items()}
        self.class_indices = sorted(by_index)
        self.factors = torch.tensor([by_index[index] for index in self.class_indices])

    def framewise_probability(self, waveform):
        frames = nn.functional.pad(waveform, (0, 320)).unfold(1, 320, 320)
        return (2 * frames.abs().mean(-1, keepdim=True)).clamp(max=1) * self.factors

    def embed(self, waveform):
        power = waveform.square().mean(1)
        return torch.stack([power, torch.ones_like(power)], 1)


@pytest.fixture
def hear(monkeypatch, tmp_path):
    """Mine `clips` with a Loudness detector of these factors, or with the detectors that are given."""

    def run(clips, params=PARAMS, factors=None, n_shards=2, detector=None, folds=None, fold_of=None):
        loudness = Loudness(factors or {SIREN: 1.0, HUM: 0.5})
        networks = Networks(detector or loudness, loudness, folds or {}, fold_of or {})
        monkeypatch.setattr(stage, "load_networks", lambda *_: networks)
        for part in ("detector", "query"):
            (tmp_path / "sed" / part).mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "weights.safetensors"):
                (tmp_path / "sed" / part / file).touch()
        for directory in ("clips", "anchors"):
            shutil.rmtree(tmp_path / directory, ignore_errors=True)
        write_clips(tmp_path / "clips", clips, n_shards)
        summary = mine_anchors(tmp_path / "clips", tmp_path / "sed", tmp_path / "anchors", audio=AUDIO, params=params)
        return summary, AnchorIndex.load(tmp_path / "anchors")

    return run


def test_the_anchor_is_where_the_sound_is(hear, tmp_path):
    onsets = {"a": 0.5, "b": 2.13, "c": 3.0, "d": 0.0, "e": 3.9}
    clips = {clip: ([SIREN], burst(onset, seed=n)) for n, (clip, onset) in enumerate(onsets.items())}
    summary, index = hear(clips)
    assert index.recordings == [f"of {clip}" for clip in index.clip_ids]
    found = dict(zip(index.clip_ids, index.table["onset_seconds"].to_pylist(), strict=True))
    for clip, onset in onsets.items():
        assert found[clip] == pytest.approx(min(onset, 3.0), abs=0.011)  # the last window begins at 3 s
    reader = AnchorReader(tmp_path / "anchors", index)
    for row, clip in enumerate(index.clip_ids):
        start = round(found[clip] * RATE)
        cut = clips[clip][1][start : start + RATE].astype(np.float64) / 32768
        np.testing.assert_array_equal(reader.waveform(row), cut)  # not a bit is lost
        assert index.energy[row] == pytest.approx(np.mean(cut**2), rel=1e-12)
        assert index.table["peak"][row].as_py() == abs(cut).max()
        assert reader.query(row)[0] == pytest.approx(np.mean(cut**2), rel=1e-5)  # of the clean segment
    assert summary["anchors"] == summary["labels"] == summary["clips"] == 5
    assert summary["empty_classes"] == {}
    assert sum(summary["score"]["histogram"].values()) == 5


def test_score_and_purity_are_those_of_the_window(hear):
    _, index = hear({"a": ([SIREN, HUM], burst(1.0))}, factors={SIREN: 1.0, HUM: 0.5})
    scores, purities = (dict(zip(index.mids, index.table[c].to_pylist(), strict=True)) for c in ("score", "purity"))
    assert scores[SIREN] == pytest.approx(0.5, abs=0.01)  # uniform noise of level 0.5
    assert scores[HUM] == pytest.approx(0.25, abs=0.01)
    assert purities[SIREN] == pytest.approx(1 - scores[HUM])
    assert purities[HUM] == pytest.approx(1 - scores[SIREN])


def test_kin_does_not_spoil_the_purity(hear):
    _, index = hear({"a": ([BARK], burst(1.0)), "b": ([SIREN], burst(1.0))}, factors={DOG: 1.0, BARK: 1.0, SIREN: 0.1})
    assert dict(zip(index.mids, index.table["purity"].to_pylist(), strict=True)) == {
        BARK: pytest.approx(0.95, abs=0.01),  # the siren's 0.05, not the dog's 0.5
        SIREN: pytest.approx(0.5, abs=0.01),
    }


def test_what_is_dropped_is_counted_by_reason_and_lost_classes_are_named(hear):
    clips = {
        "short": ([SIREN], burst(0.0, clip_seconds=0.5)),
        "quiet": ([SIREN, HUM], burst(1.0, level=0.1)),
        "silent": ([SIREN], np.zeros(4 * RATE, np.int16)),
        "good": ([SIREN, DOG], burst(1.0)),
    }
    summary, index = hear(clips, change(min_score=0.06))
    assert index.keys == [f"good-{class_of(SIREN).index:03d}", f"quiet-{class_of(SIREN).index:03d}"]
    assert summary["dropped"] == counts(unknown_class=1, short=1, low_score=2)
    assert summary["empty_classes"] == {"Hum": {"low_score": 1}, "Dog": {"unknown_class": 1}}
    assert summary["unknown_classes"] == ["Dog"]
    assert set(index.empty_classes) == {HUM, DOG}

    summary, _ = hear(clips)
    assert summary["dropped"] == counts(unknown_class=1, short=1, silent=1)
    summary, index = hear(clips, change(min_purity=0.6))
    assert summary["dropped"]["low_purity"] == 0
    summary, index = hear(clips, change(min_purity=0.8))
    assert summary["dropped"]["low_purity"] == 1  # in "good", hum scores 0.25
    with pytest.raises(ValueError, match=r"none of the labels of .* gave an anchor; dropped: .*'low_score': 4"):
        hear(clips, change(min_score=0.9))


def test_an_anchor_beside_the_sound_is_dropped_by_its_energy(hear):
    """A siren of half the level sounds alone in another second than a louder burst, which scores nothing."""

    class FirstHalf(Loudness):
        def framewise_probability(self, waveform):
            probability = super().framewise_probability(waveform)
            return probability * (torch.arange(probability.shape[1]) < 200)[:, None]

    faint = burst(0.5, level=0.25) // 2 + burst(2.5, level=0.5) // 2
    clips = {"faint": ([SIREN], faint), "alone": ([SIREN, HUM], burst(0.5))}
    detector = FirstHalf({SIREN: 1.0, HUM: 0.5})
    summary, index = hear(clips, detector=detector)
    assert summary["relative_energy"]["histogram"] == {f"{n / 10:.1f}": {2: 1, 9: 2}.get(n, 0) for n in range(10)}
    summary, index = hear(clips, change(min_relative_energy=0.2), detector=detector)  # 0.25: half of the level
    assert summary["dropped"]["low_energy"] == 0
    summary, index = hear(clips, change(min_relative_energy=0.3), detector=detector)
    assert summary["dropped"] == counts(low_energy=1)
    assert index.clip_ids == ["alone", "alone"]
    only = {"faint": ([HUM], faint), "alone": ([SIREN], burst(0.5))}
    summary, index = hear(only, change(min_relative_energy=0.3), detector=detector)
    assert summary["empty_classes"] == {"Hum": {"low_energy": 1}}
    assert index.empty_classes == (HUM,)


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=12), st.integers(1, 4))
def test_the_loudest_segment_is_that_of_a_loop(levels, n_frames):
    pcm = np.repeat(np.array(levels, np.int16), panns.FRAME_SAMPLES)[:-7]
    size = n_frames * panns.FRAME_SAMPLES
    starts = range(0, max(1, len(pcm) - size + 1), panns.FRAME_SAMPLES)
    expected = max(float(np.sum((pcm[start : start + size] / 32768.0) ** 2)) / size for start in starts)
    assert stage._loudest(pcm, size) == pytest.approx(expected)


def test_a_clip_is_cut_by_the_detector_that_has_not_seen_it(hear):
    """Of two classes' detectors, one hears the first half of a clip and the other the second."""

    class Half(Loudness):
        def __init__(self, factors, frames: slice):
            super().__init__(factors)
            self.frames = frames

        def framewise_probability(self, waveform):
            probability = super().framewise_probability(waveform)
            masked = torch.zeros_like(probability)
            masked[:, self.frames] = probability[:, self.frames]
            return masked

    two = (burst(0.5) // 2 + burst(2.5, seed=1) // 2).astype(np.int16)
    clips = {name: ([SIREN, HUM], two) for name in ("a", "b", "c", "d")}
    factors = {SIREN: 1.0, HUM: 0.5}
    folds = {0: Half(factors, slice(0, 200)), 1: Half({DOG: 0.1} | factors, slice(200, None))}
    fold_of = {"a": 0, "b": 1, "d": 1}
    _, index = hear(clips, change(batch_size=4), detector=Half(factors, slice(0, 0)), folds=folds, fold_of=fold_of)
    onsets = dict(
        zip(zip(index.clip_ids, index.mids, strict=True), index.table["onset_seconds"].to_pylist(), strict=True)
    )
    for mid in (SIREN, HUM):  # whatever the other detectors' columns are
        assert onsets["a", mid] == pytest.approx(0.5, abs=0.02)
        assert onsets["b", mid] == onsets["d", mid] == pytest.approx(2.5, abs=0.02)
        assert onsets["c", mid] == 0.0  # in no fold: the detector of all clips, which hears nothing here


def test_short_clips_are_padded_on_request(hear, tmp_path):
    clips = {"short": ([SIREN], burst(0.0, clip_seconds=0.5)), "edge": ([SIREN], burst(0.0, clip_seconds=1.0))}
    summary, index = hear(clips, change(short="pad"))
    assert summary["dropped"]["short"] == 0
    row = index.row(f"short-{class_of(SIREN).index:03d}")
    waveform = AnchorReader(tmp_path / "anchors", index).waveform(row)
    np.testing.assert_array_equal(waveform[: RATE // 2] * 32768, clips["short"][1])
    assert not waveform[RATE // 2 :].any()
    assert index.table["onset_seconds"].to_pylist() == [0, 0]
    assert index.table["score"][row].as_py() == pytest.approx(0.5, abs=0.02)  # over what there is


def test_anchors_of_a_short_clip_end_before_it_does(hear):
    """2.5 s of a clip are followed by silence up to 4 s in the detector's batch: no window may reach into it."""
    _, index = hear({"a": ([SIREN], burst(1.9, clip_seconds=2.503))})
    assert index.table["onset_seconds"].to_pylist() == [1.5]


def test_random_windows_are_drawn_by_clip_and_class(hear):
    clips = {f"c{n}": ([SIREN, HUM], burst(1.0, seed=n)) for n in range(8)}
    _, index = hear(clips, change(mode="random"), n_shards=2)
    onsets = index.table["onset_seconds"].to_pylist()
    expected = [random_start(401, segment_frames=100, seed=0, key=key) / 100 for key in index.keys]
    assert onsets == expected
    assert len(set(onsets)) > 12
    _, other = hear(clips, change(mode="random"), n_shards=5)
    assert dict(zip(other.keys, other.table["onset_seconds"].to_pylist(), strict=True)) == dict(
        zip(index.keys, onsets, strict=True)
    )


@pytest.mark.parametrize(
    ("audio", "params", "message"),
    [
        ({"sample_rate": 16000}, {}, "audio.sample_rate is 16000"),
        ({"segment_seconds": 1.005}, {}, "audio.segment_seconds is 1.005"),
        ({}, {"smoothing_seconds": 1.0}, "smoothing_seconds is 1.0, 100 frames"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, audio, params, message):
    write_clips(tmp_path / "clips", {"a": ([SIREN], burst(1.0))})
    audio = AudioParams.model_validate(AUDIO.model_dump() | audio)
    with pytest.raises(ValueError, match=message):
        mine_anchors(tmp_path / "clips", tmp_path, tmp_path / "out", audio=audio, params=change(**params))


# ------------------------------------------------------------------- with networks, in processes


def corpus(n: int) -> dict[str, tuple[list[str], np.ndarray]]:
    rng = np.random.default_rng(0)
    mids = [SIREN, HUM, DOG, BARK]
    return {
        f"clip{k:02d}": (
            [mids[j] for j in sorted(rng.choice(4, rng.integers(1, 4), replace=False))],
            burst(rng.uniform(0, 3), seed=k, clip_seconds=rng.choice([4.0, 2.2])),
        )
        for k in range(n)
    }


def write_networks(directory: Path, folds: dict[str, int] | None = None) -> None:
    """Detector and query encoder of random weights, and a detector for each of the folds."""
    for fold in sorted(set((folds or {}).values())):
        torch.manual_seed(1 + fold)
        other = panns.SmallCnn(class_indices=INDICES[fold:], channels=[4, 8], embedding_dim=6)
        panns.save(other.eval(), directory / "folds" / str(fold))
        (directory / "folds" / "folds.json").write_text(json.dumps(folds))
    torch.manual_seed(0)
    network = panns.SmallCnn(class_indices=INDICES, channels=[4, 8], embedding_dim=6)
    for part in ("detector", "query"):
        panns.save(network.eval(), directory / part)


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def write_params(path: Path) -> None:
    import ruamel.yaml

    ruamel.yaml.YAML().dump({"audio": AUDIO.model_dump(), "mine_anchors": PARAMS.model_dump()}, path)


def start(workspace: Path, n_workers: int) -> subprocess.Popen:
    """The stage as DVC would run it, in its own process group."""
    arguments = ["--clips", "clips", "--sed", "sed", "--out", "anchors", "--summary", "anchors.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(workspace), "USS_WORKERS": str(n_workers)}
    command = [sys.executable, "-m", "pipeline.stages.mine_anchors", *arguments]
    return subprocess.Popen(command, cwd=workspace, env=environment, start_new_session=True)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(workspace):
    write_clips(workspace / "clips", corpus(12), n_shards=4)
    write_networks(workspace / "sed")
    write_params(workspace / "params.yaml")
    summary = mine_anchors(workspace / "clips", workspace / "sed", workspace / "expected", audio=AUDIO, params=PARAMS)
    expected = hashes(workspace / "expected")
    assert len(expected) == 3 + 3  # one of the four shards is empty, and has no file
    assert not list((workspace / "data/scratch").glob("*expected/*/"))  # --force must mine again

    process = start(workspace, 0)  # killed when its second part is finished
    parts = workspace / "data/scratch/mine_anchors@anchors"
    while len(list(parts.glob("*/parts/*/done.json"))) < 2:
        assert process.poll() is None, "the stage ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workspace / "anchors").exists()
    assert start(workspace, 0).wait() == 0
    assert hashes(workspace / "anchors") == expected
    assert json.loads((workspace / "anchors.json").read_bytes()) == summary
    shards.verify(workspace / "anchors")


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(workspace, monkeypatch):
    write_clips(workspace / "clips", corpus(12), n_shards=4)
    write_networks(workspace / "sed", {f"clip{k:02d}": k % 2 for k in range(9)})
    for n_workers in ("0", "2"):
        monkeypatch.setenv("USS_WORKERS", n_workers)
        mine_anchors(workspace / "clips", workspace / "sed", workspace / n_workers, audio=AUDIO, params=PARAMS)
    assert hashes(workspace / "0") == hashes(workspace / "2")


def test_the_stored_query_is_the_encoders_of_the_stored_segment(workspace):
    write_clips(workspace / "clips", corpus(5), n_shards=1)
    write_networks(workspace / "sed")
    mine_anchors(workspace / "clips", workspace / "sed", workspace / "anchors", audio=AUDIO, params=PARAMS)
    index = AnchorIndex.load(workspace / "anchors")
    reader = AnchorReader(workspace / "anchors", index)
    encoder = panns.load_query_encoder(workspace / "sed" / "query")
    with torch.inference_mode():
        for row in range(len(index)):
            expected = encoder.embed(torch.from_numpy(reader.waveform(row))[None])[0]
            torch.testing.assert_close(torch.from_numpy(reader.query(row)), expected)
    assert index.query_dim == 6


def test_the_detectors_of_the_folds_are_those_on_disk(workspace):
    """Each stored score is the one that the detector of the clip's fold gives the stored window."""
    fold_of = {f"clip{k:02d}": k % 2 for k in range(8)}  # the last two clips are in no fold
    write_clips(workspace / "clips", corpus(10), n_shards=1)
    write_networks(workspace / "sed", fold_of)
    summary = mine_anchors(workspace / "clips", workspace / "sed", workspace / "anchors", audio=AUDIO, params=PARAMS)
    index = AnchorIndex.load(workspace / "anchors")
    assert summary["dropped"]["unknown_class"] == sum(INDICES[0] in labels_of(k) for k in range(1, 8, 2))
    clips = shards.ClipReader(workspace / "clips", RATE)
    for row, clip in enumerate(index.clip_ids):
        place = workspace / "sed" / (f"folds/{fold_of[clip]}" if clip in fold_of else "detector")
        detector = panns.load_detector(place)
        waveform = clips.waveform(clip)
        padded = torch.from_numpy(np.pad(waveform, (0, 4 * RATE - len(waveform))))[None]
        with torch.inference_mode():
            segments = detector.framewise_probability(padded)
        frames = panns.to_frames(segments, segment_samples=detector.segment_samples, n_frames=401)[0]
        start = round(index.table["onset_seconds"][row].as_py() * 100)
        own = frames[start : start + 101, detector.class_indices.index(int(index.class_index[row]))]
        own = own[: len(waveform) // 320 + 1 - start]
        assert index.table["score"][row].as_py() == pytest.approx(float(own.mean()), abs=1e-5)


def labels_of(number: int) -> list[int]:
    return [class_of(mid).index for mid in corpus(number + 1)[f"clip{number:02d}"][0]]
