"""Spatial-reduction attention: every token asks, a shrunken map answers.

Source: Wang et al. 2021, "Pyramid Vision Transformer", section 3.3, equations 1-3; Wang et al. 2022, "PVTv2: Improved
Baselines with Pyramid Vision Transformer", section 3.1 (the linear form).

- three ways to shrink the map that keys and values come from: a strided convolution (PVT), the mean of cells, or the
  mean on a grid of fixed size (PVTv2's linear form, whose cost grows linearly with tokens)
- products of attention cost `2 n (n / R^2) c` on a map in place of `2 n^2 c`
- one, two or three grid axes; rows that fill no whole cell are not read as keys, an axis shorter than a cell is one
- `ratio=1` is plain multi-head attention
- prunable: heads
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.conv import Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads, split_heads

Reduce = Literal["conv", "pool", "adaptive"]


@register_mixer("spatial_reduction", grids=(1, 2, 3))
class SpatialReduction(Mixer):
    """`y = W_o softmax(q k^T / sqrt(d)) v`, `q = W_q x`, `k, v = W_kv reduce(x)`.

    `reduce` is `norm(conv_R(x))`, `norm(mean_R(x))` or `gelu(norm(W mean_to_size(x)))`.

    Args:
        dim: channels.
        heads: attention heads.
        ratio: side of the cells that become one key each, in tokens; 1 keeps the map (`conv` and `pool`).
        reduce: `conv` by a strided convolution, `pool` by the mean of a cell, `adaptive` by means on a fixed grid.
        size: side of that fixed grid.
        norm: factory of the norm on the shrunken map, or None.
        qkv_bias: whether the input products add a bias.
        axes: number of grid axes, where `grid` does not say it.
        grid: size of the token grid, where it is known.

    Raises:
        ValueError: `heads` does not divide `dim`, or `ratio`, `size` or `reduce` is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        ratio: int = 2,
        reduce: Reduce = "conv",
        size: int = 7,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        qkv_bias: bool = True,
        axes: int = 2,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if ratio < 1 or size < 1:
            raise ValueError(f"ratio and size must be at least 1, got ratio={ratio}, size={size}")
        if reduce not in ("conv", "pool", "adaptive"):
            raise ValueError(f"reduce must be conv, pool or adaptive, got {reduce!r}")
        if grid is not None:
            axes = len(grid)
        self.heads = heads
        self.head_dim = dim // heads
        self.ratio = ratio
        self.kind = reduce
        self.size = size
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        smaller = ratio > 1 or reduce == "adaptive"
        self.conv = None
        if smaller and reduce != "pool":
            step = ratio if reduce == "conv" else 1
            self.conv = Conv(dim, dim, step, stride=step, padding=0, axes=axes)
        self.norm = norm(dim) if norm and smaller else None

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        q = split_heads(linear(self.q, x.flatten(1, -2)), self.heads)
        kv = linear(self.kv, self.reduced(x)).unflatten(-1, (2, self.heads, self.head_dim))
        k, v = (t.transpose(1, 2) for t in kv.unbind(2))
        return linear(self.proj, join_heads(attention(q, k, v))).view(x.shape)

    def reduced(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b m c"]:
        """The tokens that keys and values are made of."""
        if self.kind == "adaptive":
            x = _adaptive_mean(x, self.size)
        elif self.kind == "pool" and self.ratio > 1:
            x = _cell_mean(x, self.ratio)
        elif self.conv is not None:
            x = _at_least(x, self.ratio)
        if self.conv is not None:
            x = self.conv(x)
        x = x.flatten(1, -2)
        if self.norm is not None:
            x = self.norm(x)
        return F.gelu(x) if self.kind == "adaptive" else x

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.kv.weight.detach().view(2, self.heads, -1)[1].norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        slice_linear(self.q, channels, inputs=False)
        slice_linear(self.kv, torch.cat((channels, channels + self.heads * self.head_dim)), inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        self.heads = len(index)


def _at_least(x: Tensor, side: int) -> Tensor:
    """Zeros at the end of every grid axis that is shorter than `side`."""
    short = [max(0, side - n) for n in x.shape[1:-1]]
    if not any(short):
        return x
    return F.pad(x, [0, 0] + [p for n in reversed(short) for p in (0, n)])


def _cell_mean(x: Tensor, side: int) -> Tensor:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    return pool(x.movedim(-1, 1), [min(side, n) for n in x.shape[1:-1]]).movedim(1, -1)


def _adaptive_mean(x: Tensor, size: int) -> Tensor:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # ONNX has no pooling to a fixed grid; a mean over an interval is a product with a constant matrix.
        for axis in range(1, x.ndim - 1):
            x = torch.tensordot(x, _interval_means(x.shape[axis], size).to(x), ([axis], [1])).movedim(-1, axis)
        return x
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.ndim - 3]
    return pool(x.movedim(-1, 1), (size,) * (x.ndim - 2)).movedim(1, -1)


def _interval_means(n: int, size: int) -> Float[Tensor, "{size} {n}"]:
    """Row i averages the tokens `floor(i n / size) .. ceil((i + 1) n / size) - 1`."""
    rows = torch.zeros(size, n)
    for i in range(size):
        start, stop = i * n // size, -(-(i + 1) * n // size)
        rows[i, start:stop] = 1 / (stop - start)
    return rows
