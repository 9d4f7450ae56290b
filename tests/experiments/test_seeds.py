"""Table I over seeds: its numbers and intervals, how often they hold the truth, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation.statistics import Design, mean_over_classes, resample
from pipeline.experiments import seeds
from pipeline.experiments.seeds import from_folders
from pipeline.reporting import over_seeds
from pipeline.reporting.kept import keep
from pipeline.reporting.over_seeds import STATISTICS, Comparison, markdown, summarise, write
from pipeline.reporting.tables import DASH, MINUS

CLIPS, PAIRS_PER_CLIP, CLASSES = 4, 3, 3


def make_scores(gain=5.0, noise=1.0, seed=0, query="average"):
    """One model of one run. What belongs to the pair is a function of the pair, for all runs alike."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    n = CLASSES * CLIPS * PAIRS_PER_CLIP
    pair = np.arange(n)
    k = pair // (CLIPS * PAIRS_PER_CLIP)
    before, hard = shared.normal(0, 0.3, n), shared.normal(0, 2, n)
    after = before + gain + k + hard + rng.normal(0, noise, n)
    return pd.DataFrame(
        {
            "pair": pair,
            "class_index": 10 * k + 7,
            "mid": [f"/m/{i}" for i in k],
            "target_clip": [f"clip-{i}-{p % CLIPS}" for i, p in zip(k, pair, strict=True)],
            "target_recording": [f"clip-{i}-{p % CLIPS}" for i, p in zip(k, pair, strict=True)],
            "interferer_recording": [f"other-{p}" for p in pair],
            "interferer_class_index": 10 * k + 8,
            "query": query,
            "sdr_mixture": before,
            "sdr_half": before + 3,
            "sdr": after,
            "sdri": after - before,
            "si_sdr_mixture": before - 0.1,
            "si_sdr": after - 0.5 - 0.1 * k,
            "si_sdri": after - before - 0.4 - 0.1 * k,
        }
    )


def make_runs(models=("resunet", "mae"), n_seeds=3):
    return {
        s: {m: make_scores(5 + i + 0.3 * s * (1 + i), seed=100 * i + s) for i, m in enumerate(models)}
        for s in range(n_seeds)
    }


def save(runs, folder):
    for s, models in runs.items():
        for model, table in models.items():
            path = folder / str(s) / model / "scores.parquet"
            path.parent.mkdir(parents=True)
            oracle = table.assign(query="oracle")
            pd.concat([oracle, table]).sample(frac=1, random_state=0).to_parquet(path, index=False)
    return [folder / str(s) for s in runs]


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_numbers_are_those_of_the_statistics_module_over_recordings_and_seeds(statistic, n_seeds):
    runs = make_runs(n_seeds=n_seeds)
    runs[0]["mae"].loc[[2, 20], ["sdri", "si_sdri"]] = np.nan  # a difference leaves them out of both
    comparison = Comparison(runs, n_resamples=20, seed=3)
    metric, kind = statistic.split("_class_")[0], statistic.split("_class_")[1].removesuffix("_mean")
    pairs = runs[0]["resunet"]
    design = Design.of(
        pairs["class_index"].tolist(), pairs["target_recording"].tolist(), pairs["interferer_recording"].tolist()
    )
    ours, base = ([runs[s][m][metric].to_numpy() for s in runs] for m in ("mae", "resunet"))
    masked = [np.where(np.isnan(a), np.nan, b) for a, b in zip(ours, base, strict=True)]

    def drawn(columns):
        found = resample({str(i): x for i, x in enumerate(columns)}, design, n_resamples=20, seed=3)
        return [found[str(i), kind] for i in range(len(columns))]

    differences = [a - b for a, b in zip(drawn(ours), drawn(masked), strict=True)]
    for found, expected in (
        (comparison.model("mae"), drawn(ours)),
        (comparison.model("resunet"), drawn(base)),
        (comparison.difference("mae", "resunet"), differences),
    ):
        number, estimate = found.numbers[statistic], mean_over_classes(expected, design)
        values = (number.mean, number.low, number.high)
        np.testing.assert_allclose(values, (estimate.value, estimate.low, estimate.high), rtol=0, atol=1e-9)
        plain = [getattr(pairs.assign(x=x).groupby("class_index")["x"], kind)().mean() for x in ours]
        if found is comparison.model("mae"):
            assert list(number.per_seed.values()) == pytest.approx(plain)
        assert found.covers == ("seeds and recordings" if n_seeds > 1 else "recordings only")
        assert np.isnan(number.sd) == (n_seeds == 1)


