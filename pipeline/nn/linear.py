"""Matrix products in float32 on a CPU where torch has two libraries for them, and takes the slower one.

torch.nn.Linear calls MKL. On AMD's processors with AVX-512, MKL keeps to AVX2: 105 to 120 GFLOP/s on a core of a Zen 5,
where oneDNN, which torch has for convolutions, makes 200 to 270. A 1x1 convolution over channels that lie innermost is
the same product, forward and backward. In a single thread torch gives it to oneDNN only where it has a stride or is
dilated: dilation says nothing of a kernel of one element, so it is set. `python -m benchmarks.linear` measures both.

Elsewhere (Intel, ARM, GPUs, other types, autocast, matrices too small for it) this is torch.nn.functional.linear.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPUINFO = Path("/proc/cpuinfo")
LEAST_PRODUCTS = 1 << 22  # multiplications: below, the convolution's own cost is more than it saves


@cache
def mkl_is_slower() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (both and CPUINFO.is_file()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in CPUINFO.read_text()


def linear(
    x: Float[Tensor, "*batch inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "*batch outputs"]:
    """torch.nn.functional.linear, to a few units in the last place, by the faster library; no second derivatives."""
    if not (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST_PRODUCTS
        and mkl_is_slower()
        and not torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    image: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return image.squeeze(3).squeeze(0).t().reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """torch.nn.Linear by `linear`: the same parameters under the same names."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Change the last dimension."""
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """Rows to an image, a pixel for each: `linear` takes the rows out of it. Only what a gradient needs is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.weight_shape = weight.shape
        return F.conv2d(_image(x), _kernel(weight), bias, dilation=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = _rows(gradient)
        dx = dw = None
        if for_weight:
            # What the weights are is of no account to their own gradient.
            kernel = _kernel(weight if for_x else gradient.new_empty(ctx.weight_shape))
            dx, dw, _ = torch.ops.aten.convolution_backward(
                _image(rows), _image(x), kernel, None, [1, 1], [0, 0], [2, 2], False, [0, 0], 1, [for_x, True, False]
            )
        elif for_x:
            dx = F.conv2d(_image(rows), _kernel(weight.t()), dilation=2)
        return (
            _rows(dx) if dx is not None else None,
            dw[:, :, 0, 0] if dw is not None else None,
            rows.sum(0) if for_bias else None,
        )


def _image(rows: Tensor) -> Tensor:
    """One image, a pixel for each row, its channels innermost; no copy of rows that lie one behind the other."""
    n, channels = rows.shape
    return rows.contiguous().as_strided((1, channels, n, 1), (n * channels, 1, channels, channels))


def _rows(image: Tensor) -> Tensor:
    return image[0, :, :, 0].t()


def _kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
