"""Multi-head self-attention over all tokens, or cross-attention when a context is given.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.

- the grid is read as one sequence, so any number of axes works
- head width is free of `dim / heads` (Brown et al. 2022, "Wide Attention Is The Way Forward")
- causal form decodes with a key/value cache
- prunable: heads
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.attention import attention, join_heads, split_heads


@register_mixer("attention", grids=(1, 2, 3), causal=True)
class Attention(HeadMixer):
    """`y = W_o concat_h(softmax(q_h k_h^T / sqrt(d)) v_h)`, `q, k, v = W_qkv x`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.
        drop: dropout after the output product; `attn_drop` on the attention weights.
        causal: attend only to earlier tokens and to itself.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        self.causal = causal
        self.attn_drop = attn_drop
        self.drop = nn.Dropout(drop) if drop else None

    @classmethod
    def of(cls, other: "Attention", **options: Any) -> "Attention":
        """`other` as a mixer of this class, its weights shared, not copied; `options` are what this class has more."""
        with torch.device(other.qkv.weight.device):
            new = cls(
                other.dim,
                heads=other.heads,
                head_dim=other.head_dim,
                attn_drop=other.attn_drop,
                drop=other.drop.p if other.drop is not None else 0.0,
                causal=other.causal,
                **options,
            )
        new.qkv, new.proj = other.qkv, other.proj
        return new.train(other.training)

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m c"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        q, k, v = self._project(x.flatten(1, -2), context)
        keys = None if mask is None or context is not None else mask.flatten(1)[:, None, None, :]
        y = self._attend(q, k, v, keys, self.causal and context is None)
        y = linear(self.proj, join_heads(y))
        return (y if self.drop is None else self.drop(y)).view(x.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return attention(q, k, v, mask=mask, causal=causal, dropout=self.attn_drop if self.training else 0.0)

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            return self.project(x)
        inner = self.heads * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        q = nn.functional.linear(x, weight[:inner], None if bias is None else bias[:inner])
        kv = nn.functional.linear(context, weight[inner:], None if bias is None else bias[inner:])
        k, v = kv.chunk(2, -1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        empty = torch.empty(batch, self.heads, 0, self.head_dim, device=device, dtype=dtype)
        return empty, empty

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        q, k, v = self._project(x_t[:, None], None)
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.proj(join_heads(attention(q, k, v)))[:, 0], (k, v)
