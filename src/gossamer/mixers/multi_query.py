"""Multi-query attention: many query heads read one shared key and value head.

Source: Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need".

- keys and values cost a head's width rather than the model's
- a token's heads all ask the same keys, so they are laid side by side as `n * heads` queries of one head; nothing is
  repeated
- the grid is read as one sequence, so any number of axes works
- prunable: heads
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention


@register_mixer("multi_query", grids=(1, 2, 3))
class MultiQueryAttention(Mixer):
    """`y = W_o concat_h(softmax(q_h k^T / sqrt(d)) v)`, `q = W_q x`, `k, v = W_kv x`.

    Args:
        dim: channels.
        heads: query heads.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        self.heads = heads
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        tokens = x.flatten(1, -2)
        q = linear(self.q, tokens).unflatten(-1, (self.heads, self.head_dim)).flatten(1, 2)
        k, v = linear(self.kv, tokens).chunk(2, -1)
        keys = None if mask is None else mask.flatten(1)[:, None, None, :]
        y = attention(q[:, None], k[:, None], v[:, None], mask=keys)[:, 0]
        return linear(self.proj, y.unflatten(1, (-1, self.heads)).flatten(2)).view(x.shape)

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        queries = self.q.weight.detach().view(self.heads, -1).norm(dim=1)
        return queries * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        with torch.no_grad():
            slice_linear(self.q, channels, inputs=False)
            slice_linear(self.proj, channels, inputs=True)
        self.heads = len(index)
