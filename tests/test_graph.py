"""The whole graph on profiles/tiny.yaml, in a copy of the project: it runs, it rests, and survives a kill anywhere."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipeline.core import profiles

ROOT = Path(__file__).parent.parent
COPIED = ("dvc.yaml", ".dvcignore", "pipeline")
# Outputs that say when, on what and how long: not a function of the inputs.
VARYING = ("reports/report.html", "reports/provenance.json")

pytestmark = pytest.mark.slow


def environment(directory):
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_ROOT": str(directory),
        "USS_WORKERS": "2",
        "OMP_NUM_THREADS": "1",  # on which the last bits of trained weights depend
    }


def module(directory, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
    )


def dvc(directory, *arguments):
    return module(directory, "dvc", *arguments)


def digests(directory, outs):
    """SHA-256 of every file below the outputs."""
    files = [
        f
        for out in outs
        for f in ([directory / out] if (directory / out).is_file() else sorted((directory / out).rglob("*")))
    ]
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.is_file() and str(f.relative_to(directory)) not in VARYING
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project after one `make repro`: stages side by side, for which DVC has nothing left to do."""
    directory = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, directory / name)
    params = profiles.text("tiny", ROOT)
    for old, new in {"n_shards: 1\n": "n_shards: 2\n", "pairs_per_part: 32\n": "pairs_per_part: 12\n"}.items():
        assert old in params
        params = params.replace(old, new)  # several parts in a stage, hence several workers
    (directory / "params.yaml").write_text(params)
    assert dvc(directory, "init", "--no-scm", "-q").returncode == 0
    result = module(directory, "pipeline.experiments.repro", "--jobs", "2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory


def test_the_graph_runs_and_its_report_is_whole(project):
    metrics = json.loads((project / "reports" / "metrics.json").read_text())
    assert metrics["resunet.average.n_pairs"] == metrics["mixture.n_pairs"] == metrics["mixture.n_classes"]
    assert metrics["mixture.n_classes"] == 24
    assert metrics["data.train.clips_quarantined"] == 5
    assert metrics["data.train.clips_missing"] == 3
    page = (project / "reports" / "report.html").read_text()
    assert page.count("<audio") >= 8
    assert str(project) not in page
    table = (project / "reports" / "table1.md").read_text()
    assert "5.18" in table
    assert "the intervals are points" in table  # one pair per class
    assert "the intervals are points" in page
    with_features = ("mae_resunet", "mae_resunet_updated", "mae_resunet_aligned", "mae_resunet_interferer")
    models = ("resunet", "bandsplit", *with_features)
    assert all(metrics[f"{model}.average.n_pairs"] == 24 for model in models)
    assert metrics["mae_resunet.probe_difference_map"] == 0  # frozen
    assert metrics["mae_resunet.n_trainable"] < metrics["mae_resunet_updated.n_trainable"]
    for name in ("performer", "conv_tasnet", "performer_clips"):
        assert metrics[f"mixit.{name}.do_nothing_snr"] == pytest.approx(3, abs=1)
        assert f"mixit.{name}.stem_si_snri" in metrics
    assert metrics["mixit.performer_clips.pairs_sdri_class_median_mean"] > -30
    assert ">Unsupervised</h2>" in page
    gate = subprocess.run([sys.executable, "-m", "pipeline", "gate"], cwd=project, capture_output=True, text=True)
    assert gate.returncode == 0, gate.stdout


def test_every_defective_file_is_in_the_quarantine_list_with_its_reason(project):
    rows = (project / "data" / "clips" / "train" / "quarantine.csv").read_text().splitlines()
    reasons = sorted(row.split(",")[2] for row in rows[1:])
    assert reasons == ["no_samples", "non_finite", "silent", "undecodable", "undecodable"]


def test_a_second_run_has_nothing_to_do(project):
    result = dvc(project, "repro")
    assert "Data and pipelines are up to date." in result.stdout
    assert "Running stage" not in result.stdout


def test_a_number_of_training_changes_nothing_before_training(project):
    params = (project / "params.yaml").read_text()
    assert params.count("learning_rate: 1.5e-3") == 1
    (project / "params.yaml").write_text(params.replace("learning_rate: 1.5e-3", "learning_rate: 2e-3"))
    plan = dvc(project, "repro", "--dry").stdout
    (project / "params.yaml").write_text(params)
    ran = [line.split("'")[1] for line in plan.splitlines() if line.startswith("Running stage")]
    assert ran[0] == "check"  # which reads all of params.yaml, and whose output is always the same
    # A dry run changes no output, so that the evaluation, which waits for new weights, is not in its plan.
    # Nor is the report, whose inputs those are. All models of Table I share the schedule.
    assert {"train_separator@resunet", "train_mae_separator@mae_resunet_updated"} <= set(ran)
    assert not {"scan", "resample@train", "sed", "pretrain_mae", "mine_anchors@train", "make_eval_pairs@eval"} & set(
        ran
    )
    plan = dvc(project, "repro", "--dry", "--force", "--downstream", "train_separator@resunet").stdout
    ran = [line.split("'")[1] for line in plan.splitlines() if line.startswith("Running stage")]
    assert ran == ["train_separator@resunet", "evaluate@resunet", "report"]


def planned(project, old, new):
    """The stages that `dvc repro` would run after a change of params.yaml, with all that waits for them."""
    params = (project / "params.yaml").read_text()
    assert params.count(old) == 1
    (project / "params.yaml").write_text(params.replace(old, new))
    plan = dvc(project, "repro", "--dry").stdout
    (project / "params.yaml").write_text(params)
    first = [line.split("'")[1] for line in plan.splitlines() if line.startswith("Running stage")]
    found = set()
    for name in set(first) - {"report", "check"}:
        plan = dvc(project, "repro", "--dry", "--force", "--downstream", name).stdout
        found |= {line.split("'")[1] for line in plan.splitlines() if line.startswith("Running stage")}
    return found


def test_a_setting_of_the_model_trains_and_evaluates_that_model_alone(project):
    ours = {"train_mae_separator@mae_resunet", "evaluate_mae@mae_resunet", "probe@mae_resunet", "report"}
    assert planned(project, "freeze_mae: true            #", "freeze_mae: false #") == ours


def test_a_setting_of_a_separator_without_queries_trains_and_evaluates_it_alone(project):
    ours = {"train_mixit@conv_tasnet", "evaluate_mixit@conv_tasnet", "report"}
    entry = "model: mixit_models.conv_tasnet, mixtures: whole, segment_seconds: null, epochs: "
    assert planned(project, entry + "1.0", entry + "2.0") == ours


def test_how_pairs_are_mixed_concerns_no_separator_of_music(project):
    found = planned(project, "normalize: joint ", "normalize: declip ")
    assert {"train_separator@resunet", "evaluate_mixit_clips@performer_clips"} <= found
    assert not {name for name in found if "mixit@" in name}


def stages_of_tiny():
    """The command and outputs of each stage of the graph on profiles/tiny.yaml, `check` apart."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dvc.yaml", ".dvcignore"):
            shutil.copy(ROOT / name, Path(folder, name))
        Path(folder, "params.yaml").write_text(profiles.text("tiny", ROOT))
        stages = Repo.init(folder, no_scm=True).index.stages
        return {s.name: (s.cmd, [out.def_path for out in s.outs]) for s in stages if s.cmd and s.name != "check"}


STAGES = stages_of_tiny()


def holds_a_lock(pid, locks):
    with contextlib.suppress(FileNotFoundError):
        return any(lock.read_text().startswith(f"pid {pid} ") for lock in locks.glob("*.lock"))
    return False


def test_dvc_is_ended_and_started_again_beside_its_stage(project):
    """SIGTERM to dvc alone: another one at once refuses, or ends with the same bytes; a third does anyway."""
    name = "train_separator@resunet"
    outs = STAGES[name][1]
    before = digests(project, outs)
    shutil.rmtree(project / "data" / "separators" / "resunet")
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", name]
    process = subprocess.Popen(
        command, cwd=project, env=environment(project), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list((project / "data" / "scratch" / "locks").glob("*.lock")):
        time.sleep(0.01)
    process.terminate()
    process.wait()
    assert process.returncode != 0
    second = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert second.returncode == 0 or "is alive" in second.stderr + second.stdout
    third = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert third.returncode == 0, third.stderr[-3000:]
    assert digests(project, outs) == before


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_and_run_again_gives_the_same_bytes(project, name):
    cmd, outs = STAGES[name]
    before = digests(project, outs)
    command = [sys.executable, *shlex.split(cmd)[1:]]
    # Timings go by what runs; two groups of the graph share the code of training and of evaluation.
    timing = name.replace("resample@", "resample_").replace("train_mae_", "train_").replace("evaluate_mae", "evaluate")
    timing = timing.replace("mixit_clips@", "mixit@")
    seconds = json.loads((project / "data" / "timings" / f"{timing}.json").read_text())["seconds"]

    def killed_after(delay):
        if name in ("scan", "index_music"):  # these make their corpus
            shutil.rmtree(project / "data" / ("synthetic" if name == "scan" else "music/synthetic"), ignore_errors=True)
        for out in outs:
            path = project / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # as DVC does
        with (project / "log").open("w") as file:
            process = subprocess.Popen(
                command, cwd=project, env=environment(project), stderr=file, start_new_session=True
            )
            # The clock starts when the imports are done: that is when the stage takes its lock.
            locks = project / "data" / "scratch" / "locks"
            while process.poll() is None and not holds_a_lock(process.pid, locks):
                time.sleep(0.01)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == -signal.SIGKILL

    # Timed beside another stage, it may be over sooner by itself: then it is killed earlier.
    assert any(killed_after(seconds * share) for share in (0.3, 0.1, 0.02, 0.0))

    again = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert digests(project, outs) == before
