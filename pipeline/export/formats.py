"""Files of a graph for other programs, and what runs them here: ONNX under onnxruntime, TorchScript under torch."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.export.graphs import Graph
from pipeline.separate.targets import Unusable, one_line

Format = Literal["onnx", "torchscript"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "torchscript": "model.pt"}
OPSET = 17
OUTPUT = "estimate"
TRACED_BATCH, TRACED_SECONDS = 2, 2  # of what is traced; the graph holds for others

Inputs = tuple[Float[np.ndarray, "batch _"], ...]
Runner = Callable[..., Float[np.ndarray, "batch *sources time"]]
"""Mixtures, and queries behind them in the order of a graph's `inputs`, to estimates; all float32."""


def write(graph: Graph, sample_rate: int, to: Format, path: Path, *, int8: bool = False) -> None:
    """Trace a graph and write it to `path`; Unusable for a graph or a choice that the format cannot hold."""
    if int8 and to != "onnx":
        raise Unusable("--int8 is of onnx: TorchScript has no dynamic quantisation of convolutions")
    samples = graph.samples or TRACED_SECONDS * sample_rate
    inputs = graph.examples(TRACED_BATCH, samples, torch.Generator().manual_seed(0))
    with torch.no_grad(), tracing():
        if to == "torchscript":
            traced = torch.jit.trace(graph, inputs, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, os.fspath(path))
            return
        _import("onnx")
        axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in (*graph.inputs, OUTPUT)}
        if graph.samples is None:
            axes["mixture"][1] = "time"
            axes[OUTPUT][1 if len(inputs) > 1 else 2] = "time"
        try:
            torch.onnx.export(
                graph,
                inputs,
                os.fspath(path),
                dynamo=False,  # its graphs hold for all lengths, and it needs no further package
                input_names=list(graph.inputs),
                output_names=[OUTPUT],
                dynamic_axes=axes,
                opset_version=OPSET,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise Unusable(f"ONNX cannot hold this network: {one_line(error)}") from error
    if int8:
        quantise(path)


@contextmanager
def tracing() -> Iterator[None]:
    """Trace with the sizes of layer norms as numbers, which ONNX wants, and without warnings of what is meant.

    Branches on shapes become what they are at the traced length, which is as long as the networks' own distinctions
    ask for (`graphs`).
    """
    normed = F.layer_norm

    def layer_norm(x: Tensor, shape: Any, *rest: Any, **options: Any) -> Tensor:
        return normed(x, [int(n) for n in shape], *rest, **options)

    with warnings.catch_warnings(), mock.patch.object(F, "layer_norm", layer_norm):
        warnings.simplefilter("ignore")
        yield


def quantise(path: Path) -> None:
    """Replace the weights of products, recurrences and convolutions of an ONNX file by int8, but for the front end's.

    Activations are quantised as they come (dynamically), by onnxruntime.
    """
    onnx = _import("onnx")
    quantization = _import("onnxruntime.quantization")
    model = onnx.load(path)
    front = [node.name for node in model.graph.node if node.name.startswith(("/transform", "/bank", "/near"))]
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preparation that these graphs need not
    quantization.quantize_dynamic(
        model,
        os.fspath(path),
        op_types_to_quantize=["MatMul", "Gemm", "LSTM", "Conv"],
        nodes_to_exclude=front,
        weight_type=quantization.QuantType.QUInt8,  # which convolutions need
    )


def reader(path: Path, graph: Graph) -> Runner:
    """Open a written file on one thread; what it returns takes and gives arrays."""
    if path.suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have one go over to torch.export
            return of_torch(torch.jit.load(os.fspath(path)))  # type: ignore[no-untyped-call]
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Float[np.ndarray, "batch _"]) -> Float[np.ndarray, "batch *sources time"]:
        found = session.run([OUTPUT], dict(zip(graph.inputs, inputs, strict=True)))[0]
        return cast(np.ndarray, found)

    return run


def of_torch(network: Callable[..., Tensor]) -> Runner:
    """Have a network of tensors take and give arrays."""

    def run(*inputs: Float[np.ndarray, "batch _"]) -> Float[np.ndarray, "batch *sources time"]:
        with torch.inference_mode():
            return network(*(torch.from_numpy(one) for one in inputs)).float().numpy()

    return run


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise Unusable(f"{name.split('.')[0]} is not installed: pip install onnx onnxruntime") from error