def test_the_interval_of_seeds_contains_that_of_recordings_and_widens_as_seeds_differ():
    width = {}
    for gap in (0.0, 1.0, 3.0):
        runs = make_runs(("resunet",))
        for s in runs:
            runs[s]["resunet"]["sdri"] += gap * s
        number = Comparison(runs, n_resamples=50, seed=0).model("resunet").numbers["sdri_class_mean_mean"]
        width[gap] = number.high - number.low
        one = Comparison({0: runs[0]}, n_resamples=50, seed=0).model("resunet").numbers["sdri_class_mean_mean"]
        width["recordings"] = one.high - one.low
    assert 0.7 * width["recordings"] < width[0.0] < width[1.0] < width[3.0]
    assert width[3.0] > 2 * 4.3 * 3.0 / 3**0.5 * 0.9  # Student's t of 2 degrees of freedom, and what is below noise


def study(rng, design, n_studies, n_seeds, skew=False, recording=1.4, pair=2.0, seed=0.5):
    """`n_studies` models of `n_seeds` trainings, on pairs of ten classes, whose true means are 0."""

    def draw(*shape):
        return rng.exponential(1, shape) - 1 if skew else rng.standard_normal(shape)

    columns = [design[name] for name in ("target_recording", "interferer_recording")]
    shared = sum(recording * draw(n_studies, int(column.max()) + 1)[:, column] for column in columns)
    shared = shared + pair * draw(n_studies, len(design))
    runs = {}
    for s in range(n_seeds):
        own = shared + seed * rng.standard_normal((n_studies, 1)) + 0.5 * rng.standard_normal(shared.shape)
        runs[s] = {f"m{i}": design.assign(sdri=own[i], si_sdri=0.0) for i in range(n_studies)}
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("case", ["level", "difference, skewed"])
def test_a_printed_95_percent_is_95_over_3_seeds(case, monkeypatch):
    """2,000 studies on 20 designs, through what makes the table."""
    monkeypatch.setattr(over_seeds, "METRICS", ("sdri",))
    monkeypatch.setattr(over_seeds, "AGGREGATES", ("mean",))
    rng, hits, total = np.random.default_rng(7), 0, 0
    size = {"recording": 0.4, "pair": 0.8} if "difference" in case else {}
    for _ in range(20):
        n_pairs, n_classes = 8, 10
        class_index = np.repeat(np.arange(n_classes), n_pairs)
        targets = class_index * 6 + np.concatenate([np.resize(rng.permutation(6), n_pairs) for _ in range(n_classes)])
        design = pd.DataFrame(
            {
                "pair": np.arange(len(class_index)),
                "class_index": class_index,
                **{name: "" for name in ("mid", "target_clip", "interferer_class_index")},
                "target_recording": targets,
                "interferer_recording": rng.integers(0, 60, len(class_index)),
                "sdr_mixture": 0.0,
            }
        )
        runs = study(rng, design, 100, 3, "skewed" in case, **size)
        if "difference" in case:  # of two models that share more than they differ by
            shared = rng.normal(0, 3, len(design))
            for s in runs:
                runs[s] = {"base": design.assign(sdri=shared), **runs[s]}
                for name in set(runs[s]) - {"base"}:
                    runs[s][name]["sdri"] += shared
        comparison = Comparison(runs, n_resamples=100, seed=int(rng.integers(1 << 30)))
        for name in set(comparison.seeds_of) - {"base"}:
            result = comparison.difference(name, "base") if "difference" in case else comparison.model(name)
            number = result.numbers["sdri_class_mean_mean"]
            hits, total = hits + (number.low <= 0 <= number.high), total + 1
    assert total == 2000
    assert 0.93 <= hits / total <= 0.97


def test_what_two_models_share_is_not_in_their_difference():
    runs = make_runs()
    for s in runs:
        runs[s]["same"] = runs[s]["resunet"].copy()
        shifted = runs[s]["resunet"].copy()
        shifted[["sdr", "sdri", "si_sdr", "si_sdri"]] += 0.5
        runs[s]["shifted"] = shifted
    comparison = Comparison(runs, n_resamples=100, seed=0)
    for key, number in comparison.difference("same", "resunet").numbers.items():
        assert (number.mean, number.low, number.high) == (0, 0, 0), key
    for number in comparison.difference("shifted", "resunet").numbers.values():
        np.testing.assert_allclose((number.mean, number.low, number.high, number.sd), (0.5, 0.5, 0.5, 0), atol=1e-9)
    # Seeds far apart, in both models alike: wide on its own, and nothing of it in the difference.
    assert comparison.model("resunet").numbers["sdri_class_mean_mean"].sd > 0.2


