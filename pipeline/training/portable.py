"""What a trained separator's folder needs to be used elsewhere: classes, average queries, query encoder, detector."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from pipeline.core.ontology import class_of
from pipeline.core.runtime import sha256_file, write_atomic
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.nn.features import SAMPLE_RATE
from pipeline.separators import QuerySeparator

MAX_COPY_BYTES = 64 * 2**20  # PANNs' checkpoints (320 MB) are named by their hash; the small networks are copied
QUERIES, ENCODER, DETECTOR = "queries.safetensors", "query_encoder", "detector"


def check_networks(sed: Path, *parts: str) -> None:
    """FileNotFoundError, before a training that would want them in the end, where networks of stage sed are missing."""
    for part in parts:
        if not (sed / part / "weights.safetensors").is_file():
            raise FileNotFoundError(f"{sed / part} has no weights.safetensors: stage sed writes them")


def equip(folder: Path, network: QuerySeparator, anchors: Path, sed: Path) -> dict[str, Any]:
    """Write average queries and copies of stage sed's networks into `folder`; return the keys for its config.json."""
    index = AnchorIndex.load(anchors)
    reader = AnchorReader(anchors, index)
    queries = []
    for class_index in sorted(set(index.table["class_index"].to_pylist())):
        rows = index.rows(class_index)
        queries.append(reader.queries(rows).astype(np.float64).mean(axis=0).astype(np.float32))
    write_atomic(folder / QUERIES, save({"query": torch.from_numpy(np.stack(queries))}))
    networks = {part: _copy(sed / source, folder / part) for part, source in ((ENCODER, "query"), (DETECTOR, DETECTOR))}
    network.segment_samples = index.segment_samples
    seconds = felt_seconds(network.eval(), index.query_dim, torch.device("cpu"))
    found = {"classes": _classes(index), "context_seconds": seconds}
    return found | {f"{part}_sha256": sha256 for part, sha256 in networks.items()}


def equip_blind(folder: Path, anchors: Path, sed: Path) -> dict[str, Any]:
    """Write a copy of stage sed's detector, which names what a separator without queries gives; return the keys."""
    sha256 = _copy(sed / DETECTOR, folder / DETECTOR)
    return {"classes": _classes(AnchorIndex.load(anchors)), f"{DETECTOR}_sha256": sha256}


def _classes(index: AnchorIndex) -> list[dict[str, Any]]:
    found = [class_of(index.mids[index.rows(i)[0]]) for i in sorted(set(index.table["class_index"].to_pylist()))]
    return [{"index": one.index, "mid": one.mid, "name": one.name} for one in found]


def _copy(source: Path, target: Path) -> str:
    """Copy a network's folder if it is small; return the hash of its weights."""
    weights = source / "weights.safetensors"
    if weights.stat().st_size <= MAX_COPY_BYTES:
        shutil.copytree(source, target, dirs_exist_ok=True)
    return sha256_file(weights)


def felt_seconds(
    network: QuerySeparator, query_dim: int, device: torch.device, *, seconds: float = 8.0, decibels: float = -70.0
) -> float:
    """Measure how far, in seconds, a change of the input is felt in the output, up to `seconds`.

    Two noises of the same energy that are equal in one half and differ in the other are separated as a long recording
    is; where the estimates of the equal half differ by more than `decibels` of their level, the change is felt.
    """
    generator = torch.Generator().manual_seed(0)
    n = -(-round(seconds * SAMPLE_RATE) // network.block_samples) * network.block_samples
    one, other = torch.randn(2, 2 * n, generator=generator)
    query = torch.randn(1, query_dim, generator=generator).abs().to(device)
    felt = 0
    with torch.inference_mode():
        query = network.joint_query(query)
        for half in (slice(0, n), slice(n, 2 * n)):
            changed = one.clone()
            changed[half] = other[half] * (one[half].norm() / other[half].norm())
            estimates = [network(0.1 * mixture[None].to(device), query)[0].cpu() for mixture in (one, changed)]
            kept = slice(n, 2 * n) if half.start == 0 else slice(0, n)
            difference = (estimates[0] - estimates[1])[kept].abs()
            level = estimates[0].square().mean().sqrt()
            above = torch.nonzero(difference > level * 10 ** (decibels / 20))
            if len(above):
                felt = max(felt, int(above.max()) + 1 if half.start == 0 else n - int(above.min()))
    return felt / SAMPLE_RATE
