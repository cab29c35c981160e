"""Prefix tuning: attention that also reads a few learned keys and values.

`y = W_o concat_h(softmax(q_h [p_h; k_h]^T / sqrt(d)) [r_h; v_h])`, p and r learned.

Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation".

- without the paper's reparametrisation by an MLP, which is for training only; values start at zero, so that a new
  prefix only takes a share of the attention
- whatever is masked, the prefix is read
- the causal form decodes with a cache that begins with the prefix
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gossamer.mixers.attention import Attention
from gossamer.mixers.base import register_mixer
from gossamer.ops.attention import attention


@register_mixer("prefix_attention", grids=(1, 2, 3), causal=True)
class PrefixAttention(Attention):
    """Attention over the tokens and `slots` learned keys and values.

    Args:
        dim: channels.
        slots: learned keys and values of each head.
        shared: keywords of `Attention`.

    Raises:
        ValueError: `slots` is below 1.
    """

    def __init__(self, dim: int, *, slots: int = 8, **shared: Any) -> None:
        super().__init__(dim, **shared)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.prefix_k = nn.Parameter(0.02 * torch.randn(self.heads, slots, self.head_dim))
        self.prefix_v = nn.Parameter(torch.zeros(self.heads, slots, self.head_dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        return attention(q, k, v, mask=mask, causal=causal, sinks=(self.prefix_k, self.prefix_v), dropout=drop)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        k, v = (p.to(device, dtype).expand(batch, -1, -1, -1) for p in (self.prefix_k, self.prefix_v))
        return k, v

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        for name in ("prefix_k", "prefix_v"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[index].clone()))
