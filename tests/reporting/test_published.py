"""What the papers print, figure by figure, and their sentences about classes on numbers made up to meet them or not."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.signal import chirp

from pipeline.core import ontology
from pipeline.reporting import charts
from pipeline.reporting.published import (
    ABSENT,
    MET,
    NOT_MET,
    class_checks,
    class_gains,
    figures,
    flatness_by_class,
    spectral_flatness_db,
)
from pipeline.reporting.sections.table1 import published_systems
from pipeline.stages.report import report
from tests.corpora import write_anchors
from tests.stages.test_report import FEATURES, PARAMS, make_run, make_scores

RATE = 32000


def test_table_1_has_every_figure_of_the_paper():
    found = {(row.name.removeprefix("paper: "), row.query): row.numbers for row in published_systems()}
    key = "{}_class_median_mean".format
    for system, oracle, sdr, sdri in (
        ("ResUNet (Kong et al.)", 7.90, 5.23, 5.18),
        ("MAE-ResUNet, frozen", 8.45, 5.53, 5.62),
        ("MAE-ResUNet, updated", 8.45, 5.57, 5.64),
    ):
        assert found.pop((system, "oracle")) == {key("sdri"): oracle}
        assert found.pop((system, "average")) == {key("sdr"): sdr, key("sdri"): sdri}
    assert not found


def test_the_classes_that_are_named_are_audiosets():
    names = {c.name for c in ontology.classes()}
    said = figures()["classes"]
    assert {*said["above_15_db"], *said["gain_most"], *said["sdri"]} <= names


# ----------------------------------------------------------------------------------------------- flatness


def test_flatness_of_noise_is_known_and_a_tone_lies_far_below():
    t = np.arange(2 * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    # The power of Gaussian noise in a bin is exponentially distributed: E ln P = ln E P - Euler's constant.
    assert spectral_flatness_db(noise) == pytest.approx(-10 * np.euler_gamma / np.log(10), abs=0.1)
    tone = spectral_flatness_db(np.sin(2 * np.pi * 1000 * t))
    assert tone < -50
    assert tone < spectral_flatness_db(chirp(t, 100, t[-1], 12000)) < spectral_flatness_db(np.cumsum(noise)) < -2.5


def test_flatness_depends_neither_on_level_nor_on_pauses_and_silence_has_none():
    noise = np.random.default_rng(1).standard_normal(RATE)
    paused = np.concatenate([noise, np.zeros(RATE)])
    assert spectral_flatness_db(0.001 * noise) == pytest.approx(spectral_flatness_db(noise), abs=1e-6)
    assert spectral_flatness_db(paused) == pytest.approx(spectral_flatness_db(noise), abs=0.1)
    assert np.isnan(spectral_flatness_db(np.zeros(RATE)))
    assert np.isfinite(spectral_flatness_db(noise[:100]))  # shorter than a frame


def test_flatness_of_classes_is_of_their_anchors(tmp_path):
    assert flatness_by_class(tmp_path / "none") == {}
    anchors = write_anchors(tmp_path / "anchors", 3)
    found = flatness_by_class(anchors)
    assert found
    assert all(ontology.is_class(mid) and np.isfinite(value) for mid, value in found.items())


# ------------------------------------------------------------------------------------------------- checks

NAMES = ["Speech", "Dial tone", "Smoke detector, smoke alarm", "Sine wave", "Dog", "Wind", "Rain"]
AS_SAID = {
    "level": [5.86, 15.5, 16.0, 9.0, 4.0, 2.0, 1.0],
    "gain": [0.4, 2.0, 3.0, 2.5, 0.1, -0.2, -0.1],
    "flatness": [-20.0, -45.0, -50.0, -55.0, -15.0, -8.0, -5.0],
}


def verdicts(numbers, names=NAMES):
    return [check.verdict for check in class_checks(pd.DataFrame(numbers, index=pd.Index(names)))]


def test_numbers_as_the_paper_says_meet_every_sentence():
    assert verdicts(AS_SAID) == [MET] * 6


@pytest.mark.parametrize(
    ("column", "at", "value", "sentence"),
    [
        ("level", 6, -0.1, 0),
        ("level", 6, 0.0, 0),
        ("level", 1, 14.9, 1),
        ("level", 0, 5.85, 2),
        ("gain", 4, 2.2, 3),
        ("gain", slice(5, 7), 0.05, 4),
        ("flatness", slice(0, 7), [-5, -5, -5, -8, -40, -50, -60], 5),
        ("flatness", slice(0, 7), -5.0, 5),
    ],
)
def test_each_sentence_can_fail_by_itself(column, at, value, sentence):
    numbers = {name: np.array(values) for name, values in AS_SAID.items()}
    numbers[column][at] = value
    assert [i for i, verdict in enumerate(verdicts(numbers)) if verdict == NOT_MET] == [sentence]


def test_what_is_not_in_the_data_is_neither_met_nor_unmet():
    others = {name: values[4:] for name, values in AS_SAID.items()}
    assert verdicts(others, NAMES[4:])[1:4] == [ABSENT] * 3
    nothing = class_checks(pd.DataFrame({"level": [], "gain": [], "flatness": []}, dtype=float))
    assert [check.verdict for check in nothing] == [ABSENT] * 6
    some = class_checks(pd.DataFrame({key: values[:2] for key, values in AS_SAID.items()}, index=pd.Index(NAMES[:2])))
    assert some[1].here == "Dial tone 15.50; not here: Smoke detector, smoke alarm"
    assert some[1].verdict == MET


def test_gains_are_of_the_average_query_to_the_same_class():
    frame = pd.DataFrame(
        {
            "model": ["a", "a", "b", "b", "b"],
            "query": ["average"] * 4 + ["oracle"],
            "mid": ["/m/1", "/m/2", "/m/2", "/m/1", "/m/1"],
            "class_name": ["one", "two", "two", "one", "one"],
            "sdri_mean": [1.0, 2.0, 5.0, 2.5, 99.0],
        }
    )
    gains = class_gains(frame, "a", "b", {"/m/2": -3.0})
    assert gains.loc["one"].tolist() == pytest.approx([2.5, 1.5, np.nan], nan_ok=True)
    assert gains.loc["two"].tolist() == [5.0, 3.0, -3.0]
    assert class_gains(frame, "a", None, {}).empty
    assert "one" in charts.flatness_chart(class_gains(frame, "a", "b", {"/m/1": -9.0}), ["one"])
    assert "no gain" in charts.flatness_chart(class_gains(frame, "a", None, {}), ["one"])


def test_the_checks_stand_in_the_table_and_the_page(tmp_path):
    places, settings = make_run(
        tmp_path, params=PARAMS.replace("mae_separators: {}\n", FEATURES), mae_resunet=make_scores(gain=5.5, seed=1)
    )
    metrics = report(places, tmp_path / "out", settings)
    text, page = ((tmp_path / "out" / name).read_text() for name in ("table1.md", "report.html"))
    lost = metrics["mae_resunet.average.vs_resunet.classes_worse"]
    assert "| every class has an SDRi above 0 | 3 of 3; lowest: " in text
    assert f"(some, and fewer than half) | {lost:.0f} of 3 |" in text
    assert "| Speech: has 5.86 dB | not here: Speech | not in this data |" in text
    assert "<th>every class has an SDRi above 0</th><td>3 of 3; lowest: " in page
    assert "sounds generated by rule" in page
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "## What the paper says of the classes" in text
