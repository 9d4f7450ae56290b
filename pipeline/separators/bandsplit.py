"""A band-split separator: complex masks from few tokens per frame, made for dB per second of training on a CPU.

    mixture / its RMS -> STFT -> bands, narrow below and wide above -> one token of `width` numbers per frame and band
        layers of   3x3 convolutions over frames and bands          what is near in time and frequency
                    a perceptron over the whole frame               harmonics, the shape of the spectrum
                    a bidirectional LSTM over time, in each band    what comes before and after
    -> per band, with its own bins beside its token -> complex mask of its bins

Each part is residual, behind a layer norm and FiLM by the query with gain and shift of their own per band (Perez et
al. 2018). Band-split networks are Luo and Yu's (arXiv:2209.15174), who have recurrent networks in both directions; the
frame's perceptron is that of TFC-TDF (Choi et al., arXiv:1912.02591). On a CPU convolutions and products take half to
two thirds of the time of a recurrence with as many multiplications.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from pipeline.separators._levelled import N_FEATURES, Levelled

BAND_GROUPS = (1, 2, 5, 8)  # widths of the four quarters of the bands, in units; the half without Nyquist is their sum


class FiLM(nn.Module):
    """A layer norm whose gain and shift, for every band and channel, come from the query."""

    def __init__(self, query_hidden: int, bands: int, width: int) -> None:
        super().__init__()
        self.bands = bands
        self.gain = nn.Parameter(torch.ones(width))
        self.change = nn.Linear(query_hidden, bands * 2 * width)
        nn.init.normal_(self.change.weight, std=0.3 * query_hidden**-0.5)
        nn.init.zeros_(self.change.bias)

    def forward(
        self, x: Float[Tensor, "batch frames bands width"], query: Float[Tensor, "batch moments query_hidden"]
    ) -> Float[Tensor, "batch frames bands width"]:
        """Normalise each token, then scale and shift it as the query says, of each frame or one of all of them."""
        gain, shift = self.change(query).unflatten(2, (self.bands, -1)).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), self.gain + gain)


class Convolutions(nn.Module):
    """Two 3x3 convolutions over frames and bands, which see what is near in time and frequency."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.leave.weight.mul_(0.3)
        for conv in (self.enter, self.leave):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Float[Tensor, "batch frames bands width"]) -> Float[Tensor, "batch frames bands width"]:
        """Change each token by its neighbours; the memory's layout is channels-last already."""
        return self.leave(F.silu(self.enter(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class Frame(nn.Module):
    """A perceptron with one hidden layer, from all bands of a frame to all bands of it."""

    def __init__(self, bands: int, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(bands * width, hidden)
        self.leave = nn.Linear(hidden, bands * width)
        nn.init.normal_(self.leave.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch frames bands width"]) -> Float[Tensor, "batch frames bands width"]:
        """Change each token by its whole frame."""
        return self.leave(F.silu(self.enter(x.flatten(2)))).view(x.shape)


class Recurrence(nn.Module):
    """A bidirectional LSTM over time, the same for every band; on a CPU in float32, for few have one in bfloat16."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(2 * hidden, width)
        nn.init.normal_(self.leave.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch frames bands width"]) -> Float[Tensor, "batch frames bands width"]:
        """Change each token by what its band has before and after."""
        by_band = x.transpose(1, 2).to(self.leave.weight.dtype)
        with torch.autocast("cpu", enabled=False):
            found = self.lstm(by_band.flatten(0, 1))[0]
        h = self.leave(found)
        return h.unflatten(0, by_band.shape[:2]).transpose(1, 2)


class Separator(Levelled):
    """The network above, with `layers` times the three parts between its bands and its masks.

    n_fft must be a multiple of 8 x `bands`, and these of 4: a quarter of the bands each has 1, 2, 5 and 8 units of
    bins. A `recurrent_hidden` of 0 leaves the LSTMs out.
    """

    def __init__(
        self,
        *,
        query_dim: int,
        interferer_query: bool = False,
        n_fft: int,
        hop_length: int,
        bands: int,
        width: int,
        layers: int,
        frame_hidden: int,
        recurrent_hidden: int,
        mask_hidden: int,
        query_hidden: int,
    ) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query, n_fft=n_fft, hop_length=hop_length)
        if bands <= 0 or bands % len(BAND_GROUPS):
            raise ValueError(f"bands {bands} is not a positive multiple of {len(BAND_GROUPS)}")
        if n_fft % (8 * bands):
            raise ValueError(f"n_fft {n_fft} is not a multiple of 8 x {bands} bands")
        self.bands, self.width = bands, width
        self.group = bands // len(BAND_GROUPS)  # bands of as many bins each
        unit = n_fft // 2 // self.group // sum(BAND_GROUPS)
        self.widths = [unit * units for units in BAND_GROUPS]
        self.split = nn.ParameterList(_normal(self.group, N_FEATURES * bins, width) for bins in self.widths)
        self.split_bias = nn.Parameter(torch.zeros(bands, width))
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [Convolutions(width), Frame(bands, width, frame_hidden)]
            if recurrent_hidden:
                parts.append(Recurrence(width, recurrent_hidden))
        self.parts = nn.ModuleList(parts)
        self.query = nn.Linear(self.joint_dim, query_hidden)
        self.films = nn.ModuleList(FiLM(query_hidden, bands, width) for _ in range(len(parts) + 1))
        self.mask1 = nn.ParameterList(
            _normal(self.group, width + N_FEATURES * bins, mask_hidden) for bins in self.widths
        )
        self.mask1_bias = nn.Parameter(torch.zeros(bands, 1, mask_hidden))
        self.mask2 = nn.ParameterList(_normal(self.group, mask_hidden, 2 * bins, gain=0.1) for bins in self.widths)
        # Half of the mixture, to begin with.
        halves = ([0.5] * bins + [0.0] * bins for bins in self.widths)
        self.mask2_bias = nn.ParameterList(torch.tensor(half).repeat(self.group, 1, 1) for half in halves)

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice = slice(None),
    ) -> Float[Tensor, "batch part"]:
        """Separate the part of each mixture from what is in that part alone."""
        return self.masked(mixture[:, part], query)

    def masked(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch *windows joint_dim"],
        enter: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        steer: Callable[[Tensor, int], Tensor] = lambda hidden, frames: hidden,
    ) -> Float[Tensor, "batch time"]:
        """The mixture through its mask. A separator that knows more of it starts here.

        `enter` may change the tokens (batch, frames, bands, width) that go into the layers; `steer(hidden, frames)`
        what every gain and shift is made from, (batch, windows, query_hidden) into (batch, 1 or frames, query_hidden).
        """
        return self.through(mixture, query, lambda planes: self.mask(planes, query, enter, steer))

    def mask(
        self,
        planes: Float[Tensor, "batch frames bins 3"],
        query: Float[Tensor, "batch *windows joint_dim"],
        enter: Callable[[Tensor], Tensor],
        steer: Callable[[Tensor, int], Tensor],
    ) -> Complex[Tensor, "batch frames bins"]:
        """A complex factor of every bin, any number: it may amplify. Float32 whatever the autocast."""
        real, imaginary = self.mask_parts(planes, query, enter, steer)
        return torch.complex(real, imaginary)

    def mask_parts(
        self,
        planes: Float[Tensor, "batch frames bins 3"],
        query: Float[Tensor, "batch *windows joint_dim"],
        enter: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        steer: Callable[[Tensor, int], Tensor] = lambda hidden, frames: hidden,
    ) -> Float[Tensor, "2 batch frames bins"]:
        """Real and imaginary part of the mask, for a program that knows no complex numbers."""
        batch, frames = planes.shape[:2]
        # Products of a whole group of bands of one width: (bands, batch x frames, numbers).
        groups = [
            group.reshape(batch * frames, self.group, -1).transpose(0, 1)
            for group in torch.split(planes, [self.group * bins for bins in self.widths], dim=2)
        ]
        tokens = torch.cat([torch.bmm(group, weight) for group, weight in zip(groups, self.split, strict=True)])
        h = enter(tokens.view(self.bands, batch, frames, -1).permute(1, 2, 0, 3) + self.split_bias)
        query = steer(F.silu(self.query(self.normed(query))), frames)
        for film, part in zip(self.films, self.parts, strict=False):
            h = h + part(film(h, query))
        h = self.films[-1](h, query).flatten(0, 1).transpose(0, 1)
        masks = []
        layers = zip(groups, self.mask1, self.mask1_bias.chunk(len(groups)), self.mask2, self.mask2_bias, strict=True)
        for (group, weight1, bias1, weight2, bias2), token in zip(layers, torch.split(h, self.group), strict=True):
            hidden = F.silu(torch.baddbmm(bias1, torch.cat([token, group.to(token.dtype)], dim=-1), weight1))
            logits = torch.baddbmm(bias2, hidden, weight2)
            masks.append(logits.view(self.group, batch, frames, 2, -1).permute(3, 1, 2, 0, 4).flatten(3))
        return torch.cat(masks, dim=-1).float()


def _normal(groups: int, inputs: int, outputs: int, gain: float = 1.0) -> nn.Parameter:
    """Weights of as many linear layers, which keep the variance but for the gain."""
    return nn.Parameter(torch.randn(groups, inputs, outputs) * (gain * inputs**-0.5))
