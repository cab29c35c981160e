"""Hard attention: every query attends the few keys that suit it best.

Source: Nagarajan et al. 2020, "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more
Accurate NLP Models".

- as many tokens as `top_k` or fewer: plain attention
- in training chosen by mask, in eval by gathering; the two are equal
- one, two or three grid axes: the grid is read as one sequence
- the causal form chooses among the keys of its cache
- prunable: heads
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.layers.linear import linear
from gossamer.mixers.attention import Attention
from gossamer.mixers.base import register_mixer
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.hard_attention import hard_attention, hard_attention_masked


@register_mixer("hard_attention", grids=(1, 2, 3), causal=True)
class HardAttention(Attention):
    """`y_i = W_o concat_h(sum_{j in T_i} softmax_{T_i}(q_i . k / sqrt(d))_j v_j)`, `T_i` the `top_k` best keys.

    Args:
        dim: channels.
        top_k: keys a query attends.
        heads, head_dim, qkv_bias, out_bias, attn_drop, drop, causal: as of `Attention`.

    Raises:
        ValueError: `top_k` is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        top_k: int = 8,
        qkv_bias: bool = True,
        out_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            attn_drop=attn_drop,
            drop=drop,
            causal=causal,
        )
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m c"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        q, k, v = self._project(x.flatten(1, -2), context)
        keys = None if mask is None or context is not None else mask.flatten(1)[:, None, None, :]
        causal = self.causal and context is None
        drop = self.attn_drop if self.training else 0.0
        if k.shape[2] <= self.top_k:
            y = attention(q, k, v, mask=keys, causal=causal, dropout=drop)
        elif self.training:
            y = hard_attention_masked(q, k, v, self.top_k, mask=keys, causal=causal, dropout=drop)
        else:
            y = hard_attention(q, k, v, self.top_k, mask=keys, causal=causal)
        y = linear(self.proj, join_heads(y))
        return (y if self.drop is None else self.drop(y)).view(x.shape)

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        q, k, v = self._project(x_t[:, None], None)
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.proj(join_heads(hard_attention(q, k, v, self.top_k)))[:, 0], (k, v)
