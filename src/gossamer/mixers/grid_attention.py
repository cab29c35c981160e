"""Grid attention: tokens spread evenly over the whole map attend to each other, as many of them as a window holds.

Source: Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer", section 3.2.

- cost grows linearly with tokens; what is near is left to window attention, with which it alternates
- one window-attention block and one grid-attention block let every token read every other where no axis of the grid is
  longer than the square of the window's side
- one, two or three grid axes; any grid size (zero-padded at the end of an axis)
- a learned bias for each head and each relative position on the lattice
- prunable: heads
"""

from typing import Literal

from gossamer.mixers.base import register_mixer
from gossamer.mixers.window import WindowAttention
from gossamer.ops import grid as g


@register_mixer("grid_attention", grids=(1, 2, 3))
class GridAttention(WindowAttention):
    """`y = W_o softmax(q k^T / sqrt(d) + B) v` among the tokens at `i * side / window + offset`, for each offset.

    Args:
        dim: channels.
        heads: attention heads.
        window: tokens of the lattice on every axis.
        axes: number of grid axes (sets the size of the bias table), where `grid` does not say it.
        small: `shrink` takes the grid's shortest axis for the lattice's side where that is shorter, `pad` pads.
        grid: size of the token grid, where it is known: with `shrink` the bias table is made for the lattice that fits.

    Raises:
        ValueError: `heads` does not divide `dim`, or the input has other grid axes than the table.
    """

    split = staticmethod(g.dilated_windows)
    join = staticmethod(g.undilated_windows)

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        window: int = 7,
        axes: int = 2,
        small: Literal["shrink", "pad"] = "shrink",
        qkv_bias: bool = True,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, window=window, axes=axes, small=small, qkv_bias=qkv_bias, grid=grid)
