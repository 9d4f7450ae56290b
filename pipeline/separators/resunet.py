"""ResUNet30: a U-Net that masks the mixture's STFT, steered by a query embedding (Kong et al., arXiv:2305.07447).

The arithmetic is that of the published implementation (bytedance/uss), so that its checkpoints load (`from_uss`) and
give its outputs. Where paper and code differ, the code is followed: FiLM only shifts, the FFT size is a parameter
(2048 in the published checkpoints, 1024 in the later paper).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from pipeline.core.weights import read_tensors
from pipeline.nn.features import istft, magnitude, pad_to, stft
from pipeline.separators import QuerySeparator

NEGATIVE_SLOPE = 0.01
# Of each encoder, and in reverse of each decoder: (frames, bins). The deepest one keeps the frames.
STRIDES = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (1, 2))
FRAMES_MULTIPLE = 32
BINS_MULTIPLE = 64

Bottleneck = Literal["conv", "dprnn"]


class FiLMNorm(nn.Module):
    """Batch norm, a shift by the query, leaky ReLU: the pre-activation of every convolution.

    FiLM (Perez et al. 2018, eq. 2) is gamma * x + beta. Here gamma is 1, as in Kong et al.'s code: the batch norm
    before it already has a gain.
    """

    def __init__(self, channels: int, query_dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, momentum=norm_momentum)
        self.beta = nn.Linear(query_dim, channels)

    def forward(
        self, x: Float[Tensor, "batch channels frames bins"], query: Float[Tensor, "batch *windows query_dim"]
    ) -> Float[Tensor, "batch channels frames bins"]:
        """Normalise, shift and rectify, keeping the shape. With a query per window, each has as many of the frames."""
        # The norm's result is needed by nobody else (its backward uses its input), so both steps overwrite it.
        h = self.norm(x)
        beta = self.beta(query)
        if query.ndim == 3:
            beta = beta.repeat_interleave(h.shape[2] // query.shape[1], dim=1).transpose(1, 2)[..., None]
        else:
            beta = beta[:, :, None, None]
        h = h.add_(beta.to(h.dtype))
        return F.leaky_relu(h, NEGATIVE_SLOPE, inplace=True)


class ResBlock(nn.Module):
    """Two pre-activation 3x3 convolutions beside a shortcut, which is 1x1 where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, query_dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.pre1 = FiLMNorm(in_channels, query_dim, norm_momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pre2 = FiLMNorm(out_channels, query_dim, norm_momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "batch in_channels frames bins"], query: Float[Tensor, "batch *windows query_dim"]
    ) -> Float[Tensor, "batch out_channels frames bins"]:
        """Keep frames and bins, change the channels."""
        h = self.conv1(self.pre1(x, query))
        h = self.conv2(self.pre2(h, query))
        return h + self.shortcut(x)


