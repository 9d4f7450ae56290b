"""The report stage on a run made up here: numbers against slower, plainer ways, and the page as a reader gets it."""

import html
import json
import re
import shutil
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.io import wavfile

from pipeline.core import ontology, profiles
from pipeline.evaluation.statistics import finite_mean
from pipeline.reporting import charts, sounds, tables
from pipeline.reporting.ablation_table import as_it_stands, read_ablations
from pipeline.reporting.comparability import comparisons
from pipeline.reporting.gates import GateParams
from pipeline.reporting.inputs import SplitData, ThinClass, flat_scalars, read_split
from pipeline.reporting.provenance import code, data_hash, hardware, profile
from pipeline.reporting.scores import read_scores
from pipeline.reporting.sections import listening, table1
from pipeline.reporting.sections.provenance import rerun
from pipeline.reporting.sections.table1 import System
from pipeline.reporting.sections.verdict import ONE_TRAINING
from pipeline.reporting.summary import per_class_csv, summarise, wilcoxon_p
from pipeline.stages.report import Places, Settings, main, report

RATE = 32000
PARAMS = """\
data: {source: synthetic, root: data/synthetic, train: [balanced_train], eval: [eval]}
sed: {weights: null, query_weights: null, steps: 500}
pairs: {exclude: ontology, normalize: joint, match_energy: true}
make_eval_pairs: {seed: 1234, pairs_per_class: 4}
train: {seed: 0, steps: 1000, batch_size: 4, segment_seconds: 2.0, query: own, loss_weights: {l1: 1.0, interferer: 0.1}}
separators:
  resunet: {architecture: resunet, weights: null, model: {n_fft: 1024}}
mae_separators: {}
pretrain_mae: {weights: null, weights_format: audiomae, steps: 5, model: {dim: 64, depth: 4}}
report: {bootstrap_resamples: 50, bootstrap_seed: 0, min_targets: 5, max_lost: 0.5}
gate:
  resunet.average.sdri_class_mean_mean: {min: 3.0}
  resunet.average.n_nan: {max: 0}
"""
# Spread over the 527, and none the kin of another.
CLASSES = [ontology.classes()[i] for i in range(300, 527, 9)]


