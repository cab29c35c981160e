"""Pooling: every token becomes the mean of its neighbourhood, less itself.

Source: Yu et al. 2021, "MetaFormer Is Actually What You Need for Vision", section 3.2.

- no parameters; cost grows linearly with tokens
- one, two or three grid axes
- a mean at the border counts only the tokens that exist
"""

from jaxtyping import Float
from torch import Tensor

from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.grid import mean_filter


@register_mixer("pool", grids=(1, 2, 3))
class Pool(Mixer):
    """`y = mean(neighbourhood of x) - x`.

    Args:
        dim: channels.
        size: neighbourhood width in tokens, odd.

    Raises:
        ValueError: `size` is even or below 1.
    """

    def __init__(self, dim: int, *, size: int = 3) -> None:
        super().__init__(dim)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, got {size}")
        self.size = size

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return mean_filter(x, self.size) - x
