"""DistilHuBERT (Chang et al. 2022, arXiv:2110.01900): two layers that imitate HuBERT. 50 Hz, 768 wide.

Weights: Apache-2.0 on the Hugging Face hub.

    hf download ntu-spml/distilhubert --local-dir data/upstreams/distilhubert
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.upstreams._transformers import Options, TransformersUpstream, quiet, strides
from pipeline.upstreams._transformers import read as read_folder

__all__ = ["Options", "Upstream", "read"]


def _model(config: Mapping[str, Any]) -> nn.Module:
    from transformers import HubertConfig, HubertModel  # seconds, and most runs do without

    model: nn.Module = HubertModel(HubertConfig(**config))
    return model


class Upstream(TransformersUpstream):
    """The encoder of a config of the transformers library; `weights` says where its tensors came from."""

    def __init__(self, *, config: dict[str, Any], normalise: bool, weights: str) -> None:
        model = _model(quiet(config))
        stride, window = strides(model.config.to_dict())  # type: ignore[operator, union-attr]
        super().__init__(
            model,
            normalise=normalise,
            lora_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
            stride=stride,
            window=window,
        )


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.distilhubert:` in params.yaml."""
    return read_folder(options, _model, "hubert")
