"""WavLM (Chen et al. 2022, arXiv:2110.13900): HuBERT trained on overlapped and noisy speech. 50 Hz, 768 wide.

Weights: see the model card (the torchaudio bundles state MIT). Its attention reads its projections' weights itself, so
that adapters there would be passed by: they adapt the feed-forward layers.

    hf download microsoft/wavlm-base-plus --local-dir data/upstreams/wavlm
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.upstreams import _transformers
from pipeline.upstreams._transformers import Options

__all__ = ["Options", "Upstream", "read"]


class Upstream(_transformers.TransformersUpstream):
    """The encoder WavLM, by transformers."""

    library = "WavLM"
    lora_targets = ("intermediate_dense", "output_dense")


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.wavlm:` in params.yaml."""
    return _transformers.read(Upstream, options)
