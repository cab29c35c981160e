"""Hard attention: every query attends the few keys that suit it best.

Source: Nagarajan et al. 2020, "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more
Accurate NLP Models".

- as many tokens as `top_k` or fewer: plain attention
- in training chosen by mask, in eval by gathering; the two are equal
- one, two or three grid axes: the grid is read as one sequence
- the causal form chooses among the keys of its cache
- prunable: heads
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.mixers.attention import Attention
from gossamer.mixers.base import register_mixer
from gossamer.ops.attention import join_heads
from gossamer.ops.hard_attention import hard_attention, hard_attention_masked


@register_mixer("hard_attention", grids=(1, 2, 3), causal=True)
class HardAttention(Attention):
    """`y_i = W_o concat_h(sum_{j in T_i} softmax_{T_i}(q_i . k / sqrt(d))_j v_j)`, `T_i` the `top_k` best keys.

    Args:
        dim: channels.
        top_k: keys a query attends.
        shared: keywords of `Attention`.

    Raises:
        ValueError: `top_k` is below 1.
    """

    def __init__(self, dim: int, *, top_k: int = 8, **shared: Any) -> None:
        super().__init__(dim, **shared)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if k.shape[2] <= self.top_k:
            return super()._attend(q, k, v, mask, causal)
        if self.training:
            return hard_attention_masked(q, k, v, self.top_k, mask=mask, causal=causal, dropout=self.attn_drop)
        return hard_attention(q, k, v, self.top_k, mask=mask, causal=causal)

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        q, k, v = self._project(x_t[:, None], None)
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.proj(join_heads(hard_attention(q, k, v, self.top_k)))[:, 0], (k, v)
