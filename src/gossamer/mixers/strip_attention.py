"""Strip self-attention: keys and values from a shrunken map, queries and keys squeezed to one number a head.

Source: Xu et al. 2025, "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", a reconstruction from the
abstract and from the squeezed cross-attention of the authors' sister paper.

- with `qk_dim=1` the logits of a head are the outer product of two strips, a matrix of rank one
- cost of the affinities `n m h` for n tokens and m keys, in place of `n^2 c`
- the map is shrunken by a depth-wise strided convolution and a batch norm; maps are zero-padded to whole cells
- `ratio=1, qk_dim=dim / heads` is plain multi-head attention
- prunable: heads
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads, split_heads
from gossamer.ops.grid import pad_to_multiple


@register_mixer("strip_attention", grids=(1, 2, 3))
class StripAttention(Mixer):
    """`y = W_o concat_h(softmax(q_h k_h^T / sqrt(p)) v_h)`, `q = W_q x`, `k, v = W_kv norm(D x)`.

    `q_h` and `k_h` are p numbers a token, `v_h` has `dim / heads`; `D` is a depth-wise convolution of side and stride
    `ratio`.

    Args:
        dim: channels.
        heads: attention heads.
        ratio: side of the cells that become one key each; 1 keeps the map.
        qk_dim: p, channels of a head's queries and keys.
        axes: number of grid axes, where `grid` does not say it.
        grid: size of the token grid, where it is known.

    Raises:
        ValueError: `heads` does not divide `dim`, or `ratio` or `qk_dim` is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        ratio: int = 2,
        qk_dim: int = 1,
        axes: int = 2,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if ratio < 1 or qk_dim < 1:
            raise ValueError(f"ratio and qk_dim must be at least 1, got ratio={ratio}, qk_dim={qk_dim}")
        self.heads = heads
        self.head_dim = dim // heads
        self.ratio = ratio
        self.qk_dim = qk_dim
        axes = len(grid) if grid else axes
        self.reduce = Conv(dim, dim, ratio, stride=ratio, padding=0, groups=dim, axes=axes) if ratio > 1 else None
        self.norm = BatchNorm(dim) if ratio > 1 else None
        self.q = nn.Linear(dim, heads * qk_dim)
        self.kv = nn.Linear(dim, heads * qk_dim + dim)
        self.proj = nn.Linear(dim, dim)

    @property
    def norm_pairs(self) -> tuple[tuple[str, str], ...]:
        return (("reduce", "norm"),) if self.ratio > 1 else ()

    @property
    def input_products(self) -> tuple[str, ...]:
        """What alone reads the input; the strided convolution reads it too, with zeros around it."""
        return ("q", "kv") if self.ratio == 1 else ()

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        strips = self.heads * self.qk_dim
        q = linear(self.q, x.flatten(1, -2))
        k, v = linear(self.kv, self.reduced(x).flatten(1, -2)).split((strips, self.heads * self.head_dim), -1)
        y = attention(*(split_heads(t, self.heads) for t in (q, k, v)))
        return linear(self.proj, join_heads(y)).view(x.shape)

    def reduced(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *small c"]:
        """The map that keys and values are made of."""
        if self.reduce is None or self.norm is None:
            return x
        return self.norm(self.reduce(pad_to_multiple(x, (self.ratio,) * (x.ndim - 2))))

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.kv.weight.detach()[self.heads * self.qk_dim :].view(self.heads, -1).norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        strips, values = expand_heads(index, self.qk_dim), expand_heads(index, self.head_dim)
        slice_linear(self.q, strips, inputs=False)
        slice_linear(self.kv, torch.cat((strips, values + self.heads * self.qk_dim)), inputs=False)
        slice_linear(self.proj, values, inputs=True)
        self.heads = len(index)
