"""Take out of a network what weighs least: whole hidden channels, so that what is left is smaller and faster.

Only channels between two layers of one part are taken, which nothing else reads: those between the two convolutions of
a block of the U-Net, and of the band-split network's convolutions, and the hidden units of its perceptrons and masks.
A channel weighs what the norms of its weights on the way in and on the way out give, multiplied.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.separate.targets import Unusable
from pipeline.separators.bandsplit import Convolutions, Frame
from pipeline.separators.bandsplit import Separator as BandSplit
from pipeline.separators.resunet import ResBlock


@torch.no_grad()
def prune(network: nn.Module, share: float) -> int:
    """Take out a share of the hidden channels of each part, at least one staying; return how many parameters went.

    The network is changed in place. Unusable for one that has no such part.
    """
    before = sum(p.numel() for p in network.parameters())
    parts = 0
    for module in network.modules():
        if isinstance(module, ResBlock):
            _block(module, share)
        elif isinstance(module, Convolutions | Frame):
            kept = _heaviest(_norms(module.enter.weight, 0), _norms(module.leave.weight, 1), share)
            _cut(module.enter, 0, kept)
            _cut(module.leave, 1, kept)
        elif isinstance(module, BandSplit):
            _masks(module, share)
        else:
            continue
        parts += 1
    if not parts:
        raise Unusable(f"--prune: {type(network).__module__.rpartition('.')[2]} has no channels that can be taken out")
    return before - sum(p.numel() for p in network.parameters())


def _block(block: ResBlock, share: float) -> None:
    kept = _heaviest(_norms(block.conv1.weight, 0), _norms(block.conv2.weight, 1) * block.pre2.norm.weight.abs(), share)
    _cut(block.conv1, 0, kept)
    _cut(block.conv2, 1, kept)
    _cut(block.pre2.beta, 0, kept)
    norm = block.pre2.norm
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
    norm.num_features = len(kept)


def _masks(network: BandSplit, share: float) -> None:
    """Take hidden units of each group of bands' mask layers; of each band as many."""
    biases = []
    for first, second, bias in zip(
        network.mask1, network.mask2, network.mask1_bias.chunk(len(network.widths)), strict=True
    ):
        into, out = first.norm(dim=1), second.norm(dim=2)  # (bands, hidden)
        kept = torch.stack([_heaviest(a, b, share) for a, b in zip(into, out, strict=True)])
        first.data = first.gather(2, kept[:, None].expand(-1, first.shape[1], -1))
        second.data = second.gather(1, kept[:, :, None].expand(-1, -1, second.shape[2]))
        biases.append(bias.gather(2, kept[:, None]))
    network.mask1_bias.data = torch.cat(biases)


def _heaviest(into: Float[Tensor, " n"], out: Float[Tensor, " n"], share: float) -> Int[Tensor, " kept"]:
    """Indices of the channels that stay, in their order."""
    n = max(1, len(into) - int(share * len(into)))
    return (into * out).argsort(descending=True, stable=True)[:n].sort().values


def _norms(weight: Float[Tensor, "..."], dim: int) -> Float[Tensor, " n"]:
    return weight.transpose(0, dim).flatten(1).norm(dim=1)


def _cut(layer: nn.Conv2d | nn.Linear, dim: int, kept: Int[Tensor, " kept"]) -> None:
    """Keep a layer's outputs (dim 0) or inputs (1) of these indices."""
    layer.weight = nn.Parameter(layer.weight.index_select(dim, kept))
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept])
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1]
    else:
        layer.out_features, layer.in_features = layer.weight.shape[0], layer.weight.shape[1]
