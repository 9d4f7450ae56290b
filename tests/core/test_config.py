"""params.yaml is checked at the door: every mistake names its key, and nothing in it is run."""

import pytest
from pydantic import Field

from pipeline.core.config import Params, load_params


class Optim(Params):
    lr: float = Field(gt=0)
    steps: int


class Train(Params):
    optim: Optim
    channels: list[int]
    freeze: bool


GOOD = "train:\n  optim: {lr: 1e-3, steps: 10}\n  channels: [32, 64]\n  freeze: true\n"


def load(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_params("train", Train, path)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("1e-05", 1e-5), ("2", 2.0)])
def test_numbers_are_read_as_dvc_writes_them(tmp_path, text, value):
    """`dvc exp run -S train.lr=1e-5` writes 1e-05, which YAML 1.1 readers take for a string."""
    assert load(tmp_path, GOOD.replace("1e-3", text)).optim.lr == value


def test_dots_reach_into_a_section(tmp_path):
    (tmp_path / "params.yaml").write_text(GOOD)
    assert load_params("train.optim", Optim, tmp_path / "params.yaml").steps == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("lr: 1e-3", "lr: -1"), r"train\.optim\.lr: .*greater than 0"),
        (GOOD.replace("steps: 10", "steps: ten"), r"train\.optim\.steps: .*valid integer \(got 'ten'\)"),
        (GOOD.replace("lr: 1e-3", "lr: 1e-3, momentum: 0.9"), r"train\.optim\.momentum: Extra"),
        (GOOD.replace("  channels: [32, 64]\n", ""), r"train\.channels: Field required"),
        (GOOD.replace("freeze: true", "freeze: no"), r"train\.freeze: .*valid boolean \(got 'no'\)"),
        ("evaluate: {}\n", r"no section 'train'"),
        (GOOD + "trian: {}\n", r"unknown section 'trian'; there are .*'train'"),
    ],
)
def test_a_mistake_names_its_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


def test_yaml_that_would_run_code_is_refused(tmp_path):
    evil = f"train: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n"
    with pytest.raises(Exception, match="could not determine a constructor"):
        load(tmp_path, evil)
    assert not (tmp_path / "ran").exists()


def test_keys_of_another_section_take_the_place_of_a_sections_own_and_are_named_where_they_are(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("train: {lr: 0.5, steps: 5}\nseparators: {one: {steps: 7}, two: {steps: x}, three: {}}\n")
    assert load_params("train", Optim, path, over=["separators.one"]) == Optim(lr=0.5, steps=7)
    assert load_params("train", Optim, path, over=["separators.three"]) == Optim(lr=0.5, steps=5)
    with pytest.raises(ValueError, match=r"separators\.two\.steps: .* \(got 'x'\)"):
        load_params("train", Optim, path, over=["separators.two"])
    with pytest.raises(ValueError, match=r"no section 'separators\.four'"):
        load_params("train", Optim, path, over=["separators.four"])
