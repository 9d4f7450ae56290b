"""Performer separator: a FAVOR+ Transformer over STFT frames that shares the mixture out between N soft masks.

    mixture -> STFT -> log magnitude, normalised -> Linear -+-> encoder -> Linear -> N masks -> times the STFT -> iSTFT
            -> Conv1d, GELU, LayerNorm ---------------------+

Unconditional: every source at once, in no order. Softmax masks sum to one in every bin, and the inverse STFT is linear:
the estimates sum to the mixture without a projection. They also cannot go negative, which closes a way to a perfect
mixture-invariant loss without separation that sigmoid masks with the projection have found in practice.

`Pretrainer` teaches front end and encoder to fill in hidden frames first, as a masked autoencoder.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from pipeline.nn.favor import PerformerEncoder
from pipeline.nn.features import istft, magnitude, pad_to, stft
from pipeline.nn.linear import Linear
from pipeline.nn.losses import mixture_consistency
from pipeline.separators import BlindSeparator

LOG_GAIN = 100.0  # of the magnitude inside log1p, for waveforms in [-1, 1]
MIN_STD = 1e-2  # of a bin's log magnitude: bins that a codec emptied are not blown up
HEAD_PREFIX = "head."

Norm = Literal["zscore", "minmax", "none"]


class Separator(BlindSeparator):
    """N masks from a Transformer whose tokens are `patch_frames` successive frames each.

    front_end   stft: tokens are a Linear of log1p(100 |X|), normalised. conv: of a learned filter bank with the STFT's
                window and hop, so of as many frames; the masks are the STFT's all the same
    norm        zscore: the log magnitude is (value - mean) / std, per bin. minmax: the same with the least value of the
                training data for `mean` and the range for `std`, one for all bins. none: as it is. `set_statistics`
                says the values, which are saved with the weights; until then they are 0 and 1
    mask_activation   softmax: over the sources. sigmoid: each mask on its own
    consistency       what the estimates lack of the mixture is given to them, by equal shares or by their power (see
                      mixture_consistency)

    The rest is PerformerEncoder's. All masks start near 1 / n_sources. Only the Linear layers, and exact attention,
    follow an autocast: STFT, features, masks and all sums are float32.
    """

    own_after_pretraining = frozenset({"n_sources", "mask_activation", "consistency", "dropout", "recompute"})
    """What may differ from the network that was pretrained: the head's, and what changes no output."""

    def __init__(
        self,
        *,
        sample_rate: int,
        n_sources: int,
        front_end: Literal["stft", "conv"],
        norm: Norm,
        n_fft: int,
        hop_length: int,
        patch_frames: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        attention: Literal["favor", "sdpa"],
        n_features: int,
        stabiliser: Literal["paper", "full"],
        eps: float,
        qk_norm: bool,
        recompute: bool,
        mask_activation: Literal["softmax", "sigmoid"],
        consistency: Literal["none", "uniform", "magsq"],
    ) -> None:
        super().__init__()
        if n_fft % 2:
            raise ValueError(f"n_fft {n_fft} is odd: frames would not be centred")
        # With longer hops the last samples of a mixture hang by the tip of one window, and are divided by it.
        if not 0 < hop_length <= 3 * n_fft // 8:
            raise ValueError(f"hop_length {hop_length} is not between 1 and 3/8 of n_fft {n_fft}")
        self.sample_rate = sample_rate
        self.n_sources = n_sources
        self.front_end = front_end
        self.norm = norm
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.patch_frames = patch_frames
        self.mask_activation = mask_activation
        self.consistency = consistency
        self.n_bins = n_fft // 2 + 1
        self.register_buffer("mean", torch.zeros(self.n_bins))
        self.register_buffer("std", torch.ones(self.n_bins))
        self.mean: Tensor
        self.std: Tensor

        self.conv: nn.Conv1d | None = None
        self.embed: nn.Module = Linear(patch_frames * self.n_bins, dim)
        if front_end == "conv":
            self.conv = nn.Conv1d(1, dim, n_fft, hop_length, padding=n_fft // 2)
            self.conv_norm = nn.LayerNorm(dim)
            self.embed = nn.Identity() if patch_frames == 1 else Linear(patch_frames * dim, dim)
        self.sizes: dict[str, Any] = {
            "dim": dim,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "attention": attention,
            "n_features": n_features,
            "stabiliser": stabiliser,
            "eps": eps,
            "qk_norm": qk_norm,
            "recompute": recompute,
        }
        self.encoder = PerformerEncoder(depth=depth, **self.sizes)
        self.head = Linear(dim, n_sources * self.n_bins * patch_frames)
        # Logits of 0.1 where a normed token is of length sqrt(dim). With equal masks they would have equal gradients,
        # and stay equal for ever.
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(dim))
        nn.init.zeros_(self.head.bias)
        if mask_activation == "sigmoid" and n_sources > 1:
            nn.init.constant_(self.head.bias, -math.log(n_sources - 1))

    def separate(
        self, mixture: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch sources time"], Float[Tensor, "batch sources bins frames"]]:
        """(estimates, masks). The masks are the network's, before what `consistency` does to the estimates."""
        batch, length = mixture.shape
        # Reflection at the ends needs more samples than half a window; shorter mixtures get silence behind them.
        padded = pad_to(mixture, self.n_fft // 2 + 1)
        spectrum = self._stft(padded)
        logits = self.head(self.encoder(self._with_front(padded, spectrum)))
        with torch.autocast(mixture.device.type, enabled=False):
            logits = logits.float().view(batch, -1, self.n_sources, self.n_bins)[:, : spectrum.shape[1]]
            # (batch, frames, sources, bins): the head writes each frame's masks side by side.
            masks = logits.softmax(dim=2) if self.mask_activation == "softmax" else logits.sigmoid()
            masks = masks.transpose(1, 2)
            masked = (masks * spectrum[:, None]).flatten(0, 1)
            estimates = istft(masked, n_fft=self.n_fft, hop_length=self.hop_length, length=padded.shape[-1])
            estimates = estimates.view(batch, self.n_sources, -1)[..., :length]
            if self.consistency != "none":
                estimates = mixture_consistency(estimates, mixture.float(), self.consistency)
        return estimates, masks.transpose(2, 3)

    def tokens(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch tokens dim"]:
        """Make the encoder's input, without positions: ceil(frames / patch_frames) tokens."""
        padded = pad_to(waveform, self.n_fft // 2 + 1)
        return self._with_front(padded, self._stft(padded))

    def log_magnitude(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames bins"]:
        """log1p(100 |X|), before any norm; of time // hop_length + 1 frames."""
        return _log_magnitude(self._stft(pad_to(waveform, self.n_fft // 2 + 1)))

    def normalised(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames bins"]:
        """The log magnitude, brought to scale as `norm` says."""
        return self._normed(self.log_magnitude(waveform))

    @torch.no_grad()
    def set_statistics(self, mean: Float[Tensor, " bins"], std: Float[Tensor, " bins"]) -> None:
        """Set mean and scale of the log magnitude (`statistics`). Deviations below 0.01 are taken for that."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=MIN_STD))

    def learn_statistics(self, waveforms: Iterable[Float[Tensor, "batch time"]]) -> None:
        """Set them from waveforms of the training data."""
        self.set_statistics(*statistics(self, waveforms))

    def redraw(self, step: int, seed: int) -> None:
        """New random features (see PerformerEncoder); nothing happens to a separator with exact attention."""
        self.encoder.redraw(step, seed)

    def pretrained_names(self) -> list[str]:
        """The names of what pretraining hands over: all tensors but the mask head's."""
        return [name for name in self.state_dict() if not name.startswith(HEAD_PREFIX)]

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Front end and encoder as `Pretrainer.encoder_state` gave them; the head stays as it is.

        ValueError where a tensor is missing, is of another shape, or is none of this separator's.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(HEAD_PREFIX)}
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"not this separator's front end and encoder: without {missing}, with {unknown}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} has the shape {list(state[name].shape)}, and not {list(tensor.shape)}")
        self.load_state_dict(self.state_dict() | dict(state))

    def _stft(self, padded: Tensor) -> Complex[Tensor, "batch frames bins"]:
        return stft(padded, n_fft=self.n_fft, hop_length=self.hop_length)

    def _normed(self, log_magnitude: Float[Tensor, "batch frames bins"]) -> Float[Tensor, "batch frames bins"]:
        return log_magnitude if self.norm == "none" else (log_magnitude - self.mean) / self.std

    def _with_front(
        self, padded: Float[Tensor, "batch time"], spectrum: Complex[Tensor, "batch frames bins"]
    ) -> Float[Tensor, "batch tokens dim"]:
        with torch.autocast(padded.device.type, enabled=False):
            if self.conv is None:
                frames = self._normed(_log_magnitude(spectrum))
            else:
                frames = self.conv_norm(F.gelu(self.conv(padded.float()[:, None])).transpose(1, 2))
            frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.patch_frames))
        return self.embed(frames.reshape(frames.shape[0], -1, self.patch_frames * frames.shape[2]))


def _log_magnitude(spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch frames bins"]:
    return torch.log1p(LOG_GAIN * magnitude(spectrum))


@torch.no_grad()
def statistics(
    separator: Separator, waveforms: Iterable[Float[Tensor, "batch time"]]
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
    """Compute the arguments of `set_statistics` for `norm`, in float64; ValueError without a waveform."""
    count = 0
    total = square = low = high = torch.zeros((), dtype=torch.float64)
    for waveform in waveforms:
        found = separator.log_magnitude(waveform).double().flatten(0, 1).cpu()
        low = found.min() if count == 0 else torch.minimum(low, found.min())
        high = found.max() if count == 0 else torch.maximum(high, found.max())
        total, square = total + found.sum(dim=0), square + found.square().sum(dim=0)
        count += len(found)
    if count == 0:
        raise ValueError("there are no waveforms to take statistics of")
    ones = torch.ones(separator.n_bins, dtype=torch.float64)
    if separator.norm == "zscore":
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp(min=0).sqrt().float()
    if separator.norm == "minmax":
        return (low * ones).float(), ((high - low) * ones).float()
    return torch.zeros(separator.n_bins), ones.float()


class Pretrainer(nn.Module):
    """Masked autoencoding of a separator's tokens: hide some, predict what they stood for, mean square error.

    mask_mode   what becomes of a hidden token. token: a learned one takes its place. zero, noise: zeros, or Gaussian
                noise as strong as the tokens. drop: it is left out (He et al. 2022); a learned token takes its place
                behind the encoder, where one more block lets it look at the others
    mask_ratio  share of tokens hidden, rounded to whole ones, the same for all items
    mask_span   frames hidden together. Frames share most of their samples with their neighbours: a single one could be
                interpolated
    target      logmag: the frames as `Separator.normalised` gives them. wave: the n_fft samples under each window.
                Fixed data and no embedding, which could satisfy itself by being zero
    loss_on     masked tokens only, or all

    The decoder is one Linear (Xie et al. 2022, arXiv:2111.09886).
    """

    def __init__(
        self,
        separator: Separator,
        *,
        mask_mode: Literal["token", "zero", "noise", "drop"] = "token",
        mask_ratio: float = 0.3,
        mask_span: int = 8,
        target: Literal["logmag", "wave"] = "logmag",
        loss_on: Literal["masked", "all"] = "masked",
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is not between 0 and 1")
        if mask_span < 1:
            raise ValueError(f"mask_span {mask_span} is not at least 1 frame")
        self.separator = separator
        self.mask_mode = mask_mode
        self.mask_ratio = mask_ratio
        self.span_tokens = -(-mask_span // separator.patch_frames)
        self.target = target
        self.loss_on = loss_on
        dim = separator.encoder.dim
        if mask_mode in ("token", "drop"):
            self.mask_token = nn.Parameter(torch.zeros(dim))
            nn.init.normal_(self.mask_token, std=0.02)
        if mask_mode == "drop":
            self.second_encoder = PerformerEncoder(depth=1, **separator.sizes)
        size = separator.n_bins if target == "logmag" else separator.n_fft
        self.decoder = Linear(dim, separator.patch_frames * size)

    def redraw(self, step: int, seed: int) -> None:
        """New random features, of whatever here has some."""
        self.separator.redraw(step, seed)
        if hasattr(self, "second_encoder"):
            self.second_encoder.redraw(step, seed)

    def forward(self, waveform: Float[Tensor, "batch time"], generator: torch.Generator) -> Float[Tensor, ""]:
        """The loss, for tokens hidden as `generator` draws them. ValueError for waveforms of a single token."""
        tokens = self.separator.tokens(waveform)
        hidden = self.draw(tokens.shape[0], tokens.shape[1], generator).to(tokens.device)
        prediction = self.decoder(self._encode(tokens, hidden, generator))
        with torch.autocast(waveform.device.type, enabled=False):
            target = self.targets(waveform)
            batch, frames, size = target.shape
            # The last token's patch may reach beyond the last frame: nothing is asked about that.
            error = (prediction.float().reshape(batch, -1, size)[:, :frames] - target).square().mean(dim=-1)
            if self.loss_on == "all":
                return error.mean()
            asked = hidden.repeat_interleave(self.separator.patch_frames, dim=1)[:, :frames]
            return (error * asked).sum() / asked.sum()

    def draw(self, batch: int, tokens: int, generator: torch.Generator) -> Bool[Tensor, "{batch} {tokens}"]:
        """Which tokens to hide: whole spans, from a grid that begins anywhere, and the start of one more.

        On the generator's device.
        """
        if tokens < 2:
            raise ValueError(f"{tokens} token: there is nothing to predict a hidden one from")
        n_hidden = min(max(round(self.mask_ratio * tokens), 1), tokens - 1)
        span, device = self.span_tokens, generator.device
        offset = torch.randint(span, (batch, 1), generator=generator, device=device)
        rank = torch.rand(batch, (tokens - 1) // span + 2, generator=generator, device=device)
        span_of = (torch.arange(tokens, device=device) + offset) // span
        # Stable, so that the spans stay whole and the one that is cut keeps its beginning.
        order = rank.gather(1, span_of).argsort(dim=1, stable=True)
        return torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, order[:, :n_hidden], True)

    @torch.no_grad()
    def targets(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames values"]:
        """Make the prediction targets of every frame."""
        if self.target == "logmag":
            return self.separator.normalised(waveform)
        n_fft = self.separator.n_fft
        padded = pad_to(waveform.float(), n_fft // 2 + 1)
        reflected = F.pad(padded[:, None], (n_fft // 2, n_fft // 2), mode="reflect")[:, 0]
        return reflected.unfold(1, n_fft, self.separator.hop_length)

    def encoder_state(self) -> dict[str, Tensor]:
        """Front end and encoder, for `Separator.load_pretrained`."""
        state = self.separator.state_dict()
        return {name: state[name] for name in self.separator.pretrained_names()}

    def _encode(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        hidden: Bool[Tensor, "batch tokens"],
        generator: torch.Generator,
    ) -> Float[Tensor, "batch tokens dim"]:
        encoder = self.separator.encoder
        if self.mask_mode == "drop":
            return self._encode_visible(tokens, hidden)
        if self.mask_mode == "token":
            instead = self.mask_token.to(tokens.dtype)
        elif self.mask_mode == "zero":
            instead = torch.zeros_like(tokens)
        else:
            noise = torch.randn(tokens.shape, generator=generator, device=generator.device)
            instead = noise.to(tokens) * tokens.detach()[~hidden].std()
        return encoder(torch.where(hidden[..., None], instead, tokens))

    def _encode_visible(
        self, tokens: Float[Tensor, "batch tokens dim"], hidden: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        batch, n_tokens, dim = tokens.shape
        position = self._visible(hidden)
        index = position[..., None].expand(-1, -1, dim)
        latent = self.separator.encoder(tokens.gather(1, index), position=position)
        everywhere = self.mask_token.float().expand(batch, n_tokens, dim).scatter(1, index, latent.float())
        return self.second_encoder(everywhere)

    def _visible(self, hidden: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch visible"]:
        """The positions of the tokens that are left, in order: as many in every item."""
        return (~hidden).nonzero()[:, 1].view(hidden.shape[0], -1)
