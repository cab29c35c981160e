"""Prefix tuning: attention that also reads a few learned keys and values.

`y = W_o concat_h(softmax(q_h [p_h; k_h]^T / sqrt(d)) [r_h; v_h])`, p and r learned.

Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation".

- without the paper's reparametrisation by an MLP, which is for training only; values start at zero, so that a new
  prefix only takes a share of the attention
- whatever is masked, the prefix is read
- the causal form decodes with a cache that begins with the prefix
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.mixers.attention import Attention
from gossamer.mixers.base import register_mixer
from gossamer.ops.attention import attention, join_heads


@register_mixer("prefix_attention", grids=(1, 2, 3), causal=True)
class PrefixAttention(Attention):
    """Attention over the tokens and `slots` learned keys and values.

    Args:
        dim: channels.
        slots: learned keys and values of each head.
        heads, head_dim, qkv_bias, out_bias, attn_drop, drop, causal: as of `Attention`.

    Raises:
        ValueError: `slots` is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        slots: int = 8,
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
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.prefix_k = nn.Parameter(0.02 * torch.randn(self.heads, slots, self.head_dim))
        self.prefix_v = nn.Parameter(torch.zeros(self.heads, slots, self.head_dim))

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m c"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        q, k, v = self._project(x.flatten(1, -2), context)
        keys = None if mask is None or context is not None else mask.flatten(1)[:, None, None, :]
        y = attention(
            q, k, v,
            mask=keys,
            causal=self.causal and context is None,
            sinks=(self.prefix_k, self.prefix_v),
            dropout=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        y = linear(self.proj, join_heads(y))
        return (y if self.drop is None else self.drop(y)).view(x.shape)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        k, v = (p.to(device, dtype).expand(batch, -1, -1, -1) for p in (self.prefix_k, self.prefix_v))
        return k, v

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        for name in ("prefix_k", "prefix_v"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[index].clone()))
