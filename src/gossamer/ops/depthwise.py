"""Depth-wise convolution of maps, with a fast weight gradient on CPU.

`y_{p, c} = b_c + sum_r w_{r, c} x_{p + r, c}`; hence `dw_{r, c} = sum_p dy_{p, c} x_{p + r, c}`, which is again a
depth-wise convolution: of the input, with the output's gradient as its kernel.

- CPU libraries are quick at that product and slow at their own weight gradient (up to 100 times, on small maps)
- kernels of 3 are left to the library, which has a form of its own for them
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.compiled import channels_last_conv2d, conv2d, traced

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]
WeightGradient = Callable[[Tensor, Tensor, Sequence[int]], Tensor]

MIN_KERNEL = 5
# One output of the product sums a whole map; beyond this the sum loses digits and the gain is gone.
MAX_TOKENS = 128 * 128


def depthwise_conv(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 k k2"], bias: Float[Tensor, " c"] | None
) -> Float[Tensor, "b c h w"]:
    """A depth-wise convolution with odd kernels, padded so that the map keeps its size."""
    if not _gains(x, weight):
        return _convolve(x, weight, bias)
    if traced(x, weight):
        return torch.ops.gossamer.depthwise_conv.default(x, weight, bias)
    return _convolve(x, weight, bias) if torch.compiler.is_compiling() else _Depthwise.apply(x, weight, bias)


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


def _weight_gradient(x: Tensor, dy: Tensor, kernel: Sequence[int]) -> Tensor:
    b, c, h, w = x.shape
    # Every sample's channel is a group of its own: no two of them are summed inside the product.
    maps, kernels = x.reshape(1, b * c, h, w), dy.reshape(b * c, 1, h, w)
    dw = F.conv2d(maps, kernels, padding=(kernel[0] // 2, kernel[1] // 2), groups=b * c)
    return dw.view(b, c, 1, *kernel).sum(0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, dy: Tensor, convolve: Convolve, weight_gradient: WeightGradient) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    dx = convolve(dy, weight.flip(2, 3), None) if for_x else None
    dw = weight_gradient(x, dy, weight.shape[2:]) if for_weight else None
    return dx, dw, dy.sum((0, 2, 3)) if for_bias else None


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_keep)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _convolve, _weight_gradient)


# The same for compilers, which are to see no convolution (`gossamer.ops.compiled`).
_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("depthwise_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("depthwise_weight_gradient(Tensor x, Tensor dy, int[] kernel) -> Tensor")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return channels_last_conv2d(x, weight, bias, 1, padding, 1, x.shape[1])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    ops = torch.ops.gossamer
    return _gradients(ctx, dy, ops.depthwise_conv.default, ops.depthwise_weight_gradient.default)


_library.impl("depthwise_conv", _forward, "CPU")
_library.impl("depthwise_weight_gradient", _weight_gradient, "CPU")
torch.library.register_fake("gossamer::depthwise_conv", _forward, lib=_library)
torch.library.register_fake(
    "gossamer::depthwise_weight_gradient", lambda x, dy, kernel: x.new_empty(x.shape[1], 1, *kernel), lib=_library
)
torch.library.register_autograd("gossamer::depthwise_conv", _backward, setup_context=_keep, lib=_library)
