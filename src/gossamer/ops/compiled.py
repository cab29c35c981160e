"""Products that a compiler calls as they are, on CPUs.

- convolutions: a compiler that sees one lays every map on the way to it with the second axis last, as if all maps were
  channels first; ours lie channels last already, and would be turned there and back (up to 1.6 times the time)
- linear layers: oneDNN's product adds the bias and takes the GELU as it goes; the compiler's choice copies the bias
- not under autocast, whose rules know the library's own operators only
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()

_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor")
_library.define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)


def compiling() -> bool:
    """Whether a compiler looks on that will run what it sees; an exporter is none."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def traced(x: Tensor, weight: Tensor) -> bool:
    """Whether a compiler looks on that these operators are for."""
    return compiling() and x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")


def linear(
    x: Float[Tensor, "*b c"], weight: Float[Tensor, "o c"], bias: Float[Tensor, " o"] | None, act: str = "none"
) -> Float[Tensor, "*b o"]:
    """`act(W x + b)` by oneDNN, `act` one of `none` and `gelu`; without gradients."""
    return torch.ops.gossamer.linear.default(x, weight, bias, act)


def conv2d(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o i k k2"],
    bias: Float[Tensor, " o"] | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "b o h2 w2"]:
    """`torch.nn.functional.conv2d` of an image in PyTorch's channels_last memory format."""
    if traced(x, weight):
        if torch.is_grad_enabled() or not (ONEDNN and _held(weight)):
            return torch.ops.gossamer.conv2d.default(x, weight, bias, stride, padding, dilation, groups)
        # Not a convolution to the compiler either, and called without Python; it has no gradient.
        x = x.contiguous(memory_format=torch.channels_last)
        how: Any = (list(padding), list(stride), list(dilation), groups, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *how)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none")


def channels_last_strides(shape: Sequence[int | torch.SymInt]) -> tuple[int | torch.SymInt, ...]:
    """Of PyTorch's channels_last memory format, axes of length one included.

    Of such an axis any stride will do; but from images and kernels that do not say channels last by every stride,
    convolutions answer in the other format.
    """
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


def _held(weight: Tensor) -> bool:
    """Whether answers are channels last for sure: the compiler counts on it."""
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight[0].numel() > 1
        and weight.stride() == channels_last_strides(weight.shape)
    )


def channels_last_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """`torch.nn.functional.conv2d` that takes an image in any memory format and answers in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x.as_strided(x.shape, channels_last_strides(x.shape)), weight, bias, *how)
    return y.contiguous(memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.how = inputs
    ctx.biases = None if bias is None else bias.shape
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    stride, padding, dilation, groups = ctx.how
    which = ctx.needs_input_grad[:3]
    grads = torch.ops.aten.convolution_backward(
        dy, *ctx.saved_tensors, ctx.biases, stride, padding, dilation, False, [0, 0], groups, which
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, which, strict=True)), None, None, None, None


_library.impl("linear", _linear, "CPU")
_library.impl("conv2d", channels_last_conv2d, "CPU")
torch.library.register_fake(
    "gossamer::linear", lambda x, weight, bias, act: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=_library
)
torch.library.register_fake("gossamer::conv2d", channels_last_conv2d, lib=_library)
torch.library.register_autograd("gossamer::conv2d", _backward, setup_context=_keep, lib=_library)
