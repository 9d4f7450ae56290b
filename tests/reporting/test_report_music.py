"""The report of the unsupervised separators: numbers, warnings, the source report's figures, and what is not there."""

import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile

from pipeline.reporting import blind, charts
from pipeline.reporting.blind import ISOLATED, WHOLE, BlindResult
from pipeline.reporting.blind_tables import PRETRAINING_RAN_OUT, blind_tables, cost_table
from pipeline.reporting.gates import Bound, evaluate_gates
from pipeline.reporting.inputs import read_timings
from pipeline.reporting.page import MAX_BYTES
from pipeline.reporting.sections import unsupervised
from pipeline.reporting.tables import DASH, MINUS
from pipeline.stages.report import Settings, report
from tests.stages.test_report import PARAMS, RATE, make_run, make_scores, write_model

ENTRY = {
    "architecture": "performer",
    "data": "music",
    "mixtures": "subsets",
    "segment_seconds": [3.0],
    "pretrained": False,
    "diversity": 0.0,
    "sparsity": 0.0,
    "sparsity_form": "report",
    "model": {"layers": 2},
}
ENTRIES = {
    "performer_3": ENTRY,
    "performer_10": {**ENTRY, "segment_seconds": [10.0]},
    "tasnet_3": {**ENTRY, "architecture": "conv_tasnet", "model": {"blocks": 4}},
    "tasnet_30": {**ENTRY, "architecture": "conv_tasnet", "segment_seconds": [30.0], "model": {"blocks": 4}},
    "pretrained_3": {**ENTRY, "pretrained": True},
    "auxiliary_10": {**ENTRY, "segment_seconds": [10.0], "diversity": 0.1, "sparsity": 0.1, "sparsity_form": "l1l2"},
    "sounds_2": {**ENTRY, "data": "clips", "segment_seconds": [2.0]},
    "found_2": {**ENTRY, "data": "clips", "mixtures": "whole", "segment_seconds": [2.0]},
    "never": {**ENTRY, "segment_seconds": [7.0]},
}
FILES = {"mixit.md", "mixit_length.svg", "mixit_training.svg", "mixit_pretraining.svg"}


def intervals_of(summary):
    """Intervals of half a dB on either side of every number of a summary, of overlaps 0.01."""
    found = {}
    for part, prefix in (("moms", ""), ("stems", "stem_"), ("masks", ""), ("pairs", "pairs_")):
        for key, value in (summary.get(part) or {}).items():
            if isinstance(value, float):
                width = 0.01 if key == "overlap" else 0.5
                found |= {f"{prefix}{key}_ci_lo": value - width, f"{prefix}{key}_ci_hi": value + width}
    return found


@pytest.fixture(autouse=True, scope="module")
def known_intervals():
    """The report is given the intervals above: tests/reporting/test_mixit_intervals.py is about the true ones."""

    def read(scores, names, **_):
        found = [path for name in names for path in scores.parents[1].rglob(f"evaluate_mixit_{name}.json")]
        summaries = {path.stem.removeprefix("evaluate_mixit_"): json.loads(path.read_text()) for path in found}
        return {name: intervals_of(summary) for name, summary in summaries.items()}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pipeline.reporting.sections.unsupervised.read_intervals", read)
        yield


def summary_of(name, snr=8.0, overlap=0.1, **changes):
    """What stage evaluate_mixit leaves of an entry."""
    entry = ENTRIES[name]
    tasnet = entry["architecture"] == "conv_tasnet"
    summary = {
        "status": "ok",
        **{key: entry[key] for key in ("architecture", "data", "mixtures", "pretrained", "diversity", "sparsity")},
        "segment_seconds": entry["segment_seconds"][0],
        "sample_rate": RATE,
        "n_sources": 8,
        "n_parameters": 9_100_000 if tasnet else 4_321_000,
        "steps": 300,
        "moms": {
            "n": 64,
            "snr": snr,
            "si_snr": snr - 2,
            "do_nothing_snr": 2.98,
            "do_nothing_si_snr": -0.03,
            "snr_above_do_nothing": snr - 2.98,
        },
        "stems": {
            "n": 32,
            "si_snri": 4.25,
            "si_snr": 1.5,
            "sdr": 5.5,
            "sir": None,
            "sar": float("nan"),
            "n_undefined": 2,
        },
        "masks": {"overlap": overlap, "ne_mask": 2.49, "ne_energy": 2.1},
        "pairs": None,
        "examples": [],
    }
    if entry["data"] == "clips":
        numbers = {key: 6.66 for key in ("sdri_class_median_mean", "sdri_class_mean_mean")}
        summary["pairs"] = {"n": 1234, "n_classes": 3, **numbers, "si_sdri_class_median_mean": 5.55}
        summary["stems"] = None
    return {**summary, **changes}


