"""The list of ablations, on a project of one small stage: it runs what is missing, and its table holds what came."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.experiments import ablations
from pipeline.experiments.ablations import ABLATIONS, Ablation

ROOT = Path(__file__).parents[2]


def test_every_setting_is_a_key_of_params_yaml_and_every_name_is_used_once():
    document = YAML(typ="safe").load(ROOT / "params.yaml")
    for ablation in ABLATIONS:
        for setting in ablation.settings:
            node = document
            for key in setting.split("=")[0].split("."):
                node = node[key]
            assert str(node).lower() != setting.split("=")[1], setting
    assert len({ablation.name for ablation in ABLATIONS}) == len(ABLATIONS)


def test_every_value_fits_the_settings():
    from pipeline.core.config import load_params
    from pipeline.separators.mae_resunet import Settings

    usual = load_params("model", Settings, ROOT / "params.yaml").model_dump()
    for ablation in ABLATIONS:
        changes = {
            k.removeprefix("model."): YAML(typ="safe").load(v) for k, v in (s.split("=") for s in ablation.settings)
        }
        if all(setting.startswith("model.") for setting in ablation.settings):
            assert Settings(**{**usual, **changes}).model_dump() == {**usual, **changes}


MODELS = "separators: {resunet: {}}\nmae_separators: {mae_resunet: {settings: model}}\n"
STAGE = """\
import json, pathlib
from ruamel.yaml import YAML
value = YAML(typ="safe").load(pathlib.Path("params.yaml"))["value"]
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path("reports/metrics.json").write_text(json.dumps({
    "mae_resunet.average.sdri_class_mean_mean": value,
    "mae_resunet.average.vs_resunet.sdri_class_mean_mean": value - 5,
    "mae_resunet.average.vs_resunet.sdri_class_median_mean": value - 5.5,
    "mae_resunet.n_parameters": 1234,
}))
with open(pathlib.Path(__file__).parent / "runs.txt", "a") as file:
    file.write(f"{value}\\n")
"""


def test_experiments_take_the_threads_of_what_they_are_compared_with(tmp_path):
    assert ablations.threads_of_the_report(tmp_path) == {}
    for threads, expected in (([], {}), ([1], {"OMP_NUM_THREADS": "1"}), ([1, 2], {})):
        (tmp_path / "provenance.json").write_text(json.dumps({"training_threads": threads}))
        assert ablations.threads_of_the_report(tmp_path) == expected


def test_without_a_run_to_compare_with_none_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "run", lambda chosen: pytest.fail("hours of experiments"))
    monkeypatch.setattr("sys.argv", ["ablations"])
    with pytest.raises(SystemExit):
        ablations.main()
    assert "reports/metrics.json" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_missing_is_run_and_nothing_twice(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    for name, value in (("NAME", "a"), ("EMAIL", "a@b")):
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", value)
    (tmp_path / "stage.py").write_text(STAGE)
    (project / "params.yaml").write_text(f"value: 5.5\n{MODELS}")
    dvc_yaml = {"cmd": f"{sys.executable} {tmp_path / 'stage.py'}", "params": ["value"]}
    dvc_yaml["metrics"] = [{"reports/metrics.json": {"cache": False}}]
    (project / "dvc.yaml").write_text(json.dumps({"stages": {"report": dvc_yaml}}))

    def command(*arguments):
        subprocess.run(arguments, check=True, capture_output=True)

    command("git", "init", "-q")
    command(sys.executable, "-m", "dvc", "init", "-q")
    command(sys.executable, "-m", "dvc", "repro", "-q")
    command("git", "add", "-A")
    command("git", "commit", "-qm", "start")

    some = [Ablation("six", ("value=6.0",), "more"), Ablation("four", ("value=4.0",), "less")]
    ablations.run(some[:1])
    ablations.run(some)
    assert sorted((tmp_path / "runs.txt").read_text().split()) == ["4.0", "5.5", "6.0"]
    rows = ablations.collect(some, Path("reports"))
    assert [(r["name"], r["sdri"], r["difference"]) for r in rows] == [
        ("as it stands", "5.50", "+0.50"),
        ("six", "6.00", "+1.00"),
        ("four", "4.00", "\u22121.00"),
    ]
    with open("reports/ablations.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert "| six | `value=6.0` | 6.00 | +1.00 | +0.50 | 1,234 | more |" in Path("reports/ablations.md").read_text()

    # Another commit with the same results keeps what was run; with other results it does not.
    command("git", "add", "-A")
    command("git", "commit", "-qm", "table")
    three = Ablation("three", ("value=3.0",), "still less")
    wrong = Ablation("wrong", ("value=x",), "fails")
    assert ablations.run([three, wrong]) == ["wrong"]
    rows = ablations.collect([*some, three, wrong], Path("reports"))
    assert [r["name"] for r in rows] == ["as it stands", "six", "four", "three"]
    (project / "reports/metrics.json").write_text('{"mae_resunet.average.sdri_class_mean_mean": 1.0}')
    rows = ablations.collect([*some, three], Path("reports"))
    assert [(r["name"], r["sdri"]) for r in rows] == [("as it stands", "1.00"), ("three", "3.00")]

    Path("reports/ablations.csv").write_text("name,sdri\nof an older form,1.0\n")
    assert ablations.collect([*some, three], Path("reports")) == rows

    command("git", "reset", "-q", "--hard", "HEAD~1")
    (project / "params.yaml").write_text(f"value: 5.5\nother: 1\n{MODELS}")
    for again in (ablations.run, lambda chosen: ablations.collect(chosen, Path("reports"))):
        with pytest.raises(
            ValueError, match=r"experiment six differs from the workspace in more than value=6.0: see other"
        ):
            again([*some, Ablation("not run", ("value=1.0",), "")])
    assert sorted((tmp_path / "runs.txt").read_text().split()) == ["3.0", "4.0", "5.5", "6.0"]
