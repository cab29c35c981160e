"""Window MLP: a learned linear map over the tokens of a window, one for each group of channels; no attention.

Source: Liu et al. 2021, "Swin Transformer", table 12 (Swin-MLP), after Tolstikhin et al. 2021, "MLP-Mixer".

- cost grows linearly with tokens at a fixed window
- windows are shifted by padding the grid, not by rolling it: no mask is needed
- one, two or three grid axes; any grid size (zero-padded at the end of an axis)
"""

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.mixers.base import Mixer, register_mixer
from gossamer.mixers.window import shift_offset, window_side
from gossamer.ops import grid as g


@register_mixer("window_mlp", grids=(1, 2, 3))
class WindowMlp(Mixer):
    """`y_h = W_h x_h + b_h` over the tokens of a window, `x_h` the channels of group h.

    Args:
        dim: channels.
        heads: groups of channels.
        window: window side in tokens, the same on every axis.
        axes: number of grid axes, where `grid` does not say it.
        shifted: move the windows by half their side.
        small: the rule for small grids, as of window attention.
        grid: size of the token grid, where it is known: with `shrink` the map is made for the window that fits.

    Raises:
        ValueError: `heads` does not divide `dim`, or the input has other grid axes than the map.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        window: int = 7,
        axes: int = 2,
        shifted: bool = False,
        small: Literal["shrink", "pad"] = "shrink",
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if grid is not None:
            axes = len(grid)
        self.heads = heads
        self.shifted = shifted
        self.small = small
        self.size = (window_side(window, grid, small),) * axes
        n = prod(self.size)
        bound = n**-0.5
        self.weight = nn.Parameter(torch.empty(heads, n, n).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, n).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        size, shape = self.size, g.lengths(x)
        if len(shape) != len(size):
            raise ValueError(f"the map is for {len(size)} grid axes (axes=), got input {tuple(x.shape)}")
        offset = shift_offset(shape, size, self.shifted, self.small)
        before = [s - o if o else 0 for s, o in zip(size, offset, strict=True)]
        after = [-(n + b) % s for n, b, s in zip(shape, before, size, strict=True)]
        if any(before) or any(after):
            x = F.pad(x, [0, 0] + [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
        full = g.lengths(x)
        w = g.windows(x, size).unflatten(-1, (self.heads, -1))
        # (heads, tokens, windows * channels): one product for each head does all windows.
        mixed = torch.baddbmm(self.bias[:, :, None], self.weight, w.permute(2, 1, 0, 3).flatten(2))
        mixed = mixed.unflatten(2, (w.shape[0], w.shape[3])).permute(2, 1, 0, 3).flatten(2)
        y = g.unwindows(mixed, size, full)
        for axis, (start, length) in enumerate(zip(before, shape, strict=True), 1):
            y = y.narrow(axis, start, length)
        return y
