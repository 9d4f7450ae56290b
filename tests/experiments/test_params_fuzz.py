"""No value of params.yaml that is none passes, and every stop names its key: every leaf of the sections with a type."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core.config import AudioParams, DataParams, Params, load_params
from pipeline.datasets import synthetic
from pipeline.mixtures.mixing import PairsParams
from pipeline.mixtures.tracks import MusicParams
from pipeline.stages.evaluate import EvaluateParams
from pipeline.stages.evaluate_mixit import EvaluateMixitParams
from pipeline.stages.make_eval_pairs import MakeEvalPairsParams
from pipeline.stages.mine_anchors import MineAnchorsParams
from pipeline.stages.report import ReportParams
from pipeline.stages.resample import ResampleParams
from pipeline.stages.sed import SedParams
from pipeline.stages.train_separator import TrainParams
from pipeline.training.mae import PretrainParams
from pipeline.training.mixit import MixitParams, PretrainPerformerParams

SECTIONS: dict[str, type[Params]] = {
    "audio": AudioParams,
    "data": DataParams,
    "evaluate": EvaluateParams,
    "evaluate_mixit": EvaluateMixitParams,
    "make_eval_pairs": MakeEvalPairsParams,
    "mine_anchors": MineAnchorsParams,
    "mixit": MixitParams,
    "music": MusicParams,
    "pairs": PairsParams,
    "pretrain_mae": PretrainParams,
    "pretrain_performer": PretrainPerformerParams,
    "report": ReportParams,
    "resample": ResampleParams,
    "sed": SedParams,
    "synthetic": synthetic.Options,
    "train": TrainParams,
}
WRONG: dict[str, Any] = {"a mapping": {"a": 1}, "nan": math.nan, "infinite": math.inf, "-infinite": -math.inf}
BOUNDED = ("seed", "batch_size", "steps", "learning_rate", "pairs_per_class", "regularisation", "fractions")
DOCUMENT = YAML(typ="safe").load(Path(__file__).parents[2] / "params.yaml")
# Of the source of music that it belongs to: checked by that source's own class.
ELSEWHERE = ("music", "synthetic_stems")


def leaves(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if path[:2] == ELSEWHERE:
        return
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path


def assert_stopped_by_name(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    document = YAML(typ="safe").load(Path(__file__).parents[2] / "params.yaml")
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file = tmp_path / "params.yaml"
    with file.open("w") as opened:
        YAML(typ="safe").dump({path[0]: document[path[0]]}, opened)
    named = ".".join(str(key) for key in path if not isinstance(key, int))
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        load_params(path[0], SECTIONS[path[0]], file)


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_no_value_is_stopped_by_name(tmp_path, section):
    paths = list(leaves(DOCUMENT[section], (section,)))
    assert paths
    for number, path in enumerate(paths):
        for value in list(WRONG.values())[number % 2 :: 2]:  # every other one: half of the time
            assert_stopped_by_name(tmp_path, path, value)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_none_of_what_is_no_value_passes(tmp_path, section, wrong):
    for path in leaves(DOCUMENT[section], (section,)):
        assert_stopped_by_name(tmp_path, path, WRONG[wrong])


@pytest.mark.parametrize("value", [-1, 10**12, 10**30])
def test_numbers_that_no_run_can_mean_are_stopped_by_name(tmp_path, value):
    paths = [path for section in SECTIONS for path in leaves(DOCUMENT[section], (section,))]
    bounded = [path for path in paths if any(key in BOUNDED for key in path[1:])]
    assert len(bounded) > 20
    for path in bounded:
        assert_stopped_by_name(tmp_path, path, value)


@pytest.mark.parametrize("warmup", [[[0, 0.0]], [[0, -1.0]], [[-1, 1.0]], [[0, 0.1], [5, 11.0]]])
def test_a_warm_up_that_turns_learning_round_or_off_is_stopped_by_name(tmp_path, warmup):
    assert_stopped_by_name(tmp_path, ("train", "warmup"), warmup)
