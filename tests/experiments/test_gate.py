"""The gate that CI calls: exit status, reasons, and quickness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.core import profiles
from pipeline.core.config import load_params
from pipeline.experiments.gate import lines, main
from pipeline.reporting.gates import Bound, GateParams, evaluate_gates, read_metrics

METRICS = {"resunet.average.sdri_class_mean_mean": 4.5, "resunet.average.n_nan": 0, "schema": 1}


def call(tmp_path, gate, metrics=METRICS):
    """Exit status of the gate for a `gate:` section and metrics, each given as text or as what JSON makes of it."""
    for name, content in (("metrics.json", metrics), ("params.yaml", gate)):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return main([str(tmp_path / "metrics.json"), "--params", str(tmp_path / "params.yaml")])


def gate(**bounds):
    return {"gate": {key.replace("__", "."): bound for key, bound in bounds.items()}}


def test_numbers_within_their_bounds_pass(tmp_path, capsys):
    bounds = gate(resunet__average__sdri_class_mean_mean={"min": 3}, resunet__average__n_nan={"max": 0})
    assert call(tmp_path, bounds) == 0
    assert "all 2 gates passed" in capsys.readouterr().out


def test_a_number_out_of_bounds_fails_and_says_by_how_much(tmp_path, capsys):
    bounds = gate(resunet__average__sdri_class_mean_mean={"min": 5.0}, resunet__average__n_nan={"max": 0})
    assert call(tmp_path, bounds) == 1
    out = capsys.readouterr().out
    assert "FAIL  resunet.average.sdri_class_mean_mean" in out
    assert "4.5 is below the minimum of 5 by 0.5" in out
    assert "1 of 2 gates failed" in out


def test_a_missing_number_fails(tmp_path, capsys):
    assert call(tmp_path, gate(no__such={"max": 1})) == 1
    assert "no such number in the metrics" in capsys.readouterr().out


@given(
    st.floats(-10, 10),
    st.none() | st.floats(-10, 0),
    st.floats(0, 10),
)
def test_a_gate_passes_exactly_within_its_ends(value, low, high):
    [found] = evaluate_gates({"x": value}, {"x": Bound(min=low, max=high)})
    assert found.passed == ((low is None or low <= value) and value <= high)
    assert lines([found])[0].startswith("pass" if found.passed else "FAIL")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1e999}', "a is inf, not a finite number"),
        ('{"a": null}', "a is None, not a finite number"),
        ('{"a": true}', "a is True, not a finite number"),
        ('{"a": {"b": 1}}', "not a finite number"),
        ("\ufeff{}", "is not JSON"),
    ],
)
def test_unreadable_metrics_are_told_from_failing_ones(tmp_path, capsys, metrics, message):
    assert call(tmp_path, gate(x={"min": 0}), metrics) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gate": {"x": {"min": "3"}}}, r"gate.x.min: Input should be a valid number"),
        ({"gate": {"x": {"least": 3}}}, r"gate.x.least: Extra inputs are not permitted"),
        ({"gate": {"x": {}}}, "a gate needs min, max or both"),
        ({"gate": {"x": {"min": 2, "max": 1}}}, "min 2.0 is above max 1.0"),
        ("gate: {x: {min: .inf}}", "finite"),
        ({"gate": None}, "does not fit GateParams"),
        ({}, "no section 'gate'"),
        ("gate: [", "expected"),
    ],
)
def test_a_mistake_in_the_bounds_is_named(tmp_path, capsys, params, message):
    assert call(tmp_path, params) == 2
    assert message in capsys.readouterr().err


def test_absent_files_are_named(tmp_path, capsys):
    assert main([str(tmp_path / "none.json"), "--params", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"cannot read .*none\.json: No such file"):
        read_metrics(tmp_path / "none.json")


def test_no_gates_hold_nothing_and_say_so(tmp_path, capsys):
    assert call(tmp_path, {"gate": {}}) == 0
    assert "nothing is held" in capsys.readouterr().out


def test_the_bounds_keep_the_order_of_params(tmp_path):
    (tmp_path / "params.yaml").write_text("gate: {z: {min: 1}, a: {max: 2.5}}")
    bounds = load_params("gate", GateParams, tmp_path / "params.yaml").bounds
    assert [(key, str(bound)) for key, bound in bounds.items()] == [("z", ">= 1"), ("a", "<= 2.5")]


def test_the_gate_loads_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'matplotlib', 'pandas', 'scipy'}"
    code = f"import sys, pipeline.experiments.gate; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ROOT = Path(__file__).parents[2]


def test_without_arguments_the_committed_metrics_are_held(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "metrics.json").write_text('{"x": 1}')
    (tmp_path / "params.yaml").write_text("gate: {x: {min: 2}}")
    assert main([]) == 1
    assert "1 is below the minimum of 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["default", "audioset", "esc10", "music"])
def test_half_of_the_mixture_passes_for_no_model(name, tmp_path):
    """A separator whose estimate is half of its input, at 0 dB: SDRi 10 lg 2 + 0, all else as good as one likes.

    profiles/tiny.yaml is left out: its few steps may well end below.
    """
    (tmp_path / "params.yaml").write_text(profiles.text(name, ROOT))
    document = YAML(typ="safe").load(tmp_path / "params.yaml")
    bounds = load_params("gate", GateParams, tmp_path / "params.yaml").bounds
    good = {key: bound.max if bound.min is None else bound.min for key, bound in bounds.items()}
    assert all(gate.passed for gate in evaluate_gates(good, bounds))
    for model in (*document["separators"], *document["mae_separators"]):
        for si_sdri in (0.0, 0.003):  # to the rounding of a float32
            of_half = {f"{model}.average.{key}": 3.0103 for key in ("sdri_class_mean_mean", "sdri_class_median_mean")}
            of_half |= {f"{model}.average.si_sdri_class_{kind}_mean": si_sdri for kind in ("mean", "median")}
            failed = [gate.key for gate in evaluate_gates({**good, **of_half}, bounds) if not gate.passed]
            assert f"{model}.average.si_sdri_class_mean_mean" in failed
