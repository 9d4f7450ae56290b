"""What the chain's own query encoder hears in a mixture: PANNs' Cnn14, or the small network of its family.

The features are those that a query is made of, before they are pooled over time: one vector per 0.32 s (Cnn14), or per
0.16 s (the small network of four blocks). They have learned from labels, unlike those of the other encoders here, and
so say what features are worth that know the classes. `weights` is a folder that stage sed wrote.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipeline import upstreams
from pipeline.core.config import Params
from pipeline.core.runtime import outside
from pipeline.nn import panns


class Options(Params):
    """Section `upstreams.panns:` of params.yaml."""

    weights: str = Field(min_length=1)  # data/sed/query: this run's own


class Upstream(upstreams.Upstream):
    """A query encoder of the sizes that `panns.config_of` tells. Its convolutional blocks may learn, and no more."""

    sample_rate = upstreams.SAMPLE_RATE

    def __init__(self, *, network: dict[str, Any]) -> None:
        super().__init__()
        self.network = panns.build_query_encoder(network).requires_grad_(False)
        for block in self.network.conv_blocks():
            block.requires_grad_(True)
        self.dim, self.n_layers = self.network.segment_dim, 1
        self.frames_per_step = float(self.network.segment_frames)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Upstream":
        # The front end stays float32, whatever the blocks become (`bf16_frozen`).
        blocks = nn.ModuleList(self.network.conv_blocks())
        changed = {id(t) for t in (*blocks.parameters(), *blocks.buffers())}

        def convert(t: Tensor) -> Tensor:
            return fn(t) if id(t) in changed else t.to(fn(t).device)

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "Upstream":
        """The batch norms keep the statistics that they were trained with: a few mixtures at a time have others."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """One layer: the last block's, averaged over the mels. What is behind the last whole segment has no step."""
        return [self.network.segments(waveform)]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The blocks before the last; the last."""
        *before, last = self.network.conv_blocks()
        return [[p for block in before for p in block.parameters()], list(last.parameters())]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The query encoder of the folder that `upstreams.panns:` in params.yaml names."""
    encoder = panns.load_query_encoder(outside(options["weights"]))
    return {"network": panns.config_of(encoder)}, {
        f"network.{name}": tensor.contiguous() for name, tensor in encoder.state_dict().items()
    }