class DecoderBlock(nn.Module):
    """Upsample by a transposed convolution that does not overlap, join the encoder's features, refine."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], query_dim: int, norm_momentum: float
    ) -> None:
        super().__init__()
        self.pre = FiLMNorm(in_channels, query_dim, norm_momentum)
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, stride, stride=stride, bias=False)
        self.block = ResBlock(2 * out_channels, out_channels, query_dim, norm_momentum)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels frames bins"],
        skip: Float[Tensor, "batch out_channels up_frames up_bins"],
        query: Float[Tensor, "batch *windows query_dim"],
    ) -> Float[Tensor, "batch out_channels up_frames up_bins"]:
        """Undo the pooling of the encoder that `skip` comes from."""
        h = self.upsample(self.pre(x, query))
        return self.block(torch.cat([h, skip], dim=1), query)


class DualPath(nn.Module):
    """A dual-path recurrent bottleneck (Luo et al., arXiv:1910.06379): a GRU over the bins, then one over the frames.

    Both run in both directions, behind the pre-activation of the convolutions, and are residual. At the bottom of the
    U-Net a frame is 32 of the STFT's and hears of all others: an estimate depends on the whole recording.
    """

    def __init__(self, channels: int, query_dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.pres = nn.ModuleList(FiLMNorm(channels, query_dim, norm_momentum) for _ in range(2))
        self.grus = nn.ModuleList(nn.GRU(channels, channels, batch_first=True, bidirectional=True) for _ in range(2))
        self.leaves = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch channels frames bins"], query: Float[Tensor, "batch *windows query_dim"]
    ) -> Float[Tensor, "batch channels frames bins"]:
        """Change each bottom frame and bin by all others; the shape stays."""
        # Sequences of (batch, frames, bins, channels) over its third axis, then over its second.
        for pre, gru, leave, order in zip(self.pres, self.grus, self.leaves, ((0, 2, 3, 1), (0, 3, 2, 1)), strict=True):
            sequences = pre(x, query).permute(order)
            h = leave(gru(sequences.flatten(0, 1))[0]).unflatten(0, sequences.shape[:2])
            x = x + h.permute([order.index(axis) for axis in range(4)])
        return x


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as a matrix product, channels innermost in its result.

    On a CPU that takes a fifth of the time where there is one channel to read, and what follows is spared a copy.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "batch in_channels frames bins"]
    ) -> Float[Tensor, "batch out_channels frames bins"]:
        """Keep frames and bins, change the channels."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Six encoders, a bottleneck and six decoders on a time-frequency plane of any number of input channels.

    Frames must be a multiple of 32 and bins of 64. What the columns and channels mean is the caller's business:
    another feature extractor's output can join the spectrogram as more bins or as another channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        query_dim: int,
        norm_momentum: float,
        bottleneck: Bottleneck = "conv",
    ) -> None:
        super().__init__()
        self.enter = Pointwise(in_channels, channels[0])
        # Deep to shallow, a decoder gives back the width of the encoder that it joins, one level up.
        widths = [channels[0], *channels]
        self.encoders = nn.ModuleList(
            ResBlock(widths[i], widths[i + 1], query_dim, norm_momentum) for i in range(len(STRIDES))
        )
        self.bottleneck: nn.Module = (
            ResBlock(channels[-1], channels[-1], query_dim, norm_momentum)
            if bottleneck == "conv"
            else DualPath(channels[-1], query_dim, norm_momentum)
        )
        decoder_widths = [channels[-1], *reversed(channels)]
        self.decoders = nn.ModuleList(
            DecoderBlock(decoder_widths[i], decoder_widths[i + 1], stride, query_dim, norm_momentum)
            for i, stride in enumerate(reversed(STRIDES))
        )
        self.leave = nn.Conv2d(channels[0], out_channels, 1)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels frames bins"],
        query: Float[Tensor, "batch *windows query_dim"],
        join: Callable[[int, Tensor], Tensor] = lambda level, h: h,
    ) -> Float[Tensor, "batch out_channels frames bins"]:
        """Float32 whatever the autocast: the last, cheap convolution is left out of it.

        `join(level, h)` may add to what goes into the next encoder after `level` of them, or at 6 into the bottleneck:
        (batch, channels[level - 1], frames / 2^min(level, 5), bins / 2^level).
        """
        h = self.enter(x)
        skips = []
        for level, (encoder, stride) in enumerate(zip(self.encoders, STRIDES, strict=True), start=1):
            skips.append(encoder(h, query))
            h = join(level, F.avg_pool2d(skips[-1], stride))
        h = self.bottleneck(h, query)
        for decoder in self.decoders:
            h = decoder(h, skips.pop(), query)
        with torch.autocast(h.device.type, enabled=False):
            return self.leave(h.float())