def test_a_model_that_lacks_a_seed_is_compared_on_those_it_shares():
    runs = make_runs(("resunet", "mae", "late", "alone"))
    for s in (0, 1, 2):
        if s != 1:
            del runs[s]["mae"]
        if s == 0:
            del runs[s]["late"]
    for s in (0, 1):
        del runs[s]["alone"]
    del runs[2]["resunet"]
    summary = summarise(runs, n_resamples=30, seed=0, baseline="resunet", equivalent=[("alone", "resunet")])
    rows = {row["model"]: row for row in summary["models"]}
    assert {m: row["seeds"] for m, row in rows.items()} == {"resunet": [0, 1], "mae": [1], "late": [1, 2], "alone": [2]}
    assert rows["mae"]["interval_covers"] == "recordings only"
    assert rows["late"]["interval_covers"] == "seeds and recordings"
    differences = {row["a"]: row for row in summary["differences"]}
    assert {m: row["seeds"] for m, row in differences.items()} == {"mae": [1], "late": [1], "alone": []}
    alone = Comparison({1: runs[1]}, n_resamples=30, seed=0).difference("late", "resunet")
    for key, number in alone.numbers.items():
        assert differences["late"][key]["mean"] == round(number.mean, 6)
        assert differences["late"][key]["ci_hi"] == round(number.high, 6)
    assert not set(STATISTICS) & set(differences["alone"])
    text = markdown(summary)
    assert f"| alone {MINUS} resunet | 0 | none | {' | '.join([DASH] * 4)} |" in text
    assert f"| late {MINUS} resunet | 1 (1) | recordings only |" in text
    assert "alone and resunet: no shared seed" in text


def test_other_pairs_are_an_error_that_names_run_and_model():
    def broken(change):
        runs = make_runs()
        runs[2]["mae"] = change(runs[2]["mae"].copy())
        return runs

    for change, message in (
        (lambda t: t.drop(index=5), r"mae of seed 2 \(35 pairs\) and resunet of seed 0 \(36 pairs\) .* 5$"),
        (lambda t: t.assign(target_clip="x"), "mae of seed 2 and resunet of seed 0 .* pair 0 has target_clip x"),
        (lambda t: t.assign(class_index=7), "mae of seed 2 .* pair 12 has class_index 7 and 17"),
        (lambda t: t.assign(sdr_mixture=1.0), "mae of seed 2 .* different mixtures"),
    ):
        with pytest.raises(ValueError, match=message):
            summarise(broken(change), n_resamples=10, seed=0, baseline="resunet")
    with pytest.raises(ValueError, match="no run has scores of nobody; there are resunet, mae"):
        summarise(make_runs(), n_resamples=10, seed=0, baseline="resunet", equivalent=[("mae", "nobody")])
    with pytest.raises(ValueError, match="no runs"):
        summarise({}, n_resamples=10, seed=0, baseline="resunet")


def test_a_model_that_was_also_given_what_else_sounds_has_a_row_of_each(tmp_path):
    path = tmp_path / "0" / "bandsplit" / "scores.parquet"
    path.parent.mkdir(parents=True)
    alone, given = make_scores(5.0), make_scores(6.0, query="average+interferer")
    pd.concat([alone, given]).to_parquet(path, index=False)
    runs = from_folders([tmp_path / "0"])
    assert list(runs[0]) == ["bandsplit", "bandsplit+interferer"]
    difference = Comparison(runs, n_resamples=50, seed=0).difference("bandsplit+interferer", "bandsplit")
    assert difference.numbers["sdri_class_mean_mean"].mean == pytest.approx(1.0)


def test_folders_are_named_by_their_seed(tmp_path):
    folders = save(make_runs(n_seeds=2), tmp_path)
    runs = from_folders(folders[::-1])
    assert sorted(runs) == [0, 1]
    pd.testing.assert_series_equal(runs[1]["mae"]["sdri"], make_runs()[1]["mae"]["sdri"])
    with pytest.raises(ValueError, match="seed 0 is given twice"):
        from_folders([folders[0], folders[0]])
    with pytest.raises(ValueError, match="named by its seed"):
        from_folders([tmp_path])
    (tmp_path / "7").mkdir()
    with pytest.raises(ValueError, match=r"no <model>/scores.parquet in .*7"):
        from_folders([tmp_path / "7"])


