"""Window attention: each token attends inside its window; windows shifted by half let information cross borders.

Source: Liu et al. 2021, "Swin Transformer", section 3.2, equations 3-4.

- cost grows linearly with tokens at a fixed window
- one, two or three grid axes; any grid size (zero-padded at the end of an axis, as in the authors' dense form)
- a learned bias for each head and each relative position inside a window
- prunable: heads
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads

# Released weights were trained with this finite penalty between tokens of different regions.
REGION_PENALTY = -100.0


@register_mixer("window", grids=(1, 2, 3))
class WindowAttention(HeadMixer):
    """`y = W_o softmax(q k^T / sqrt(d) + B + M) v` inside windows; `B` by relative position, `M` keeps regions apart.

    Args:
        dim: channels.
        heads: attention heads.
        window: window side in tokens, the same on every axis.
        axes: number of grid axes (sets the size of the bias table).
        shifted: shift the grid by half a window first.
        small: what happens on an axis no longer than the window: `shrink` takes the whole axis as the window and
            does not shift (the authors' classification form), `pad` pads it (their dense form).
        grid: size of the token grid, where it is known: with `shrink` the bias table is made for the window that fits.

    Raises:
        ValueError: `heads` does not divide `dim`.
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
        qkv_bias: bool = True,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if grid is not None:
            axes = len(grid)
        self.shifted = shifted
        self.small = small
        self.size = (window,) * axes
        if grid is not None and small == "shrink" and min(grid) <= window:
            self.size, self.shifted = (min(grid),) * axes, False
        rows = 1
        for s in self.size:
            rows *= 2 * s - 1
        self.bias_table = nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, heads), std=0.02))
        self.register_buffer("bias_index", g.relative_index(self.size), persistent=False)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        size = self.size
        shape = x.shape[1:-1]
        padded = g.pad_to_multiple(x, size)
        full = tuple(padded.shape[1:-1])
        offset = tuple(s // 2 if self.shifted else 0 for s in size)
        if self.small == "shrink":
            offset = tuple(0 if n <= s else o for n, s, o in zip(full, size, offset, strict=True))
        w = g.windows(g.shift(padded, [-o for o in offset]), size)
        q, k, v = self.project(w)
        y = attention(q, k, v, bias=self._bias(full, offset, len(w)))
        y = self.proj(join_heads(y))
        return g.crop(g.shift(g.unwindows(y, size, full), offset), shape)

    def _bias(self, full: tuple[int, ...], offset: tuple[int, ...], count: int) -> Tensor:
        n = self.bias_index.shape[0]
        bias = self.bias_table[self.bias_index.flatten()].view(n, n, self.heads).permute(2, 0, 1)[None]
        if not any(offset):
            return bias
        apart = ~g.shift_mask(full, self.size, offset).to(bias.device)
        bias = bias + apart[:, None].to(bias.dtype) * REGION_PENALTY
        return bias.repeat(count // len(bias), 1, 1, 1)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        self.bias_table = nn.Parameter(self.bias_table.detach()[:, index].clone())
