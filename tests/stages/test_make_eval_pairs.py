"""Stage make_eval_pairs: balanced, at 0 dB, without the forbidden, and the same table whatever the index looks like."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ruamel.yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.ontology import class_of, classes, kin
from pipeline.mixtures.anchors import AnchorIndex, anchor_key, write_index
from pipeline.mixtures.mixing import PairsParams, energy, mix
from pipeline.stages.make_eval_pairs import (
    SCHEMA,
    Chosen,
    MakeEvalPairsParams,
    choose,
    content_sha256,
    main,
    make_eval_pairs,
    tabulate,
)

ROOT = Path(__file__).parents[2]
PAIRS = PairsParams(exclude="ontology", normalize="joint", match_energy=True, min_gain=0.02, max_gain=50.0)
PARAMS = MakeEvalPairsParams(seed=1234, pairs_per_class=20)
SIREN, DOG, BARK, SPEECH, HUM = "/m/03kmc9", "/m/0bt9lr", "/m/05tny_", "/m/09x0r", "/m/07rcgpl"


def rows_of(clips: dict[str, list[str]], seed: int = 0) -> list[dict]:
    """Index rows with an anchor for each label of each clip; its energy is a function of its key."""
    rows = []
    for clip, mids in clips.items():
        for mid in mids:
            k = class_of(mid).index
            level = np.random.default_rng([seed, k, *clip.encode()]).uniform(1e-3, 1)
            rows.append(
                {
                    "anchor": anchor_key(clip, k), "clip_id": clip, "recording": clip[:3], "class_index": k,
                    "mid": mid, "labels": ";".join(mids), "onset_seconds": k / 100, "score": 0.5, "purity": 0.5,
                    "energy": level, "peak": 1.0, "shard": "anchors-00000.tar", "wav_offset": 0,
                    "wav_size": 0, "query_offset": 0, "query_size": 0, "sha256": anchor_key(clip, k),
                }
            )  # fmt: skip
    return rows


def corpus(n_clips: int = 60) -> dict[str, list[str]]:
    rng = np.random.default_rng(1)
    mids = [SIREN, DOG, BARK, SPEECH, HUM]
    return {
        f"c{n:03d}": [mids[j] for j in sorted(rng.choice(5, rng.integers(1, 4), replace=False))] for n in range(n_clips)
    }


def write(directory: Path, rows: list[dict], empty: tuple[str, ...] = ()) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_index(directory, rows, sample_rate=32000, segment_samples=64000, query_dim=4, empty_classes=empty)


def run(tmp_path: Path, rows: list[dict], *, empty=(), name="pairs", **changes) -> tuple[pa.Table, dict]:
    write(tmp_path / "anchors", rows, empty)
    pairs = PairsParams.model_validate({k: changes.get(k, v) for k, v in PAIRS.model_dump().items()})
    params = MakeEvalPairsParams.model_validate({k: changes.get(k, v) for k, v in PARAMS.model_dump().items()})
    summary = make_eval_pairs(tmp_path / "anchors", tmp_path / name, pairs=pairs, params=params)
    assert summary == json.loads((tmp_path / name / "pairs.json").read_text())
    return pq.read_table(tmp_path / name / "pairs.parquet"), summary


@pytest.mark.slow
def test_527_classes_give_52_700_rows(tmp_path):
    rows = rows_of({f"c{k:03d}x{n}": [c.mid] for k, c in enumerate(classes()) for n in range(4)})
    table, summary = run(tmp_path, rows, pairs_per_class=100)
    assert (summary["pairs"], summary["classes"]) == (table.num_rows, 527) == (52_700, 527)


def test_every_class_has_its_pairs_in_order(tmp_path):
    manifest, summary = run(tmp_path, rows_of(corpus()))
    assert manifest.schema.equals(SCHEMA)
    indices = sorted(class_of(mid).index for mid in (SIREN, DOG, BARK, SPEECH, HUM))
    assert manifest["class_index"].to_pylist() == [k for k in indices for _ in range(20)]
    assert manifest["pair"].to_pylist() == list(range(100))
    assert set(manifest["seed"].to_pylist()) == {1234}
    assert (summary["pairs"], summary["classes"]) == (100, 5)
    for row in manifest.to_pylist():
        assert row["mid"] == classes()[row["class_index"]].mid
        assert row["target"] == anchor_key(row["target_clip"], row["class_index"])
        assert row["interferer"] == anchor_key(row["interferer_clip"], row["interferer_class_index"])
        assert row["target_onset_seconds"] == row["class_index"] / 100
        assert row["interferer_onset_seconds"] == row["interferer_class_index"] / 100


@pytest.mark.parametrize("exclude", ["none", "label", "ontology"])
def test_interferers_are_of_another_class_another_clip_and_not_excluded(tmp_path, exclude):
    clips = corpus()
    manifest, summary = run(tmp_path, rows_of(clips), exclude=exclude)
    carried = Counter()
    for row in manifest.to_pylist():
        assert row["class_index"] != row["interferer_class_index"]
        assert row["target_clip"] != row["interferer_clip"]
        labels = set(clips[row["interferer_clip"]])
        carried["target_label"] += row["mid"] in labels
        carried["target_kin"] += bool(labels & kin(row["mid"]))
        carried["any_label"] += bool(labels & set(clips[row["target_clip"]]))
    assert summary["overlap"] == {name: pytest.approx(count / 100) for name, count in carried.items()}
    assert (carried["target_label"] == 0) == (exclude != "none")
    assert (carried["target_kin"] == 0) == (exclude == "ontology")
    assert summary["overlap_without_exclusion"]["target_label"] > 0


def test_mixtures_are_at_0_db_unless_clamped_and_clamps_are_counted(tmp_path):
    rows = rows_of(corpus())
    for row in rows:
        if row["mid"] == HUM:
            row["energy"] = 1e-8 if row["clip_id"] < "c030" else 1e-10  # faint, and silent
    manifest, summary = run(tmp_path, rows)
    by_key = {row["anchor"]: row for row in rows}
    counts = Counter()
    for row in manifest.to_pylist():
        target, interferer = by_key[row["target"]]["energy"], by_key[row["interferer"]]["energy"]
        ratio = (target / interferer) ** 0.5
        assert row["gain"] == pytest.approx(np.clip(ratio, 0.02, 50))
        assert row["clamped"] == (not 0.02 <= ratio <= 50)
        if not row["clamped"]:
            assert target / (row["gain"] ** 2 * interferer) == pytest.approx(1)
        counts["clamped_to_min_gain"] += ratio < 0.02
        counts["clamped_to_max_gain"] += ratio > 50
        counts["silent_targets"] += target == 1e-10
        counts["silent_interferers"] += interferer == 1e-10
    assert min(counts.values()) > 0
    assert {name: summary[name] for name in counts} == counts


def test_energies_are_left_alone_on_request(tmp_path):
    manifest, summary = run(tmp_path, rows_of(corpus()), match_energy=False)
    assert set(manifest["gain"].to_pylist()) == {1.0}
    assert summary["clamped_to_min_gain"] == summary["clamped_to_max_gain"] == 0


def test_the_stored_gain_mixes_the_waveforms_at_0_db(tmp_path):
    """From sound to index to manifest and back to sound."""
    rows = rows_of(corpus())
    rng = np.random.default_rng(0)
    waveforms = {row["anchor"]: rng.uniform(0.05, 1) * rng.uniform(-1, 1, 400) for row in rows}
    for row in rows:
        row["energy"] = float(energy(waveforms[row["anchor"]][None])[0])
    manifest, _ = run(tmp_path, rows)
    for row in manifest.to_pylist():
        sources = waveforms[row["target"]][None], waveforms[row["interferer"]][None]
        _, target, interferer = mix(*sources, np.array([row["gain"]]), "joint")
        assert energy(target) == pytest.approx(energy(interferer))


def test_the_same_anchors_and_seed_give_the_same_rows_in_any_index_and_for_ever(tmp_path):
    rows = [row | {"recording": row["clip_id"]} for row in rows_of(corpus())]
    _, summary = run(tmp_path, rows)
    # Golden: a change here changes every evaluation set that has been published.
    assert summary["content_sha256"] == "48693181ebe55598ed22402bbfa26f91c05a227a3d0bda155a1f2032475fada7"
    parquet = (tmp_path / "pairs" / "pairs.parquet").read_bytes()
    moved = [row | {"shard": "anchors-00007.tar", "wav_offset": 99} for row in reversed(rows)]  # other shards, order
    _, again = run(tmp_path, moved, name="again")
    assert again == summary
    assert (tmp_path / "again" / "pairs.parquet").read_bytes() == parquet
    # not even the index' own order matters
    index = AnchorIndex.load(tmp_path / "anchors")
    table = index.table.take(pa.array(np.random.default_rng(0).permutation(len(index))))
    lists = {name: table[name].to_pylist() for name in ("anchor", "mid", "clip_id", "recording", "labels")}
    shuffled = AnchorIndex(
        32000, 64000, 4, (), table, table["class_index"].to_numpy(), table["energy"].to_numpy(), *lists.values()
    )
    chosen = choose(shuffled, "ontology", PARAMS)
    table = tabulate(shuffled, chosen.targets, chosen.interferers, pairs=PAIRS, seed=1234)
    assert content_sha256(table) == summary["content_sha256"]


def test_no_pair_is_of_one_recording(tmp_path):
    manifest, _ = run(tmp_path, rows_of(corpus()))  # ten clips a recording
    assert len(manifest) == 100
    assert all(row["target_recording"] != row["interferer_recording"] for row in manifest.to_pylist())


@pytest.mark.parametrize("change", [{"seed": 1}, {"exclude": "none"}, {"max_gain": 1.0}])
def test_another_rule_gives_another_hash(tmp_path, change):
    _, summary = run(tmp_path, rows_of(corpus()))
    _, other = run(tmp_path, rows_of(corpus()), **change)
    assert other["content_sha256"] != summary["content_sha256"]


def test_more_pairs_begin_with_the_fewer(tmp_path):
    few, _ = run(tmp_path, rows_of(corpus()), pairs_per_class=5)
    many, _ = run(tmp_path, rows_of(corpus()), pairs_per_class=8)
    for k in set(few["class_index"].to_pylist()):
        ours, theirs = (
            [(r["target"], r["interferer"]) for r in table.to_pylist() if r["class_index"] == k]
            for table in (few, many)
        )
        assert theirs[:5] == ours


def sound_pairs(index: AnchorIndex, chosen: Chosen) -> dict[int, list[tuple[str, str]]]:
    """The hashes of the two sounds of each pair, by class, in the stream's order."""
    sounds = index.table["sha256"].to_pylist()
    pairs: dict[int, list[tuple[str, str]]] = {}
    for t, i in zip(chosen.targets.tolist(), chosen.interferers.tolist(), strict=True):
        pairs.setdefault(int(index.class_index[t]), []).append((sounds[t], sounds[i]))
    return pairs


