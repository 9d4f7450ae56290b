"""WavLM (Chen et al. 2022, arXiv:2110.13900): HuBERT trained on overlapped and noisy speech. 50 Hz, 768 wide.

Weights: see the model card (the torchaudio bundles state MIT). Its attention reads its projections' weights itself, so
that adapters there would be passed by: they adapt the feed-forward layers.

    hf download microsoft/wavlm-base-plus --local-dir data/upstreams/wavlm
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.upstreams._transformers import Options, TransformersUpstream, quiet, strides
from pipeline.upstreams._transformers import read as read_folder

__all__ = ["Options", "Upstream", "read"]


def _model(config: Mapping[str, Any]) -> nn.Module:
    from transformers import WavLMConfig, WavLMModel  # seconds, and most runs do without

    model: nn.Module = WavLMModel(WavLMConfig(**config))
    return model


class Upstream(TransformersUpstream):
    """The encoder of a config of the transformers library; `weights` says where its tensors came from."""

    def __init__(self, *, config: dict[str, Any], normalise: bool, weights: str) -> None:
        model = _model(quiet(config))
        stride, window = strides(model.config.to_dict())  # type: ignore[operator, union-attr]
        super().__init__(
            model,
            normalise=normalise,
            lora_targets=("intermediate_dense", "output_dense"),
            stride=stride,
            window=window,
        )


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.wavlm:` in params.yaml."""
    return read_folder(options, _model, "wavlm")
