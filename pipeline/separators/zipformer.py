"""A U-Net over time of attention blocks at several frame rates, after Zipformer (Yao et al., arXiv:2310.11230).

    mixture / its RMS -> STFT -> log power of all bins -> `width` numbers a frame
        a stack of blocks at each of `rates`, as 1, 2, 4, 2, 1: every frame, every second, every fourth, and back
        a block   attention's weights, once, used twice (gated, and by heads); a convolution; three perceptrons
                  -> BiasNorm, FiLM by the query -> a learned share of it, the rest being the block's input
    -> FiLM, and with the frame's own bins beside -> a mask of each bin, from 0 to 1

From Zipformer are the frame rates, the block's shape, BiasNorm in place of a layer norm (it keeps some of a vector's
length), and SwooshR and SwooshL in place of SiLU. Ours are the FiLM, one width in all stacks, and attention that looks
`reach` frames of its own rate to either side, so that a long recording is heard as its pieces are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators._levelled import Levelled
from pipeline.separators.gru import Mask

KERNEL = 15  # frames that a convolution sees
MAX_RATE = 64
NORM_FLOOR = 1e-8  # mean square to divide by


def swoosh_r(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 + e^(x - 1)) - 0.08 x, shifted to be 0 at 0: Zipformer's SwooshR."""
    return F.softplus(x - 1) - 0.08 * x - 0.313261687


def swoosh_l(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 + e^(x - 4)) - 0.08 x - 0.035: Zipformer's SwooshL, for layers that are mostly off."""
    return F.softplus(x - 4) - 0.08 * x - 0.035


class BiasNorm(nn.Module):
    """x e^scale over the root mean square of x - bias: Zipformer's norm, which keeps some of a vector's length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Norm each vector, keeping the shape."""
        power = (x - self.bias).square().mean(dim=-1, keepdim=True)
        return x * (power + NORM_FLOOR).rsqrt() * self.scale.exp()


class Perceptron(nn.Module):
    """One hidden layer, SwooshL before the last."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, width)
        _soften(self.leave)

    def forward(self, x: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch frames width"]:
        """Change each frame by itself."""
        h: Tensor = self.leave(swoosh_l(self.enter(x)))
        return h


class Weights(nn.Module):
    """Attention's weights, for several uses: of queries, keys and a learned bias by distance, softmaxed.

    A frame looks at `reach` frames to either side.
    """

    def __init__(self, width: int, heads: int, head_width: int, reach: int) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.project = nn.Linear(width, 2 * heads * head_width)
        self.by_distance = nn.Parameter(torch.zeros(heads, 2 * reach + 1))

    def forward(self, x: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch heads frames frames"]:
        """Compute the share that each frame takes of each other."""
        query, key = self.project(x).unflatten(2, (self.heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        places = torch.arange(x.shape[1], device=x.device)
        distance = places[:, None] - places
        bias = self.by_distance[:, distance.clamp(-self.reach, self.reach) + self.reach]
        logits = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias).float()
        return logits.masked_fill(distance.abs() > self.reach, -torch.inf).softmax(dim=-1).to(x.dtype)


class Gated(nn.Module):
    """Zipformer's non-linear attention: one head's weights on values behind a tanh gate, times a linear gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 3 * hidden), nn.Linear(hidden, width)
        _soften(self.leave)

    def forward(
        self, x: Float[Tensor, "batch frames width"], weights: Float[Tensor, "batch heads frames frames"]
    ) -> Float[Tensor, "batch frames width"]:
        """Change each frame by those that the first head's weights point at."""
        gate, values, after = self.enter(x).chunk(3, dim=-1)
        h: Tensor = self.leave(weights[:, 0] @ (gate.tanh() * values) * after)
        return h