def index_with_copies(directory: Path, seed: int, n_clips: int, n_sounds: int) -> AnchorIndex:
    """An index in which several anchors are the same sound, as those of one clip's labels may be."""
    rng = np.random.default_rng(seed)
    mids = [SIREN, DOG, SPEECH, HUM]
    clips = {
        f"c{n:02d}": [mids[j] for j in sorted(rng.choice(4, rng.integers(1, 3), replace=False))] for n in range(n_clips)
    }
    write(directory, [row | {"sha256": f"sound{rng.integers(n_sounds)}"} for row in rows_of(clips)])
    return AnchorIndex.load(directory)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(4, 9), st.integers(2, 20), st.integers(1, 40))
def test_a_pair_of_sounds_comes_again_only_after_all_others_of_its_class(seed, n_clips, n_sounds, pairs_per_class):
    with tempfile.TemporaryDirectory() as directory:
        index = index_with_copies(Path(directory), seed, n_clips, n_sounds)
    params = MakeEvalPairsParams(seed=seed, pairs_per_class=pairs_per_class)
    try:
        chosen = choose(index, "ontology", params)
    except ValueError:
        return  # nothing in this corpus may meet
    pairs = sound_pairs(index, chosen)
    sounds = index.table["sha256"].to_pylist()
    assert sorted(pairs) == chosen.stream.classes
    for item in range(len(pairs)):  # of every class
        possible = {(sounds[draw.target], sounds[draw.interferer]) for draw in chosen.stream.choices(item)}
        own = pairs[int(index.class_index[chosen.stream.draw(item).target])]
        assert len(own) == pairs_per_class
        for start in range(0, pairs_per_class, len(possible)):
            one_round = own[start : start + len(possible)]
            assert len(set(one_round)) == len(one_round)
            assert set(one_round) <= possible


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(4, 9), st.integers(1, 12), st.integers(1, 12))
def test_a_pair_is_a_function_of_the_seed_the_class_and_its_number(seed, n_clips, few, more):
    with tempfile.TemporaryDirectory() as directory:
        index = index_with_copies(Path(directory), seed, n_clips, 6)

    def pairs_of(n: int) -> dict[int, list[tuple[str, str]]]:
        return sound_pairs(index, choose(index, "label", MakeEvalPairsParams(seed=seed, pairs_per_class=n)))

    try:
        first, second, longer = pairs_of(few), pairs_of(few), pairs_of(few + more)
    except ValueError:
        return  # nothing in this corpus may meet
    assert first == second == {k: pairs[:few] for k, pairs in longer.items()}


