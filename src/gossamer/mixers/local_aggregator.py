"""Local relation aggregator: what a token takes from each neighbour is learned for their offset, not computed.

Source: Li et al. 2022, "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning",
section 3.2, equations 4-5 (local MHRA).

- attention's form, values in and a product out, with an affinity that is a table over offsets: every channel is a head
- no softmax, no activation; cost grows linearly with tokens
- one, two or three grid axes, any size
- prunable: channels between the two products
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, slice_depthwise, slice_linear
from gossamer.mixers.base import Mixer, register_mixer


@register_mixer("local_aggregator", grids=(1, 2, 3))
class LocalAggregator(Mixer):
    """`y_p = W_o (a + sum_r A_r * v_{p + r})`, `v = W_v x`, `|r| <= kernel / 2` on each axis, zero outside the grid.

    Args:
        dim: channels.
        kernel: neighbourhood width in tokens, odd.
        axes: number of grid axes, where `grid` does not say it.

    Raises:
        ValueError: `kernel` is even or below 1.
    """

    affinity: Any

    def __init__(self, dim: int, *, kernel: int = 5, axes: int = 2, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(dim)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.value = nn.Linear(dim, dim)
        self.affinity = Conv(dim, dim, kernel, groups=dim, axes=len(grid) if grid else axes)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return linear(self.proj, self.affinity(linear(self.value, x)))

    def widths(self) -> dict[str, int]:
        return {"channels": self.value.out_features}

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        check_axis(self, axis)
        values = self.value.weight.detach().norm(dim=1) * self.affinity.weight.detach().flatten(1).norm(dim=1)
        return values * self.proj.weight.detach().norm(dim=0)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        with torch.no_grad():
            slice_linear(self.value, index, inputs=False)
            slice_depthwise(self.affinity, index)
            slice_linear(self.proj, index, inputs=True)