class Separator(QuerySeparator):
    """ResUNet30 with widths `channels` (one per encoder, six).

    The mask's phase is that of a complex number near zero when training starts: anything. With a `phase_bias` of 1 that
    number starts near one, and the estimate as half of the mixture; 0 is how the published network starts. The
    `bottleneck` is the published convolutions (conv) or `DualPath` (dprnn).

    n_fft must be a multiple of 128: the half without its last bin is halved six times on the way down. The STFT, the
    mask and its inverse are float32 also under autocast; only the U-Net follows it.
    """

    def __init__(
        self,
        *,
        query_dim: int,
        interferer_query: bool = False,
        n_fft: int,
        hop_length: int,
        channels: Sequence[int],
        norm_momentum: float = 0.01,
        phase_bias: float = 0.0,
        bottleneck: Bottleneck = "conv",
    ) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query)
        if len(channels) != len(STRIDES):
            raise ValueError(f"channels has {len(channels)} widths {list(channels)}; there are {len(STRIDES)} encoders")
        if not 0 < norm_momentum <= 1:
            raise ValueError(f"norm_momentum {norm_momentum} is not above 0 and at most 1")
        if n_fft % (2 * BINS_MULTIPLE):
            raise ValueError(f"n_fft {n_fft} is not a multiple of {2 * BINS_MULTIPLE}")
        # With longer hops the last samples of a mixture hang by the tip of one window, and are divided by it.
        if not 0 < hop_length <= 3 * n_fft // 8:
            raise ValueError(f"hop_length {hop_length} is not between 1 and 3/8 of n_fft {n_fft}")
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.norm = nn.BatchNorm1d(n_fft // 2 + 1, momentum=norm_momentum)
        self.unet = UNet(1, 3, channels, self.joint_dim, norm_momentum, bottleneck)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # Channels innermost, here and so in all that follows: 0.7 of the time of a training step on a CPU.
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        assert self.unet.leave.bias is not None
        nn.init.constant_(self.unet.leave.bias[1], phase_bias)

    @property
    def grid_samples(self) -> int:
        """32 frames: the U-Net halves them five times."""
        return FRAMES_MULTIPLE * self.hop_length

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice = slice(None),
    ) -> Float[Tensor, "batch part"]:
        """Separate `part` of each mixture from its samples alone."""
        return self.masked(mixture[:, part], lambda spectrum: self.unet(self.plane(spectrum), query))

    def masked(
        self, mixture: Float[Tensor, "batch time"], logits: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch time"]:
        """The mixture through the mask of `logits(spectrum)`, (batch, 3, padded_frames, masked_bins).

        A separator that knows more of the mixture than its STFT starts here.
        """
        length = mixture.shape[-1]
        # Reflection at the ends needs more samples than half a window; shorter mixtures get silence behind them.
        padded = pad_to(mixture, self.n_fft // 2 + 1)
        spectrum = stft(padded, n_fft=self.n_fft, hop_length=self.hop_length)
        mask = self.mask(logits(spectrum), frames=spectrum.shape[1])
        # Nyquist has no mask: it was dropped on the way in, and is silent in the published network too.
        bins = mask.shape[-1]
        estimate = F.pad(spectrum[..., :bins] * mask, (0, spectrum.shape[-1] - bins))
        return istft(estimate, n_fft=self.n_fft, hop_length=self.hop_length, length=padded.shape[-1])[:, :length]

    def plane(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch 1 padded_frames even_bins"]:
        """Make the U-Net's input: magnitudes normalised per bin, without Nyquist, and then silence up to 32 frames."""
        return self.normed(spectrum)[..., :-1].contiguous()

    def normed(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch 1 padded_frames bins"]:
        """Magnitudes normalised per bin, with silence behind them up to a multiple of 32 frames.

        The order matters: frames added before the norm would be shifted away from zero by it.
        """
        with torch.autocast(spectrum.device.type, enabled=False):
            h = self.norm(magnitude(spectrum).transpose(1, 2)).transpose(1, 2)
        return F.pad(h[:, None], (0, 0, 0, -h.shape[1] % FRAMES_MULTIPLE))

    def mask(
        self, logits: Float[Tensor, "batch 3 padded_frames even_bins"], *, frames: int
    ) -> Complex[Tensor, "batch {frames} even_bins"]:
        """sigmoid(magnitude) * e^(j phase), the phase being that of tanh(real) + j tanh(imaginary).

        uss multiplies the mixture's magnitude, cosine and sine by this one by one; the magnitude it divides and
        multiplies by cancels, and its clamps with it.
        """
        gain = logits[:, 0, :frames].sigmoid()
        real, imaginary = logits[:, 1, :frames].tanh(), logits[:, 2, :frames].tanh()
        # Clamped inside the root, so that a gradient through the zero phasor is not 0 / 0.
        gain = gain * (real.square() + imaginary.square()).clamp(min=1e-20).rsqrt()
        return torch.complex(gain * real, gain * imaginary)


def published_name(name: str) -> str:
    """The name that uss gives to a tensor of our Separator's state dict."""
    if name.startswith("norm."):
        return name.replace("norm", "base.bn0")
    name = name.removeprefix("unet.")
    for ours, theirs in (("enter.", "base.pre_conv."), ("leave.", "base.after_conv.")):
        if name.startswith(ours):
            return name.replace(ours, theirs)
    where, index, *rest = name.split(".")
    if where == "bottleneck":
        block, rest = ["conv_block7a", "conv_block1"], [index, *rest]
    elif where == "encoders":
        block = [f"encoder_block{int(index) + 1}", "conv_block1"]
    elif rest[0] == "block":
        block, rest = [f"decoder_block{int(index) + 1}", "conv_block2"], rest[1:]
    else:
        block = [f"decoder_block{int(index) + 1}"]
    layer, *rest = rest
    if layer.startswith("pre"):
        number = layer.removeprefix("pre") or "1"
        if rest[0] == "beta":
            return ".".join(["film", "->".join([*block, f"beta{number}"]), *rest[1:]])
        return ".".join(["base", *block, f"bn{number}", *rest[1:]])
    return ".".join(["base", *block, "conv1" if layer == "upsample" else layer, *rest])


def dropped_shapes(*, query_dim: int, n_fft: int, channels: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a published checkpoint that do nothing here.

    The transform and its inverse, which uss keeps as frozen convolutions, and in each decoder a second batch norm that
    forward never calls together with the shift that FiLM computes for it.
    """
    shapes: dict[str, tuple[int, ...]] = {"base.istft.ola_window": (n_fft,)}
    for part in ("real", "imag"):
        shapes[f"base.stft.conv_{part}.weight"] = (n_fft // 2 + 1, 1, n_fft)
        shapes[f"base.istft.conv_{part}.weight"] = (n_fft, n_fft, 1)
    for index, width in enumerate([channels[-1], *reversed(channels[1:])], start=1):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"base.decoder_block{index}.bn2.{tensor}"] = (width,)
        shapes[f"base.decoder_block{index}.bn2.num_batches_tracked"] = ()
        shapes[f"film.decoder_block{index}->beta2.weight"] = (width, query_dim)
        shapes[f"film.decoder_block{index}->beta2.bias"] = (width,)
    return shapes


def uss_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The query_dim, n_fft and channels of a published state dict, read off its shapes.

    Takes names with or without the `ss_model.` of the Lightning checkpoint. Raises ValueError naming a tensor that is
    missing or has too few axes.
    """
    state = {name.removeprefix("ss_model."): tensor for name, tensor in state.items()}

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise ValueError(f"not a uss checkpoint: it has no {name} to tell its sizes by")
        return state[name].shape[axis]

    return {
        "query_dim": size("film.encoder_block1->conv_block1->beta1.weight", 1),
        "n_fft": 2 * (size("base.bn0.weight", 0) - 1),
        "channels": [size(f"base.encoder_block{k}.conv_block1.conv2.weight", 0) for k in range(1, len(STRIDES) + 1)],
    }


def from_uss(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published uss state dict (names with or without `ss_model.`) under the names of our Separator.

    Every tensor must be there with its shape, and none beside them; only `dropped_shapes` are left out. Raises
    ValueError naming what is missing, unexpected or misshapen. Build the Separator that takes the result with
    `uss_arguments(state)` and any hop_length (320 in uss).
    """
    arguments = uss_arguments(state)
    state = {name.removeprefix("ss_model."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        ours = Separator(hop_length=1, **arguments).state_dict()
    dropped = dropped_shapes(**arguments)
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in ours.items()} | dropped

    problems = [f"missing {name}" for name in sorted(shapes.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - shapes.keys())]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in sorted(shapes.items())
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError("not the state dict of a uss ResUNet30: " + "; ".join(problems))
    # Row 0 of the transform's cosines is the window itself.
    window = state["base.stft.conv_real.weight"][0, 0]
    if not torch.allclose(window, torch.hann_window(arguments["n_fft"]), atol=1e-5):
        raise ValueError("not the state dict of a uss ResUNet30: its transform's window is not a periodic Hann window")
    return {name: state[published_name(name)] for name in ours}


def read_published(path: Path, *, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The separator in a Lightning checkpoint of uss, under our names, and the arguments that its shapes show.

    Errors: `weights.check` and `from_uss`.
    """
    state = read_tensors(path, sha256=sha256, entry="state_dict", prefix="ss_model.")
    return from_uss(state), uss_arguments(state)
