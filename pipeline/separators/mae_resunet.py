"""MAE-ResUNet: ResUNet30 that also sees features of an upstream encoder (Zhao et al., arXiv:2407.11745, section II).

    mixture -> STFT -> |X|, normed --------------+--> U-Net, steered by the query -> mask -> iSTFT
            -> upstream -> layers -> steps -> fusion

Where the features join (`fusion`), for 2 s, n_fft 1024, an A-MAE of width 768:

freq        (batch, 1, 224, 513) and (batch, 1, 224, 768) side by side along the frequency axis; of the 1281 columns the
            last is dropped, and of the U-Net's 1280 the first 513 are the mask's. As published; 2.5 times the U-Net
channel     one Linear to the bins: a second input channel
deep        one Linear, added to all bins where a row of the U-Net is 16 frames, before the fifth encoder
film        their mean over time, one Linear, added to the query
attention   the rows of the bottleneck (32 frames) look the steps up: cross attention over time, added to all bins
interferer  with the query they tell what else sounds: the embedding of the interferer, which training teaches them by
            an objective of its own; what they tell is added to the query, by one Linear. Not in the paper
none        they do not: the baseline

In evaluation the encoder hears the whole mixture, and the features of its frames depend on where they stand (in `freq`
with pad1024 a row's features are not even of its own time). Trained on parts of mixtures, the encoder hears the whole
all the same, and the features of the part's rows are taken (`context: anchor`); with `segment` it hears the part alone.

deep, film, attention and interferer begin with zero weights: as the baseline. Every feature vector is brought to zero
mean and unit variance first. For the same seed the U-Net begins with the baseline's weights, whatever the fusion.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.config import Params
from pipeline.separators import resunet
from pipeline.separators.resunet import FRAMES_MULTIPLE, Pointwise
from pipeline.upstreams import FRAME_RATE, SAMPLE_RATE, Repeat, align, build, combine, names

Fusion = Literal["freq", "channel", "deep", "film", "attention", "interferer", "none"]
DEEP_LEVEL, BOTTLENECK_LEVEL = 4, 6
ATTENTION_HEADS = 4


class Settings(Params):
    """What such a model is: `model:` of params.yaml, and each of `variants:`."""

    upstream: str
    freeze_mae: bool
    mae_input: Literal["pad1024", "crop", "hop35"]
    layers: Literal["auto", "last", "last3", "weighted"]
    repeat: Repeat
    fusion: Fusion
    lora_rank: int = Field(ge=0)
    encoder_learning_rate: float = Field(gt=0)
    encoder_weight_decay: float = Field(ge=0)
    layer_decay: float = Field(gt=0, le=1)
    unfreeze_step: int = Field(ge=0)
    drop_path: float = Field(ge=0, lt=1)
    bf16_frozen: bool
    context: Literal["anchor", "segment"]

    @field_validator("upstream")
    @classmethod
    def _is_a_file(cls, name: str) -> str:
        if name not in names():
            raise ValueError(f"there is no such upstream; there are {', '.join(names())}")
        return name

    @model_validator(mode="after")
    def _adapters_learn(self) -> "Settings":
        if self.lora_rank and self.freeze_mae:
            raise ValueError("lora_rank adapts an encoder that learns: set freeze_mae to false, or lora_rank to 0")
        return self


class Separator(resunet.Separator):
    """ResUNet30 with an upstream. The arguments are those of the baseline, of `Settings`, and the upstream's config.

    frozen      the encoder is in evaluation mode whatever the mode of the rest, and runs without gradients
    updated     it learns, from step `unfreeze_step` on, with a rate of its own that falls by `layer_decay` per layer
    adapted     (lora_rank > 0) low-rank adapters of its attention learn, its own weights do not
    """

    def __init__(
        self,
        *,
        query_dim: int,
        n_fft: int,
        hop_length: int,
        channels: Sequence[int],
        norm_momentum: float,
        phase_bias: float,
        upstream_config: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        # First, so that the same seed gives the U-Net of the baseline.
        super().__init__(
            query_dim=query_dim,
            n_fft=n_fft,
            hop_length=hop_length,
            channels=channels,
            norm_momentum=norm_momentum,
            phase_bias=phase_bias,
        )
        self.settings = Settings.model_validate(settings)
        fusion, layers = self.settings.fusion, self.settings.layers
        # Zhao et al.: the last layer's if frozen, a weighted sum of all if updated.
        self.layers = ("last" if self.settings.freeze_mae else "weighted") if layers == "auto" else layers
        if fusion == "none":
            return
        self.upstream = build(self.settings.upstream, **upstream_config)
        dim = self.upstream.dim
        if self.layers == "weighted":
            self.layer_weights = nn.Parameter(torch.zeros(self.upstream.n_layers))
        if self.settings.freeze_mae:
            self.upstream.requires_grad_(False)
            if self.settings.bf16_frozen:
                self.upstream.to(torch.bfloat16)
        elif self.settings.lora_rank:
            self._adapt()
        n_bins = n_fft // 2
        if fusion == "channel":
            self.project = nn.Linear(dim, n_bins)
            enter = Pointwise(2, channels[0])
            with torch.no_grad():
                enter.weight[:, :1] = self.unet.enter.weight
                enter.bias.copy_(self.unet.enter.bias)  # type: ignore[union-attr, arg-type]
            self.unet.enter = enter
        elif fusion == "deep":
            self.project = _silent(nn.Linear(dim, channels[DEEP_LEVEL - 1]))
        elif fusion == "film":
            self.project = _silent(nn.Linear(dim, query_dim))
        elif fusion == "interferer":
            self.tell = TellInterferer(dim, query_dim)
            self.project = _silent(nn.Linear(query_dim, query_dim))
        elif fusion == "attention":
            self.look_up = LookUp(channels[BOTTLENECK_LEVEL - 1], dim)

    def train(self, mode: bool = True) -> "Separator":
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.settings.fusion != "none" and self.settings.freeze_mae:
            self.upstream.eval()
        return self

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Give the upstream its pretrained weights; RuntimeError where they are not exactly its own."""
        if self.settings.fusion == "none":
            return
        ours = {name.replace(".base_layer.", "."): name for name in self.upstream.state_dict() if ".lora_" not in name}
        if set(ours) != set(state):
            raise RuntimeError(f"the pretrained upstream differs in {sorted(set(ours) ^ set(state))[:5]}")
        adapters = {name: t for name, t in self.upstream.state_dict().items() if ".lora_" in name}
        self.upstream.load_state_dict({ours[name]: tensor for name, tensor in state.items()} | adapters)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """For an optimizer: the U-Net and the fusion; the layers' weights; the encoder's layers, from the last down.

        Groups with `start_step` do not move before that step.
        """
        settings = self.settings
        upstream = [] if settings.fusion == "none" else list(self.upstream.parameters())
        theirs = {id(p) for p in upstream} | {id(p) for p in self._layer_weights()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in theirs and p.requires_grad], "lr": learning_rate}
        ]
        if self._layer_weights():
            groups.append({"params": self._layer_weights(), "lr": learning_rate, "weight_decay": 0.0})
        if settings.fusion == "none" or settings.freeze_mae:
            return groups
        layers = self.upstream.layer_groups()
        for depth, parameters in enumerate(reversed(layers)):
            rate = settings.encoder_learning_rate * settings.layer_decay**depth
            for matrices in (True, False):
                chosen = [p for p in parameters if p.requires_grad and (p.ndim > 1) == matrices]
                if chosen:
                    decay = settings.encoder_weight_decay if matrices else 0.0
                    options = {"lr": rate, "weight_decay": decay, "start_step": settings.unfreeze_step}
                    groups.append({"params": chosen, **options})
        return groups

    def _layer_weights(self) -> list[nn.Parameter]:
        return [self.layer_weights] if hasattr(self, "layer_weights") else []

    def _adapt(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        if not self.upstream.lora_targets:
            raise ValueError(f"upstream {self.settings.upstream!r} has nothing for lora_rank to adapt")
        rank = self.settings.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(self.upstream.lora_targets))
        inject_adapter_in_model(config, self.upstream)  # its own weights no longer need gradients

    @property
    def hears_whole(self) -> bool:
        """Whether training shows it all of a mixture, of which it separates a part."""
        return self.settings.fusion != "none" and self.settings.context == "anchor"

    @property
    def learns_interferer(self) -> bool:
        """Whether training adds `interferer_loss` to its own."""
        return self.settings.fusion == "interferer"

    def interferer_loss(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch query_dim"],
        interferer_query: Float[Tensor, "batch query_dim"],
        *,
        steps: Float[Tensor, "batch steps dim"],
    ) -> Float[Tensor, ""]:
        """How far what the features tell is from the embedding of the interferer, from 0 to 2. For training alone: the
        queries go into the running mean.

        `mixture` is what the encoder heard, `steps` what `shared(mixture)` gave. Asked for the interferer, they are to
        tell the target: each mixture is two examples.
        """
        steps = self._sounding(steps, mixture.shape[1])
        self.tell.see(query)
        return self.tell.loss(
            torch.cat([steps, steps]), torch.cat([query, interferer_query]), torch.cat([interferer_query, query])
        )

    def steps(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch steps dim"]:
        """The upstream's features of each mixture, normed, float32.

        Not kept between training steps: a mixture is met once, and the encoder of a sum is not the sum of the encoders.
        """
        frozen = self.settings.freeze_mae
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden = self.upstream.hidden(mixture)
        h = combine(self.upstream, hidden, self.layers, getattr(self, "layer_weights", None))
        h = self.upstream.to_steps(h).float()
        return F.layer_norm(h, h.shape[-1:])

    def shared(self, mixture: Float[Tensor, "batch time"]) -> dict[str, Tensor]:
        """The features, which no query changes: evaluation asks twice."""
        return {} if self.settings.fusion == "none" else {"steps": self.steps(mixture)}

    def frames(
        self, steps: Float[Tensor, "batch steps dim"], n: int, stride: int = 1, first: int = 0
    ) -> Float[Tensor, "batch {n} dim"]:
        """The step of each of n rows from frame `first` of the STFT on, a row being `stride` frames."""
        per_second = SAMPLE_RATE / self.hop_length
        per_frame = self.upstream.frames_per_step * per_second / FRAME_RATE
        return align(steps, per_frame, n, self.settings.repeat, first, stride)

    def _sounding(self, steps: Float[Tensor, "batch steps dim"], samples: int) -> Float[Tensor, "batch some dim"]:
        """The steps of so many samples; pad1024 has those of padding too."""
        seconds_per_step = self.upstream.frames_per_step / FRAME_RATE
        return steps[:, : math.ceil(samples / SAMPLE_RATE / seconds_per_step)]

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch query_dim"],
        part: slice = slice(None),
        *,
        steps: Float[Tensor, "batch steps dim"] | None = None,
    ) -> Float[Tensor, "batch part"]:
        """What each query asks for in this part of its mixture; the encoder hears all of the mixture.

        `steps`: what `shared(mixture)` gave, if it is at hand.
        """
        if self.settings.fusion == "none":
            return super().forward(mixture[:, part], query)
        if steps is None:
            steps = self.steps(mixture)
        if self.settings.fusion == "interferer":
            with torch.no_grad():  # the U-Net takes what it is told, and does not change it
                told = self.tell.hint(self._sounding(steps, mixture.shape[1]), query)
            return super().forward(mixture[:, part], query + self.project(told).to(query.dtype))
        first, total = round((part.start or 0) / self.hop_length), 1 + mixture.shape[1] // self.hop_length
        return self.masked(mixture[:, part], lambda spectrum: self.logits(spectrum, steps, query, first, total))

    def logits(
        self,
        spectrum: Complex[Tensor, "batch frames bins"],
        steps: Float[Tensor, "batch steps dim"],
        query: Float[Tensor, "batch query_dim"],
        first: int,
        total: int,
    ) -> Float[Tensor, "batch 3 padded_frames masked_bins"]:
        """What the mask is made of: the U-Net on STFT and features, from frame `first` on of `total`."""
        fusion = self.settings.fusion
        if fusion == "freq":
            return self._side_by_side(spectrum, steps, query, first)
        plane = self.plane(spectrum)
        rows = plane.shape[2]
        if fusion == "channel":
            second = self.project(self.frames(steps, rows, first=first))[:, None].float()
            return self.unet(torch.cat([plane, second], dim=1), query)
        if fusion == "film":
            return self.unet(plane, query + self.project(steps.mean(dim=1)).to(query.dtype))
        if fusion == "deep":
            found = self.frames(steps, -(-rows // 16), stride=16, first=first)
            added = self.project(found).transpose(1, 2)[..., None]
            return self.unet(plane, query, lambda level, h: h + added.to(h.dtype) if level == DEEP_LEVEL else h)
        # Where the bottleneck's rows stand in the mixture; both lengths end as the U-Net's do, at 32 frames.
        span = (first / FRAMES_MULTIPLE, -(-total // FRAMES_MULTIPLE))
        return self.unet(
            plane, query, lambda level, h: self.look_up(h, steps, span) if level == BOTTLENECK_LEVEL else h
        )

    def _side_by_side(
        self,
        spectrum: Complex[Tensor, "batch frames bins"],
        steps: Float[Tensor, "batch steps dim"],
        query: Float[Tensor, "batch query_dim"],
        first: int,
    ) -> Float[Tensor, "batch 3 padded_frames bins"]:
        """The published fusion. With it Nyquist has a mask."""
        plane = self.normed(spectrum)
        rows, bins = plane.shape[2:]
        plane = torch.cat([plane, self.frames(steps, rows, first=first)[:, None]], dim=3)[..., :-1]
        # Nothing to add for the published widths.
        plane = F.pad(plane, (0, -plane.shape[3] % resunet.BINS_MULTIPLE))
        return self.unet(plane, query)[..., :bins]


class LookUp(nn.Module):
    """Cross attention: each row of the bottleneck asks the steps, with the time of both told by sines and cosines."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        heads = math.gcd(channels, ATTENTION_HEADS)
        self.attention = nn.MultiheadAttention(channels, heads, kdim=dim, vdim=dim, batch_first=True)
        _silent(self.attention.out_proj)

    def forward(
        self,
        h: Float[Tensor, "batch channels rows bins"],
        steps: Float[Tensor, "batch steps dim"],
        span: tuple[float, int],
    ) -> Float[Tensor, "batch channels rows bins"]:
        """Keep the shape; the same for all bins of a row. `span`: the first row's place, of how many in the mixture."""
        with torch.autocast(h.device.type, enabled=False):
            rows = h.float().mean(dim=3).transpose(1, 2)
            found, _ = self.attention(rows + _time(rows, *span), steps + _time(steps), steps, need_weights=False)
        return h + found.transpose(1, 2)[..., None].to(h.dtype)


class TellInterferer(nn.Module):
    """What else sounds: the direction in which the interferer's embedding lies from the mean of all, from the features'
    mean and maximum over time and the query.

    Embeddings of one encoder share most of their direction (small: their mean has a cosine of 0.9 with each), so both
    sides are taken from the mean of the training queries, a running one. A hint is as long as those lie from it: six
    times that took the gain away, on one seed (reports/LOG.md, 2026-11-23).
    """

    HIDDEN, DROPOUT, BATCHES_OF_MEAN = 256, 0.2, 100

    def __init__(self, dim: int, query_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * dim + query_dim, self.HIDDEN),
            nn.GELU(),
            nn.Dropout(self.DROPOUT),
            nn.Linear(self.HIDDEN, query_dim),
        )
        self.mean: Tensor
        self.spread: Tensor
        self.n_batches: Tensor
        self.register_buffer("mean", torch.zeros(query_dim))
        self.register_buffer("spread", torch.zeros(()))  # mean square distance from the mean
        self.register_buffer("n_batches", torch.zeros(()))

    @torch.no_grad()
    def see(self, query: Float[Tensor, "batch query_dim"]) -> None:
        """Take a training batch's queries into the running mean and spread."""
        query = query.float()
        self.n_batches += 1
        share = (1 / self.n_batches).clamp(min=1 / self.BATCHES_OF_MEAN)
        self.mean += share * (query.mean(dim=0) - self.mean)
        self.spread += share * ((query - self.mean).square().sum(dim=1).mean() - self.spread)

    def forward(
        self, steps: Float[Tensor, "batch steps dim"], query: Float[Tensor, "batch query_dim"]
    ) -> Float[Tensor, "batch query_dim"]:
        """A direction, of any length."""
        with torch.autocast(steps.device.type, enabled=False):
            steps = steps.float()
            asked = F.normalize(query.float() - self.mean, dim=1) * math.sqrt(query.shape[1])
            told: Tensor = self.layers(torch.cat([steps.mean(dim=1), steps.amax(dim=1), asked], dim=1))
        return told

    def hint(
        self, steps: Float[Tensor, "batch steps dim"], query: Float[Tensor, "batch query_dim"]
    ) -> Float[Tensor, "batch query_dim"]:
        """That direction, without dropout, as long as embeddings lie from their mean."""
        training = self.training
        try:
            told = F.normalize(self.eval()(steps, query), dim=1)
        finally:
            self.train(training)
        return told * self.spread.sqrt()

    def loss(
        self,
        steps: Float[Tensor, "batch steps dim"],
        query: Float[Tensor, "batch query_dim"],
        wanted: Float[Tensor, "batch query_dim"],
    ) -> Float[Tensor, ""]:
        """1 - cosine of what is told and of what was wanted, from the mean."""
        return (1 - F.cosine_similarity(self(steps, query), wanted.float() - self.mean, dim=1)).mean()


def _time(x: Float[Tensor, "batch n dim"], first: float = 0, total: int | None = None) -> Float[Tensor, "n dim"]:
    """Where in the mixture each of n vectors lies, from 0 to 1, as sines and cosines of 1 to 32 half turns.

    They are number `first` and on of `total`; all there are, if it is not said.
    """
    n, dim = x.shape[1:]
    place = (torch.arange(n, device=x.device) + first + 0.5) / (total or n)
    turns = torch.pi * 32 ** torch.linspace(0, 1, -(-dim // 2), device=x.device)
    angle = place[:, None] * turns
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]


def _silent(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