def test_repeats_are_avoided_and_those_that_cannot_be_are_counted(tmp_path):
    clips = {"a": [SIREN], "b": [SIREN], "c": [SIREN], "d": [HUM], "e": [HUM], "f": [HUM], "g": [HUM]}
    _, summary = run(tmp_path, rows_of(clips), pairs_per_class=12)  # all there are: 3 x 4 of either class
    assert (summary["repeats"], summary["repeats_by_class"]) == (0, {})
    assert summary["repeats_avoided"] > 0
    manifest, summary = run(tmp_path, rows_of(clips), pairs_per_class=14)
    assert (summary["repeats"], summary["repeats_by_class"]) == (4, {"Hum": 2, "Siren": 2})
    assert manifest.num_rows == 28
    mixtures = [(row["target"], row["interferer"], row["gain"]) for row in manifest.to_pylist()]
    assert len(mixtures) - len(set(mixtures)) == 4


def test_one_sound_under_two_names_is_one_sound(tmp_path):
    rows = rows_of({"a": [SIREN], "b": [SIREN], "c": [HUM], "d": [HUM]})
    assert run(tmp_path, rows, pairs_per_class=4)[1]["repeats"] == 0
    for row in rows:
        if row["mid"] == HUM:
            row["sha256"] = "the same"
    assert run(tmp_path, rows, pairs_per_class=4)[1]["repeats_by_class"] == {"Siren": 2, "Hum": 2}


