"""ScaledAdam: Adam whose steps are in proportion to the tensor they move (Yao et al., arXiv:2310.11230, section 3.5).

A tensor's direction is Adam's, times the tensor's root mean square; its size is learned beside, as the logarithm of a
scale would be by Adam. Left out of the published recipe: sizes that move every fourth step alone, clipping by the
median of past gradients, and the Eden schedule: those of `train` hold here.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

LEAST_RMS, LARGEST_RMS = 1e-5, 3.0  # of a tensor, as far as it counts: one of zeros must begin to move
SIZE_RATE = 0.1  # of the learning rate, for the logarithm of a tensor's size


class ScaledAdam(torch.optim.Optimizer):
    """The optimizer above, with a rate of about thirty times Adam's: 0.045 in the paper.

    A tensor with one number, whose size says nothing, moves as by Adam at SIZE_RATE. Weight decay is AdamW's, where a
    group has one.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient; a closure is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name, like in (("first", parameter), ("second", parameter)):
                state[name] = torch.zeros_like(like)
            for name in ("size_first", "size_second"):
                state[name] = torch.zeros((), device=parameter.device)
        state["step"] += 1
        rate, betas = group["lr"], group["betas"]
        parameter.mul_(1 - rate * group["weight_decay"])
        direction = _adam(state["first"], state["second"], gradient, state["step"], betas, group["eps"])
        if parameter.numel() == 1:
            parameter.add_(direction, alpha=-SIZE_RATE * rate)
            return
        rms = parameter.square().mean().sqrt().clamp(LEAST_RMS, LARGEST_RMS)
        towards_size = (parameter * gradient).sum()
        size = _adam(state["size_first"], state["size_second"], towards_size, state["step"], betas, group["eps"])
        grown = parameter * (1 - SIZE_RATE * rate * size)
        parameter.copy_(grown.add_(direction * rms, alpha=-rate))


def _adam(first: Tensor, second: Tensor, gradient: Tensor, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    """Take a gradient into its moments, and return Adam's direction of a length of about 1 per number."""
    first.lerp_(gradient, 1 - betas[0])
    second.lerp_(gradient.square(), 1 - betas[1])
    correction = math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    return correction * first / (second.sqrt() + eps)
