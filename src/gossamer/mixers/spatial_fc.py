"""Spatial linear map: every token becomes a learned weighted sum of all tokens, the same for every channel.

Source: Yu et al. 2021, "MetaFormer Is Actually What You Need for Vision", table 5 (spatial MLP).

- bound to one grid size; cost grows with the square of the tokens
"""

from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.mixers.base import Mixer, register_mixer


@register_mixer("spatial_fc", grids=(1, 2, 3))
class SpatialFc(Mixer):
    """`y_i = sum_j W_ij x_j`.

    Args:
        dim: channels.
        grid: size of the token grid.

    Raises:
        ValueError: the input has another grid.
    """

    def __init__(self, dim: int, *, grid: tuple[int, ...]) -> None:
        super().__init__(dim)
        self.grid = grid
        self.fc = nn.Linear(prod(grid), prod(grid), bias=False)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        if tuple(x.shape[1:-1]) != self.grid:
            raise ValueError(f"the spatial map is for a grid of {self.grid}, got {tuple(x.shape[1:-1])}")
        return (self.fc.weight @ x.flatten(1, -2)).view(x.shape)
