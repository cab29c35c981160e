"""Simplified linear attention: ReLU features in place of the softmax, a convolution of the values beside them.

Source: Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization", section 3.3.

- `q (k^T v)` or `(q k^T) v`, whichever takes fewer products; no scale, no focusing function
- keys get a learned position each, which starts at zero; another grid gets the table resized
- the convolution has one set of weights that all heads share; it gives back the rank that few features lose
- in CSWin every channel has another convolution of width 3 (`lepe`); the two are one convolution, of the sum of kernels
- inside windows where the map is larger than one; windows of a shifted map are not masked
- written from the paper's description: the authors' code has no licence
- prunable: heads
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.conv import Conv
from gossamer.layers.linear import linear
from gossamer.layers.positions import resize_positions
from gossamer.layers.prune import check_axis, expand_heads, slice_depthwise
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import join_heads, split_heads
from gossamer.ops.depthwise import depthwise_conv
from gossamer.ops.linear_attention import linear_attention, relu


@register_mixer("simplified_linear", grids=(2,))
class SimplifiedLinear(HeadMixer):
    """`y = W_o (q' S / (q' z + 1e-6) + D v)`, `S = sum_j k'_j v_j^T`, `z = sum_j k'_j`.

    `q' = relu(q)`, `k' = relu(k + P)`, `D` a depth-wise convolution.

    Args:
        dim: channels.
        heads: attention heads.
        kernel: side of the depth-wise kernel `D`, odd.
        window: window side in tokens, None for the whole map.
        shifted: shift the map by half a window first, where it is larger than one.
        lepe: a depth-wise kernel of width 3 for every channel beside `D`.
        grid: size of the token grid.

    Raises:
        ValueError: `heads` does not divide `dim`, or `kernel` is below 3 with `lepe`.
    """

    conv: Any

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kernel: int = 5,
        window: int | None = None,
        shifted: bool = False,
        lepe: bool = False,
        qkv_bias: bool = True,
        grid: tuple[int, ...],
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if lepe and kernel < 3:
            raise ValueError(f"kernel must be at least 3 with lepe, got {kernel}")
        self.window = window
        self.shifted = shifted
        self.size = tuple(grid) if window is None else tuple(min(window, n) for n in grid)
        self.conv = Conv(self.head_dim, self.head_dim, kernel, groups=self.head_dim)
        self.lepe: Any = Conv(dim, dim, 3, groups=dim) if lepe else None
        self.positions = nn.Parameter(torch.zeros(1, self.size[0] * self.size[1], dim))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        shape = x.shape[1:-1]
        if self.window is None or max(shape) <= self.window:
            return self._attend(x)
        size = tuple(min(self.window, n) for n in shape)
        offset = tuple(s // 2 if self.shifted and n > s else 0 for s, n in zip(size, shape, strict=True))
        padded = g.pad_to_multiple(x, size)
        w = g.windows(g.shift(padded, [-o for o in offset]), size)
        y = self._attend(w.unflatten(1, size)).flatten(1, 2)
        return g.crop(g.shift(g.unwindows(y, size, tuple(padded.shape[1:-1])), offset), shape)

    def _attend(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:-1])
        q, k, v = linear(self.qkv, x.flatten(1, 2)).chunk(3, -1)
        k = k + resize_positions(self.positions, self.size, size, mode="bilinear")
        heads = self.heads
        y = linear_attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), relu)
        weight, bias = self.conv.weight.repeat(heads, 1, 1, 1), self.conv.bias.repeat(heads)
        if self.lepe is not None:
            weight = weight + F.pad(self.lepe.weight, [weight.shape[-1] // 2 - 1] * 4)
            bias = bias + self.lepe.bias
        near = depthwise_conv(v.unflatten(1, size).movedim(-1, 1), weight, bias)
        return linear(self.proj, join_heads(y).view(x.shape[0], *size, -1) + near.movedim(1, -1))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        super().keep(axis, index)
        self.positions = nn.Parameter(self.positions.detach()[..., channels].clone())
        if self.lepe is not None:
            slice_depthwise(self.lepe, channels)