def make_scores(n_classes=3, pairs_per_class=4, clips_per_class=3, gain=5.0, seed=0):
    """One model's scores: a better oracle, classes of different difficulty, everything consistent."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, cls in enumerate(CLASSES[:n_classes]):
        for i in range(pairs_per_class):
            pair = k * pairs_per_class + i
            # What belongs to the pair is a function of the pair, for all models alike.
            before = np.random.default_rng(pair).normal(0, 0.3)
            other = CLASSES[(k + 1) % len(CLASSES)]
            for query, extra in (("average", 0.0), ("oracle", 1.0)):
                after = before + gain + extra + (k - n_classes / 2) * 0.4 + rng.normal(0, 2)
                rows.append(
                    {
                        "pair": pair,
                        "class_index": cls.index,
                        "mid": cls.mid,
                        "target_clip": f"clip-{k}-{i % clips_per_class}",
                        "target_recording": f"clip-{k}-{i % clips_per_class}",
                        "interferer_recording": f"clip-{(k + 1) % len(CLASSES)}-{pair}",
                        "interferer_class_index": other.index,
                        "query": query,
                        "sdr_mixture": before,
                        "sdr_half": before + 3.0,
                        "sdr": after,
                        "sdri": after - before,
                        "si_sdr_mixture": before - 0.1,
                        "si_sdr": after - 0.3,
                        "si_sdri": after - before - 0.2,
                        "bss_sdr_mixture": before + 0.2,
                        "bss_sdr": after + 0.5,
                        "bss_sir": after + 6,
                        "bss_sar": after + 2,
                        "bss_sdri": after - before + 0.3,
                    }
                )
    return pd.DataFrame(rows)


def make_sounds(pair, seconds=2.0):
    """A tone in noise: mixture, target, and two estimates of different quality."""
    rng = np.random.default_rng(pair)
    t = np.arange(round(RATE * seconds)) / RATE
    sweep = 400 * (1 + pair % 5) * t + 150 * np.sin(2 * np.pi * 1.5 * t)
    target = 0.3 * np.sin(2 * np.pi * sweep) * np.clip(np.sin(2 * np.pi * 1.1 * t), 0.02, 1)
    noise = np.convolve(rng.standard_normal(len(t)), np.ones(8) / 8, mode="same")
    noise *= np.sqrt(np.mean(target**2) / np.mean(noise**2))
    return {
        "mixture": target + noise,
        "target": target,
        "average": target * 0.9 + 0.3 * noise,
        "oracle": target * 0.95 + 0.15 * noise,
    }


def write_model(root, name, scores, n_examples=1, class_name=None):
    directory = root / "data" / "scores" / name
    (directory / "examples").mkdir(parents=True)
    scores.to_parquet(directory / "scores.parquet")
    described = []
    for pair in sorted(set(scores["pair"]))[:: max(1, len(scores) // 2 // max(1, n_examples))][:n_examples]:
        rows = scores[scores["pair"] == pair].set_index("query")
        first = rows.iloc[0]
        for sound, waveform in make_sounds(pair).items():
            wavfile.write(directory / "examples" / f"{pair}-{sound}.wav", RATE, waveform.astype(np.float32))
        described.append(
            {
                "pair": int(pair),
                "class_index": int(first["class_index"]),
                "class_name": class_name or ontology.class_of(first["mid"]).name,
                "interferer_class_name": ontology.classes()[int(first["interferer_class_index"])].name,
                "target_clip": first["target_clip"],
                "files": {s: f"{pair}-{s}.wav" for s in ("mixture", "target", "average", "oracle")},
                "sdr_mixture": float(first["sdr_mixture"]),
                **{q: {"sdri": float(row["sdri"]), "si_sdri": float(row["si_sdri"])} for q, row in rows.iterrows()},
            }
        )
    (directory / "examples" / "examples.json").write_text(json.dumps(described))


def write_data(root, scores):
    """Manifests, clips, anchors, pairs and summaries that a run with these scores would have left."""
    data, reports = root / "data", root / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    (data / "manifest").mkdir(parents=True)
    header = "clip_id,subset,labels,path,size_bytes,start_seconds,end_seconds\n"
    for split, subset in (("train", "balanced_train"), ("eval", "eval")):
        names = [f"{split}{i:02d}" for i in range(20)]
        rows = "".join(f"{name},{subset},{CLASSES[0].mid},audio/{name}.wav,1000,0.0,10.0\n" for name in names)
        (data / "manifest" / f"{split}.csv").write_text(header + rows)
        (data / "clips" / split).mkdir(parents=True)
        status = ["ok"] * 16 + ["missing", "truncated", "truncated", "silent"]
        clips = pd.DataFrame({"clip_id": names, "split": split, "labels": "/m/09x0r", "status": status})
        clips.to_csv(data / "clips" / split / "manifest.csv", index=False)
        (data / "anchors" / split).mkdir(parents=True)
        pairs = scores[scores["query"] == "average"].drop(columns="query").copy()
        purity = np.random.default_rng(len(split)).beta(4, 2, len(pairs))
        anchors = pd.DataFrame({"mid": pairs["mid"], "class_index": pairs["class_index"], "purity": purity})
        anchors.to_parquet(data / "anchors" / split / "index.parquet")
        empty = [ontology.classes()[0].mid] if split == "eval" else []
        (data / "anchors" / split / "index.json").write_text(json.dumps({"classes": 3, "empty_classes": empty}))
        (data / "pairs" / split).mkdir(parents=True)
        pairs["clamped"] = pairs["pair"] == 0
        pairs["target"] = pairs["target_clip"]
        pairs.to_parquet(data / "pairs" / split / "pairs.parquet")
        (reports / f"resample_{split}.json").write_text(json.dumps({"kept": 17, "reasons": {"silent": 1}}))
    (data / "manifest" / "missing.csv").write_text(
        f"split,clip_id,subset,labels,start_seconds,end_seconds\neval,gone,eval,{CLASSES[1].mid};{ontology.classes()[9].mid},0.0,10.0\n"
    )
    overlap = {"target_label": 0.0, "target_kin": 0.0125, "any_label": 0.1}
    (reports / "pairs_eval.json").write_text(json.dumps({"pairs": 12, "overlap": overlap}))
    (reports / "sed.json").write_text(json.dumps({"mean_average_precision": 0.71, "detector": "small"}))
    steps = np.arange(0, 1000, 10)
    loss = 0.02 + 0.06 * np.exp(-steps / 200) * (1 + 0.2 * np.random.default_rng(0).standard_normal(len(steps)))
    curve = pd.DataFrame({"step": steps, "loss": loss, "gradient_norm": 1.0, "learning_rate": 1e-3})
    curve.to_csv(reports / "train_resunet.csv", index=False)
    (data / "timings").mkdir(parents=True)
    for stage, seconds in (("train_separator@resunet", 423.0), ("resample_train", 12.3), ("scan", 0.4)):
        taken = {
            "seconds": seconds,
            "cpu_seconds": 2 * seconds,
            "peak_rss_bytes": 812_000_000,
            "peak_rss_child_bytes": 0,
        }
        (data / "timings" / f"{stage}.json").write_text(json.dumps(taken))


def make_run(root, scores=None, params=PARAMS, **models):
    """A finished run under `root`, and what the stage needs to report on it."""
    scores = make_scores() if scores is None else scores
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(params)
    write_model(root, "resunet", scores)
    for name, other in models.items():
        write_model(root, name, other)
    write_data(root, scores)
    return places_of(root), Settings.load(root / "params.yaml")


def places_of(root):
    data = root / "data"
    return Places(
        data / "scores",
        data / "manifest",
        data / "clips",
        data / "anchors",
        data / "pairs",
        data / "separators",
        data / "mae",
        root / "reports",
        data / "timings",
        root / "reports" / "ablations.csv",
        root / "params.yaml",
        root,
        data / "mixit_scores",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One report of three classes, read by many tests."""
    root = tmp_path_factory.mktemp("run")
    places, params = make_run(root)
    report(places, root / "reports", params)
    return root / "reports"


def names_of(scores):
    return {mid: ontology.class_of(mid).name for mid in scores["mid"]}


def two_models(*models, **kwargs):
    return pd.concat([table.assign(model=name) for name, table in models], ignore_index=True)


# ------------------------------------------------------------------------------------------------ numbers


def test_aggregates_are_those_of_the_two_papers():
    scores = make_scores().assign(model="resunet")
    summary = summarise(scores, names_of(scores), n_resamples=20, seed=0)
    average = scores[scores["query"] == "average"]
    medians = [np.nanmedian(rows["sdri"]) for _, rows in average.groupby("class_index")]
    means = [np.nanmean(rows["si_sdr"]) for _, rows in average.groupby("class_index")]
    assert summary.metrics["resunet.average.sdri_class_median_mean"] == pytest.approx(np.nanmean(medians), abs=1e-6)
    assert summary.metrics["resunet.average.si_sdr_class_mean_mean"] == pytest.approx(np.mean(means), abs=1e-6)
    low, high = (summary.metrics[f"resunet.average.sdri_class_median_mean_ci_{end}"] for end in ("lo", "hi"))
    assert low < summary.metrics["resunet.average.sdri_class_median_mean"] < high
    assert (summary.metrics["resunet.average.n_pairs"], summary.metrics["resunet.average.n_classes"]) == (12, 3)


