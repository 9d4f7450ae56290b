"""Networks as other programs run them: mixture and queries in, estimates out, no complex number between.

Each takes the parts of a trained network and puts them behind the transforms of `transform`. `tests/export` holds the
outputs to those of the network itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.export.transform import FilterBank, RunningLevel, Transform
from pipeline.nn.features import SILENT_POWER
from pipeline.nn.losses import mixture_consistency
from pipeline.separate.targets import Unusable
from pipeline.separators import BlindSeparator, QuerySeparator, bandsplit, conv_tasnet, mae_resunet, performer, resunet
from pipeline.separators._features import Featured
from pipeline.separators._levelled import BIN_FLOOR, COMPRESSION
from pipeline.separators.performer import LOG_GAIN
from pipeline.separators.resunet import FRAMES_MULTIPLE
from pipeline.upstreams import combine, mae


class Graph(nn.Module):
    """A network to be traced. `inputs` names what forward takes, beside the batch (batch, ...) in the same order.

    samples   length of all mixtures; None: any length from `least_samples` on
    """

    inputs: tuple[str, ...] = ("mixture",)
    samples: int | None = None
    least_samples = 1

    def examples(self, batch: int, samples: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw inputs: noise as mixtures, and embeddings that are not negative, as those of the query encoder."""
        mixture = 0.1 * torch.randn(batch, samples, generator=generator)
        dim = int(getattr(self.network, "query_dim", 0))
        return (mixture, *(torch.rand(batch, dim, generator=generator) for _ in self.inputs[1:]))

    network: nn.Module


class QueryGraph(Graph):
    """A separator with queries: the mixture (batch, time), the query and, of one that takes it, the interferer's."""

    network: QuerySeparator

    def __init__(self, network: QuerySeparator) -> None:
        super().__init__()
        self.network = network
        self.inputs = ("mixture", "query", *(["interferer_query"] if network.takes_interferer else []))
        n_fft = int(network.n_fft)  # type: ignore[arg-type]
        self.transform, self.least_samples = Transform(n_fft, network.hop_length), n_fft // 2 + 1

    def forward(
        self,
        mixture: Float[Tensor, "batch time"],
        query: Float[Tensor, "batch query_dim"],
        interferer_query: Float[Tensor, "batch query_dim"] | None = None,
    ) -> Float[Tensor, "batch time"]:
        """Separate the source that is asked for."""
        return self.separated(mixture, self.network.joint_query(query, interferer_query))

    def separated(self, mixture: Tensor, query: Tensor) -> Tensor:
        """Separate the source of a joint query; each body has its own way."""
        raise NotImplementedError

    def masked(self, spectrum: tuple[Tensor, Tensor], mask: tuple[Tensor, Tensor], length: int) -> Tensor:
        """Multiply a spectrum by a mask, which may lack the last bins, and transform it back."""
        real, imaginary = (part[..., : mask[0].shape[2]] for part in spectrum)
        product = (real * mask[0] - imaginary * mask[1], real * mask[1] + imaginary * mask[0])
        lacking = self.transform.n_fft // 2 + 1 - mask[0].shape[2]
        real, imaginary = (F.pad(part, (0, lacking)) for part in product)
        return self.transform.inverse(real, imaginary, length)


class ResUNet(QueryGraph):
    """ResUNet30, as `resunet.Separator.masked` has it."""

    network: resunet.Separator

    def separated(self, mixture: Tensor, query: Tensor) -> Tensor:
        """Separate mixtures of any length."""
        real, imaginary = self.transform(mixture)
        magnitude = (real.square() + imaginary.square()).clamp(min=1e-10).sqrt()
        plane = self.network.norm(magnitude.transpose(1, 2)).transpose(1, 2)
        frames = plane.shape[1]
        plane = F.pad(plane[:, None], (0, 0, 0, -frames % FRAMES_MULTIPLE))
        logits = self.logits(plane, mixture, query)[:, :, :frames]
        gain = logits[:, 0].sigmoid()
        across, up = logits[:, 1].tanh(), logits[:, 2].tanh()
        gain = gain * (across.square() + up.square()).clamp(min=1e-20).rsqrt()
        return self.masked((real, imaginary), (gain * across, gain * up), mixture.shape[1])

    def logits(self, plane: Tensor, mixture: Tensor, query: Tensor) -> Tensor:
        """Compute what the mask is made of from the normed magnitudes, Nyquist included."""
        return self.network.unet(plane[..., :-1], query)


