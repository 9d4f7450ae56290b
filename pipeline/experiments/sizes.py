"""The sizes in params.yaml, before anything is trained: networks that can be built, and fit the machine's memory.

Networks are built on torch's meta device, which allocates nothing; what their constructors refuse is known here too.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn

BYTES_PER_PARAMETER = 16  # float32 weights, gradients, and two moments of Adam
QUERY_DIM = 2048  # Cnn14's, the largest there is
GIGABYTE = 1e9


def check_sizes(document: Mapping[str, Any]) -> None:
    """ValueError, naming place and sizes, for a network that cannot be built, or larger than the machine's memory.

    `document` is params.yaml, its sections held to their types.
    """
    memory = psutil.virtual_memory().total
    for place, sizes, build in _networks(document):
        named = ", ".join(f"{key} {value}" for key, value in sizes.items())
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*zero-element")
                network = build(**sizes)
        except Exception as error:  # of any kind: layers have their own ways to refuse a size
            raise ValueError(f"params.yaml: {place} ({named}): {str(error).splitlines()[0]}") from None
        needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in network.parameters())
        if needed > memory:
            raise ValueError(
                f"params.yaml: {place} ({named}): its training takes {needed / GIGABYTE:,.0f} GB for the parameters "
                f"alone; this machine has {memory / GIGABYTE:.0f} GB"
            )
    for place, n_bytes in _batches(document):
        if n_bytes > memory:
            raise ValueError(
                f"params.yaml: {place}: one batch of waveforms is {n_bytes / GIGABYTE:,.0f} GB; this machine has "
                f"{memory / GIGABYTE:.0f} GB"
            )


def _networks(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Callable[..., nn.Module]]]:
    """(place, sizes, constructor) of every network that this run trains."""
    from pipeline import separators
    from pipeline.nn.panns import SmallCnn
    from pipeline.upstreams.mae import MaskedAutoencoder

    for name, entry in document["separators"].items():
        build = partial(separators.build, entry["architecture"], query_dim=QUERY_DIM)
        yield f"separators.{name}.model", entry["model"], build
    places = {
        entry["model"]: entry["architecture"]
        for data in ("music", "clips")
        for entry in document[f"mixit_{data}"].values()
    }
    places[document["pretrain_performer"]["model"]] = "performer"
    for place, architecture in places.items():
        sizes = document
        for key in place.split("."):
            sizes = sizes[key]
        yield place, dict(sizes), partial(separators.build_blind, architecture, sample_rate=16_000)
    yield "pretrain_mae.model", document["pretrain_mae"]["model"], MaskedAutoencoder
    small = {key: document["sed"][key] for key in ("channels", "embedding_dim")}
    yield "sed", small, partial(SmallCnn, class_indices=range(527))


def _batches(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(place, bytes) of every batch of waveforms."""
    audio, music = document["audio"], document["music"]
    anchor, clip = (audio[f"{what}_seconds"] * audio["sample_rate"] for what in ("segment", "clip"))
    piece = max(max(music["segment_seconds"]) * music["sample_rate"], anchor)
    samples = {"sed": clip, "pretrain_mae": clip, "mine_anchors": clip, "train": anchor, "evaluate": anchor}
    samples |= {"mixit": 2 * piece, "pretrain_performer": piece, "evaluate_mixit": 2 * piece}
    for section, n in samples.items():
        yield f"{section}.batch_size", 4.0 * document[section]["batch_size"] * n