def test_undefined_pairs_are_left_out_and_counted():
    scores = make_scores().assign(model="resunet")
    lost = (scores["pair"] == 0) & (scores["query"] == "average")
    whole_class = (scores["class_index"] == CLASSES[1].index) & (scores["query"] == "average")
    scores.loc[lost | whole_class, ["sdr", "sdri", "bss_sdr"]] = np.nan
    summary = summarise(scores, names_of(scores), n_resamples=20, seed=0)
    assert summary.metrics["resunet.average.n_nan"] == 5
    assert summary.metrics["resunet.average.n_classes"] == 2
    rest = scores[(scores["query"] == "average") & scores["sdri"].notna()]
    expected = rest.groupby("class_index")["sdri"].median().mean()
    assert summary.metrics["resunet.average.sdri_class_median_mean"] == pytest.approx(expected, abs=1e-6)
    assert all(np.isfinite(value) for value in summary.metrics.values())


def test_numbers_that_do_not_exist_have_no_key():
    scores = make_scores().assign(model="resunet")
    scores[[column for column in scores if column.startswith("bss")]] = np.nan
    summary = summarise(scores, names_of(scores), n_resamples=20, seed=0)
    assert not [key for key in summary.metrics if "bss" in key]


def test_a_model_compared_with_itself_differs_by_nothing():
    scores = make_scores()
    summary = summarise(two_models(("a", scores), ("b", scores)), names_of(scores), n_resamples=20, seed=0)
    assert summary.metrics["b.average.vs_a.sdri_class_median_mean"] == 0
    assert summary.metrics["b.average.vs_a.sdri_class_median_mean_ci_hi"] == 0
    assert summary.metrics["b.average.vs_a.wilcoxon_p"] == 1
    assert summary.metrics["b.average.vs_a.classes_same"] == 3


def test_differences_are_paired_so_that_what_models_share_does_not_blur_them():
    scores = make_scores(n_classes=8)
    better = scores.assign(sdri=scores["sdri"] + 0.5 + 0.01 * np.arange(len(scores)) % 3)
    summary = summarise(two_models(("a", scores), ("b", better)), names_of(scores), n_resamples=200, seed=0)
    key = "b.average.vs_a.sdri_class_mean_mean"
    width = summary.metrics[f"{key}_ci_hi"] - summary.metrics[f"{key}_ci_lo"]
    alone = "b.average.sdri_class_mean_mean"
    assert summary.metrics[f"{key}_ci_lo"] > 0.4
    assert width < 0.2 * (summary.metrics[f"{alone}_ci_hi"] - summary.metrics[f"{alone}_ci_lo"])
    assert summary.metrics["b.average.vs_a.wilcoxon_p"] < 0.01


def test_a_difference_is_taken_over_the_pairs_that_both_models_have():
    scores = make_scores(n_classes=1)
    worse = scores.copy()
    outlier = scores["sdri"].idxmin()
    worse.loc[outlier, "sdri"] = np.nan  # as if it had dropped its worst pair
    summary = summarise(two_models(("a", scores), ("b", worse)), names_of(scores), n_resamples=20, seed=0)
    assert summary.metrics["b.average.vs_a.sdri_class_mean_mean"] == 0


def test_finite_mean_of_nothing_is_nan_and_does_not_warn():
    np.testing.assert_array_equal(finite_mean(np.array([[1.0, np.nan, 3.0], [np.nan] * 3])), [2.0, np.nan])


def test_wilcoxon_needs_a_difference():
    assert wilcoxon_p(np.array([0.0, np.nan])) == 1
    assert wilcoxon_p(np.array([0.3])) == 1
    assert wilcoxon_p(np.linspace(0.1, 1, 20)) < 1e-4


# ------------------------------------------------------------------------------------------ inconsistency


def read(tmp_path, pairs=None, **tables):
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "scores.parquet")
    return read_scores(tmp_path, list(tables), pairs)


def test_models_on_different_pairs_are_refused(tmp_path):
    scores = make_scores()
    with pytest.raises(ValueError, match=r"a \(12 pairs\) and b \(11 pairs\) differ in 1 pairs: 7"):
        read(tmp_path, a=scores, b=scores[scores["pair"] != 7])


def test_models_on_different_mixtures_are_refused(tmp_path):
    scores = make_scores()
    other = scores.assign(sdr_mixture=scores["sdr_mixture"] + (scores["pair"] == 5))
    other["sdr"] += scores["pair"] == 5
    with pytest.raises(ValueError, match=r"a and b were scored on different mixtures: the input SDR of pair 5"):
        read(tmp_path, a=scores, b=other)


def test_models_on_different_targets_are_refused(tmp_path):
    scores = make_scores()
    with pytest.raises(ValueError, match="pair 0 has target_clip clip-0-0 and elsewhere"):
        read(tmp_path, a=scores, b=scores.assign(target_clip="elsewhere"))


def test_queries_on_different_pairs_are_refused(tmp_path):
    scores = make_scores()
    with pytest.raises(ValueError, match=r"a, average query \(12 pairs\) and a, oracle query \(11 pairs\)"):
        read(tmp_path, a=scores[(scores["pair"] != 3) | (scores["query"] == "average")])


def test_scores_that_stop_early_are_refused(tmp_path):
    scores = make_scores()
    pairs = scores[scores["query"] == "average"]
    with pytest.raises(ValueError, match=r"the evaluation pairs \(12 pairs\) and a \(10 pairs\) differ"):
        read(tmp_path, pairs, a=scores[scores["pair"] < 10])


def test_scores_of_an_older_manifest_are_refused(tmp_path):
    scores = make_scores()
    pairs = scores[scores["query"] == "average"].assign(target_clip="new")
    with pytest.raises(ValueError, match="a: pair 0 has target_clip clip-0-0, but new in the evaluation pairs"):
        read(tmp_path, pairs, a=scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: pd.concat([s, s[:1]]), "holds pair 0 with the average query more than once"),
        (lambda s: s.drop(columns=["sdri"]), "lacks sdri"),
        (lambda s: s.assign(query="guess"), "no query 'guess'"),
        (lambda s: s.assign(sdri=s["sdri"] + 1), r"pair 0 \(average query\) improves its sdr by"),
        (lambda s: s[:0], "has no rows"),
    ],
)
def test_scores_that_contradict_themselves_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, a=change(make_scores()))


