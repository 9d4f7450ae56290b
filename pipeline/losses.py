"""Training objectives: (estimate, target) -> one value per item of the batch. Lower is better."""

from jaxtyping import Float
from torch import Tensor


def l1_loss(estimate: Float[Tensor, "batch time"], target: Float[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean absolute difference of the waveforms, per item (Kong et al., arXiv:2305.07447, eq. 9).

    In the unit of the waveforms. Call it outside autocast: bfloat16 rounds a waveform to 8 bits.
    """
    return (estimate - target).abs().mean(dim=-1)