class MaeResUNet(ResUNet):
    """ResUNet30 with an A-MAE, for mixtures as long as those of its training: the encoder's input has a fixed size."""

    network: mae_resunet.Separator

    def __init__(self, network: mae_resunet.Separator) -> None:
        super().__init__(network)
        if network.upstream is None:
            return
        if not isinstance(network.upstream, mae.Upstream):
            raise Unusable(f"upstream {network.settings.upstream!r} cannot be exported; A-MAE's encoder can")
        if network.segment_samples is None:
            raise Unusable("the length of the training mixtures is not known, and the encoder's input depends on it")
        self.samples = network.segment_samples
        self.bank = FilterBank(network.upstream.mae_input, self.samples)
        network.upstream.float()

    def logits(self, plane: Tensor, mixture: Tensor, query: Tensor) -> Tensor:
        """Compute what the mask is made of from magnitudes and features."""
        network, upstream = self.network, self.network.upstream
        if upstream is None:
            return super().logits(plane, mixture, query)
        assert isinstance(upstream, mae.Upstream)
        assert self.samples is not None
        hidden = [h[:, 1:] for h in upstream.encoder.hidden(self.bank(mixture))]
        steps = upstream.to_steps(combine(upstream, hidden, network.layers, network.layer_weights))
        located = network.locate(F.layer_norm(steps, steps.shape[-1:]), self.samples, slice(None))
        logits = network.unet(
            network.fusion.plane(plane, located),
            network.fusion.query(query, located),
            lambda level, h: network.fusion.join(level, h, located),
        )
        return logits[..., : plane.shape[3]]


class BandSplit(QueryGraph):
    """The band-split network, as `bandsplit.Separator.masked` has it: of long mixtures the level is what lies near."""

    network: bandsplit.Separator

    def __init__(self, network: bandsplit.Separator) -> None:
        super().__init__(network)
        trained = network.segment_samples
        self.long_samples = (trained or 0) + network.grid_samples  # from here on a mixture is a long one
        self.near = None if trained is None else RunningLevel(trained, network.hop_length)

    def separated(self, mixture: Tensor, query: Tensor) -> Tensor:
        """Separate mixtures of any length."""
        network, length = self.network, mixture.shape[1]
        level = mixture.square().mean(dim=1, keepdim=True).clamp(min=SILENT_POWER).sqrt()
        if self.near is not None:
            # Both are cheap, and a graph without a branch is what every runtime takes.
            is_long = torch.as_tensor(length) >= self.long_samples
            level = torch.where(is_long, self.near(mixture), level)
        real, imaginary = self.transform(F.pad(mixture / level, (0, -length % network.hop_length)))
        scale = (3 / 8 * network.n_fft) ** -0.5
        across, up = scale * real[..., :-1], scale * imaginary[..., :-1]
        power = across.square() + up.square() + BIN_FLOOR
        gain = power ** ((COMPRESSION - 1) / 2)
        planes = torch.stack([across * gain, up * gain, 0.25 * power.log() + 1], dim=3)
        mask = network.mask_parts(planes, query)
        return self.masked((real, imaginary), (mask[0], mask[1]), length) * level


class ConvTasNet(Graph):
    """Conv-TasNet, whose filters are learned: there is no transform to replace."""

    network: conv_tasnet.Separator

    def __init__(self, network: conv_tasnet.Separator) -> None:
        super().__init__()
        self.network = network

    def forward(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch sources time"]:
        """Separate all sources of mixtures of any length."""
        return self.network(mixture)


class Performer(Graph):
    """The Performer on log magnitudes, as `performer.Separator.separate` has it."""

    network: performer.Separator

    def __init__(self, network: performer.Separator) -> None:
        super().__init__()
        if network.front_end != "stft":
            raise Unusable(f"a performer with front_end {network.front_end!r} cannot be exported; with stft it can")
        self.network = network
        self.transform, self.least_samples = Transform(network.n_fft, network.hop_length), network.n_fft // 2 + 1

    def forward(self, mixture: Float[Tensor, "batch time"]) -> Float[Tensor, "batch sources time"]:
        """Separate all sources of mixtures of any length."""
        network, (batch, length) = self.network, mixture.shape
        real, imaginary = self.transform(mixture)
        frames = real.shape[1]
        tokens = torch.log1p(LOG_GAIN * (real.square() + imaginary.square()).clamp(min=1e-10).sqrt())
        if network.norm != "none":
            tokens = (tokens - network.mean) / network.std
        tokens = F.pad(tokens, (0, 0, 0, -frames % network.patch_frames))
        tokens = tokens.reshape(batch, -1, network.patch_frames * network.n_bins)
        logits = network.head(network.encoder(network.embed(tokens)))
        logits = logits.view(batch, -1, network.n_sources, network.n_bins)[:, :frames]
        masks = logits.softmax(dim=2) if network.mask_activation == "softmax" else logits.sigmoid()
        masks = masks.transpose(1, 2)
        real, imaginary = ((masks * part[:, None]).flatten(0, 1) for part in (real, imaginary))
        estimates = self.transform.inverse(real, imaginary, length).view(batch, network.n_sources, -1)
        if network.consistency != "none":
            estimates = mixture_consistency(estimates, mixture, network.consistency)
        return estimates


GRAPHS: dict[str, type[Any]] = {
    "resunet": ResUNet,
    "mae_resunet": MaeResUNet,
    "bandsplit": BandSplit,
    "conv_tasnet": ConvTasNet,
    "performer": Performer,
}


def build(architecture: str, network: QuerySeparator | BlindSeparator) -> Graph:
    """Build the graph of a trained network; Unusable for an architecture that has none."""
    if architecture not in GRAPHS:
        raise Unusable(f"architecture {architecture!r} cannot be exported; {', '.join(GRAPHS)} can")
    if isinstance(network, Featured):
        network.train(False)
    graph: Graph = GRAPHS[architecture](network)
    return graph.eval().requires_grad_(False)