def test_infinite_scores_are_undefined(tmp_path):
    scores = make_scores()
    scores.loc[0, ["bss_sir", "si_sdr", "si_sdri"]] = [np.inf, -np.inf, -np.inf]
    table = read(tmp_path, a=scores)
    assert table.loc[0, ["bss_sir", "si_sdr", "si_sdri"]].isna().all()


def test_a_model_name_must_be_a_name(tmp_path):
    with pytest.raises(ValueError, match="letters, digits"):
        read_scores(tmp_path, ["../x"])


# ---------------------------------------------------------------------------------------------- the files


def test_metrics_are_flat_sorted_finite_numbers(run):
    text = (run / "metrics.json").read_text()
    metrics = json.loads(text)
    assert list(metrics) == sorted(metrics)
    assert all(isinstance(value, int | float) and np.isfinite(value) for value in metrics.values())
    assert metrics["schema"] == 1
    assert metrics["data.eval.clips_missing"] == 2  # one had no audio, one was gone when it was read
    assert metrics["data.train.clips_missing"] == 1
    assert (metrics["data.train.clips_kept"], metrics["data.train.clips_quarantined"]) == (16, 3)
    assert metrics["data.eval.classes_without_anchors"] == 2
    assert metrics["data.eval.gain_clamped"] == 1


def test_all_files_tell_the_same_numbers(run):
    metrics = json.loads((run / "metrics.json").read_text())
    value = f"{metrics['resunet.average.sdri_class_median_mean']:.2f}"
    low = f"[{metrics['resunet.average.sdri_class_median_mean_ci_lo']:.2f}, "
    assert f"| {value} {low}" in (run / "table1.md").read_text()
    shown = (run / "report.html").read_text()
    assert value in shown
    assert low in shown
    per_class = pd.read_csv(run / "per_class.csv")
    average = per_class[per_class["query"] == "average"]
    assert f"{average['sdri_median'].mean():.2f}" == value
    assert len(per_class) == 6


def test_the_same_inputs_give_the_same_bytes(tmp_path, run):
    places, params = make_run(tmp_path)
    report(places, tmp_path / "reports", params)
    for name in ("metrics.json", "per_class.csv", "table1.md", "class_sdri.svg", "training.svg", "purity.svg"):
        assert (tmp_path / "reports" / name).read_bytes() == (run / name).read_bytes(), name


def test_the_order_of_the_rows_does_not_matter(tmp_path, run):
    scores = make_scores()
    places, params = make_run(tmp_path, scores)
    shuffled = scores.sample(frac=1, random_state=1)
    shuffled.to_parquet(tmp_path / "data" / "scores" / "resunet" / "scores.parquet")
    report(places, tmp_path / "reports", params)
    for name in ("metrics.json", "per_class.csv"):
        assert (tmp_path / "reports" / name).read_bytes() == (run / name).read_bytes()


def _cells_of(table, system, query):
    """Titles and cells of a row of Table I."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[:2] == [system, query]]
    return rows[0], found


def test_table_1_has_the_columns_of_scores_and_no_others():
    numbers = {f"{name}_class_median_mean": 1.0 for name in ("sdri", "si_sdr", "x", "xi", "vs_resunet.sdri")}
    titles = table1.systems_table([System("a", "average", numbers)]).columns
    assert set(titles) - {*table1.COLUMNS.values(), *table1.COUNTS.values()} == {"System", "query", "X, class median"}


def test_the_table_stands_beside_the_papers(run):
    table = (run / "table1.md").read_text()
    for system, sdri, sdr, oracle in (
        ("ResUNet (Kong et al.)", "5.18", "5.23", "7.90"),
        ("MAE-ResUNet, frozen", "5.62", "5.53", "8.45"),
        ("MAE-ResUNet, updated", "5.64", "5.57", "8.45"),
    ):
        cells = {title: text for title, text in zip(*_cells_of(table, f"paper: {system}", "average"), strict=True)}
        assert (cells["SDRi, class median"], cells["SDR, class median"]) == (sdri, sdr)
        cells = {title: text for title, text in zip(*_cells_of(table, f"paper: {system}", "oracle"), strict=True)}
        assert (cells["SDRi, class median"], cells["SDR, class median"]) == (oracle, tables.DASH)
    assert re.search(r"\| training steps \| 1,000 \| 600,000 \| \*\*differs\*\* \|", table)
    assert re.search(r"\| STFT window \| 1024 \| 1024 \| same \|", table)


def test_the_page_needs_nothing_but_itself(run, tmp_path):
    shown = (run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=(?!\s*["']?(?:data:|#))""", shown)
    assert not re.findall(r"url\((?!#)", shown)
    assert "@import" not in shown
    assert "http" not in re.sub(r'http-equiv|xmlns(:\w+)?="[^"]*"', "", shown)
    assert "Content-Security-Policy" in shown
    assert str(run.parent) not in shown  # no path of this machine


