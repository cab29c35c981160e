"""Depth-wise convolution of maps, with a fast weight gradient on CPU.

`y_{p, c} = b_c + sum_r w_{r, c} x_{p + r, c}`; hence `dw_{r, c} = sum_p dy_{p, c} x_{p + r, c}`, which is again a
depth-wise convolution: of the input, with the output's gradient as its kernel.

- CPU libraries are quick at that product and slow at their own weight gradient (up to 100 times, on small maps)
- kernels of 3 are left to the library, which has a form of its own for them
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.compiled import conv2d

MIN_KERNEL = 5
# One output of the product sums a whole map; beyond this the sum loses digits and the gain is gone.
MAX_TOKENS = 128 * 128


def depthwise_conv(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 k k2"], bias: Float[Tensor, " c"] | None
) -> Float[Tensor, "b c h w"]:
    """A depth-wise convolution with odd kernels, padded so that the map keeps its size."""
    if not torch.compiler.is_compiling() and _gains(x, weight):
        return _Depthwise.apply(x, weight, bias)
    return _convolve(x, weight, bias)


def _gains(x: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and x.device.type == "cpu"
        and min(weight.shape[2:]) >= MIN_KERNEL
        and x.shape[2] * x.shape[3] <= MAX_TOKENS
        and not torch.is_autocast_enabled("cpu")
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dx = _convolve(dy, weight.flip(2, 3), None) if for_x else None
        dw = None
        if for_weight:
            b, c, h, w = x.shape
            padding = (weight.shape[2] // 2, weight.shape[3] // 2)
            # Every sample's channel is a group of its own: no two of them are summed inside the product.
            maps, kernels = x.reshape(1, b * c, h, w), dy.reshape(b * c, 1, h, w)
            dw = F.conv2d(maps, kernels, padding=padding, groups=b * c).view(b, *weight.shape).sum(0)
        return dx, dw, dy.sum((0, 2, 3)) if for_bias else None