def out_of_memory(name):
    summary = summary_of(name, status="out_of_memory", steps=0)
    return {key: value for key, value in summary.items() if key not in ("moms", "stems", "masks", "pairs", "examples")}


def write_examples(root, name, n=1, seconds=3.0, n_outputs=6):
    """Sounds of an entry whose later outputs are the louder ones, and how its summary lists them."""
    folder = root / "data" / "mixit_scores" / name / "examples"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    t = np.arange(round(RATE * seconds)) / RATE
    examples = []
    for k in range(n):
        outputs = [0.02 * (i + 1) * np.sin(2 * np.pi * 300 * (i + 1) * t) for i in range(n_outputs)]
        waveforms = {"mixture": sum(outputs) + 0.01 * rng.standard_normal(len(t))}
        waveforms |= {f"output-{i}": output for i, output in enumerate(outputs)}
        files = {sound: f"{k}-{sound}.wav" for sound in waveforms}
        for sound, waveform in waveforms.items():
            wavfile.write(folder / files[sound], RATE, waveform.astype(np.float32))
        levels = [float(10 * np.log10(np.mean(output**2))) for output in outputs]
        examples.append({"name": str(k), "files": files, "outputs_db": levels})
    return examples


def write_music(root, summaries, params=ENTRIES, source="synthetic_stems"):
    """A finished run with unsupervised separators: everything of `test_report.make_run`, and theirs."""
    sections = f"music: {json.dumps({'source': source})}\n"
    for data in ("music", "clips"):
        entries = {name: {**entry} for name, entry in params.items() if entry["data"] == data}
        for entry in entries.values():
            del entry["data"]  # the section says it
        sections += f"mixit_{data}: {json.dumps(entries)}\n"
    places, _ = make_run(root, params=PARAMS + sections)
    for name, summary in summaries.items():
        (places.summaries / f"evaluate_mixit_{name}.json").write_text(json.dumps(summary))
        steps = np.arange(10, 210, 10)
        curve = pd.DataFrame({"step": steps, "loss": -8 + 6 * np.exp(-steps / 50), "gradient_norm": 1.0})
        curve = curve.assign(learning_rate=1e-3, validation=np.where(steps % 100 == 0, -7.5, np.nan))
        curve.to_csv(places.summaries / f"train_mixit_{name}.csv", index=False)
        taken = {"seconds": 61.0, "peak_rss_bytes": 1_500_000_000, "peak_rss_child_bytes": 0}
        taken |= {"minutes_per_epoch": 12.34, "seconds_per_audio_hour": 4321.0, "cuda_allocated_bytes": 7_770_000_000}
        (places.timings / f"train_mixit@{name}.json").write_text(json.dumps(taken))
    (places.summaries / "pretrain_performer.csv").write_text(
        "step,loss,gradient_norm,learning_rate\n10,1,1,1\n20,0.5,1,1\n"
    )
    (places.summaries / "pretrain_performer.json").write_text(json.dumps({"loss": 0.41, "loss_untrained": 1.02}))
    return places, Settings.load(root / "params.yaml")


