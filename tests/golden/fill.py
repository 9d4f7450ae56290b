"""The rule by which the golden files' networks were filled (README.md), under the original tensor names."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(HERE / f"{name}.npz") as content:
        return {key: torch.from_numpy(content[key]) for key in content.files}


def description(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def filled(name: str) -> dict[str, Tensor]:
    """The random tensors of the network behind `<name>.npz`; the analytic ones are left out."""
    rows = description(name)["state_dict"]
    return {key: fill(key, tuple(shape)) for key, shape, _, kind in rows if kind != "analytic"}


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    randn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return 1 + 0.2 * randn.abs()
    if name.endswith("running_mean"):
        return 0.1 * randn
    if name.endswith(".bias"):
        return 0.05 * randn
    if len(shape) == 1:
        return 1 + 0.1 * randn
    if name.startswith("film."):
        return randn / math.sqrt(shape[1])
    if name == "fc_audioset.weight":
        return 0.15 * randn / math.sqrt(shape[1])
    transposed = re.fullmatch(r"base\.decoder_block\d\.conv1\.weight", name)
    fan_in = shape[0] if transposed else math.prod(shape[1:])
    return randn * math.sqrt(2 / fan_in) * (0.02 if name == "base.after_conv.weight" else 1)


def fill_amae(name: str, shape: tuple[int, ...]) -> Tensor:
    """Rule "fan" of the AudioMAE files."""
    randn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name in ("cls_token", "mask_token"):
        return 0.02 * randn
    if len(shape) >= 2:
        return randn / math.sqrt(math.prod(shape[1:]))
    shift = 1.0 if "norm" in name and name.endswith("weight") else 0.2 if name.endswith(".tau") else 0.0
    return 0.02 * randn + shift
