"""The list of clips that all later stages read: complete, the same in every run, and no recording on both sides."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

from pipeline.core import profiles
from pipeline.core.config import load_params
from pipeline.datasets import Clip, audioset, load
from pipeline.stages import scan as stage
from pipeline.stages.scan import DataParams, scan

REPOSITORY = Path(__file__).parents[2]
SPEECH, DOG = "/m/09x0r", "/m/0bt9lr"


def dataset(root: Path, **subsets: list[Clip]) -> ModuleType:
    """A data set of these clips; each file that is named is made, a byte long."""
    for clip in (clip for found in subsets.values() for clip in found):
        if clip.path is not None:
            (root / clip.path).parent.mkdir(parents=True, exist_ok=True)
            (root / clip.path).write_bytes(b"x")
    module = ModuleType("test")
    module.clips = lambda root, subset, counts: iter(subsets[subset])  # type: ignore[attr-defined]
    return module


def clip(clip_id: str, *labels: str, start: float = 0.0, missing: bool = False, recording: str = "") -> Clip:
    path = None if missing else f"audio/{clip_id}.wav"
    return Clip(clip_id, labels or (SPEECH,), path, start, start + 10, recording or clip_id)


def params(root: Path, train: tuple[str, ...] = ("train",), evaluation: tuple[str, ...] = ("eval",)) -> DataParams:
    return DataParams(source="test", root=str(root), train=list(train), eval=list(evaluation))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_present_and_missing_clips_are_listed_apart_and_counted(tmp_path):
    root, out = tmp_path / "root", tmp_path / "data" / "manifest"
    source = dataset(
        root,
        train=[clip("-a", SPEECH, DOG, start=30.0), clip("b", DOG, missing=True)],
        eval=[clip("c", DOG), clip("a_", missing=True)],
    )
    summary = scan(out, params(root), source)
    assert sorted(path.name for path in out.iterdir()) == ["eval.csv", "missing.csv", "summary.json", "train.csv"]
    assert (out / "train.csv").read_bytes() == (
        b"clip_id,subset,labels,path,size_bytes,start_seconds,end_seconds,recording\n"
        b"-a,train,/m/09x0r;/m/0bt9lr,audio/-a.wav,1,30.0,40.0,-a\n"
    )
    assert [row["clip_id"] for row in table(out / "eval.csv")] == ["c"]
    assert [(row["split"], row["clip_id"]) for row in table(out / "missing.csv")] == [("eval", "a_"), ("train", "b")]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {key: summary["train"][key] for key in ("listed", "present", "missing", "bytes")} == {
        "listed": 2,
        "present": 1,
        "missing": 1,
        "bytes": 1,
    }
    assert summary["classes"][DOG] == {
        "index": 74,
        "name": "Dog",
        "train": {"listed": 2, "present": 1},
        "eval": {"listed": 1, "present": 1},
    }


def test_a_recording_in_both_splits_is_taken_out_of_train_and_never_silently(tmp_path, caplog):
    source = dataset(
        tmp_path,
        train=[clip("a"), clip("same"), clip("rec_0", recording="rec"), clip("quiet")],
        eval=[clip("b"), clip("same"), clip("rec_70000", start=70.0, recording="rec"), clip("quiet", missing=True)],
    )
    summary = scan(tmp_path / "out", params(tmp_path), source)
    assert [row["clip_id"] for row in table(tmp_path / "out" / "train.csv")] == ["a"]
    assert [row["clip_id"] for row in table(tmp_path / "out" / "eval.csv")] == ["b", "rec_70000", "same"]
    assert summary["train"]["dropped_also_in_eval"] == 3
    assert "3 clips of train are of recordings that are also in eval" in caplog.text


def test_one_file_cannot_serve_both_splits(tmp_path):
    twin = Clip("twin", (DOG,), "audio/b.wav", 0.0, 10.0, "other")
    source = dataset(tmp_path, train=[clip("a"), twin], eval=[clip("b")])
    assert scan(tmp_path / "out", params(tmp_path), source)["train"]["dropped_also_in_eval"] == 1


def test_a_clip_in_two_subsets_of_a_split_counts_once(tmp_path):
    source = dataset(
        tmp_path,
        small=[clip("a"), clip("r", start=30.0, recording="r")],
        large=[clip("a"), clip("r_30000", start=30.0, recording="r"), clip("r_90000", start=90.0, recording="r")],
        eval=[clip("e")],
    )
    summary = scan(tmp_path / "out", params(tmp_path, train=("small", "large")), source)
    assert [row["clip_id"] for row in table(tmp_path / "out" / "train.csv")] == ["a", "r", "r_90000"]
    assert summary["train"]["repeated_clips"] == 2


def test_takes_of_one_recording_are_clips_of_their_own(tmp_path):
    takes = [Clip(f"1-7-{take}-0", (DOG,), f"audio/1-7-{take}-0.wav", 0.0, 5.0, "7") for take in "ABC"]
    source = dataset(tmp_path, esc50=takes, esc10=takes, eval=[clip("e")])
    summary = scan(tmp_path / "out", params(tmp_path, train=("esc50", "esc10")), source)
    rows = table(tmp_path / "out" / "train.csv")
    assert [(row["clip_id"], row["recording"]) for row in rows] == [(take.clip_id, "7") for take in takes]
    assert summary["train"]["repeated_clips"] == 3


def test_a_split_without_any_audio_stops_the_stage_naming_the_root(tmp_path):
    source = dataset(tmp_path, train=[clip("a")], eval=[clip("b", missing=True)])
    with pytest.raises(ValueError, match=f"none of the 1 clips of eval has a file under data.root '{tmp_path}'"):
        scan(tmp_path / "out", params(tmp_path), source)
    assert not (tmp_path / "out").exists()


def test_params_name_a_subset_once(tmp_path):
    for train, evaluation in ((("a", "a"), ("b",)), (("a",), ("b", "a"))):
        with pytest.raises(ValueError, match="subset 'a' is given twice"):
            params(tmp_path, train, evaluation)
    with pytest.raises(ValueError, match="eval"):
        DataParams(source="audioset", root="x", train=["a"], eval=[])


def test_the_embedded_recordings_are_there():
    embedded = load_params("data", DataParams, REPOSITORY / "params.yaml")
    source = load(embedded.source)
    for subset, n in ((subset, 80) for subset in (*embedded.train, *embedded.eval)):
        clips = list(source.clips(REPOSITORY / embedded.root, subset))
        assert len(clips) == n
        assert all(clip.path is not None for clip in clips)


def test_the_params_of_the_generated_corpus_fit(tmp_path):
    (tmp_path / "params.yaml").write_text(profiles.text("synthetic", REPOSITORY))
    embedded = load_params("data", DataParams, tmp_path / "params.yaml")
    options = load_params(embedded.source, load(embedded.source).Options, tmp_path / "params.yaml")
    assert embedded.source == "synthetic"
    assert options.train_clips_per_class > options.eval_clips_per_class > 0


def test_two_runs_write_the_same_bytes_and_what_lay_there_before_goes(tmp_path):
    root = tmp_path / "root"
    labels = f'"{DOG},{SPEECH}"'
    for subset, ids in (("balanced_train", "abcd"), ("eval", "wxyz")):
        lines = "".join(f"{letter * 11}, 0.000, 10.000, {labels}\n" for letter in ids)
        (root / "audio").mkdir(parents=True, exist_ok=True)
        (root / f"{subset}_segments.csv").write_text(lines)
        for letter in ids[:3]:
            (root / "audio" / f"Y{letter * 11}.wav").write_bytes(b"12")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale.csv").touch()
        scan(tmp_path / name, params(root, ("balanced_train",), ("eval",)), audioset)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert "stale.csv" not in content(tmp_path / "one")


def test_esc10_laid_out_as_audioset_runs_unchanged(tmp_path):
    """320 ids of ten characters, as in a copy of ESC-10; a start in the name would be part of another id."""
    for subset, folds in (("balanced_train", (1, 2, 3)), ("eval", (4,))):
        lines = ["# Segments csv laid out as AudioSet's own\n", "# YTID, start_seconds, end_seconds, positive_labels\n"]
        for fold in folds:
            for i in range(80):
                ytid = f"{fold}-{100000 * fold + i // 2}-{'AB'[i % 2]}"
                lines.append(f'{ytid}, 0.000, 5.000, "{DOG}"\n')
                path = tmp_path / "audio" / f"{ytid}.ogg"
                path.parent.mkdir(exist_ok=True)
                path.touch()
        (tmp_path / f"{subset}_segments.csv").write_text("".join(lines))
    summary = scan(tmp_path / "out", params(tmp_path, ("balanced_train",), ("eval",)), audioset)
    assert [(summary[split]["present"], summary[split]["missing"]) for split in stage.SPLITS] == [(240, 0), (80, 0)]


# --------------------------------------------------------------------------------------------------- the whole stage


def smaller_params(folder: Path, per_class: int) -> Path:
    """A folder with a params.yaml of the default source, smaller."""
    values = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    values["data"] = {"source": "synthetic", "root": "data/synthetic", "train": ["balanced_train"], "eval": ["eval"]}
    values["synthetic"] |= {"train_clips_per_class": per_class, "eval_clips_per_class": 1}
    YAML(typ="safe").dump(values, folder / "params.yaml")
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.stages.scan", "--out", "data/manifest"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(folder)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_the_stage_makes_its_corpus_and_a_killed_run_ends_in_the_same_bytes(workspace, monkeypatch):
    smaller_params(workspace, 1)
    process = start(workspace)
    while len(list((workspace / "data" / "synthetic" / "audio").glob("[!.]*"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workspace / "data" / "manifest").exists()
    for name in ("manifest", "again"):
        monkeypatch.setattr(sys, "argv", ["scan", "--out", f"data/{name}"])
        stage.main()
    assert content(workspace / "data" / "manifest") == content(workspace / "data" / "again")
    rows = table(workspace / "data" / "manifest" / "train.csv")
    assert Counter(row["subset"] for row in rows) == {"balanced_train": 24 + 5}
    assert all(
        (workspace / "data" / "synthetic" / row["path"]).stat().st_size == int(row["size_bytes"]) for row in rows
    )


def test_a_wrong_key_stops_the_stage_with_its_dotted_name(workspace, monkeypatch):
    smaller_params(workspace, 1)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("train_clips_per_class", "clips"))
    monkeypatch.setattr(sys, "argv", ["scan", "--out", "data/manifest"])
    with pytest.raises(ValueError, match=r"synthetic\.clips: Extra inputs are not permitted"):
        stage.main()
