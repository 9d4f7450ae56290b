"""Stage upstream: a model knows what params.yaml says of its own encoder, and nothing of the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.stages.upstream import describe, main

ROOT = Path(__file__).parents[2]
MODELS = list(YAML(typ="safe").load(ROOT / "params.yaml")["mae_separators"])


def test_what_is_said_of_one_encoder_is_its_own_entry_or_nothing(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "mae_separators:\n"
        "  a: {architecture: mae_resunet, body: x, train: {}, settings: model}\n"
        "  b: {architecture: mae_resunet, body: x, train: {}, settings: variants.b}\n"
        "model: {upstream: wavlm, fusion: freq}\n"
        "variants: {b: {upstream: mae}}\n"
        "upstreams: {wavlm: {weights: somewhere, sha256: null}, hubert: {weights: random}}\n"
    )
    assert describe("a", path) == {"upstream": "wavlm", "options": {"weights": "somewhere", "sha256": None}}
    assert describe("b", path) == {"upstream": "mae", "options": None}
    with pytest.raises(ValueError, match=r"no section 'mae_separators\.c'"):
        describe("c", path)


def test_the_training_depends_on_its_own_encoder_and_not_on_the_section():
    stages = {stage.addressing: stage for stage in Repo(str(ROOT)).index.stages}
    for model in MODELS:
        deps = stages[f"train_mae_separator@{model}"].deps
        assert f"data/upstreams/{model}.json" in map(str, deps)
        assert not [name for dep in deps for name in getattr(dep, "params", []) if name.startswith("upstreams")]


def test_the_command_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr("sys.argv", ["upstream", "mae_resunet", "--out", "data/upstreams/mae_resunet.json"])
    main()
    found = json.loads(Path("data/upstreams/mae_resunet.json").read_text())
    assert found == {"upstream": "mae", "options": None}


@pytest.mark.slow
def test_another_encoders_weights_train_no_model_again(tmp_path):
    """dvc.yaml's own two stages, the training replaced by a line in a file."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    upstream, train = stages["upstream"], stages["train_mae_separator"]
    upstream["do"]["deps"] = []
    train["do"]["deps"] = [dep for dep in train["do"]["deps"] if dep.startswith("data/upstreams/")]
    train["do"]["cmd"] = "mkdir -p data/separators/${key} && echo ${key} >> trained.txt"
    del train["do"]["plots"]
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"upstream": upstream, "train_mae_separator": train}}))
    params = (ROOT / "params.yaml").read_text()
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    dvc = [sys.executable, "-m", "dvc"]

    def trained(text):
        (tmp_path / "params.yaml").write_text(text)
        (tmp_path / "trained.txt").write_text("")
        done = subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return sorted((tmp_path / "trained.txt").read_text().split())

    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, env=environment, check=True)
    assert trained(params) == sorted(MODELS)
    assert trained(params.replace("weights: data/sed/query", "weights: data/other")) == []
    hears_panns = params.replace("  upstream: mae               #", "  upstream: panns             #")
    assert hears_panns != params
    assert trained(hears_panns) == ["mae_resunet"]
    assert trained(hears_panns.replace("weights: data/sed/query", "weights: data/other")) == ["mae_resunet"]