def test_a_small_class_repeats_its_targets_and_it_is_said(tmp_path):
    clips = corpus() | {"z0": ["/m/01h8n0"], "z1": ["/m/01h8n0"]}
    manifest, summary = run(tmp_path, rows_of(clips))
    rare = [r["target"] for r in manifest.to_pylist() if r["mid"] == "/m/01h8n0"]
    assert sorted(Counter(rare).values()) == [10, 10]
    assert summary["distinct_targets_per_class"]["min"] == 2
    assert summary["distinct_targets_per_class"]["max"] == 20


def test_classes_that_evaluation_says_nothing_about_are_named(tmp_path):
    clips = {"a": [DOG], "b": [SIREN, BARK], "c": [HUM, BARK], "d": [DOG]}
    _, summary = run(tmp_path, rows_of(clips), empty=("/m/01h8n0",))
    assert summary["classes_without_anchors"] == ["Conversation"]
    assert summary["classes_without_interferer"] == ["Dog", "Bark"]
    assert summary["pairs"] == 2 * 20


def test_nothing_to_pair_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no two of 2 anchors"):
        run(tmp_path, rows_of({"a": [DOG], "b": [DOG]}))
    assert not (tmp_path / "pairs").exists()


def test_a_killed_run_leaves_nothing_and_the_next_one_the_same_bytes(workspace, monkeypatch):
    write(workspace / "anchors", rows_of(corpus()))
    params = {"pairs": PAIRS.model_dump(), "make_eval_pairs": PARAMS.model_dump()}
    ruamel.yaml.YAML().dump(params, workspace / "params.yaml")
    arguments = ["--anchors", "anchors", "--out", "pairs", "--summary", "summary.json"]
    program = (  # dies between its two files
        "import os, signal\n"
        "from pipeline.stages import make_eval_pairs as stage\n"
        "stage.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(workspace)}
    killed = subprocess.run([sys.executable, "-c", program, *arguments], cwd=workspace, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (workspace / "pairs").exists()

    monkeypatch.setattr(sys, "argv", ["make_eval_pairs", *arguments])
    main()
    summary = make_eval_pairs(workspace / "anchors", workspace / "expected", pairs=PAIRS, params=PARAMS)
    for name in ("pairs.parquet", "pairs.json"):
        assert (workspace / "pairs" / name).read_bytes() == (workspace / "expected" / name).read_bytes()
    assert json.loads((workspace / "summary.json").read_text()) == summary
