"""What is wrong in params.yaml stops before anything runs, by its key."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.core import profiles
from pipeline.experiments import check
from pipeline.experiments.check import check_files, check_gates, check_names, check_params

ROOT = Path(__file__).parents[2]
YAML_READER = YAML(typ="safe")


def document():
    return YAML_READER.load(profiles.text("tiny", ROOT))


BAD = ["my model", "a/b", "../mydata", "-h", "--section=x", "é", "a.b", "$HOME", "`touch x`", "x>y", "a&b", "*", 1,
       True, "a'b", 'a"b', "a\nb", "a\n", "", "resunet@1", "sed", "A" * 300, "mixit_performer", None, 1.5]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("section", check.ENTRIES)
def test_a_name_that_is_no_plain_name_is_refused(section, name):
    params = document()
    params[section] = {name: {}}
    with pytest.raises(ValueError, match=rf"^params\.yaml: {section}: the name "):
        check_names(params)


@pytest.mark.parametrize(("one", "other"), [("separators", "mae_separators"), ("mixit_music", "mixit_clips")])
def test_two_entries_that_would_write_the_same_files_are_refused(one, other):
    params = document()
    params[one]["twice"] = params[other]["twice"] = {}
    with pytest.raises(ValueError, match=f"{other}: the name 'twice' is in {one} too"):
        check_names(params)


def test_plain_names_pass():
    params = document()
    params["separators"]["A_b-9"] = params["separators"]["resunet"]
    check_names(params)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("gate.resunet.average.n_nan", {"mn": 0}, r"gate\.resunet\.average\.n_nan\.mn"),
        ("evaluate_mixit.n_moms", -1, r"evaluate_mixit\.n_moms"),
        ("report.bootstrap_resamples", "many", r"report\.bootstrap_resamples"),
        ("variants.aligned.fusion", "no-such", r"variants\.aligned\.fusion"),
        ("separators.resunet.architecture", "no-such", "no-such"),
        ("mixit_music.performer.pretrained", "true; touch x", r"mixit_music\.performer\.pretrained"),
        ("upstreams.no_such", {"weights": "random"}, "no upstream 'no_such'"),
    ],
)
def test_a_wrong_value_anywhere_is_named(tmp_path, place, value, message):
    params = document()
    section, _, rest = place.partition(".")
    node = params[section]
    *above, key = [rest] if section == "gate" else rest.split(".")
    for name in above:
        node = node[name]
    node[key] = value
    YAML().dump(params, tmp_path / "params.yaml")
    with pytest.raises(ValueError, match=message):
        check_params(tmp_path / "params.yaml")


def test_a_gate_on_a_model_that_is_not_there_is_refused():
    params = document()
    params["gate"] = {"resunett.average.n_nan": {"max": 0}}
    with pytest.raises(ValueError, match=r"gate: resunett\.average\.n_nan: no entry 'resunett'"):
        check_gates(params)
    params["gate"] = {"mixit.performer.alarm": {"max": 0}, "pretrain_mae.probe_difference_map": {"min": 0}}
    check_gates(params)


def test_a_file_that_is_not_there_or_not_what_is_said_is_named_by_its_key(workspace):
    params = document()
    params["sed"]["weights"] = "no/such.pth"  # and no query_weights: the small network would be trained first
    with pytest.raises(ValueError, match=r"sed\.weights: no/such\.pth: no such file"):
        check_files(params)
    Path("w.pth").write_bytes(b"weights")
    params["sed"].update(weights="w.pth", weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"sed\.weights: w\.pth has sha256 [0-9a-f]{64}, not 0{64}"):
        check_files(params)
    params = document()
    params["data"].update(source="audioset", root="no/such")
    with pytest.raises(ValueError, match=r"data\.root: no folder no/such"):
        check_files(params)


def test_data_that_need_ffmpeg_where_there_is_none_are_named(workspace, monkeypatch):
    params = document()
    params["data"].update(source="audioset", root="raw")
    Path("raw/audio").mkdir(parents=True)
    Path("raw/audio/a.webm").touch()
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"data\.root: raw/audio/a\.webm needs ffmpeg"):
        check_files(params)


def test_as_a_command_it_is_one_line_and_2(tmp_path):
    params = document()
    params["train"]["steps"] = -1
    YAML().dump(params, tmp_path / "params.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.experiments.check"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: params.yaml does not fit TrainParams")
    assert found.stderr.count("\n") == 1
    assert "train.steps" in found.stderr
    debug = subprocess.run(command, cwd=tmp_path, env=environment | {"USS_DEBUG": "1"}, capture_output=True, text=True)
    assert "Traceback" in debug.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The graph and its code, with a file of the user's; nothing has run."""
    directory = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, directory / name)
    shutil.copytree(ROOT / "pipeline", directory / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "data" / "mydata").mkdir(parents=True)
    (directory / "data" / "mydata" / "precious").touch()
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=directory, check=True)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["../mydata", "x';touch pwned;'", "`touch pwned`", "x>pwned", "q';touch pwned;'/../../mydata"]
)
@pytest.mark.parametrize("stage", ["train_separator", "evaluate"])
def test_a_single_stage_of_a_bad_name_deletes_and_runs_nothing(project, stage, name):
    params = document()
    params["separators"] = {name: params["separators"]["resunet"]}
    YAML().dump(params, project / "params.yaml")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", f"{stage}@{name}"]
    found = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert found.returncode != 0
    assert (project / "data" / "mydata" / "precious").exists()
    assert not list(project.rglob("pwned*"))


def test_a_link_where_results_are_to_lie_is_named(workspace, tmp_path_factory):
    Path("data").mkdir(exist_ok=True)
    Path("data/clips").symlink_to(tmp_path_factory.mktemp("disk"))
    with pytest.raises(ValueError, match=r"data/clips is a link to .*: DVC takes no results behind a link"):
        check_files(document())