class Attention(nn.Module):
    """Values of several heads, by weights that were computed before."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.enter, self.leave = nn.Linear(width, heads * head_width), nn.Linear(heads * head_width, width)
        _soften(self.leave)

    def forward(
        self, x: Float[Tensor, "batch frames width"], weights: Float[Tensor, "batch heads frames frames"]
    ) -> Float[Tensor, "batch frames width"]:
        """Change each frame by those that the heads' weights point at."""
        values = self.enter(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        h: Tensor = self.leave((weights @ values).transpose(1, 2).flatten(2))
        return h


class Convolution(nn.Module):
    """A gated layer, a convolution of each channel over time, SwooshR, a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.over_time = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        _soften(self.leave)

    def forward(self, x: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch frames width"]:
        """Change each frame by its neighbours."""
        gated = F.glu(self.enter(x), dim=-1)
        h: Tensor = self.leave(swoosh_r(self.over_time(gated.transpose(1, 2)).transpose(1, 2)))
        return h


class Block(nn.Module):
    """Zipformer's block, with FiLM by the query behind its norm."""

    def __init__(self, width: int, hidden: int, heads: int, head_width: int, reach: int, query_hidden: int) -> None:
        super().__init__()
        self.weights = Weights(width, heads, head_width, reach)
        self.perceptrons = nn.ModuleList(Perceptron(width, hidden) for _ in range(3))
        self.gated = Gated(width, width)
        self.attentions = nn.ModuleList(Attention(width, heads, head_width) for _ in range(2))
        self.convolutions = nn.ModuleList(Convolution(width) for _ in range(2))
        self.norm = BiasNorm(width)
        self.film = nn.Linear(query_hidden, 2 * width)
        nn.init.normal_(self.film.weight, std=0.5 * query_hidden**-0.5)
        nn.init.zeros_(self.film.bias)
        self.share = nn.Parameter(torch.full((width,), 0.5))

    def forward(
        self, x: Float[Tensor, "batch frames width"], query: Float[Tensor, "batch 1 query_hidden"]
    ) -> Float[Tensor, "batch frames width"]:
        """Change each frame by its neighbours as the query says; the shape stays."""
        weights = self.weights(x)
        h = x + self.perceptrons[0](x)
        h = h + self.gated(h, weights)
        for attention, convolution, perceptron in zip(
            self.attentions, self.convolutions, self.perceptrons[1:], strict=True
        ):
            h = h + attention(h, weights)
            h = h + convolution(h)
            h = h + perceptron(h)
        gain, shift = self.film(query).chunk(2, dim=-1)
        return torch.lerp(x, torch.addcmul(shift, self.norm(h), 1 + gain).to(x.dtype), self.share.to(x.dtype))


class Stack(nn.Module):
    """Blocks at one frame rate: `rate` frames are averaged into one, and what the blocks change is repeated."""

    def __init__(self, rate: int, width: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.rate = rate
        self.blocks = nn.ModuleList(blocks)
        self.weights = nn.Parameter(torch.zeros(rate)) if rate > 1 else None
        self.share = nn.Parameter(torch.full((width,), 0.5)) if rate > 1 else None

    def forward(
        self, x: Float[Tensor, "batch frames width"], query: Float[Tensor, "batch 1 query_hidden"]
    ) -> Float[Tensor, "batch frames width"]:
        """Keep the shape. At the end the last frame stands for those that are missing."""
        h = x
        if self.weights is not None:
            missing = -x.shape[1] % self.rate
            padded = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1)
            h = padded.reshape(len(x), -1, self.rate, x.shape[2])
            h = torch.einsum("bfrw,r->bfw", h, self.weights.softmax(dim=0).to(h.dtype))
        for block in self.blocks:
            h = block(h, query)
        if self.share is None:
            return h
        h = h.repeat_interleave(self.rate, dim=1)[:, : x.shape[1]]
        return torch.lerp(x, h, self.share.to(x.dtype))


class Separator(Levelled):
    """The network above. ValueError for `rates` that are none or no powers of 2.

    rates          STFT frames per frame of each stack
    blocks         in a stack
    width          numbers of a frame
    hidden         of a block's perceptrons
    heads          of attention, each of `head_width` numbers
    reach          frames of its own rate that attention looks to either side
    mask_hidden    width of the hidden layer before the mask
    query_hidden   the query is brought to as many numbers, from which every gain and shift is made
    """

    def __init__(
        self,
        *,
        query_dim: int,
        interferer_query: bool = False,
        n_fft: int,
        hop_length: int,
        rates: Sequence[int],
        blocks: int,
        width: int,
        hidden: int,
        heads: int,
        head_width: int,
        reach: int,
        mask_hidden: int,
        query_hidden: int,
    ) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query, n_fft=n_fft, hop_length=hop_length)
        if not rates or any(rate & (rate - 1) or not 0 < rate <= MAX_RATE for rate in rates):
            raise ValueError(f"rates {list(rates)} are not powers of 2 up to {MAX_RATE}")
        self.rates = list(rates)
        bins = n_fft // 2
        self.enter = nn.Linear(bins, width)
        self.query = nn.Linear(self.joint_dim, query_hidden)
        sizes = (width, hidden, heads, head_width, reach, query_hidden)
        self.stacks = nn.ModuleList(Stack(rate, width, [Block(*sizes) for _ in range(blocks)]) for rate in rates)
        self.mask = Mask(bins, width, mask_hidden, query_hidden)

    @property
    def grid_samples(self) -> int:
        """The hop of the lowest frame rate."""
        return self.hop_length * max(self.rates)

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice = slice(None),
    ) -> Float[Tensor, "batch part"]:
        """Separate the part of each mixture from what is in that part alone."""
        return self.through(mixture[:, part], query, lambda planes: self.masks(planes[..., 2], query))

    def masks(
        self, levels: Float[Tensor, "batch frames bins"], query: Float[Tensor, "batch joint_dim"]
    ) -> Float[Tensor, "batch frames bins"]:
        """A factor of every bin, from the log power of all of them."""
        steer = F.silu(self.query(self.normed(query)))
        h = self.enter(levels)
        for stack in self.stacks:
            h = stack(h, steer)
        mask: Tensor = self.mask(h, levels, steer)
        return mask


def _soften(layer: nn.Linear) -> None:
    """Begin what a residual adds with a tenth of its usual size."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
