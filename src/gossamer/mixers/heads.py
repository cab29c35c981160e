"""What all mixers with one fused query/key/value product share: the two products, and how heads are pruned."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer


class HeadMixer(Mixer):
    """Base of multi-head mixers: `qkv` (rows ordered q, k, v, each head-major) and `proj`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * self.head_dim, dim, bias=out_bias)

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each `(b, heads, n, head_dim)`."""
        # Split before the axes are swapped: their gradients are then joined in the product's own layout, in one copy.
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.qkv.weight.detach().view(3, self.heads, -1)[2].norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        inner = self.heads * self.head_dim
        slice_linear(self.qkv, torch.cat([channels + part * inner for part in range(3)]), inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        self.heads = len(index)
