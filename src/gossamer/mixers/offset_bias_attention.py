"""Attention with wide values and a learned bias for each absolute offset between two tokens.

Source: Graham et al. 2021, "LeViT", section 3 (attention bias, values wider than keys); Li et al. 2022,
"EfficientFormer", section 3 (the 3-D block).

- one fused product gives queries, keys and values, head by head
- the bias knows how far apart two tokens are on each axis, not in which direction
- one, two or three grid axes; bound to one grid size, or resized to any (the dense form of EfficientFormer)
- the bias is gathered at every call: a copy kept for eval mode would go stale when weights are loaded or trained
- prunable: heads
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.grid import absolute_offset_index


@register_mixer("offset_bias_attention", grids=(1, 2, 3))
class OffsetBiasAttention(Mixer):
    """`y = W_o concat_h(softmax(q_h k_h^T / sqrt(d) + B_h[|i - j|]) v_h)`.

    Args:
        dim: channels.
        grid: size of the token grid that the bias table is for.
        heads: attention heads.
        key_dim: channels of a query and key, `d`.
        value_dim: channels of a value, `4 * key_dim` by default.
        resize: accept any grid, the matrix of biases resized bicubically as an image (EfficientFormer's dense form).
    """

    bias_index: Tensor

    def __init__(
        self,
        dim: int,
        *,
        grid: Sequence[int],
        heads: int = 8,
        key_dim: int = 32,
        value_dim: int | None = None,
        resize: bool = False,
    ) -> None:
        super().__init__(dim)
        self.grid = tuple(grid)
        self.heads = heads
        self.key_dim = key_dim
        self.value_dim = 4 * key_dim if value_dim is None else value_dim
        self.resize = resize
        self.qkv = nn.Linear(dim, heads * (2 * key_dim + self.value_dim))
        self.proj = nn.Linear(heads * self.value_dim, dim)
        self.bias_table = nn.Parameter(torch.zeros(heads, prod(self.grid)))
        self.register_buffer("bias_index", absolute_offset_index(self.grid).flatten(), persistent=False)

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        if not self.resize and tuple(x.shape[1:-1]) != self.grid:
            raise ValueError(
                f"the bias table is for a grid of {self.grid} tokens, got {tuple(x.shape[1:-1])}; "
                f"build the mixer with grid= of the input, or resize=True"
            )
        qkv = linear(self.qkv, x.flatten(1, -2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), -1)
        keys = None if mask is None else mask.flatten(1)[:, None, None, :]
        y = attention(q, k, v, mask=keys, bias=self.bias(q.shape[2]))
        return linear(self.proj, join_heads(y)).view(x.shape)

    def bias(self, tokens: int) -> Float[Tensor, "1 h n n"]:
        """The bias between any two of `tokens` tokens."""
        n = prod(self.grid)
        bias = self.bias_table.index_select(1, self.bias_index).view(1, self.heads, n, n)
        if self.resize:
            bias = F.interpolate(bias, (tokens, tokens), mode="bicubic")
        return bias

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.qkv.weight.detach().unflatten(0, (self.heads, -1))[:, 2 * self.key_dim :].norm(dim=(1, 2))
        return values * self.proj.weight.detach().unflatten(1, (self.heads, -1)).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        slice_linear(self.qkv, expand_heads(index, 2 * self.key_dim + self.value_dim), inputs=False)
        slice_linear(self.proj, expand_heads(index, self.value_dim), inputs=True)
        self.bias_table = nn.Parameter(self.bias_table.detach()[index].clone())
        self.heads = len(index)