def test_bytes_depend_on_the_runs_alone(tmp_path):
    folders = save(make_runs(), tmp_path / "runs")
    for out, order in (("a", folders), ("b", folders[::-1])):
        write(
            summarise(from_folders(order), n_resamples=50, seed=1, baseline="resunet", equivalent=[("mae", "resunet")]),
            tmp_path / out,
        )
    for name in ("seeds.json", "seeds.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["seeds.json", "seeds.md"]


def test_the_command_writes_a_table_with_every_number(tmp_path, monkeypatch):
    runs = make_runs()
    for s in runs:
        runs[s]["again"] = make_scores(5 + 0.3 * s, seed=s + 50)
    folders = save(runs, tmp_path / "runs")
    (tmp_path / "params.yaml").write_text(
        "separators: {resunet: {}}\n"
        "report: {bootstrap_resamples: 40, bootstrap_seed: 2, min_targets: 5, max_lost: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    equivalent = ["--equivalent", "again", "resunet", "--equivalent", "mae", "resunet"]
    monkeypatch.setattr(sys, "argv", ["seeds", "--runs", *map(str, folders), "--out", "reports/seeds", *equivalent])
    seeds.main()
    summary = json.loads(Path("reports/seeds/seeds.json").read_text())
    assert summary["bootstrap"] == {"resamples": 40, "seed": 2}
    counts = ("n_pairs", "n_classes", "n_target_recordings", "n_interferer_recordings")
    assert [summary[name] for name in counts] == [36, 3, 12, 36]
    assert [row["model"] for row in summary["models"]] == ["resunet", "again", "mae"]
    first = summary["models"][0]["sdri_class_mean_mean"]
    expected = {s: runs[s]["resunet"].groupby("class_index")["sdri"].mean().mean() for s in runs}
    assert first["per_seed"] == {str(s): pytest.approx(x, abs=1e-6) for s, x in expected.items()}
    assert first["mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert first["sd"] == pytest.approx(np.std(list(expected.values()), ddof=1), abs=1e-6)

    text = Path("reports/seeds/seeds.md").read_text()
    cell = f"{first['mean']:.2f} [{first['ci_lo']:.2f}, {first['ci_hi']:.2f}] ± {first['sd']:.2f}"
    assert f"| resunet | 3 (0, 1, 2) | seeds and recordings | {cell} |" in text
    assert "| resunet | " + " | ".join(f"{x:.2f}" for x in expected.values()) + " |" in text
    assert f"| mae {MINUS} resunet | 3 (0, 1, 2) | seeds and recordings | +" in text
    assert "- again and resunet agree within noise by SDRi:" in text
    assert "- mae and resunet **differ** by more than noise by SDRi: +" in text
    assert [row["sdri_class_mean_mean"]["within_noise"] for row in summary["equivalent"]] == [True, False]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (6, 8, 5), line


def test_the_table_is_made_again_from_what_lies_beside_it_alone(tmp_path, monkeypatch):
    folders = save(make_runs(), tmp_path / "runs")
    (tmp_path / "of_the_runs.yaml").write_text(
        "separators: {resunet: {}}\nreport: {bootstrap_resamples: 40, bootstrap_seed: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["seeds", "--runs", *map(str, folders), "--out", "kept", "--params", "of_the_runs.yaml"]
    monkeypatch.setattr(sys, "argv", [*command, "--equivalent", "mae", "resunet"])
    seeds.main()
    first = {path.name: path.read_bytes() for path in Path("kept").iterdir()}
    assert sorted(first) == ["params.yaml", "scores.parquet", "seeds.json", "seeds.md"]
    assert first["params.yaml"] == (tmp_path / "of_the_runs.yaml").read_bytes()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("scores.parquet", "params.yaml"):
        (elsewhere / name).write_bytes(first[name])
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "of_the_runs.yaml").unlink()
    monkeypatch.setattr(sys, "argv", ["seeds", "--again", str(elsewhere)])
    seeds.main()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == first
    assert "## Equivalence" in first["seeds.md"].decode()

    table = pd.read_parquet(elsewhere / "scores.parquet")
    runs = make_runs()
    assert len(table) == sum(len(scores) for models in runs.values() for scores in models.values())
    one = table[(table["seed"] == 2) & (table["model"] == "mae")]
    np.testing.assert_allclose(one["sdri"], runs[2]["mae"]["sdri"], rtol=0, atol=1e-5)


def test_a_table_without_its_scores_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["seeds", "--again", str(tmp_path)])
    with pytest.raises(ValueError, match=r"has no scores\.parquet: its table was made without"):
        seeds.main()
    make_scores().to_parquet(tmp_path / "scores.parquet")
    (tmp_path / "params.yaml").write_text(
        "separators: {resunet: {}}\nreport: {bootstrap_resamples: 40, bootstrap_seed: 2}\n"
    )
    with pytest.raises(ValueError, match="is not the scores of a table over seeds"):
        seeds.main()


def test_the_scores_of_a_large_table_are_small(tmp_path):
    """Ten classes of 100 pairs, nine models, three seeds, as on ESC-10."""
    one = make_scores()
    large = pd.concat([one.assign(pair=one["pair"] + len(one) * i) for i in range(28)], ignore_index=True)
    rng = np.random.default_rng(0)
    runs = {s: {f"m{i}": large.assign(sdri=rng.normal(5, 3, len(large))) for i in range(9)} for s in range(3)}
    (tmp_path / "params.yaml").write_text("report: {}\n")
    keep(runs, tmp_path, tmp_path / "params.yaml", [])
    assert (tmp_path / "scores.parquet").stat().st_size < 2_000_000


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("table", sorted((ROOT / "reports").rglob("seeds*.md")), ids=lambda p: p.name)
def test_a_committed_table_has_its_scores_or_is_said_to_lack_them(table):
    if (table.parent / "scores.parquet").is_file():
        summary = seeds.table_again(table.parent)
        assert markdown(summary) == table.read_text(), "python -m pipeline seeds --again makes it anew"
    else:
        assert "**No scores were kept**" in (table.parent / "README.md").read_text()


STAGE = """\
import pathlib, shutil
from ruamel.yaml import YAML
seed = YAML(typ="safe").load(pathlib.Path("params.yaml"))["train"]["seed"]
shutil.copytree(pathlib.Path(__file__).parent / "runs" / str(seed), "data/scores")
with open(pathlib.Path(__file__).parent / "ran.txt", "a") as file:
    file.write(f"{seed}\\n")
"""


@pytest.mark.slow
def test_seeds_are_experiments_and_none_runs_twice(tmp_path, monkeypatch):
    runs = make_runs()
    save(runs, tmp_path / "runs")
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    monkeypatch.chdir(project)
    for name, value in (("NAME", "a"), ("EMAIL", "a@b")):
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", value)
    (tmp_path / "stage.py").write_text(STAGE)
    params = (
        "train: {seed: 0, steps: 5}\nseparators: {resunet: {}}\nreport: {bootstrap_resamples: 40, bootstrap_seed: 2}\n"
    )
    (project / "params.yaml").write_text(params)
    stage = {"cmd": f"{sys.executable} {tmp_path / 'stage.py'}", "params": ["train"], "outs": ["data/scores"]}
    (project / "dvc.yaml").write_text(json.dumps({"stages": {"evaluate": stage}}))

    def command(*arguments):
        subprocess.run(arguments, check=True, capture_output=True)

    command("git", "init", "-q")
    command(sys.executable, "-m", "dvc", "init", "-q")
    command(sys.executable, "-m", "dvc", "repro", "-q")
    command("git", "add", "-A")
    command("git", "commit", "-qm", "start")

    monkeypatch.setattr(sys, "argv", ["seeds", "--seeds", "0", "1", "2"])
    seeds.main()
    ours = Path("reports/seeds/seeds.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["seeds", "--seeds", "1"])
    seeds.main()
    assert (tmp_path / "ran.txt").read_text().split() == ["0", "1", "2"]
    assert Path("reports/seeds/seeds.json").read_bytes() == ours
    folders = map(str, sorted((tmp_path / "runs").iterdir()))
    monkeypatch.setattr(sys, "argv", ["seeds", "--runs", *folders, "--out", "other"])
    seeds.main()
    assert Path("other/seeds.json").read_bytes() == ours

    (project / "params.yaml").write_text(params.replace("steps: 5", "steps: 6"))
    monkeypatch.setattr(sys, "argv", ["seeds", "--collect"])
    with pytest.raises(ValueError, match=r"experiment seed-1 differs from the workspace in more than train.seed=1"):
        seeds.main()
