"""Where a token is: sinusoid tables, learned tables, and resizing either to another grid."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sinusoid(length: int, dim: int, *, base: float = 10000.0) -> Float[Tensor, "n c"]:
    """`t[p, 2i] = sin(p / base^(2i/dim))`, `t[p, 2i+1] = cos(p / base^(2i/dim))`.

    Source: Vaswani et al. 2017, section 3.5. Odd `dim` drops the last cosine.
    """
    rates = torch.exp(torch.arange(0, dim, 2) * (-torch.tensor(base).log() / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim]


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
