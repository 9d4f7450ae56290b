"""Profiles: what differs from the default, and the command that writes params.yaml."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.core import profiles
from pipeline.experiments.profile import apply

DEFAULT = """\
# The default.
train: {steps: 400, loss_weights: {rms: 1.0}}   # a comment
separators:
  one:
    train: {steps: 5, batch_size: 2}
    model: {width: 8, depth: 2}
  two: {train: {}, model: {width: 4, depth: 1}}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/default.yaml").write_text(DEFAULT)
    (tmp_path / "params.yaml").write_text(DEFAULT)
    return tmp_path


def write(root, name, text):
    (root / f"profiles/{name}.yaml").write_text(text)
    return YAML(typ="safe").load(profiles.text(name, root))


def test_a_profile_is_the_default_with_what_it_names(root):
    found = write(root, "small", "train: {steps: 1}\nseparators: {one: {model: {width: 2}}}\n")
    assert found["train"] == {"steps": 1, "loss_weights": {"rms": 1.0}}
    assert found["separators"]["one"] == {"train": {"steps": 5, "batch_size": 2}, "model": {"width": 2, "depth": 2}}
    assert found["separators"]["two"] == {"train": {}, "model": {"width": 4, "depth": 1}}
    assert "# a comment" in profiles.text("small", root)


def test_names_that_belong_together_are_taken_as_they_stand(root):
    found = write(root, "other", "train: {loss_weights: {l1: 1.0}}\nseparators: {one: {train: {steps: 9}}}\n")
    assert found["train"]["loss_weights"] == {"l1": 1.0}
    assert found["separators"]["one"]["train"] == {"steps": 9}


def test_entries_come_and_go(root):
    found = write(root, "three", "separators: {two: null, three: {train: {}, model: {width: 1, depth: 1}}}\n")
    assert list(found["separators"]) == ["one", "three"]


def test_a_key_that_the_default_has_not_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"profiles/bad\.yaml: train\.stepz is not in profiles/default\.yaml"):
        write(root, "bad", "train: {stepz: 1}\n")
    with pytest.raises(ValueError, match="no profile 'nothing'; there are default, bad"):
        profiles.document("nothing", root)


def test_settings_of_ones_own_are_not_lost(root):
    write(root, "small", "train: {steps: 1}\n")
    apply("small", root, force=False)
    assert YAML(typ="safe").load(root / "params.yaml")["train"]["steps"] == 1
    apply("default", root, force=False)
    assert (root / "params.yaml").read_text() == DEFAULT
    own = (root / "params.yaml").read_text().replace("400", "401")
    (root / "params.yaml").write_text(own)
    with pytest.raises(ValueError, match="settings that no profile has"):
        apply("small", root, force=False)
    assert (root / "params.yaml").read_text() == own
    apply("small", root, force=True)
    assert YAML(typ="safe").load(root / "params.yaml")["train"]["steps"] == 1


def test_every_profile_of_the_project_can_be_written():
    root = Path(__file__).parents[2]
    assert profiles.names(root) == ["default", "audioset", "esc10", "music", "synthetic", "tiny"]
    assert all(profiles.text(name, root) and profiles.purpose(name, root) for name in profiles.names(root))
