"""Window attention: each token attends inside its window; windows shifted by half let information cross borders.

Source: Liu et al. 2021, "Swin Transformer", section 3.2, equations 3-4.

- cost grows linearly with tokens at a fixed window
- one, two or three grid axes; any grid size (zero-padded at the end of an axis, as in the authors' dense form)
- a learned bias for each head and each relative position inside a window
- tokens of different regions of a shifted window are kept apart by a finite penalty, as the released weights were
  trained with
- prunable: heads
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads

REGION_PENALTY = -100.0


@register_mixer("window", grids=(1, 2, 3))
class WindowAttention(HeadMixer):
    """`y = W_o softmax(q k^T / sqrt(d) + B + M) v` inside windows; `B` by relative position, `M` keeps regions apart.

    Args:
        dim: channels.
        heads: attention heads.
        window: window side in tokens, the same on every axis.
        axes: number of grid axes (sets the size of the bias table), where `grid` does not say it.
        shifted: shift the grid by half a window first.
        small: what happens on a grid whose shortest axis is no longer than the window: `shrink` takes that axis as the
            window's side and does not shift (the authors' classification form), `pad` pads to the window and shifts
            all the same (their dense form).
        grid: size of the token grid, where it is known: with `shrink` the bias table is made for the window that fits.

    Raises:
        ValueError: `heads` does not divide `dim`, or the input has other grid axes than the table.
    """

    # How the grid falls into windows, and back.
    split = staticmethod(g.windows)
    join = staticmethod(g.unwindows)

    bias_index: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        window: int = 7,
        axes: int = 2,
        shifted: bool = False,
        small: Literal["shrink", "pad"] = "shrink",
        qkv_bias: bool = True,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if grid is not None:
            axes = len(grid)
        self.shifted = shifted
        self.small = small
        self.size = (window_side(window, grid, small),) * axes
        rows = 1
        for s in self.size:
            rows *= 2 * s - 1
        self.bias_table = nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, heads), std=0.02))
        self.register_buffer("bias_index", g.relative_index(self.size).flatten(), persistent=False)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        size, shape = self.size, g.lengths(x)
        if len(shape) != len(size):
            raise ValueError(f"the bias table is for {len(size)} grid axes (axes=), got input {tuple(x.shape)}")
        padded = g.pad_to_multiple(x, size)
        full = g.lengths(padded)
        offset = shift_offset(shape, size, self.shifted, self.small)
        w = self.split(g.shift(padded, [-o for o in offset]), size)
        q, k, v = self.project(w)
        bias = self.relative_bias()
        if any(offset):
            y = self._attend_regions(q, k, v, bias, g.shift_penalty(full, size, offset, REGION_PENALTY).to(bias))
        else:
            y = join_heads(attention(q, k, v, bias=bias))
        return g.crop(g.shift(self.join(linear(self.proj, y), size, full), offset), shape)

    def relative_bias(self) -> Float[Tensor, "1 h n n"]:
        """`B[h, i, j] = table[index(i, j), h]`."""
        n = round(len(self.bias_index) ** 0.5)
        # An embedding look-up: its gradient is far cheaper than that of indexing.
        return (
            F.embedding(self.bias_index.to(self.bias_table.device), self.bias_table)
            .view(n, n, self.heads)
            .permute(2, 0, 1)[None]
        )

    def _attend_regions(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, penalty: Float[Tensor, "w n n"]
    ) -> Float[Tensor, "bw n c"]:
        count, n = penalty.shape[:2]
        bias = bias + penalty[:, None]
        if bias.requires_grad or torch.onnx.is_in_onnx_export():
            # Written-out attention copies q, k and v anyway. With windows among the heads the bias broadcasts.
            q, k, v = (t.unflatten(0, (-1, count)).flatten(1, 2) for t in (q, k, v))
            y = attention(q, k, v, bias=bias.flatten(0, 1)[None])
            return y.unflatten(1, (count, self.heads)).transpose(2, 3).reshape(-1, n, self.heads * self.head_dim)
        bias = bias.expand(q.shape[0] // count, *bias.shape).flatten(0, 1)
        return join_heads(attention(q, k, v, bias=bias))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        self.bias_table = nn.Parameter(self.bias_table.detach()[:, index].clone())


def window_side(window: int, grid: tuple[int, ...] | None, small: str) -> int:
    """The side of the window that fits a grid: its shortest axis, if that is no longer than the window."""
    return min(window, *grid) if grid is not None and small == "shrink" else window


def shift_offset(grid: tuple[int, ...], size: tuple[int, ...], shifted: bool, small: str) -> tuple[int, ...]:
    """Half a window on each axis, or none where the rule for small grids says so."""
    if not shifted or (small == "shrink" and min(grid) <= size[0]):
        return (0,) * len(size)
    return tuple(s // 2 for s in size)
