"""Dasheng (Dinkel et al. 2024, arXiv:2406.06992): a masked autoencoder of frames, trained on all kinds of sound. 25 Hz.

Code and weights Apache-2.0 (PyPI: dasheng). No frequency axis: a step is 40 ms of all 64 mels.

    dvc import-url https://zenodo.org/records/11511780/files/dasheng_base.pt data/upstreams/dasheng_base.pt
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipeline import upstreams
from pipeline.core.config import Params, Sha256, Size
from pipeline.core.devices import exact_float32
from pipeline.core.weights import read_tensors
from pipeline.nn.fbank import to_16k

WINDOW_SAMPLES = 4 * 160  # one step


class Options(Params):
    """Section `upstreams.dasheng:` of params.yaml."""

    weights: str = Field(min_length=1)  # a published .pt, or "random"
    sha256: Sha256 | None
    config: dict[str, Size | list[Size]]  # embed_dim, depth, num_heads: of the file too (base: 768, 12, 12)


class Upstream(upstreams.Upstream):
    """The encoder of the dasheng package; longer waveforms than its 10.08 s go in pieces, as there."""

    lora_targets = ("attn.qkv", "attn.proj")

    def __init__(self, *, config: dict[str, Any], weights: str) -> None:
        super().__init__()
        from dasheng.pretrained.pretrained import Dasheng

        self.model = Dasheng(**config)
        self.dim, self.n_layers, self.frames_per_step = config["embed_dim"], config["depth"], 4.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Upstream":
        # The log-mel front end and its norm stay float32, whatever the blocks become (`bf16_frozen`).
        front = (self.model.front_end, self.model.init_bn)
        kept = {id(t) for module in front for t in (*module.parameters(), *module.buffers())}

        def convert(t: Tensor) -> Tensor:
            return t.to(fn(t).device) if id(t) in kept else fn(t)

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "Upstream":
        """The norm of its input keeps the statistics that it was pretrained with."""
        super().train(mode)
        self.model.init_bn.eval()
        return self

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """Output of each block, 25 times a second."""
        low = to_16k(waveform, upstreams.SAMPLE_RATE)
        low = F.pad(low, (0, max(0, WINDOW_SAMPLES - low.shape[1])))
        found: list[list[Tensor]] = [[] for _ in self.model.blocks]
        hooks = [
            block.register_forward_hook(lambda module, args, output, place=place: place.append(output))
            for block, place in zip(self.model.blocks, found, strict=True)
        ]
        try:
            with torch.autocast(low.device.type, enabled=False), exact_float32():
                features = self.model.forward_to_spec(low)
            self.model.forward_spectrogram(features.to(self.model.norm.weight.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(pieces, dim=1) for pieces in found]

    def final_norm(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The encoder's last norm."""
        return self.model.norm(h)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """All that comes before the first block; each block, the last with the final norm."""
        layers = [list(block.parameters()) for block in self.model.blocks]
        layers[-1] += list(self.model.norm.parameters())
        within = {id(p) for group in layers for p in group}
        return [[p for p in self.model.parameters() if id(p) not in within], *layers]


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The encoder of `upstreams.dasheng:` in params.yaml; ValueError names a file that does not fit its sizes."""
    config = dict(options["config"])
    if options["weights"] == "random":
        return {"config": config, "weights": "random"}, None
    path = Path(options["weights"])
    state = {f"model.{k}": v for k, v in read_tensors(path, sha256=options["sha256"], entry="model").items()}
    expected = {name: t.shape for name, t in Upstream(config=config, weights="").state_dict().items()}
    wrong = sorted(set(state) ^ set(expected)) or [n for n, t in state.items() if t.shape != expected[n]]
    if wrong:
        raise ValueError(f"{path} does not fit upstreams.dasheng.config: {wrong[:5]}")
    return {"config": config, "weights": path.name}, state
