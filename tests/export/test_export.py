"""The command `export`: files that other runtimes run as the network does, with their parity; refusals of one line."""

import json

import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline import separators
from pipeline.export import command
from pipeline.mixtures.anchors import AnchorIndex
from tests.corpora import write_anchors
from tests.stages.test_train_separator import trained

PAIRS = "pairs: {exclude: label, normalize: joint, match_energy: true, min_gain: 0.02, max_gain: 50.0}\n"
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `export`)")
pytest.importorskip("onnx", reason="onnx is not installed (extra `export`)")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A trained model, and evaluation pairs of the classes that it knows."""
    root = tmp_path_factory.mktemp("run")
    trained(root)
    write_anchors(root / "data/anchors/eval", 4, seed=1)
    index = AnchorIndex.load(root / "data/anchors/eval")
    rows = [
        {"pair": i, "class_index": c, "target": index.anchor(index.rows(c)[i % 4]), "gain": 1.0}
        for i, c in enumerate(index.classes * 2)
    ]
    for row in rows:
        other = next(c for c in index.classes if c != row["class_index"])
        row["interferer"] = index.anchor(index.rows(other)[0])
    (root / "data/pairs/eval").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data/pairs/eval/pairs.parquet")
    (root / "params.yaml").write_text(PAIRS)
    return root


@pytest.fixture
def export(root, monkeypatch, capsys):
    """The command: its exit status and what it says. What is traced must not pass the tests' checks of shapes."""

    def run(*arguments, data=root / "data"):
        with monkeypatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            code = command.main([*map(str, arguments), "--data", str(data)])
        return code, capsys.readouterr().err

    return run


def runs(path, *inputs):
    if path.suffix == ".pt":
        return torch.jit.load(path)(*inputs).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
@pytest.mark.parametrize(("to", "file"), [("onnx", "model.onnx"), ("torchscript", "model.pt")])
def test_an_export_separates_as_the_network_for_any_batch_and_length(root, export, tmp_path, to, file):
    assert export(root / "separator", "--to", to, "-o", tmp_path / "out") == (0, "")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        ["README.md", "config.json", file, "parity.json", "parity.md", "queries.safetensors"]
    )
    network = separators.load(root / "separator")
    query = load_file(tmp_path / "out/queries.safetensors")["query"]
    for batch, samples in ((1, 5000), (3, 20001)):
        mixture = 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = network(mixture, query[[0] * batch]).numpy()
        np.testing.assert_allclose(runs(tmp_path / "out" / file, mixture, query[[0] * batch]), expected, atol=1e-5)
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["pairs"] == len(pq.read_table(root / "data/pairs/eval/pairs.parquet"))
    assert abs(parity["sdri_change"]) <= 0.05
    assert parity["max_difference"] < 1e-4
    assert parity["difference_db"] < -60
    assert min(parity["rtf_network"], parity["rtf_export"], parity["mb_export"]) > 0
    assert "| export |" in (tmp_path / "out/parity.md").read_text()
    if to == "onnx":
        import onnx

        graph = onnx.load(tmp_path / "out" / file).graph
        complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
        assert not {one.data_type for one in graph.initializer} & complex_types
        assert not {node.op_type for node in graph.node} & {"STFT", "DFT"}


def test_int8_quantises_all_but_the_front_end_and_says_what_it_costs(root, export, tmp_path):
    import onnx

    assert export(root / "separator", "-o", tmp_path / "out", "--pairs", "2", "--int8")[0] == 0
    nodes = onnx.load(tmp_path / "out/model.onnx").graph.node
    kinds = {node.op_type for node in nodes}
    assert {"ConvInteger", "DynamicQuantizeLinear"} <= kinds
    assert {node.op_type for node in nodes if node.name.startswith("/transform/Conv")} == {"Conv"}
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert (parity["int8"], parity["pairs"]) == (True, 2)
    assert parity["max_difference"] > 0


def test_a_pruned_model_is_smaller_and_is_compared_on_noise_without_evaluation_pairs(root, export, tmp_path):
    assert export(root / "separator", "-o", tmp_path / "out", "--prune", "0.5", data=tmp_path) == (0, "")
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert (parity["prune"], parity["pairs"], parity["sdri_change"]) == (0.5, 0, None)
    assert parity["difference_db"] > -60
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["export"]["inputs"], config["export"]["samples"]) == (["mixture", "query"], None)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["mixture", "query"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "no model at nowhere"),
        (["MODEL", "--prune", "1"], "--prune is a share from 0 to below 1"),
        (["MODEL", "--prune", "nan"], "--prune is a share from 0 to below 1"),
        (["MODEL", "--to", "torchscript", "--int8"], "--int8 is of onnx"),
        (["MODEL", "-o", __file__], "it is a file, not a folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line(root, export, tmp_path, flags, said):
    flags = [str(root / "separator") if flag == "MODEL" else flag for flag in flags]
    code, error = export(*([] if "-o" in flags else ["-o", str(tmp_path / "out")]), *flags)
    assert code == 2
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*"))
