"""What separators with features of an upstream encoder share (Zhao et al., arXiv:2407.11745, section II).

A body and an upstream make a separator: `mae_resunet`, `mae_bandsplit`. How the features join the body is a file of
`fusions/`. In evaluation the encoder is given the whole mixture, and the features of its frames depend on where they
stand (in `freq` with pad1024 a row's features are not even of its own time). Trained on parts of mixtures, the encoder
is given the whole all the same, and the features of the part's rows are taken (`context: anchor`); with `segment` it is
given the part alone.

In a recording longer than the mixtures of the training the encoder is given windows of their length (rounded down to
the body's grid), side by side from the start on, and the body reaches across them. What the features do to the query
they do in each window anew.

Every feature vector is brought to zero mean and unit variance first. For the same seed the body begins with the
baseline's weights, whatever the fusion.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.core.config import Params
from pipeline.separators import Batch, QuerySeparator, fusions
from pipeline.separators.fusions import Features, Sizes
from pipeline.upstreams import FRAME_RATE, SAMPLE_RATE, Layers, Repeat, Upstream, build, combine, names


class Settings(Params):
    """Settings of one model: `model:` of params.yaml, and each of `variants:`.

    A separator has a subclass with the file of its body, which takes the fusions of that body alone.
    """

    body_name: ClassVar[str | None] = None

    upstream: str
    freeze_mae: bool
    mae_input: Literal["pad1024", "crop", "hop35"]
    layers: Literal["auto", "last", "last3", "weighted"]
    repeat: Repeat
    fusion: str
    fusion_options: dict[str, Any]  # arguments of the fusion; what is left out has the file's default
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

    @field_validator("fusion")
    @classmethod
    def _is_a_fusion(cls, name: str) -> str:
        if name not in fusions.names():
            raise ValueError(f"there is no such fusion; there are {', '.join(fusions.names())}")
        if cls.body_name is not None and cls.body_name not in fusions.bodies(name):
            known = [other for other in fusions.names() if cls.body_name in fusions.bodies(other)]
            raise ValueError(f"this fusion is not of {cls.body_name}, which has {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _adapters_learn(self) -> "Settings":
        if self.lora_rank and self.freeze_mae:
            raise ValueError("lora_rank adapts an encoder that learns: set freeze_mae to false, or lora_rank to 0")
        return self


class Featured(QuerySeparator):
    """A query separator's body with an upstream; a subclass inherits from the body too and calls `take_features`.

    frozen      the encoder is in evaluation mode whatever the mode of the rest, and runs without gradients
    updated     it learns, from step `unfreeze_step` on, with a rate of its own that falls by `layer_decay` per layer
    adapted     (lora_rank > 0) low-rank adapters of its attention learn, its own weights do not
    """

    settings: Settings
    fusion: fusions.Fusion
    upstream: Upstream | None
    layer_weights: nn.Parameter | None

    def take_features(
        self, settings: Settings, upstream_config: Mapping[str, Any], body: nn.Module, **sizes: Any
    ) -> None:
        """Add upstream and fusion to a body that is built: the same seed gives it the baseline's weights.

        `sizes` are those of `fusions.Sizes` that the body alone knows.
        """
        self.settings = settings
        # Zhao et al.: the last layer's if frozen, a weighted sum of all if updated.
        automatic: Layers = "last" if settings.freeze_mae else "weighted"
        self.layers = automatic if settings.layers == "auto" else settings.layers
        self.upstream, self.layer_weights, dim = None, None, 0
        if fusions.reads_features(settings.fusion):
            self.upstream = build(settings.upstream, **upstream_config)
            dim = self.upstream.dim
            if self.layers == "weighted":
                self.layer_weights = nn.Parameter(torch.zeros(self.upstream.n_layers))
            if settings.freeze_mae:
                self.upstream.requires_grad_(False)
                if settings.bf16_frozen:
                    self.upstream.to(torch.bfloat16)
            elif settings.lora_rank:
                self._adapt(self.upstream)
        found = Sizes(dim, self.query_dim, self.joint_dim, **sizes)
        self.fusion = fusions.build(settings.fusion, found, body, settings.fusion_options)

    def train(self, mode: bool = True) -> "Featured":
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.upstream is not None and self.settings.freeze_mae:
            self.upstream.eval()
        return self

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Give the upstream its pretrained weights; RuntimeError where they are not exactly its own."""
        if self.upstream is None:
            return
        ours = {name.replace(".base_layer.", "."): name for name in self.upstream.state_dict() if ".lora_" not in name}
        if set(ours) != set(state):
            raise RuntimeError(f"the pretrained upstream differs in {sorted(set(ours) ^ set(state))[:5]}")
        adapters = {name: t for name, t in self.upstream.state_dict().items() if ".lora_" in name}
        self.upstream.load_state_dict({ours[name]: tensor for name, tensor in state.items()} | adapters)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Group the parameters: body and fusion; the layers' weights; the encoder's layers, from the last down."""
        settings = self.settings
        layer_weights = [] if self.layer_weights is None else [self.layer_weights]
        upstream = [] if self.upstream is None else list(self.upstream.parameters())
        theirs = {id(p) for p in upstream} | {id(p) for p in layer_weights}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in theirs and p.requires_grad], "lr": learning_rate}
        ]
        if layer_weights:
            groups.append({"params": layer_weights, "lr": learning_rate, "weight_decay": 0.0})
        if self.upstream is None or settings.freeze_mae:
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

    def _adapt(self, upstream: Upstream) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        if not upstream.lora_targets:
            raise ValueError(f"upstream {self.settings.upstream!r} has nothing for lora_rank to adapt")
        rank = self.settings.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(upstream.lora_targets))
        inject_adapter_in_model(config, upstream)  # its own weights no longer need gradients

    def losses(self, batch: Batch, objectives: Sequence[str]) -> dict[str, Tensor]:
        """Compute the terms of the training loss; with `context: segment` the encoder is given the part alone."""
        return super().losses(batch.cut() if self.settings.context == "segment" else batch, objectives)

    def auxiliary_losses(self, batch: Batch, **shared: Tensor) -> dict[str, Tensor]:
        """Compute the fusion's own terms."""
        if self.upstream is None:
            return {}
        return self.fusion.losses(self.locate(shared["features"], batch.mixture.shape[1], batch.part), batch)

    def features(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch steps dim"]:
        """Compute the upstream's features of each mixture, normed, float32, at the upstream's own time steps.

        They are not kept between training steps: a mixture is met once, and the encoder of a sum is not the sum of the
        encoders.
        """
        assert self.upstream is not None
        frozen = self.settings.freeze_mae
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden = self.upstream.hidden(mixture)
        h = combine(self.upstream, hidden, self.layers, self.layer_weights)
        h = self.upstream.to_steps(h).float()
        return F.layer_norm(h, h.shape[-1:])

    def shared(self, mixture: Float[Tensor, "batch time"]) -> dict[str, Tensor]:
        """Compute the features, which no query changes: (batch, steps, dim), or of each window of a long recording."""
        if self.upstream is None:
            return {}
        samples = mixture.shape[1]
        if not self.is_long(samples):
            return {"features": self.features(mixture)}
        size = self.window_samples
        windows = -(-(1 + -(-samples // self.hop_length)) * self.hop_length // size)
        # What the last window lacks is the recording's end, backwards: the encoder was trained on no silence.
        filled = F.pad(mixture[:, None], (0, max(0, windows * size - samples)), mode="reflect")[:, 0, : windows * size]
        found = self.features(filled.reshape(-1, size))
        return {"features": found.reshape(-1, windows, *found.shape[1:])}

    @property
    def window_samples(self) -> int:
        """Length of the windows that the encoder is given of a long recording."""
        assert self.segment_samples is not None
        grid = super().grid_samples
        return max(1, self.segment_samples // grid) * grid

    @property
    def block_samples(self) -> int:
        """A window of the encoder's."""
        return self.grid_samples if self.upstream is None else self.window_samples

    def steered(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch joint_dim"],
        part: slice,
        features: Float[Tensor, "batch *windows steps dim"] | None,
    ) -> tuple[Features, Float[Tensor, "batch *windows joint_dim"], int]:
        """Locate the features, computed if they are None, and let them change the query: the third is the windows.

        With more than one the features are of items and windows: all items' first windows, then all their second ones.
        """
        if features is None:
            features = self.shared(mixture)["features"]
        if features.ndim == 3:
            located = self.locate(features, mixture.shape[1], part)
            return located, self.fusion.query(query, located), 1
        windows = features.shape[1]
        located = replace(
            self.locate(features.transpose(0, 1).flatten(0, 1), self.window_samples, slice(None)),
            total=self.window_samples // self.hop_length,
        )
        of_windows = self.fusion.query(query.repeat(windows, 1), located)
        return located, torch.stack(of_windows.chunk(windows), dim=1), windows

    def locate(self, values: Float[Tensor, "batch steps dim"], samples: int, part: slice) -> Features:
        """Say where in mixtures of so many samples the features of `part` lie."""
        assert self.upstream is not None
        frames_per_step = self.upstream.frames_per_step
        return Features(
            values,
            n_sounding=math.ceil(samples / SAMPLE_RATE / (frames_per_step / FRAME_RATE)),
            steps_per_frame=frames_per_step * (SAMPLE_RATE / self.hop_length) / FRAME_RATE,
            repeat=self.settings.repeat,
            first=round((part.start or 0) / self.hop_length),
            total=1 + samples // self.hop_length,
        )


def fold(x: Float[Tensor, "batch ..."], windows: int, dim: int) -> Float[Tensor, "items ..."]:
    """Make an item of each window along `dim`: all first ones, all second ones, and so on."""
    return x if windows == 1 else torch.cat(x.chunk(windows, dim=dim))


def unfold(x: Float[Tensor, "items ..."], windows: int, dim: int) -> Float[Tensor, "batch ..."]:
    """Put the windows of each item side by side again along `dim`."""
    return x if windows == 1 else torch.cat(x.chunk(windows), dim=dim)
