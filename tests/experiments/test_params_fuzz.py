"""Every leaf of params.yaml is given what is no value of it: the check stops by the leaf's name, or the value is right.

The checks of the first stage run on documents in memory. No network is allocated: sizes are tried on the meta device.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core import config
from pipeline.experiments.check import check_gates, check_params
from pipeline.experiments.sizes import check_sizes

ROOT = Path(__file__).parents[2]
DOCUMENT = YAML(typ="safe").load(ROOT / "params.yaml")
WRONG: dict[str, Any] = {
    "a mapping": {"a": 1},
    "a list": [[]],
    "text": "what is this",
    "nan": math.nan,
    "infinite": math.inf,
    "-infinite": -math.inf,
    "null": None,
    "negative": -1,
    "zero": 0,
    "huge": 10**12,
    "huge, real": 1e30,
}
# Leaves for which a value of that kind is one, by the last key that is a name.
MEANT: dict[str, set[str]] = {
    "text": {
        *("root", "train", "eval", "weights", "query_weights"),  # places and names of other things
    },
    "null": {
        *("weights", "weights_sha256", "query_weights", "query_weights_sha256", "sha256", "config_sha256"),
        *("hop_seconds", "segment_seconds", "validate_every_steps", "min", "max"),
    },
    "negative": {"silence_db", "mom_snr_range", "min", "max"},
    "zero": {
        *("seed", "bootstrap_seed", "folds", "warmup_steps", "warmup", "mixup", "gain_db", "level_db", "equaliser_db"),
        *(
            "max_bad_fraction",
            "silence_db",
            "min_score",
            "min_purity",
            "min_relative_energy",
            "weight_decay",
            "dropout",
        ),
        *("n_examples", "n_reconstructions", "n_mixtures", "gradient_clip", "ema", "patience", "redraw_every_steps"),
        *("final_learning_rate", "mom_snr_range", "diversity", "sparsity", "min_targets", "max_lost"),
        *("lora_rank", "encoder_weight_decay", "unfreeze_step", "drop_path", "rms", "interferer", "min", "max"),
        *("fractions", "norm_momentum", "phase_bias", "recurrent_hidden", "eps", "interferer_query"),
    },
    "huge": {"min", "max"},
    "huge, real": {"min", "max"},
}


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values; an empty mapping or list is one."""
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path


LEAVES = list(leaves(DOCUMENT))
SIZED = {"sed", "pretrain_mae", "separators", "mixit_models", "pretrain_performer", "train", "evaluate", "music"}


def stopped_by(monkeypatch: pytest.MonkeyPatch, path: tuple[Any, ...], value: Any) -> str | None:
    """What the check says of params.yaml with this value there; None where it passes."""
    document = copy.deepcopy(DOCUMENT)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    monkeypatch.setattr(config, "read_document", lambda _: document)
    try:
        check_gates(check_params(ROOT / "params.yaml"))
        if path[0] in SIZED:
            check_sizes(document)
    except ValueError as error:
        return str(error)
    return None


def assert_stopped_or_right(monkeypatch: pytest.MonkeyPatch, path: tuple[Any, ...], kind: str) -> None:
    names = [key for key in path if isinstance(key, str)]
    said = stopped_by(monkeypatch, path, WRONG[kind])
    if said is None:
        node: Any = DOCUMENT
        for key in path:
            node = node[key]
        meant = names[-1] in MEANT.get(kind, set()) or (kind == "text" and path[-2:] == ("gate", names[-1]))
        assert meant, f"{'.'.join(map(str, path))} may be {WRONG[kind]!r}"
    else:
        assert names[-1] in said, f"{'.'.join(map(str, path))} = {WRONG[kind]!r}: {said}"


@pytest.mark.parametrize("kind", WRONG)
def test_a_sample_of_what_is_no_value_is_stopped_by_name(monkeypatch, kind):
    """Every kind on every thirtieth leaf, other leaves for each kind."""
    for path in LEAVES[list(WRONG).index(kind) :: 30]:
        assert_stopped_or_right(monkeypatch, path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_value_of_any_leaf_is_stopped_by_name(monkeypatch, kind):
    failed = []
    for path in LEAVES:
        try:
            assert_stopped_or_right(monkeypatch, path, kind)
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("section", ["variants", "upstreams", "mixit_models", "separators", "mae_separators"])
@pytest.mark.parametrize("entry", [{}, {"no_such_key": 1}, 3, None])
def test_an_entry_that_is_none_is_stopped_by_its_name(monkeypatch, section, entry):
    said = stopped_by(monkeypatch, (section, "no_such_entry"), entry)
    assert said is not None
    assert "no_such_entry" in said


@pytest.mark.parametrize("warmup", [[[0, 0.0]], [[0, -1.0]], [[-1, 1.0]], [[0, 0.1], [5, 11.0]]])
def test_a_warm_up_that_turns_learning_round_or_off_is_stopped_by_name(monkeypatch, warmup):
    said = stopped_by(monkeypatch, ("train", "warmup"), warmup)
    assert said is not None
    assert "train.warmup" in said


def test_networks_and_batches_larger_than_the_memory_are_stopped_by_their_sizes(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 10**7}))
    said = stopped_by(monkeypatch, ("sed", "seed"), 1)
    assert said is not None
    assert "separators.resunet.model (n_fft 1024" in said
