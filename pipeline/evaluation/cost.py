"""What a separator costs: parameters, and multiply-accumulates for a mixture of 2 s."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Counts of one separator."""

    n_parameters: int
    n_trainable: int  # of the parameters, those that training moves
    macs: int  # multiply-accumulates of convolutions and matrix products; transforms and norms are not counted


def cost(separator: nn.Module, *, query_dim: int, samples: int) -> Cost:
    """Count on one silent mixture, on the CPU; `query_dim` is the width of the query that `forward` takes.

    Attention is counted in its plain form: the fused one escapes torch.
    """
    was_training = separator.training
    separator.eval()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        separator(torch.zeros(1, samples), torch.zeros(1, query_dim))
    separator.train(was_training)
    parameters = list(separator.parameters())
    return Cost(
        n_parameters=sum(p.numel() for p in parameters),
        n_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        macs=counter.get_total_flops() // 2,
    )
