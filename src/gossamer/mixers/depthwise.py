"""Depth-wise convolution: each channel is filtered over the grid by itself.

Source: Liu et al. 2022, "A ConvNet for the 2020s", section 2.4; Yu et al. 2021, "MetaFormer", table 5.

- cost grows linearly with tokens; a token sees its neighbourhood, `kernel` wide
- one, two or three grid axes
"""

from jaxtyping import Float
from torch import Tensor

from gossamer.layers import Conv
from gossamer.mixers.base import Mixer, register_mixer


@register_mixer("depthwise", grids=(1, 2, 3))
class Depthwise(Mixer):
    """`y_{p, c} = b_c + sum_r w_{r, c} x_{p + r, c}`, zero outside the grid.

    Args:
        dim: channels.
        kernel: neighbourhood width in tokens, odd.
        axes: number of grid axes, where `grid` does not say it.

    Raises:
        ValueError: `kernel` is even or below 1.
    """

    def __init__(
        self, dim: int, *, kernel: int = 7, axes: int = 2, bias: bool = True, grid: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(dim)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.conv = Conv(dim, dim, kernel, groups=dim, bias=bias, axes=len(grid) if grid else axes)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return self.conv(x)
