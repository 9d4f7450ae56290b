"""Scale-invariant SDR: the error after the best gain on the reference (Le Roux et al. 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import LIMIT_DB


class Metric(metrics.Metric):
    """SI-SDR, and its gain over the mixture's."""

    columns = gains = ("si_sdr",)

    def __call__(
        self,
        estimates: Float[Tensor, "batch estimates time"],
        target: Float[Tensor, "batch time"],
        interferer: Float[Tensor, "batch time"],
    ) -> dict[str, Float[Tensor, "batch estimates"]]:
        """Score all of them by `si_sdr`."""
        return {"si_sdr": si_sdr(estimates, target[:, None].expand_as(estimates))}


def si_sdr(estimate: Float[Tensor, "*batch time"], reference: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
    """Scale-invariant SDR in dB, within ±100 dB; NaN where the estimate or the reference is all zeros.

        10 log10( |a s|^2 / |a s - y|^2 ),   a = <y, s> / |s|^2

    Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019, eq. 5. They assume signals of zero mean. Here, as
    in `sdr`, a mean stays (torchmetrics' zero_mean=False): an estimate with an offset has an error.
    """
    estimate, reference = estimate.double(), reference.double()
    scale = (estimate * reference).sum(dim=-1, keepdim=True) / reference.square().sum(dim=-1, keepdim=True)
    error = scale * reference - estimate
    ratio = (scale * reference).square().sum(dim=-1) / error.square().sum(dim=-1)  # 0 / 0 for a silent estimate
    return (10 * torch.log10(ratio)).clamp(-LIMIT_DB, LIMIT_DB)
