"""What an export loses against the network that it was made of: SDRi, the largest difference, time and size."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import nn

from pipeline.core.config import load_params
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.export.formats import Inputs, Runner
from pipeline.export.graphs import Graph
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mixing import PairsParams, mix
from pipeline.separate import Separator

BATCH = 4  # mixtures at once
TIMED_SECONDS, TIMED_RUNS = 8, 3
NOISES = 4  # mixtures that stand in where there are no evaluation pairs


@dataclass(frozen=True)
class Parity:
    """A line of an export's table; decibels are of the mean over pairs, None where there are no pairs."""

    model: str
    format: str
    int8: bool
    prune: float
    pairs: int
    sdri_network: float | None  # of the network as it was trained
    sdri_export: float | None
    max_difference: float  # of a sample of the estimates, full scale 1
    difference_db: float  # power of the difference by that of the network's estimates
    rtf_network: float  # CPU seconds of one core per second of audio
    rtf_export: float
    mb_network: float
    mb_export: float

    @property
    def sdri_change(self) -> float | None:
        """Change of SDRi that the export brings, in dB; None where there are no pairs."""
        if self.sdri_export is None or self.sdri_network is None:
            return None
        return round(self.sdri_export - self.sdri_network, 4)

    def as_dict(self) -> dict[str, object]:
        """The line for parity.json, with the change of SDRi."""
        return {**asdict(self), "sdri_change": self.sdri_change}

    def markdown(self) -> str:
        """The line as a table of Markdown, the network above its export."""
        kind = self.format + (", int8" if self.int8 else "") + (f", pruned by {self.prune:g}" if self.prune else "")

        def row(name: str, *numbers: float | None) -> str:
            return f"| {name} | " + " | ".join("" if n is None else f"{n:.4g}" for n in numbers) + " |\n"

        where = f"{self.pairs} evaluation pairs" if self.pairs else "noise, since there are no evaluation pairs here"
        return (
            f"# {self.model} as {kind}\n\nOn {where}. Time is of one core.\n\n"
            "| | SDRi, dB | change, dB | largest difference | difference, dB | CPU s per s | MB |\n"
            "|---|---|---|---|---|---|---|\n"
            + row("network", self.sdri_network, None, None, None, self.rtf_network, self.mb_network)
            + row(
                "export",
                self.sdri_export,
                self.sdri_change,
                self.max_difference,
                self.difference_db,
                self.rtf_export,
                self.mb_export,
            )
        )


@dataclass(frozen=True)
class Measured:
    """Sums over mixtures; `sdri` has two values per pair, of the network and of the export."""

    sdri: list[tuple[float, float]]
    largest: float
    error: float
    level: float


def compare(separator: Separator, graph: Graph, network: Runner, export: Runner, data: Path, most: int) -> Measured:
    """Give both the evaluation pairs in `data`, or noise where it has none for this model."""
    found, largest, error, level = [], 0.0, 0.0, 0.0
    for inputs, target in batches(separator, graph, data, most):
        one, other = network(*inputs), export(*inputs)
        largest = max(largest, float(np.abs(one - other).max()))
        error, level = error + float(np.square(one - other).sum()), level + float(np.square(one).sum())
        if target is not None:
            gains = (improvement(estimate, inputs[0], target) for estimate in (one, other))
            found += list(zip(*(gain.tolist() for gain in gains), strict=True))
    return Measured(found, largest, error, level)


def improvement(
    estimate: Float[np.ndarray, "batch *sources time"],
    mixture: Float[np.ndarray, "batch time"],
    target: Float[np.ndarray, "batch time"],
) -> Float[np.ndarray, " batch"]:
    """SDRi in dB; of estimates without a query, that of the one that is nearest to the target."""
    reference, estimates = torch.from_numpy(target), torch.from_numpy(estimate)
    if estimates.ndim == 3:
        best = si_sdr(estimates, reference[:, None].expand_as(estimates)).nan_to_num(-math.inf).argmax(dim=1)
        estimates = estimates[torch.arange(len(best)), best]
    gain: np.ndarray = (sdr(estimates, reference) - sdr(torch.from_numpy(mixture), reference)).numpy()
    return gain


def batches(
    separator: Separator, graph: Graph, data: Path, most: int
) -> Iterator[tuple[Inputs, Float[np.ndarray, "batch time"] | None]]:
    """Give a graph's inputs and the targets of up to `most` evaluation pairs, spread over all; or noise and None.

    Pairs are taken where both sounds' classes are the model's, at its sample rate.
    """
    path, rows = data / "pairs/eval/pairs.parquet", []
    columns = {one.index: i for i, one in enumerate(separator.classes)}
    if path.is_file() and most:
        rows = [row for row in pq.read_table(path).to_pylist() if row["class_index"] in columns]
        rows = [rows[i * len(rows) // min(most, len(rows))] for i in range(min(most, len(rows)))]
    index = AnchorIndex.load(data / "anchors/eval") if rows else None
    fits = index is not None and index.sample_rate == separator.sample_rate
    if index is None or not fits or graph.samples not in (None, index.segment_samples):
        generator = torch.Generator().manual_seed(0)
        for _ in range(NOISES):
            drawn = graph.examples(1, graph.samples or 2 * separator.sample_rate, generator)
            yield tuple(one.numpy() for one in drawn), None
        return
    reader = AnchorReader(data / "anchors/eval", index)
    normalize = load_params("pairs", PairsParams, data.parent / "params.yaml").normalize
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        targets, interferers = (
            torch.from_numpy(reader.waveforms(index.row(row[role]) for row in some))
            for role in ("target", "interferer")
        )
        gain = torch.tensor([row["gain"] for row in some], dtype=torch.float32)
        mixture, target, _ = mix(targets, interferers, gain, normalize)
        given: Inputs = (mixture.numpy(),)
        if separator.takes_queries:
            given += (separator.averages[[columns[row["class_index"]] for row in some]].numpy(),)
        if len(graph.inputs) > 2:
            assert separator.not_given is not None
            given += (separator.not_given.expand(len(some), -1).numpy().copy(),)
        yield given, target.numpy()


def real_time_factor(runner: Runner, graph: Graph, sample_rate: int) -> float:
    """CPU seconds of one thread per second of audio: the least of some runs."""
    samples = graph.samples or TIMED_SECONDS * sample_rate
    inputs = tuple(one.numpy() for one in graph.examples(1, samples, torch.Generator().manual_seed(0)))
    took, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runner(*inputs)
        for _ in range(TIMED_RUNS):
            began = time.process_time()
            runner(*inputs)
            took.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(took) * sample_rate / samples


def megabytes(network: nn.Module) -> float:
    """Size of a network's tensors."""
    return sum(t.numel() * t.element_size() for t in network.state_dict().values()) / 1e6
