"""Signal-to-distortion ratio against the reference as it is: the number of Kong et al. and Zhao et al.

Quiet mistakes of level count. It has floors, and so always a value.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluation import metrics

ENERGY_FLOOR = 1e-10  # of a mean square, as in Kong et al.'s evaluation


class Metric(metrics.Metric):
    """SDR, and its gain over the mixture's."""

    columns = gains = ("sdr",)

    def __call__(
        self,
        estimates: Float[Tensor, "batch estimates time"],
        target: Float[Tensor, "batch time"],
        interferer: Float[Tensor, "batch time"],
    ) -> dict[str, Float[Tensor, "batch estimates"]]:
        """Score all of them by `sdr`."""
        return {"sdr": sdr(estimates, target[:, None].expand_as(estimates))}


def sdr(estimate: Float[Tensor, "*batch time"], reference: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch"]:
    """Signal-to-distortion ratio in dB, without any scaling or filtering of the reference.

        10 log10( max(mean s^2, 1e-10) / max(mean (y - s)^2, 1e-10) )

    Kong et al., arXiv:2305.07447. A silent reference therefore scores a large negative number, not NaN.
    """
    reference = reference.double()
    error = estimate.double() - reference
    signal_energy = reference.square().mean(dim=-1).clamp(min=ENERGY_FLOOR)
    return 10 * torch.log10(signal_energy / error.square().mean(dim=-1).clamp(min=ENERGY_FLOOR))
