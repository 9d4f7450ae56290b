"""data2vec (Baevski et al. 2022, arXiv:2202.03555): predicts a slow copy's features of masked parts. 50 Hz, 768 wide.

Weights: Apache-2.0 on the Hugging Face hub.

    hf download facebook/data2vec-audio-base --local-dir data/upstreams/data2vec
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.upstreams import _transformers
from pipeline.upstreams._transformers import Options

__all__ = ["Options", "Upstream", "read"]


class Upstream(_transformers.TransformersUpstream):
    """The encoder data2vec, by transformers."""

    library = "Data2VecAudio"


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.data2vec:` in params.yaml."""
    return _transformers.read(Upstream, options)
