"""Grouped-query attention with rotary positions: the attention of Llama and most open language models.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"; Ainslie et al. 2023, "GQA";
Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", section 2.

- positions are counted from the first token given, or from the length of the decoding cache, which holds turned keys
- `kv_heads = heads` is multi-head attention with rotary positions
- head width is free of `dim / heads`
- prunable: groups, each with its query heads
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.grouped_query import GroupedQueryAttention
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.rotary import rotary_frequencies, rotate


@register_mixer("rotary_gqa", grids=(1,), causal=True)
class RotaryAttention(GroupedQueryAttention):
    """`y_t = W_o concat_h(softmax((R_t q_h)^T (R_s k_g) / sqrt(d)) v_g)`, `R_t` the rotation of position t.

    Args:
        dim: channels.
        qkv_bias: whether the input products add a bias; `out_bias` the output product.
        base: of the rotary frequencies; `scaling` slows them down, see `gossamer.ops.rotary.rotary_frequencies`.
        shared: the other keywords of `GroupedQueryAttention`.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given, `kv_heads` does not divide `heads`, or an
            odd head width.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(dim, qkv_bias=qkv_bias, out_bias=out_bias, **shared)
        # Made from the settings, so no weight; in single precision whatever the model's.
        self.register_buffer("frequencies", rotary_frequencies(self.head_dim, base, scaling), persistent=False)

    def project(self, x: Float[Tensor, "b n c"], start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values; `start` is the position of the first token."""
        q, k, v = super().project(x)
        f = self.frequencies.float()
        positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
        return rotate(q, positions, f), rotate(k, positions, f), v

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        q, k, v = self.project(x_t[:, None], start=state[0].shape[2])
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.proj(join_heads(attention(q, k, v)))[:, 0], (k, v)
