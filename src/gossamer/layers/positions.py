"""Where a token is: sinusoid tables, learned tables, resizing either to another grid, and positions by convolution."""

from collections.abc import Sequence
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.conv import Conv


def sinusoid(length: int, dim: int, *, base: float = 10000.0) -> Float[Tensor, "n c"]:
    """`t[p, 2i] = sin(p / base^(2i/dim))`, `t[p, 2i+1] = cos(p / base^(2i/dim))`.

    Source: Vaswani et al. 2017, section 3.5. Odd `dim` drops the last cosine.
    """
    # In double: in single precision the angle of a far position is off by more than the table's own precision.
    rates = base ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim].float()


def resize_positions(
    table: Float[Tensor, "1 n c"],
    old: Sequence[int],
    new: Sequence[int],
    *,
    prefix: int = 0,
    mode: Literal["bilinear", "bicubic"] = "bicubic",
) -> Float[Tensor, "1 m c"]:
    """A position table resized as an image from the token grid `old` to `new`; the first `prefix` rows stay.

    Raises:
        ValueError: the table has not `prefix + prod(old)` rows.
    """
    if table.shape[1] != prefix + old[0] * old[1]:
        raise ValueError(f"table has {table.shape[1]} rows, expected {prefix} + {old[0]}x{old[1]}")
    if tuple(old) == tuple(new):
        return table
    kept, grid = table[:, :prefix], table[:, prefix:]
    image = grid.unflatten(1, tuple(old)).movedim(-1, 1).float()
    image = F.interpolate(image, tuple(new), mode=mode, align_corners=False)
    return torch.cat((kept, image.movedim(1, -1).flatten(1, 2).to(table.dtype)), 1)


def table_layout(rows: int, grid: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """How many rows of a position table are for tokens in front (none or one), and the grid of the others.

    It is `grid` where the number of rows fits, and a square otherwise.

    Raises:
        ValueError: neither fits.
    """
    for front in (0, 1):
        if rows - front == grid[0] * grid[1]:
            return front, (grid[0], grid[1])
    side = isqrt(rows)
    if rows - side * side > 1:
        raise ValueError(
            f"a table of {rows} positions is of no square image; build the model with img_size= of the image it is for"
        )
    return rows - side * side, (side, side)


class GridPositions(nn.Module):
    """A learned position for each place of a token grid, added: `y = x + P`.

    Args:
        dim: channels.
        grid: rows and columns of the table.
        resize: other grids get the table resized as an image; False refuses them.
    """

    def __init__(self, dim: int, grid: Sequence[int], *, resize: bool = False) -> None:
        super().__init__()
        self.resize = resize
        self.table = nn.Parameter(torch.zeros(1, *grid, dim))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        old, new = tuple(self.table.shape[1:3]), tuple(x.shape[1:3])
        if old == new:
            return x + self.table
        if not self.resize:
            raise ValueError(
                f"the position table is for a {old[0]}x{old[1]} grid, got {new[0]}x{new[1]}; give img_size="
            )
        return x + resize_positions(self.table.flatten(1, 2), old, new).unflatten(1, new)


class ConvPositions(nn.Module):
    """`y = x + D x`, D a depth-wise convolution whose zero border tells where a token is; any grid.

    Source: Chu et al. 2021, "Conditional Positional Encodings for Vision Transformers", section 3.2.
    """

    def __init__(self, dim: int, kernel: int = 3, axes: int = 2) -> None:
        super().__init__()
        self.conv = Conv(dim, dim, kernel, groups=dim, axes=axes)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return x + self.conv(x)