def all_summaries():
    return {
        "performer_3": summary_of("performer_3"),
        "performer_10": summary_of("performer_10", snr=13.97, overlap=0.665),
        "tasnet_3": summary_of("tasnet_3", snr=3.5),
        "tasnet_30": out_of_memory("tasnet_30"),
        "pretrained_3": summary_of("pretrained_3", snr=9.0),
        "auxiliary_10": summary_of("auxiliary_10", snr=7.0),
        "sounds_2": summary_of("sounds_2"),
        "found_2": summary_of("found_2"),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every kind of entry: fine, out of memory, alarming, idle, never evaluated."""
    root = tmp_path_factory.mktemp("music")
    places, settings = write_music(root, all_summaries())
    summary = {**all_summaries()["performer_3"], "examples": write_examples(root, "performer_3")}
    (places.summaries / "evaluate_mixit_performer_3.json").write_text(json.dumps(summary))
    report(places, root / "reports", settings)
    return root / "reports"


def entries_of(tmp_path, summaries, params=ENTRIES):
    for name, summary in summaries.items():
        (tmp_path / f"evaluate_mixit_{name}.json").write_text(json.dumps(summary))
    return blind.read_results(tmp_path, params, {}, {name: intervals_of(one) for name, one in summaries.items()})


def rows_of(text, title):
    """The rows of a table of mixit.md, as lists of cells."""
    part = text[text.index(f"## {title}") :].split("\n## ")[0 if not text.startswith("## ") else 1]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[1:] if not line.startswith("| ---")]


def row_of(text, title, *start):
    (row,) = [row for row in rows_of(text, title) if row[: len(start)] == list(start)]
    return row


# ------------------------------------------------------------------------------------------------ numbers


def test_the_numbers_of_an_entry_are_flat_and_what_is_undefined_has_no_key(run):
    metrics = json.loads((run / "metrics.json").read_text())
    own = {
        key.removeprefix("mixit.performer_3."): v for key, v in metrics.items() if key.startswith("mixit.performer_3.")
    }
    assert own["snr"] == 8.0
    assert (own["snr_ci_lo"], own["snr_ci_hi"]) == (7.5, 8.5)
    assert own["do_nothing_snr"] == 2.98
    assert own["snr_above_do_nothing"] == pytest.approx(5.02)
    assert (own["stem_si_snri"], own["stem_si_snri_ci_lo"]) == (4.25, 3.75)
    assert own["stem_sdr"] == 5.5
    assert (own["overlap"], own["ne_mask"], own["ne_energy"]) == (0.1, 2.49, 2.1)
    assert (own["n_moms"], own["n_stems"], own["stem_n_undefined"], own["n_parameters"]) == (64, 32, 2, 4_321_000)
    assert (own["alarm"], own["out_of_memory"]) == (0, 0)
    assert not [key for key in own if key.startswith(("stem_sir", "stem_sar", "pairs"))]
    assert metrics["mixit.sounds_2.pairs_sdri_class_median_mean"] == 6.66
    assert not [key for key in metrics if key.startswith("mixit.never")]
    assert metrics["pretrain_performer.loss"] == 0.41
    assert all(np.isfinite(value) for value in metrics.values())
    assert list(metrics) == sorted(metrics)


def test_an_entry_that_ran_out_of_memory_has_that_and_no_scores(run):
    metrics = json.loads((run / "metrics.json").read_text())
    own = {key.removeprefix("mixit.tasnet_30.") for key in metrics if key.startswith("mixit.tasnet_30.")}
    assert metrics["mixit.tasnet_30.out_of_memory"] == 1
    assert own == {"out_of_memory", "n_parameters", "n_sources", "steps", "sample_rate"}
    row = row_of((run / "mixit.md").read_text(), "Scores", "tasnet_30")
    assert row[1:5] == ["conv_tasnet", f"music, {ISOLATED}", "30 s", "MixIT alone"]
    assert row[5:] == ["out of memory", DASH, DASH, DASH, "9,100,000"]


@given(st.floats(-20, 30), st.floats(0, 1))
def test_the_alarm_is_for_a_good_score_with_masks_alike(snr, overlap):
    numbers = {"snr": snr, "do_nothing_snr": 3.0, "overlap": overlap}
    entry = BlindResult("a", "performer", "music", 3.0, False, 0.0, 0.0, "report", "", "ok", numbers)
    assert entry.alarm == (overlap > 0.5 and snr - 3.0 > 3.0)
    assert entry.idle == (snr - 3.0 < 1.0)
    assert not (entry.alarm and entry.idle)


def test_without_an_overlap_there_is_no_alarm_to_tell():
    entry = BlindResult("a", "performer", "music", 3.0, False, 0.0, 0.0, "report", "", "ok", {"snr": 9.0})
    assert entry.alarm is None
    assert not entry.idle
    assert set(entry.metrics()) == {"mixit.a.snr", "mixit.a.out_of_memory"}


def test_warnings_stand_in_the_page_the_text_and_the_metrics(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert {name for name in ENTRIES if metrics.get(f"mixit.{name}.alarm")} == {"performer_10"}
    shown, text = (run / "report.html").read_text(), (run / "mixit.md").read_text()
    assert shown.count('<p class="warning" role="note"><b>Warning: likely spurious optimum.</b> performer_10: ') == 1
    assert shown.count('<p class="notice" role="note"><b>Not above doing nothing.</b> tasnet_3: ') == 1
    assert '<th>performer_10 <span class="flag">likely spurious optimum</span></th>' in shown
    assert "**Warning: likely spurious optimum.** performer_10: its masks overlap by 0.67, and yet" in text
    assert "10.99 dB above doing nothing" in text
    assert "**Not above doing nothing.** tasnet_3: its MixIT SNR of 3.50 dB" in text
    assert "| performer_10 (likely spurious optimum) |" in text
    assert text.count("**Warning") == 1


# ------------------------------------------------------------------------------------------------- tables


def test_scores_of_every_entry_stand_beside_those_of_doing_nothing(run):
    text = (run / "mixit.md").read_text()
    rows = rows_of(text, "Scores")
    assert {row[0].split(" (")[0] for row in rows} == {*ENTRIES, "doing nothing"}
    assert row_of(text, "Scores", "performer_3")[5:] == [
        "5.02 [4.52, 5.52]",
        "4.25 [3.75, 4.75]",
        "8.00 [7.50, 8.50]",
        "6.00 [5.50, 6.50]",
        "4,321,000",
    ]
    nothing = [row for row in rows if row[0] == "doing nothing"]
    assert [row[2:4] for row in nothing] == [
        *(["nothing (music)", "3 s"], ["nothing (music)", "10 s"], ["nothing (clips)", "2 s"])
    ]
    mixtures = ["2.98 [2.48, 3.48]", f"{MINUS}0.03 [{MINUS}0.53, 0.47]"]
    assert nothing[0][5:] == ["0.00", "0.00", *mixtures, DASH]
    assert nothing[2][6] == DASH  # no stems were scored there
    assert row_of(text, "Scores", "never")[5] == "not evaluated"
    assert "conv_tasnet 9,100,000; performer 4,321,000 parameters" in text


def test_mixtures_of_mixtures_that_differ_have_rows_of_their_own(tmp_path):
    other = summary_of("pretrained_3")
    other["moms"]["do_nothing_snr"] = 2.5
    entries = entries_of(tmp_path, {"performer_3": summary_of("performer_3"), "pretrained_3": other})
    first = blind_tables(entries, {})[0]
    names = [str(row.cells[0]) for row in first.rows if row.reference]
    assert sorted(names) == ["doing nothing (performer_3)", "doing nothing (pretrained_3)"]


def test_every_table_but_that_of_time_has_rows_that_do_nothing(run):
    text = (run / "mixit.md").read_text()
    for length in ("3 s", "10 s"):
        masks = row_of(text, "Masks", "doing nothing", "equal shares", "nothing (music)", length)
        assert masks[4:] == [DASH, "1.00", "8.00", "8.00"]
        stems = row_of(text, "Stems", "doing nothing", "equal shares", "nothing (music)", length)
        assert stems[4:] == [DASH, "0.00", *[DASH] * 6]
    for title in ("Scores", "Stems", "Masks"):
        rows = [row for row in rows_of(text, title) if "music" in row[2]]
        lengths = [float(row[3].removesuffix(" s")) for row in rows]
        assert lengths == sorted(lengths)


def test_masks_say_how_many_outputs_are_in_use(run):
    row = row_of((run / "mixit.md").read_text(), "Masks", "auxiliary_10")
    numbers = ["0.10 [0.09, 0.11]", "2.49 [1.99, 2.99]", "2.10 [1.60, 2.60]"]
    assert row[4:] == ["diversity 0.1, sparsity 0.1 (l1l2)", *numbers]


def test_an_entry_of_several_lengths_says_at_which_it_was_tested(tmp_path):
    several = summary_of("performer_3", trained_seconds=[3.0, 10.0], segment_seconds=10.0)
    single = summary_of("performer_10", trained_seconds=[10.0])
    entries = entries_of(tmp_path, {"performer_3": several, "performer_10": single})
    assert [(e.seconds, e.segment) for e in entries[:2]] == [(None, "3 and 10 s, tested at 10 s"), (10.0, "10 s")]


def test_an_entry_tested_at_several_lengths_has_a_row_for_each_and_a_place_in_the_chart(tmp_path):
    several = summary_of("performer_3", trained_seconds=[3.0, 10.0], segment_seconds=10.0)
    several["shorter"] = [{"status": "ok", "segment_seconds": 3.0, "moms": several["moms"] | {"n": 7}}]
    longest, shorter, *_ = entries_of(tmp_path, {"performer_3": several})
    assert (longest.name, longest.tested_seconds) == ("performer_3", 10.0)
    assert (shorter.name, shorter.segment) == ("performer_3@3s", "3 and 10 s, tested at 3 s")
    assert (shorter.seconds, shorter.tested_seconds, shorter.numbers["n_moms"]) == (None, 3.0, 7)
    assert "stem_si_snri" not in shorter.numbers
    assert longest.signature == shorter.signature
    assert "mixit.performer_3@3s.snr" in shorter.metrics()
    assert unsupervised.length_drawing([longest, shorter]) != unsupervised.length_drawing([longest])


def test_every_table_says_which_mixtures_were_learnt_from(run):
    text, page = (run / "mixit.md").read_text(), (run / "report.html").read_text()
    for title in ("Scores", "Stems", "Masks"):
        rows = rows_of(text, title)
        assert rows
        learnt = {row[0].split(" (")[0]: row[2] for row in rows}
        assert learnt["performer_3"] == f"music, {ISOLATED}", title
        if title != "Stems":  # of those no stems were scored here
            assert (learnt["sounds_2"], learnt["found_2"]) == (f"clips, {ISOLATED}", f"clips, {WHOLE['clips']}"), title
    assert ISOLATED in page[page.index("<h3>Time and memory of training") : page.index("<h3>By length")]
    table = (run / "table1.md").read_text()
    assert f"sounds_2 (MixIT {ISOLATED}, best assignment)" in table
    assert "found_2 (MixIT from clips as they are, best assignment)" in table


def test_the_stems_are_reported_and_what_is_undefined_is_a_dash(run):
    row = row_of((run / "mixit.md").read_text(), "Stems", "performer_3")
    assert row[5:] == ["4.25 [3.75, 4.75]", "1.50 [1.00, 2.00]", "5.50 [5.00, 6.00]", DASH, DASH, "32", "2"]


def test_time_and_memory_are_in_the_page_alone(run):
    text, shown = (run / "mixit.md").read_text(), (run / "report.html").read_text()
    assert "Time and memory of training change from run to run" in text
    for number in ("12.3", "4,321", "7.77 GB"):
        assert f">{number}<" in shown
        assert number not in re.sub(r"4,321,000", "", text)
    part = shown[shown.index("<h3>Time and memory of training") : shown.index("<h3>By length")]
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
    ]
    by_name = {row[0].split(" <")[0]: row for row in rows}
    assert by_name["tasnet_30"][5] == "out of memory"
    assert by_name["performer_10"][5] == "12.3"


def test_entries_scored_on_the_pairs_have_rows_in_table_1_that_say_what_they_are(run):
    table, shown = (run / "table1.md").read_text(), (run / "report.html").read_text()
    label = "sounds_2 (MixIT from isolated sources, best assignment)"
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label}")]
    figures = ["6.66 [6.16, 7.16]", DASH, "6.66 [6.16, 7.16]", DASH, "5.55 [5.05, 6.05]"]
    assert line.startswith(f"| {label} | {DASH} | {' | '.join(figures)} |")
    assert line.endswith("| 1,234 | 3 |")
    lines = table.split("\n## ")[0].splitlines()
    assert lines.index(line) == max(i for i, text in enumerate(lines) if text.startswith("| resunet | ")) + 1
    assert "an upper bound, and no competitor of a query" in table
    assert f"<th>{label}</th>" in shown
    assert "an upper bound, and no competitor of a query" in shown


# ---------------------------------------------------------------------------------------- files and page


def test_the_files_are_the_same_for_the_same_inputs_whatever_was_measured_of_time(tmp_path, run):
    places, settings = write_music(tmp_path, all_summaries())
    summary = {**all_summaries()["performer_3"], "examples": write_examples(tmp_path, "performer_3")}
    (places.summaries / "evaluate_mixit_performer_3.json").write_text(json.dumps(summary))
    for path in places.timings.glob("train_mixit@*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "minutes_per_epoch": 99.9, "peak_rss_bytes": 5}))
    report(places, tmp_path / "reports", settings)
    for name in {*FILES, "metrics.json", "table1.md", "training.svg"}:
        assert (tmp_path / "reports" / name).read_bytes() == (run / name).read_bytes(), name


def test_without_the_section_nothing_is_said(tmp_path):
    places, settings = make_run(tmp_path)
    assert not settings.has_blind
    metrics = report(places, tmp_path / "reports", settings)
    assert not [key for key in metrics if key.startswith(("mixit", "pretrain_performer"))]
    assert not FILES & {path.name for path in (tmp_path / "reports").iterdir()}
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert 'id="unsupervised"' not in shown
    assert "nsupervised" not in shown


@pytest.mark.parametrize("params", [{}, {"performer_3": ENTRY}])
def test_where_nothing_was_run_the_files_say_so_and_the_page_has_no_section(tmp_path, params):
    places, settings = write_music(tmp_path, {}, params)
    for path in places.summaries.glob("pretrain_performer.*"):
        path.unlink()
    report(places, tmp_path / "reports", settings)
    assert "None was evaluated." in (tmp_path / "reports" / "mixit.md").read_text()
    assert {path.name for path in (tmp_path / "reports").iterdir()} >= FILES
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert 'id="unsupervised"' not in shown
    assert ("evaluate_mixit_performer_3" in shown) == bool(params)  # among the stages not run


def test_an_entry_without_curve_or_timing_is_reported(tmp_path):
    places, settings = write_music(tmp_path, {"tasnet_30": out_of_memory("tasnet_30")})
    (places.summaries / "train_mixit_tasnet_30.csv").unlink()
    (places.timings / "train_mixit@tasnet_30.json").unlink()
    report(places, tmp_path / "reports", settings)
    assert 'id="unsupervised"' in (tmp_path / "reports" / "report.html").read_text()


def test_a_pretraining_that_ran_out_of_memory_is_told_as_that(tmp_path):
    ran_out = {**out_of_memory("pretrained_3"), "pretraining": "out_of_memory"}
    places, settings = write_music(tmp_path, {**all_summaries(), "pretrained_3": ran_out})
    header = "step,loss,gradient_norm,learning_rate,validation\n"
    (places.summaries / "pretrain_performer.csv").write_text(header)
    (places.summaries / "train_mixit_pretrained_3.csv").write_text(header)
    (places.summaries / "pretrain_performer.json").write_text(
        json.dumps({"status": "out_of_memory", "steps": 0, "mask_ratio": 0.3, "sample_rate": RATE})
    )
    report(places, tmp_path / "reports", settings)
    text, shown = ((tmp_path / "reports" / name).read_text() for name in ("mixit.md", "report.html"))
    assert row_of(text, "Scores", "pretrained_3")[5:9] == ["out of memory in pretraining", *[DASH] * 3]
    assert f"- {PRETRAINING_RAN_OUT}\n" in text
    assert "Loss of the Performer's pretraining" not in text
    assert shown.count(PRETRAINING_RAN_OUT) == 2  # below the scores, and in place of the curve
    assert "no training curve" in (tmp_path / "reports" / "mixit_pretraining.svg").read_text()
    metrics = json.loads((tmp_path / "reports" / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if k.startswith("pretrain_performer")} == {
        "pretrain_performer.out_of_memory": 1
    }
    assert metrics["mixit.pretrained_3.out_of_memory"] == 1
    assert "mixit.pretrained_3.snr" not in metrics
    bounds = {"pretrain_performer.loss": Bound(max=1.0), "mixit.pretrained_3.snr": Bound(min=0.0)}
    assert [gate.why for gate in evaluate_gates(metrics, bounds)] == ["no such number in the metrics"] * 2


def test_whether_an_entry_would_fit_is_not_told_by_its_pretraining(tmp_path):
    timing = {"train_mixit@pretrained_3": {"seconds": 1.0, "peak_rss_bytes": 5e8}}
    ran_out = {**out_of_memory("pretrained_3"), "pretraining": "out_of_memory"}
    (tmp_path / "evaluate_mixit_pretrained_3.json").write_text(json.dumps(ran_out))
    entries = blind.read_results(tmp_path, {"pretrained_3": ENTRIES["pretrained_3"]}, timing, {})
    (row,) = cost_table(entries).rows
    assert [str(cell) for cell in row.cells[5:]] == ["out of memory in pretraining", *[DASH] * 4]
    assert unsupervised.memory_drawing(entries) == unsupervised.memory_drawing([])


def test_the_page_needs_nothing_but_itself_and_its_drawings_take_the_pages_colours(run):
    shown = (run / "report.html").read_text()
    assert 'href="#unsupervised"' in shown
    assert not re.findall(r"""(?:src|href)\s*=(?!\s*["']?(?:data:|#))""", shown)
    part = shown[shown.index('<section id="unsupervised">') : shown.index('<section id="data">')]
    assert part.count('role="img"') == 4
    assert "var(--series-1)" in part
    assert not re.findall(r"#[0-9a-f]{6}\b", part)  # in the dark, too, everything can be seen
    assert "out of memory" in part
    ids = re.findall(r'\bid="([^"]+)"', shown)
    assert len(ids) == len(set(ids))


def test_names_and_numbers_of_other_stages_stay_text(tmp_path):
    hostile = "<script>alert(1)</script>|`"
    summary = {**summary_of("performer_3"), "data": hostile, "architecture": hostile, "status": "ok"}
    examples = write_examples(tmp_path, "performer_3")
    examples[0]["name"] = hostile
    places, settings = write_music(tmp_path, {"performer_3": {**summary, "examples": examples}})
    report(places, tmp_path / "reports", settings)
    shown = (tmp_path / "reports" / "report.html").read_text()
    assert shown.count("<script>") == 1
    assert html.unescape(shown).count("alert(1)") >= 4
    assert "<script>" not in (tmp_path / "reports" / "mixit_length.svg").read_text()
    text = (tmp_path / "reports" / "mixit.md").read_text()
    assert "\\<script\\>alert(1)\\</script\\>\\|\\`" in text
    assert "<script>" not in text.replace("\\<script\\>", "")


def test_an_entry_must_be_named_like_a_file(tmp_path):
    with pytest.raises(ValueError, match="letters, digits"):
        blind.read_results(tmp_path, {"../x": ENTRY}, {}, {})


def test_timings_are_in_the_order_of_the_graph(tmp_path):
    for stage in ("report", "evaluate_mixit@a", "evaluate@a", "train_mixit@a", "index_music", "probe@a"):
        (tmp_path / f"{stage}.json").write_text("{}")
    order = ["evaluate@a", "probe@a", "index_music", "train_mixit@a", "evaluate_mixit@a", "report"]
    assert list(read_timings(tmp_path, ["a"])) == order
    assert list(read_timings(tmp_path, ["b"])) == ["index_music", "report"]  # the others are of another params.yaml


# ------------------------------------------------------------------------------------------------- sounds


def test_the_mixture_and_its_loudest_outputs_can_be_heard(run):
    shown = (run / "report.html").read_text()
    part = shown[shown.index('<section id="unsupervised">') : shown.index('<section id="data">')]
    names = re.findall(r'<figure><div class="name">([^<]*)<span>([^<]*)</span>', part)
    assert [name for name, _ in names] == ["mixture", "output 5", "output 4", "output 3", "output 2"]
    assert names[1][1].startswith(MINUS)
    assert part.count('src="data:audio/mpeg;base64,') == 5
    assert "mixture 0, from" in part
    assert shown.index('id="listening"') < shown.index('id="unsupervised"')


def test_every_entrys_first_example_goes_before_a_second(tmp_path):
    entries = entries_of(
        tmp_path,
        {
            name: {**summary_of(name), "examples": write_examples(tmp_path, name, n=3)}
            for name in ("performer_3", "tasnet_3")
        },
    )
    scores = tmp_path / "data" / "mixit_scores"
    everything, left_out = unsupervised.read_examples(scores, entries, 10_000_000)
    assert [(e.entry, e.name) for e in everything] == [
        ("performer_3", "0"),
        ("performer_3", "1"),
        ("tasnet_3", "0"),
        ("tasnet_3", "1"),
    ]
    assert left_out == 0
    one = sum(len(sound.audio) + len(sound.image) for sound in everything[0].sounds)
    some, left_out = unsupervised.read_examples(scores, entries, 2 * one + one // 2)
    assert [(e.entry, e.name) for e in some] == [("performer_3", "0"), ("tasnet_3", "0")]
    assert left_out == 2
    assert unsupervised.read_examples(scores, entries, -1) == ([], 4)


def test_an_excerpt_is_where_the_mixture_is_loudest(tmp_path):
    (example,) = write_examples(tmp_path, "performer_3", seconds=6.0)
    folder = tmp_path / "data" / "mixit_scores" / "performer_3" / "examples"
    loud = np.where((np.arange(6 * RATE) // RATE) // 2 == 1, 0.5, 0.01).astype(np.float32)
    wavfile.write(folder / "0-mixture.wav", RATE, loud)
    entries = entries_of(tmp_path, {"performer_3": {**summary_of("performer_3"), "examples": [example]}})
    ((excerpt,), _) = unsupervised.read_examples(tmp_path / "data" / "mixit_scores", entries, 10_000_000)
    assert (excerpt.start, excerpt.seconds) == (2.0, 2.0)


def test_sounds_shorter_than_an_excerpt_or_silent_are_shown_whole(tmp_path):
    (example,) = write_examples(tmp_path, "performer_3", seconds=0.7)
    folder = tmp_path / "data" / "mixit_scores" / "performer_3" / "examples"
    wavfile.write(folder / "0-output-5.wav", RATE, np.zeros(round(0.7 * RATE), np.float32))
    example["outputs_db"] = [None] * 6
    entries = entries_of(tmp_path, {"performer_3": {**summary_of("performer_3"), "examples": [example]}})
    ((excerpt,), _) = unsupervised.read_examples(tmp_path / "data" / "mixit_scores", entries, 10_000_000)
    assert (excerpt.start, excerpt.seconds) == (0.0, 0.7)
    assert [sound.name for sound in excerpt.sounds] == ["mixture", *(f"output {i}" for i in range(4))]


def test_example_files_cannot_lead_elsewhere(tmp_path):
    (example,) = write_examples(tmp_path, "performer_3")
    wavfile.write(tmp_path / "secret.wav", RATE, np.zeros(100, np.float32))
    example["files"]["mixture"] = "../../../../secret.wav"
    entries = entries_of(tmp_path, {"performer_3": {**summary_of("performer_3"), "examples": [example]}})
    with pytest.raises(Exception, match=r"examples/secret\.wav"):
        unsupervised.read_examples(tmp_path / "data" / "mixit_scores", entries, 10_000_000)


def test_the_page_keeps_its_size_and_the_query_models_keep_their_three_pairs(tmp_path):
    names = [name for name in ENTRIES if name not in ("tasnet_30", "never")]
    summaries = {name: {**summary_of(name), "examples": write_examples(tmp_path, name, n=2)} for name in names}
    places, settings = write_music(tmp_path, summaries)
    shutil.rmtree(tmp_path / "data" / "scores" / "resunet")
    write_model(tmp_path, "resunet", make_scores(), n_examples=12)
    report(places, tmp_path / "reports", settings)
    shown = (tmp_path / "reports" / "report.html").read_text()
    part = shown[shown.index('<section id="unsupervised">') : shown.index('<section id="data">')]
    assert len(shown.encode()) < MAX_BYTES + 10_000
    assert part.count('<div class="example">') >= 1
    assert shown.count('<div class="example">') == 3 + part.count('<div class="example">')
    assert "more did not fit" in part


def test_music_that_may_not_be_passed_on_is_not(tmp_path):
    summary = {**summary_of("performer_3"), "examples": write_examples(tmp_path, "performer_3")}
    sounds = {**summary_of("sounds_2"), "examples": write_examples(tmp_path, "sounds_2")}
    places, settings = write_music(tmp_path, {"performer_3": summary, "sounds_2": sounds}, source="moisesdb")
    report(places, tmp_path / "reports", settings)
    shown = (tmp_path / "reports" / "report.html").read_text()
    part = shown[shown.index('<section id="unsupervised">') : shown.index('<section id="data">')]
    assert "lets no excerpt of it into this page" in part
    assert "<h4>performer_3" not in part
    assert "<h4>sounds_2" in part
    assert "MoisesDB is CC BY-NC-SA" in shown


# ------------------------------------------------------------------------------------------------- charts


def test_a_length_chart_of_nothing_says_so():
    assert "no numbers" in charts.length_chart({"a": []})


def test_the_chart_of_lengths_has_the_quantity_of_the_source_reports_text(tmp_path):
    drawn = unsupervised.length_drawing(entries_of(tmp_path, {"performer_3": summary_of("performer_3")}))
    assert all(title in drawn for title in ("stem SI-SNRi, dB", "above doing nothing", "MoM SI-SNR, dB"))


def test_an_entry_that_could_be_trained_and_not_evaluated_shows_what_training_took(tmp_path):
    timing = {"train_mixit@tasnet_3": {"minutes_per_epoch": 12.34, "cuda_allocated_bytes": 7e9}}
    (tmp_path / "evaluate_mixit_tasnet_3.json").write_text(json.dumps({**out_of_memory("tasnet_3"), "steps": 300}))
    entries = blind.read_results(tmp_path, {"tasnet_3": ENTRIES["tasnet_3"]}, timing, {})
    (row,) = cost_table(entries).rows
    assert str(row.cells[5]) == "12.3"
    assert "out of memory" not in unsupervised.memory_drawing(entries)


def test_a_length_chart_marks_what_ran_out_of_memory():
    points = [charts.Point("a", 3.0, 1.0, 0.5, 1.5), charts.Point("a", 30.0, None)]
    svg = charts.length_chart({"memory, GB": points})
    assert "out of memory" in svg
    assert ">30<" in svg
    assert svg == charts.length_chart({"memory, GB": points})


def test_curves_of_many_entries_stay_small_and_validation_is_dotted():
    curve = pd.DataFrame({"step": np.arange(5000), "loss": -np.log(np.arange(5000) + 2.0), "validation": np.nan})
    assert "dots" not in charts.training_chart({"a": curve})
    curve.loc[::500, "validation"] = -5.0
    svg = charts.training_chart({f"entry {i}": curve for i in range(14)})
    assert "loss (dots: validation)" in svg
    assert len(svg) < 120_000
