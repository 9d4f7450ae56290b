"""Conv-TasNet (Luo and Mesgarani 2019, arXiv:1809.07454): masks over a learned, short-windowed filter bank.

torchaudio's network, unconditional: every source of the mixture at once, in no order. The paper's window is 16 samples
of speech at 8 kHz. At 44.1 kHz it keeps 1.8 GiB per second of audio for the backward pass, and its blocks see 0.28 s;
with 2.5 ms (110 samples, as in the MixIT paper, Wisdom et al. 2020) it is a seventh of that, and seven times as far.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchaudio.models import ConvTasNet

from pipeline.nn.losses import mixture_consistency
from pipeline.separators import BlindSeparator

# torchaudio pads its dilated convolutions as only this kernel needs.
BLOCK_KERNEL = 3


class Separator(BlindSeparator):
    """Conv-TasNet with N filters of `window_ms`, which overlap by half, and `stacks` of `layers` blocks.

    n_filters, bottleneck, hidden   N, B and H of the paper; layers, stacks are its X and R
    mask_activation   softmax: over the sources, the masks sum to one. sigmoid: each on its own, as in the paper
    consistency       what the estimates lack of the mixture is given to them, by equal shares or by their power (see
                      mixture_consistency). Without it they do not sum to the mixture, whatever the masks: the filters
                      are learned, and no pair of transforms that undo each other
    recompute         the inside of each block is computed again in the backward pass instead of kept

    The filters and the masks are applied in float32 also under autocast; only what makes the masks follows it.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        n_sources: int,
        window_ms: float,
        n_filters: int,
        bottleneck: int,
        hidden: int,
        layers: int,
        stacks: int,
        mask_activation: Literal["softmax", "sigmoid"],
        consistency: Literal["none", "uniform", "magsq"],
        recompute: bool,
    ) -> None:
        super().__init__()
        self.hop_length = round(sample_rate * window_ms / 2000)
        if self.hop_length < 1:
            raise ValueError(f"window_ms {window_ms} is less than two samples at {sample_rate} Hz")
        self.sample_rate = sample_rate
        self.n_sources = n_sources
        self.mask_activation = mask_activation
        self.consistency = consistency
        self.recompute = recompute
        self.network = ConvTasNet(
            num_sources=n_sources,
            enc_kernel_size=2 * self.hop_length,
            enc_num_feats=n_filters,
            msk_kernel_size=BLOCK_KERNEL,
            msk_num_feats=bottleneck,
            msk_num_hidden_feats=hidden,
            msk_num_layers=layers,
            msk_num_stacks=stacks,
        )

    def separate(
        self, mixture: Float[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch sources time"], Float[Tensor, "batch sources bins frames"]]:
        """(estimates, masks). The bins are the learned filters, a frame begins every half window."""
        batch, length = mixture.shape
        with torch.autocast(mixture.device.type, enabled=False):
            padded = F.pad(mixture.float(), (0, -length % self.hop_length))
            coefficients = self.network.encoder(padded[:, None])
        logits = self._logits(coefficients)
        with torch.autocast(mixture.device.type, enabled=False):
            logits = logits.float()
            masks = logits.softmax(dim=1) if self.mask_activation == "softmax" else logits.sigmoid()
            masked = (masks * coefficients[:, None]).flatten(0, 1)
            estimates = self.network.decoder(masked).view(batch, self.n_sources, -1)[..., :length]
            if self.consistency != "none":
                estimates = mixture_consistency(estimates, mixture.float(), self.consistency)
        return estimates, masks

    def _logits(
        self, coefficients: Float[Tensor, "batch bins frames"]
    ) -> Float[Tensor, "batch {self.n_sources} bins frames"]:
        """Output of torchaudio's mask generator before its activation, which is sigmoid or ReLU only."""
        generator = self.network.mask_generator
        h = generator.input_conv(generator.input_norm(coefficients))
        total = torch.zeros_like(h)
        for block in generator.conv_layers:
            # The last block has no residual.
            residual, skip = (
                checkpoint(block, h, use_reentrant=False, preserve_rng_state=False)
                if self.recompute and torch.is_grad_enabled()
                else block(h)
            )
            total = total + skip
            h = h if residual is None else h + residual
        return generator.output_conv(generator.output_prelu(total)).unflatten(1, (self.n_sources, -1))
