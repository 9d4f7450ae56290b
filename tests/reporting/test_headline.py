"""The headline numbers: which they are, that dvc shows them and no others, and that they fit a pull request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.reporting.headline import headline, shares
from pipeline.stages.report import report
from tests.stages.test_report import make_run

ROOT = Path(__file__).parents[2]


def test_the_share_is_of_the_defined_pairs_that_gain_more_than_half_of_the_mixture_does():
    scores = pd.DataFrame(
        {
            "model": ["a"] * 5 + ["b"],
            "query": ["average"] * 4 + ["oracle", "average"],
            "sdri": [3.0, 3.01, -2.0, np.nan, 9.0, np.nan],
            "sdr": [3.0, 3.02, 2.0, np.nan, 9.0, np.nan],
            "sdr_half": [3.01] * 6,
            "si_sdri": [1.0, 6.0, -3.0, np.nan, 5.0, np.nan],
            "bss_sir": [-1.0, 4.0, -2.0, np.nan, 8.0, np.nan],
        }
    )
    third = pytest.approx(1 / 3, abs=1e-6)
    assert shares(scores) == {
        "a.average.share_improved_3_db": third,
        "a.average.share_above_half": third,
        "a.average.share_si_sdri_above_0": pytest.approx(2 / 3, abs=1e-6),
        "a.average.share_si_sdri_above_5_db": third,
        "a.average.share_other_louder": pytest.approx(2 / 3, abs=1e-6),
        "a.oracle.share_improved_3_db": 1.0,
        "a.oracle.share_above_half": 1.0,
        "a.oracle.share_si_sdri_above_0": 1.0,
        "a.oracle.share_si_sdri_above_5_db": 0.0,
        "a.oracle.share_other_louder": 0.0,
    }
    assert not any("other_louder" in key for key in shares(scores.drop(columns="bss_sir")))


def test_the_report_writes_them_from_its_metrics(tmp_path):
    places, settings = make_run(tmp_path)
    metrics = report(places, tmp_path / "out", settings)
    short = json.loads((tmp_path / "out" / "headline.json").read_text())
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert short["resunet.sdri"] == metrics["resunet.average.sdri_class_mean_mean"]
    assert short["resunet.si_sdri"] == metrics["resunet.average.si_sdri_class_mean_mean"]
    assert short["half.sdri"] == metrics["half_mixture.sdri_class_mean_mean"] == pytest.approx(3)
    assert (short["n_pairs"], short["n_classes"], short["gates_failed"]) == (12, 3, 0)
    scores = pd.read_parquet(places.scores / "resunet" / "scores.parquet")
    assert short["resunet.improved_3_db"] == pytest.approx((scores[scores["query"] == "average"]["sdri"] > 3).mean())


def test_dvc_shows_these_and_no_others():
    assert [str(out) for stage in Repo(str(ROOT)).index.stages for out in stage.outs if out.metric] == [
        "reports/headline.json"
    ]


def test_what_a_run_lacks_is_left_out():
    assert headline({}, ["a"], 2) == {"gates_failed": 2}


def test_the_difference_of_two_runs_fits_a_pull_request(tmp_path):
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    models = [*params["separators"], *params["mae_separators"]]
    mixit = [*params["mixit_music"], *params["mixit_clips"]]
    rng = np.random.default_rng(0)

    class Every(dict):
        """A number of each key that is asked for, of as many digits as there may be."""

        def __contains__(self, key):
            return True

        def __getitem__(self, key):
            return round(float(rng.normal(-10, 3)), 6)

    def run(*command):
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "COLUMNS": "500"}
        environment |= {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    dvc = [sys.executable, "-m", "dvc"]
    run("git", "init", "-q")
    run(*dvc, "init", "-q")
    (tmp_path / "reports").mkdir()
    (tmp_path / "dvc.yaml").write_text("metrics: [reports/headline.json]\n")
    for commit in (True, False):
        numbers = headline(Every({f"mixit.{name}.stem_si_snri": 0 for name in mixit}), models, 1)
        assert 15 <= len(numbers) <= 30
        (tmp_path / "reports" / "headline.json").write_text(json.dumps(numbers))
        if commit:
            run("git", "add", "-A")
            run("git", "commit", "-qm", "a run")
    lines = run(*dvc, "metrics", "diff", "--md").splitlines()
    assert len([line for line in lines if "headline.json" in line]) == len(numbers) - 1  # the gates are as they were
    assert max(map(len, lines)) < 120
