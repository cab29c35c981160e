"""Ghost attention: half of every query, key and value is a product, the other half a scaled copy of the first.

Source: Yuan et al. 2021, "Tokens-to-Token ViT", section 3.2 (T2T-ViT-Ghost), after Han et al. 2020, "GhostNet".

- halves the input products' weights; the attention itself is the ordinary one
- the grid is read as one sequence, so any number of axes works
- heads of the second half are copies of those of the first with other channel weights: none can be pruned alone
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads


@register_mixer("ghost_attention", grids=(1, 2, 3))
class GhostAttention(Mixer):
    """`y = W_o concat_h(softmax(q_h k_h^T / sqrt(d)) v_h)`, each of `q, k, v` being `[W x; s * W x]`.

    Args:
        dim: channels, even.
        heads: attention heads.
        qkv_bias: whether the input products add a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, or `dim` is odd.
    """

    def __init__(self, dim: int, *, heads: int = 8, qkv_bias: bool = False, drop: float = 0.0) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * (dim // 2), bias=qkv_bias)
        # As a depth-wise 1x1 convolution starts.
        self.scale = nn.Parameter(torch.empty(3, dim // 2).uniform_(-1, 1))
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop) if drop else None

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        half = linear(self.qkv, x.flatten(1, -2)).unflatten(-1, (3, -1))
        parts = torch.cat((half, half * self.scale), -1).unflatten(-1, (self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        y = attention(q, k, v, mask=None if mask is None else mask.flatten(1)[:, None, None, :])
        y = linear(self.proj, join_heads(y)).view(x.shape)
        return y if self.drop is None else self.drop(y)
