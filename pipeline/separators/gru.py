"""A recurrent separator for minutes on a CPU: masks from bidirectional GRUs over log-magnitude frames.

    mixture / its RMS -> STFT -> log power of all bins -> `width` numbers a frame
        layers of   layer norm, FiLM by the query (Perez et al. 2018), a bidirectional GRU over time; residual
    -> with the frame's own bins beside them -> a mask of each bin, from 0 to 1

One query steers all frames alike. A GRU in both directions hears the whole recording; how far it is felt is measured
when the model is trained, and is what `separate` gives a block for context.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.separators._levelled import Levelled


class FiLM(nn.Module):
    """A layer norm whose gain and shift, for every channel, come from the query."""

    def __init__(self, query_hidden: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.change = nn.Linear(query_hidden, 2 * width)
        nn.init.normal_(self.change.weight, std=0.3 * query_hidden**-0.5)
        nn.init.zeros_(self.change.bias)

    def forward(
        self, x: Float[Tensor, "batch frames width"], query: Float[Tensor, "batch 1 query_hidden"]
    ) -> Float[Tensor, "batch frames width"]:
        """Normalise each frame, then scale and shift it as the query says."""
        gain, shift = self.change(query).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), self.gain + gain)


class Recurrence(nn.Module):
    """A bidirectional GRU over the frames, and a layer back to their width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(2 * hidden, width)

    def forward(self, x: Float[Tensor, "batch frames width"]) -> Float[Tensor, "batch frames width"]:
        """Change each frame by what comes before and after it."""
        h: Tensor = self.leave(self.gru(x)[0])
        return h


class Separator(Levelled):
    """The network above.

    width          numbers of a frame between the layers
    hidden         of each direction of a GRU
    layers         GRUs, one after the other
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
        width: int,
        hidden: int,
        layers: int,
        mask_hidden: int,
        query_hidden: int,
    ) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query, n_fft=n_fft, hop_length=hop_length)
        bins = n_fft // 2
        self.enter = nn.Linear(bins, width)
        self.query = nn.Linear(self.joint_dim, query_hidden)
        self.layers = nn.ModuleList(Recurrence(width, hidden) for _ in range(layers))
        self.films = nn.ModuleList(FiLM(query_hidden, width) for _ in range(layers + 1))
        self.mask1 = nn.Linear(width + bins, mask_hidden)
        self.mask2 = nn.Linear(mask_hidden, bins)
        with torch.no_grad():
            self.mask2.weight.mul_(0.1)  # half of the mixture, to begin with
            self.mask2.bias.zero_()

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice = slice(None),
    ) -> Float[Tensor, "batch part"]:
        """Separate the part of each mixture from what is in that part alone."""
        return self.through(mixture[:, part], query, lambda planes: self.mask(planes[..., 2], query))

    def mask(
        self, levels: Float[Tensor, "batch frames bins"], query: Float[Tensor, "batch joint_dim"]
    ) -> Float[Tensor, "batch frames bins"]:
        """A factor of every bin between 0 and 1, float32 whatever the autocast."""
        steer = F.silu(self.query(self.normed(query)))
        h = self.enter(levels)
        for film, layer in zip(self.films, self.layers, strict=False):
            h = h + layer(film(h, steer))
        h = torch.cat([self.films[-1](h, steer), levels.to(h.dtype)], dim=-1)
        logits: Tensor = self.mask2(F.silu(self.mask1(h)))
        return logits.float().sigmoid()
