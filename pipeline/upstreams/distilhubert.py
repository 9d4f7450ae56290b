"""DistilHuBERT (Chang et al. 2022, arXiv:2110.01900): two layers that imitate HuBERT. 50 Hz, 768 wide.

Weights: Apache-2.0 on the Hugging Face hub.

    hf download ntu-spml/distilhubert --local-dir data/upstreams/distilhubert
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.upstreams import _transformers
from pipeline.upstreams._transformers import Options

__all__ = ["Options", "Upstream", "read"]


class Upstream(_transformers.TransformersUpstream):
    """The encoder DistilHuBERT, by transformers."""

    library = "Hubert"


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.distilhubert:` in params.yaml."""
    return _transformers.read(Upstream, options)
