"""Convolutional stems: an image to a map by a few convolutions, each with batch norm and activation."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.conv import ConvNorm, channels_last


class ConvStem(nn.Module):
    """`act(norm(conv(…)))` for each width; kernels are 3 pixels wide, or one more than a stride above 2.

    Args:
        widths: channels after each convolution.
        strides: step of each.
        act: activation factory.
        last_act: whether one follows the last convolution too.
        bias: whether the convolutions add one before their norm.
        least: smallest image side.

    Raises:
        ValueError: `widths` and `strides` differ in length; or, when called, the image is too small.
    """

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        act: Callable[[], nn.Module] = nn.ReLU,
        last_act: bool = True,
        bias: bool = True,
        least: int = 1,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ValueError(f"widths and strides must be of one length, got {tuple(widths)} and {tuple(strides)}")
        self.least = least
        acts = [act] * (len(widths) - 1) + [act if last_act else nn.Identity]
        self.convs = nn.Sequential(
            *(
                ConvNorm(dim, out, 3 if stride <= 2 else stride + 1, stride=stride, bias=bias, act=own)
                for (dim, out), stride, own in zip(pairwise((in_chans, *widths)), strides, acts, strict=True)
            )
        )

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        height, width = image.shape[2:]
        if min(height, width) < self.least:
            raise ValueError(f"image sides must be at least {self.least} (the deepest stride), got {height}x{width}")
        return self.convs(channels_last(image).movedim(1, -1))
