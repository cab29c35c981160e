"""Convolutions on channels-last grids of one, two or three axes.

The weight has PyTorch's layout `(out, in / groups, *kernel)`, so official checkpoints load as they are. The input
is seen through a permuted view, which is PyTorch's channels_last memory format: nothing is copied. Nor is the weight
where `hold_channels_last` put it into that format too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.norms import BatchNorm
from gossamer.ops.compiled import channels_last_strides, conv2d
from gossamer.ops.depthwise import depthwise_conv


def Conv(
    dim: int,
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = True,
    axes: int = 2,
) -> nn.Module:
    """A convolution over `axes` grid axes, padded by `kernel // 2` unless said otherwise."""
    base = (_Conv1d, _Conv2d, _Conv3d)[axes - 1]
    return base(dim, out, kernel, stride, kernel // 2 if padding is None else padding, groups=groups, bias=bias)


class Conv2d(nn.Conv2d):
    """PyTorch's own, called by a compiler as it is (`gossamer.ops.compiled`)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Conv1d(nn.Conv1d):
    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m o"]:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class _Conv2d(Conv2d):
    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        image = x.movedim(-1, 1)
        if self.groups == self.in_channels == self.out_channels and self._same():
            return depthwise_conv(image, self.weight, self.bias).movedim(1, -1)
        return super().forward(image).movedim(1, -1)

    def _same(self) -> bool:
        kernel = self.kernel_size
        odd = kernel[0] % 2 == 1 and kernel[1] % 2 == 1 and self.padding == (kernel[0] // 2, kernel[1] // 2)
        return odd and self.stride == (1, 1) and self.dilation == (1, 1) and self.padding_mode == "zeros"


class _Conv3d(nn.Conv3d):
    def forward(self, x: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b s i j o"]:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class ConvNorm(nn.Module):
    """`act(norm(conv(x)))`: the piece stems and merges are made of."""

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = True,
        norm: Callable[[int], nn.Module] = BatchNorm,
        act: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.conv = Conv(dim, out, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        self.norm = norm(out)
        self.act = act()

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j o"]:
        return self.act(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """`y = x * gate(W2 act(W1 mean(x)))`: every channel is weighted by what all places say together.

    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3.

    Args:
        dim: channels.
        hidden: channels between the two products.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.SiLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.gate = gate()

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        seen = x.flatten(1, -2).mean(1)
        weight = self.gate(self.fc2(self.act(self.fc1(seen))))
        return x * weight.view(x.shape[0], *[1] * (x.ndim - 2), -1)


def max_pool(x: Float[Tensor, "b h w c"], size: int, stride: int, padding: int) -> Float[Tensor, "b i j c"]:
    """Max-pooling of a channels-last map."""
    return F.max_pool2d(x.movedim(-1, 1), size, stride, padding).movedim(1, -1)


def hold_channels_last(model: nn.Module) -> None:
    """Brings kernels into the memory format of the maps they meet; otherwise each call copies them first.

    Of a stride-2 convolution from 320 to 512 channels of a 14x14 map that copy is nearly half the time. Shapes, names
    and numbers stay.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            held = torch.empty_strided(
                weight.shape, channels_last_strides(weight.shape), dtype=weight.dtype, device=weight.device
            )
            module.weight.data = held.copy_(weight)


def channels_last(image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b i height width"]:
    """The image in PyTorch's channels_last memory format, so that convolutions answer in it.

    One channel lies the same in either format; unless its strides say channels last, convolutions answer in the other.
    """
    if image.shape[1] == 1:
        return image[:, 0].contiguous()[..., None].movedim(-1, 1)
    return image.contiguous(memory_format=torch.channels_last)
