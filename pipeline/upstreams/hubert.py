"""HuBERT (Hsu et al. 2021, arXiv:2106.07447): masked prediction of clustered units, trained on speech. 50 Hz, 768 wide.

Weights: Apache-2.0 on the Hugging Face hub.

    hf download facebook/hubert-base-ls960 --local-dir data/upstreams/hubert
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.upstreams import _transformers
from pipeline.upstreams._transformers import Options

__all__ = ["Options", "Upstream", "read"]


class Upstream(_transformers.TransformersUpstream):
    """The encoder HuBERT, by transformers."""

    library = "Hubert"


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.hubert:` in params.yaml."""
    return _transformers.read(Upstream, options)