def test_the_page_has_players_that_play(run):
    import base64

    shown = (run / "report.html").read_text()
    uris = re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', shown)
    assert len(uris) == 3  # mixture, target, the estimate under the average query
    for uri in uris:
        path = run / "sound.mp3"
        path.write_bytes(base64.b64decode(uri))
        waveform, rate = soundfile.read(path)
        assert rate == RATE
        assert len(waveform) / rate == pytest.approx(2, abs=0.1)
        level = 10 * np.log10(np.mean(waveform[RATE // 4 : -RATE // 4] ** 2))
        assert level == pytest.approx(sounds.LOUDNESS_DB, abs=2)
    assert len(re.findall(r'src="data:image/webp;base64,', shown)) == 3


def test_what_was_lost_on_the_way_is_named(run):
    shown = html.unescape((run / "report.html").read_text())
    assert f"No pairs in the eval split (2): {ontology.classes()[9].name}, Speech." in shown
    assert re.search(r"<th>eval</th><td>truncated</td><td>2</td><td><code>eval17, eval18</code>", shown)
    assert "Not run: pretrain_mae, mine_anchors_train, mine_anchors_eval, pairs_train, evaluate_resunet." in shown
    assert "mean average precision 0.710" in shown
    assert "that or its kin: 1.25 %" in shown


def test_failing_gates_say_why_in_the_page(tmp_path):
    places, params = make_run(tmp_path)
    gates = GateParams.model_validate({"resunet.average.sdri_class_mean_mean": {"min": 99.0}, "no.such": {"max": 1}})
    report(places, tmp_path / "reports", replace(params, bounds=gates.bounds))
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert "is below the minimum of 99" in shown
    assert "no such number in the metrics" in shown


def test_one_class_and_two_pairs_are_enough(tmp_path):
    scores = make_scores(n_classes=1, pairs_per_class=2, clips_per_class=1)
    places, params = make_run(tmp_path, scores)
    metrics = report(places, tmp_path / "reports", params)
    assert metrics["resunet.average.n_pairs"] == 2
    assert metrics["mixture.n_classes_with_one_clip"] == 1


def test_several_models_get_rows_and_differences(tmp_path):
    params = PARAMS.replace(
        "mae_separators:", "  zeta: {architecture: resunet, weights: null, model: {n_fft: 2048}}\nmae_separators:"
    )
    params = params.replace(
        "mae_separators:", "  never: {architecture: resunet, weights: null, model: {n_fft: 2048}}\nmae_separators:"
    )
    better = make_scores(gain=6.0)
    places, parsed = make_run(tmp_path, params=params, zeta=better, stale=better)
    metrics = report(places, tmp_path / "reports", parsed)
    assert metrics["zeta.average.vs_resunet.sdri_class_mean_mean"] == pytest.approx(1.0)
    table = (tmp_path / "reports" / "table1.md").read_text()
    assert "\u2212 resunet" not in table  # one training each is no verdict
    assert ONE_TRAINING in table
    assert "- never is in params.yaml but was not evaluated" in table
    assert "- scores of stale were ignored" in table
    assert not [key for key in metrics if key.startswith(("stale", "never"))]
    csv = pd.read_csv(tmp_path / "reports" / "per_class.csv")
    assert csv[csv["model"] == "zeta"]["delta_sdri_median"].notna().all()
    assert csv[csv["model"] == "resunet"]["delta_sdri_median"].isna().all()


def test_a_run_of_scores_alone_is_reported(tmp_path):
    places, params = make_run(tmp_path)
    for name in ("manifest", "clips", "anchors", "pairs", "timings"):
        shutil.rmtree(tmp_path / "data" / name)
    for path in (tmp_path / "reports").glob("*"):
        path.unlink()
    shutil.rmtree(tmp_path / "data" / "scores" / "resunet" / "examples")
    metrics = report(places, tmp_path / "reports", params)
    assert not [key for key in metrics if key.startswith("data.")]
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert "Not run: resample_train, " in shown
    assert "The evaluation kept no sounds" in shown


def test_no_scores_at_all_is_an_error(tmp_path):
    places, params = make_run(tmp_path)
    shutil.rmtree(tmp_path / "data" / "scores")
    with pytest.raises(ValueError, match=r"no model of params\.yaml has scores"):
        report(places, tmp_path / "reports", params)


def test_the_command_of_the_graph_writes_every_file_and_its_timing(workspace, monkeypatch):
    make_run(workspace)
    (workspace / "reports" / "stages").mkdir()
    for path in (workspace / "reports").glob("*.*"):
        path.rename(workspace / "reports" / "stages" / path.name)
    command = "report --scores data/scores --manifest data/manifest --clips data/clips --anchors data/anchors"
    command += " --pairs data/pairs --separators data/separators --pretrained data/mae"
    command += " --summaries reports/stages --out reports"
    monkeypatch.setattr("sys.argv", command.split())
    main()
    written = {path.name for path in (workspace / "reports").glob("*.*")}
    assert written == {
        "headline.json",
        "metrics.json",
        "per_class.csv",
        "table1.md",
        "class_sdri.svg",
        "gain_flatness.svg",
        "training.svg",
        "pretraining.svg",
        "purity.svg",
        "provenance.json",
        "report.html",
        "example.webp",
    }
    assert json.loads((workspace / "data" / "timings" / "report.json").read_text())["seconds"] > 0


FEATURES = """\
mae_separators:
  mae_resunet: {architecture: mae_resunet, body: separators.resunet, train: {}, settings: model}
model: {upstream: mae, freeze_mae: true, mae_input: pad1024, fusion: freq}
"""


def write_encoder(root):
    """What the stages around an encoder would have left."""
    reports, data = root / "reports", root / "data"
    probe = {"mean_average_precision": 0.4, "ci_lo": 0.3, "ci_hi": 0.5}
    probes = {"before": probe, "after": {**probe, "mean_average_precision": 0.625}, "difference": probe}
    summary = {"weights": None, "steps": 5, "epochs": 2.0, "n_train_clips": 16, "loss": 0.81, "probe": probes}
    (reports / "pretrain_mae.json").write_text(json.dumps({**summary, "loss_of_mean_patch": 0.93}))
    (reports / "probe_mae_resunet.json").write_text(json.dumps({"freeze_mae": True, **probes}))
    (reports / "pretrain_mae.csv").write_text("step,loss,gradient_norm,learning_rate\n10,1.0,1,1\n20,0.8,1,1\n")
    (data / "mae").mkdir(parents=True)
    planes = np.random.default_rng(0).standard_normal((1, 128, 128)).astype(np.float16)
    visible = np.where(np.arange(128) % 16 < 3, planes, np.float16("nan"))
    stored = {"original": planes, "visible": visible, "reconstruction": planes}
    np.savez(data / "mae" / "reconstructions.npz", clips=np.array(["clip<b>"]), **stored)
    for name, macs in (("resunet", 2_000_000_000), ("mae_resunet", 3_000_000_000)):
        (data / "separators" / name).mkdir(parents=True)
        config = {"n_parameters": 1_234_567, "n_trainable": 1_000_000, "macs": macs}
        (data / "separators" / name / "config.json").write_text(json.dumps(config))


def test_a_model_with_features_brings_encoder_cost_and_ablations(tmp_path):
    params = PARAMS.replace("mae_separators: {}\n", FEATURES)
    places, settings = make_run(tmp_path, params=params, mae_resunet=make_scores(gain=5.5))
    write_encoder(tmp_path)
    header = "name,setting,sdri,interval,difference,difference_interval,"
    header += "difference_of_medians,difference_of_medians_interval,parameters,why\n"
    first_row = 'as it stands,,{sdri},"{interval}",{difference},"{difference_interval}",{difference_of_medians},'
    first_row += '"{difference_of_medians_interval}","{parameters}",\n'
    row = '<i>deep</i>,model.fusion=deep,5.10,"[5.00, 5.20]",+0.10,"[0.00, 0.20]",+0.37,,"1,861,029",a reason\n'
    places.ablations.write_text(header + row)
    metrics = report(places, tmp_path / "reports", settings)
    page = (tmp_path / "reports" / "report.html").read_text()
    assert "&lt;i&gt;deep&lt;/i&gt;" not in page  # a table that does not begin with this run is of another one
    places.ablations.write_text(header + first_row.format(**as_it_stands(metrics, settings.document)) + row)
    assert report(places, tmp_path / "reports", settings) == metrics
    assert metrics["pretrain_mae.loss"] == 0.81
    assert metrics["pretrain_mae.probe_after_map"] == 0.625
    assert metrics["mae_resunet.probe_difference_map_ci_lo"] == 0.3
    assert metrics["mae_resunet.macs"] == 3_000_000_000
    page = (tmp_path / "reports" / "report.html").read_text()
    assert "0.810" in page
    assert "0.930" in page
    assert "0.625" in page
    assert page.count("Filter bank, ") == 3
    assert "clip&lt;b&gt;" in page
    assert "1,234,567" in page
    assert ">1.50<" in page  # times the baseline's multiply-accumulates
    assert "&lt;i&gt;deep&lt;/i&gt;" in page
    assert "+0.37" in page
    table = (tmp_path / "reports" / "table1.md").read_text()
    assert "mae_resunet: features (input and fusion as we read the paper) | mae, frozen, pad1024, freq" in table
    assert "| mae_resunet | average |" in table


def test_an_objective_that_the_paper_has_not_is_said(tmp_path):
    for fusion, said in (("freq", []), ("interferer", ["mae_resunet: a second objective"])):
        params = PARAMS.replace("mae_separators: {}\n", FEATURES.replace("fusion: freq", f"fusion: {fusion}"))
        (tmp_path / fusion).mkdir()
        _, settings = make_run(tmp_path / fusion, params=params, mae_resunet=make_scores(gain=5.5))
        found = [
            row
            for row in comparisons(settings, {"mixture.n_classes": 24, "mixture.n_pairs": 24})
            if row.what.endswith("second objective")
        ]
        assert [row.what for row in found] == said
        assert not any(row.same for row in found)


def test_a_table_of_ablations_that_lacks_a_column_is_named(tmp_path):
    path = tmp_path / "ablations.csv"
    path.write_text("name,setting,sdri,interval,difference,difference_interval,parameters,why\n")
    with pytest.raises(ValueError, match=r"ablations\.csv: no column difference_of_medians, "):
        read_ablations(path, {}, {})
    path.write_text("")
    with pytest.raises(ValueError, match=r"ablations\.csv: no column name, "):
        read_ablations(path, {}, {})


def test_without_an_encoder_the_page_says_so(run):
    page = (run / "report.html").read_text()
    assert "No masked autoencoder was pretrained" in page
    assert 'id="ablations"' not in page


HOSTILE = "<script>alert(1)</script>\"'`|$\\frac${{ 7*7 }}"


def test_hostile_names_stay_text(tmp_path, monkeypatch):
    scores = make_scores()
    first = ontology.Class(CLASSES[0].index, CLASSES[0].mid, HOSTILE)
    classes = tuple(first if c.mid == first.mid else c for c in ontology.classes())
    monkeypatch.setattr(ontology, "classes", lambda: classes)
    places, params = make_run(tmp_path, scores)
    examples = tmp_path / "data" / "scores" / "resunet" / "examples" / "examples.json"
    described = json.loads(examples.read_text())
    described[0]["class_name"] = HOSTILE
    examples.write_text(json.dumps(described))
    clips = tmp_path / "data" / "clips" / "eval" / "manifest.csv"
    table = pd.read_csv(clips)
    table.loc[19, ["clip_id", "status"]] = [HOSTILE, HOSTILE]
    table.to_csv(clips, index=False)
    report(places, tmp_path / "reports", params)
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert "<script>alert" not in shown
    assert shown.count("<script>") == 1
    assert html.unescape(shown).count("alert(1)") >= 4  # in the chart, the table, the player's title, the quarantine
    assert "{{ 7*7 }}" in html.unescape(shown)  # shown, not evaluated
    assert "<script>" not in (tmp_path / "reports" / "class_sdri.svg").read_text()
    assert HOSTILE in list(pd.read_csv(tmp_path / "reports" / "per_class.csv")["class_name"])


def test_markdown_cells_hold_any_name():
    row = System("a|b`c<d>*", "average", {"sdri_class_median_mean": 1.0})
    line = next(x for x in table1.systems_table([row]).markdown if "a\\|b" in x)
    assert line.startswith("| a\\|b\\`c\\<d\\>\\* | average | ")


def test_example_files_cannot_lead_elsewhere(tmp_path):
    make_run(tmp_path)
    examples = tmp_path / "data" / "scores" / "resunet" / "examples" / "examples.json"
    described = json.loads(examples.read_text())
    for item in described:
        item["files"]["target"] = "../../../../secret.wav"
    wavfile.write(tmp_path / "secret.wav", RATE, np.zeros(100, np.float32))
    examples.write_text(json.dumps(described))
    with pytest.raises(FileNotFoundError, match=r"examples/secret\.wav"):
        listening.read_examples(tmp_path / "data" / "scores", ["resunet"], "resunet")


def test_three_pairs_are_chosen_by_their_rank_among_all():
    values = np.arange(100.0)
    rows = [
        {"pair": p, "query": q, "si_sdri": v if q == "average" else 0.0}
        for p, v in enumerate(values)
        for q in ("average", "oracle")
    ]
    chosen = listening.choose(pd.DataFrame(rows), [2, 10, 40, 51, 80, 93, 99])
    assert [pair for pair, _ in chosen] == [93, 51, 2]
    assert ["good" in title or "middle" in title or "bad" in title for _, title in chosen] == [True] * 3
    assert listening.choose(pd.DataFrame(rows), [7]) == [(7, listening.RULE[0][1])]
    assert listening.choose(pd.DataFrame(rows), []) == []


def test_an_estimate_nearer_to_the_interferer_is_the_other_sound():
    rng = np.random.default_rng(0)
    target, interferer = rng.standard_normal((2, 1000)).astype(np.float32)
    mixture = target + interferer
    assert not listening.is_other(0.1 * target + 0.02 * interferer, mixture, target)
    assert listening.is_other(0.02 * target + 0.1 * interferer, mixture, target)
    assert not listening.is_other(np.zeros(1000, np.float32), mixture, target)


def test_the_page_has_a_good_a_middling_and_a_bad_pair_and_the_readme_a_picture(tmp_path):
    scores = make_scores(n_classes=25, pairs_per_class=2)
    places, params = make_run(tmp_path, scores)
    shutil.rmtree(tmp_path / "data" / "scores" / "resunet")
    write_model(tmp_path, "resunet", scores, n_examples=20)
    report(places, tmp_path / "reports", params)
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert shown.count('src="data:audio') == 9  # mixture, target, estimate of three pairs
    assert [name in shown for _, name in listening.RULE] == [True] * 3
    assert shown.index('id="listening"') < shown.index('id="table1"')
    assert len(shown) < 900_000
    assert (tmp_path / "reports" / "example.webp").read_bytes()[8:12] == b"WEBP"


# ------------------------------------------------------------------------------------------ small pieces


def test_silence_is_left_silent_and_whispers_are_not_shouted():
    assert sounds.listening_gain(np.zeros(100, np.float32)) == 1
    quiet = np.full(100, 1e-6, np.float32)
    assert sounds.listening_gain(quiet) == pytest.approx(100)
    click = np.zeros(32000, np.float32)
    click[0] = 0.5
    assert 0.5 * sounds.listening_gain(click) <= sounds.PEAK + 1e-9


def test_encoding_gives_the_same_bytes():
    waveform = make_sounds(1)["mixture"].astype(np.float32)
    assert sounds.encode(waveform, RATE) == sounds.encode(waveform, RATE)


def test_a_tone_is_a_line_at_its_height_in_the_spectrogram():
    t = np.arange(RATE) / RATE
    spectrogram = charts.log_spectrogram(np.sin(2 * np.pi * 1000 * t).astype(np.float32), RATE)
    mel = 2595 * np.log10(1 + np.array([1000, RATE / 2]) / 700)
    expected = int(mel[0] / mel[1] * charts.N_BANDS)
    assert abs(int(spectrogram[:, 50].argmax()) - expected) <= 1


def test_more_classes_than_names_fit_are_drawn_as_a_profile():
    per_class = pd.concat(
        [
            pd.DataFrame(
                {
                    "class_index": range(100),
                    "class_name": "c",
                    "model": "m",
                    "query": query,
                    "sdri_median": np.arange(100.0),
                    "sdri_median_ci_lo": np.arange(100.0) - 1,
                    "sdri_median_ci_hi": np.arange(100.0) + 1,
                }
            )
            for query in ("average", "oracle")
        ]
    )
    svg = charts.class_chart(per_class)
    assert "by rank" in svg
    assert len(svg) < 60_000


@pytest.mark.parametrize(("n", "longest"), [(2, 10), (3, 40), (10, 40), (10, 70)])
def test_a_legend_stays_inside_its_figure(n, longest):
    with matplotlib.rc_context(charts._STYLE):
        figure = Figure(figsize=(7.2, 6), layout="constrained")
        axes = figure.add_subplot()
        for i in range(n):
            axes.plot([0, 1], [0, i], label=f"{i}{'n' * (longest - 1)}")
        axes.set_yticks([0, 1], ["a class with a long name", "b"])
        charts._legend_above(axes)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    frame, room = legend.get_window_extent(), figure.bbox
    assert (frame.x0, frame.y0) >= (room.x0, room.y0)
    assert frame.x1 <= room.x1
    assert frame.y1 <= room.y1
    assert [text.get_text()[0] for text in legend.get_texts()] == [str(i) for i in range(n)]


@settings(max_examples=30)
@given(st.floats(-99, 99))
def test_decibels_are_written_for_people(value):
    text = tables.db(value, signed=True)
    assert "-" not in text
    assert float(text.replace(tables.MINUS, "-")) == pytest.approx(value, abs=0.0051)
    assert tables.db(-0.001) == "0.00"
    assert tables.db(None) == tables.DASH


def test_durations_are_written_for_people():
    assert [tables.duration(s) for s in (0.41, 59.9, 185, 7805)] == ["0.4 s", "59.9 s", "3 min 5 s", "2 h 10 min"]


def test_summaries_are_shown_without_paths_of_the_machine():
    shown = flat_scalars({"a": {"b": 1.23456789}, "path": "/home/me/x", "many": list("abc"), "none": None})
    assert shown == {"a.b": "1.23457", "many": "3 entries", "none": "none"}


def test_a_split_that_was_never_made_is_unknown_not_zero(tmp_path):
    split = read_split("eval", manifest=tmp_path, clips=tmp_path, anchors=tmp_path, pairs=tmp_path)
    assert split.metrics() == {}
    assert split.clips_listed is None


def test_provenance_knows_commits_changes_and_profiles(tmp_path):
    import subprocess

    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True)

    assert code(tmp_path)["revision"] is None
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "default.yaml").write_text(PARAMS)
    (tmp_path / "profiles" / "tiny.yaml").write_text("train: {seed: 77}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "metrics.json").write_text("{}")
    (tmp_path / "dvc.lock").write_text("")
    assert code(tmp_path)["dirty"] is False  # a run writes its own reports and dvc.lock
    (tmp_path / "params.yaml").write_text(PARAMS + "\n")
    assert code(tmp_path)["changed_files"] == ["params.yaml"]
    assert profile(tmp_path, tmp_path / "params.yaml") == "default"
    (tmp_path / "params.yaml").write_text(profiles.text("tiny", tmp_path))
    assert profile(tmp_path, tmp_path / "params.yaml") == "tiny"
    (tmp_path / "params.yaml").write_text(profiles.text("tiny", tmp_path).replace("seed: 77", "seed: 78"))
    assert profile(tmp_path, tmp_path / "params.yaml") is None


def test_a_run_is_given_again_on_its_threads():
    found = {"code": {"revision": "abc", "changed_files": []}, "params": {"profile": None}, "hardware": {"gpus": []}}
    assert "\nOMP_NUM_THREADS=1 make repro\n" in rerun(found | {"training_threads": [1]})
    assert "\nmake repro\n" in rerun(found | {"training_threads": [1, 2]})
    assert "\nmake repro\n" in rerun(found | {"training_threads": [1], "hardware": {"gpus": ["H200"]}})


def test_what_half_of_the_mixture_beats_is_named():
    key = "sdri_class_mean_mean"
    rows = [System(name, "average", {key: value}) for name, value in (("good", 3.5), ("bad", 2.7))]
    assert table1.below_half(rows) == []
    (text,) = table1.below_half([*rows, System(table1.HALF, tables.DASH, {key: 3.01})])
    assert text.startswith("bad, average query: its SDRi of 2.70 dB is below the 3.01 dB of half of the mixture")


def test_intervals_that_are_points_are_said_to_be():
    def of(one_clip, classes):
        return table1.without_width({"mixture.n_classes_with_one_clip": one_clip, "mixture.n_classes": classes})

    assert of(23, 24) == []
    assert of(0, 0) == []
    (text,) = of(24, 24)
    assert "the intervals are points" in text


def test_the_data_hash_changes_with_the_data(tmp_path):
    train, evaluation = (tmp_path / split / "manifest.csv" for split in ("train", "eval"))
    for path, text in ((train, "a"), (evaluation, "b")):
        path.parent.mkdir()
        path.write_text(text)
    one = data_hash([train, evaluation])
    assert one != data_hash([evaluation, train])
    assert one != data_hash([train])
    train.write_text("c")
    assert one != data_hash([train, evaluation])
    assert data_hash([tmp_path / "manifest.csv"]) is None


def test_the_hardware_is_described_without_the_hosts_name():
    import socket

    found = hardware()
    assert found["cores"] >= 1
    assert socket.gethostname() not in json.dumps(found)


def test_the_csv_is_tidy(run):
    text = (run / "per_class.csv").read_text()
    assert text.startswith("class_index,mid,class_name,model,query,n_pairs,n_nan,n_clips,sdri_median,")
    scores = make_scores().assign(model="resunet")
    summary = summarise(scores, names_of(scores), n_resamples=5, seed=0)
    assert per_class_csv(summary.per_class).count("\n") == 7


# ------------------------------------------------------------------------------------- classes with little behind them


def test_classes_of_few_targets_or_few_of_their_clips_are_named():
    split = SplitData(
        "eval",
        class_clips={"few": 9, "lost": 10, "half": 10, "fine": 9, "gone": 3},
        class_anchors={"few": 9, "lost": 4, "half": 5, "fine": 9},
        class_targets={"few": 4, "lost": 4, "half": 5, "fine": 9},
        class_pairs={"few": 20, "lost": 4, "half": 20, "fine": 20},  # four pairs have no more than four targets
    )
    thin = split.thin_classes(min_targets=5, max_lost=0.5)
    assert thin == [ThinClass("few", 9, 9, 4), ThinClass("gone", 3, 0, 0), ThinClass("lost", 10, 4, 4)]
    assert split.thin_classes(min_targets=0, max_lost=1.0) == []
    assert [row.mid for row in split.thin_classes(min_targets=0, max_lost=0.4)] == ["gone", "half", "lost"]
    assert SplitData("eval", class_clips={"few": 9}).thin_classes(min_targets=5, max_lost=0.5) == []


def test_the_page_names_them_and_the_repeated_pairs(tmp_path):
    places, params = make_run(tmp_path)
    summary = json.loads((places.summaries / "pairs_eval.json").read_text())
    (places.summaries / "pairs_eval.json").write_text(json.dumps({**summary, "repeats_by_class": {"Zither": 3}}))
    report(places, tmp_path / "reports", params)
    page = (tmp_path / "reports" / "report.html").read_text()
    names = page.split("<h3>eval: classes with little behind them</h3>")[1].split("</table>")[0]
    # Of the first class' 20 clips 4 became anchors; each class has 3 distinct targets in 4 pairs.
    cells = '<td class="n">20</td><td class="n">4</td><td class="n">3</td>'
    assert f"<tr><th>{CLASSES[0].name}</th>{cells}</tr>" in names
    assert "Fewer than 5 distinct targets, or more than 50 % of the clips lost" in names.replace("\n", " ")
    assert "Zither 3" in page
