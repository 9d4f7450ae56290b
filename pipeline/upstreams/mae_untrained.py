"""The A-MAE as it is before its first step: a control. What it gives is the architecture's doing, not pretraining's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.upstreams import mae


class Upstream(mae.Upstream):
    """An A-MAE of the pretrained one's sizes whose weights are drawn by the seed of the separator's training."""


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], None]:
    """Sizes of the pretrained A-MAE, and no weights; `options` are {mae_input, drop_path}."""
    config, _ = mae.read(options, pretrained)
    return config, None
