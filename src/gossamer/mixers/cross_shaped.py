"""Cross-shaped windows: half of the heads attend inside vertical stripes, the other half inside horizontal ones.

Source: Dong et al. 2021, "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
section 3.2.

- a token sees the cross of its row band and its column band; cost `n c (stripe * rows + stripe * columns)` for n tokens
- position comes from a depth-wise convolution of the values inside each stripe (LePE), so any grid size works
- a grid that stripes do not divide gets zero queries, keys and values on both sides; as in the authors' code, zero keys
  take part in the softmax
- prunable: heads, of either direction
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import expand_heads, slice_depthwise
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads


@register_mixer("cross_shaped", grids=(2,))
class CrossShapedAttention(HeadMixer):
    """`y = W_o [softmax(q k^T / sqrt(d)) v + D * v]` inside stripes, `D *` a 3x3 depth-wise convolution.

    Args:
        dim: channels.
        heads: attention heads; the first half takes vertical stripes, the second horizontal ones.
        stripe: width of a stripe in tokens; None attends over the whole grid with all heads.

    Raises:
        ValueError: `heads` does not divide `dim`, is odd where there are stripes, or `stripe` is below 1.
    """

    def __init__(self, dim: int, *, heads: int = 4, stripe: int | None = 7, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if stripe is not None and heads % 2:
            raise ValueError(f"heads must be even, half for each direction of stripes; got {heads}")
        if stripe is not None and stripe < 1:
            raise ValueError(f"stripe must be at least 1 token wide, got {stripe}")
        self.stripe = stripe
        self.shares = [heads] if stripe is None else [heads // 2, heads // 2]
        widths = [share * self.head_dim for share in self.shares]
        self.lepe = nn.ModuleList(Conv(width, width, 3, groups=width) for width in widths)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        h, w = x.shape[1:3]
        sizes = [(h, w)] if self.stripe is None else [(h, self.stripe), (self.stripe, w)]
        qkv = linear(self.qkv, x).unflatten(-1, (3, self.heads, self.head_dim))
        parts = zip(qkv.split(self.shares, -2), sizes, self.lepe, strict=True)
        y = [self._attend(part, size, lepe) for part, size, lepe in parts if part.shape[-2]]
        return linear(self.proj, torch.cat(y, -1) if len(y) > 1 else y[0])

    def _attend(
        self, qkv: Float[Tensor, "b h w 3 k d"], size: tuple[int, int], lepe: nn.Module
    ) -> Float[Tensor, "b h w kd"]:
        h, w = qkv.shape[1:3]
        below, right = -h % size[0], -w % size[1]
        top, left = below // 2, right // 2
        if below or right:
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, left, right - left, top, below - top))
        full = (h + below, w + right)
        # Horizontal stripes are a view of the grid, vertical ones a copy.
        cut = qkv.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0])).transpose(2, 3)
        q, k, v = cut.reshape(-1, size[0] * size[1], 3, *qkv.shape[4:]).unbind(2)
        near = lepe(v.reshape(-1, *size, v.shape[2] * v.shape[3])).flatten(1, 2)
        far = join_heads(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        return g.unwindows(far + near, size, full)[:, top : top + h, left : left + w]

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        index = index.sort().values
        super().keep(axis, index)
        start, shares = 0, []
        for conv, share in zip(self.lepe, self.shares, strict=True):
            kept = index[(index >= start) & (index < start + share)] - start
            slice_depthwise(conv, expand_heads(kept, self.head_dim))
            shares.append(len(kept))
            start += share
        self.shares = shares
