"""A recurrent separator for minutes on a CPU: masks from bidirectional GRUs over log-magnitude frames.

    mixture / its RMS -> STFT -> log power of all bins -> `width` numbers a frame
        layers of   layer norm, FiLM by the query (Perez et al. 2018), a bidirectional GRU over time; residual
    -> FiLM, and with the frame's own bins beside -> a mask of each bin, from 0 to 1

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
        nn.init.normal_(self.change.weight, std=0.5 * query_hidden**-0.5)
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


class Mask(nn.Module):
    """The query's last FiLM, and a perceptron that sees the frame's own bins beside what the layers made of it."""

    def __init__(self, bins: int, width: int, hidden: int, query_hidden: int) -> None:
        super().__init__()
        self.film = FiLM(query_hidden, width)
        self.enter, self.leave = nn.Linear(width + bins, hidden), nn.Linear(hidden, bins)
        nn.init.normal_(self.leave.weight, std=0.3 * hidden**-0.5)
        nn.init.zeros_(self.leave.bias)  # about half of the mixture, to begin with

    def forward(
        self,
        x: Float[Tensor, "batch frames width"],
        levels: Float[Tensor, "batch frames bins"],
        query: Float[Tensor, "batch 1 query_hidden"],
    ) -> Float[Tensor, "batch frames bins"]:
        """A factor of every bin between 0 and 1, float32 whatever the autocast."""
        h = self.film(x, query)
        logits: Tensor = self.leave(F.silu(self.enter(torch.cat([h, levels.to(h.dtype)], dim=-1))))
        return logits.float().sigmoid()


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
        self.films = nn.ModuleList(FiLM(query_hidden, width) for _ in range(layers))
        self.mask = Mask(bins, width, mask_hidden, query_hidden)

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
        for film, layer in zip(self.films, self.layers, strict=True):
            h = h + layer(film(h, steer))
        mask: Tensor = self.mask(h, levels, steer)
        return mask
