"""Grouped-query attention: fewer key/value heads than query heads, each read by a group of query heads.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".

- keys and values, and the decoding cache with them, take `kv_heads / heads` of what multi-head attention's take
- `kv_heads = heads` is multi-head attention; its weights become grouped ones by the mean of each group's heads
  (`group_heads`)
- one, two or three grid axes: the grid is read as one sequence
- the causal form decodes with a cache of `kv_heads` heads
- prunable: groups, each with its query heads
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads


class GroupedMixer(Mixer):
    """Base of mixers with `heads` query heads over `kv_heads` key and value heads: `qkv` (rows q, k, v) and `proj`.

    Args:
        dim: channels.
        heads: query heads.
        kv_heads: key and value heads, half of `heads` by default.
        head_dim: channels of a head, `dim / heads` by default.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given, or `kv_heads` is not in 1..heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None,
        *,
        qkv_bias: bool,
        head_dim: int | None = None,
        out_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        groups = max(1, heads // 2) if kv_heads is None else kv_heads
        if not 1 <= groups <= heads:
            raise ValueError(f"kv_heads must be in 1..{heads} (heads), got {groups}")
        self.heads = heads
        self.kv_heads = groups
        self.head_dim = head_dim or dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * groups) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * self.head_dim, dim, bias=out_bias)

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(b, heads, n, head_dim)`, keys and values `(b, kv_heads, n, head_dim)`."""
        parts = linear(self.qkv, x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
        return q, k, v


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises a ValueError where groups of query heads cannot be of one size."""
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads; got kv_heads={kv_heads}, heads={heads}")


@register_mixer("gqa", grids=(1, 2, 3), causal=True)
class GroupedQueryAttention(GroupedMixer):
    """`y = W_o concat_h(softmax(q_h k_g^T / sqrt(d)) v_g)`, `g = h * kv_heads // heads`.

    Args:
        dim: channels.
        heads: query heads.
        kv_heads: key and value heads, half of `heads` by default.
        head_dim: channels of a head, `dim / heads` by default.
        qkv_bias: whether the input products add a bias; `out_bias` the output product.
        causal: attend only to earlier tokens and to itself.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given, or `kv_heads` does not divide `heads`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, heads, kv_heads, qkv_bias=qkv_bias, head_dim=head_dim, out_bias=out_bias)
        check_groups(heads, self.kv_heads)
        self.causal = causal

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        keys = None if mask is None else mask.flatten(1)[:, None, None, :]
        y = attention(*self.project(x.flatten(1, -2)), mask=keys, causal=self.causal)
        return linear(self.proj, join_heads(y)).view(x.shape)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self.causal:
            return super().initial_state(batch, device, dtype)
        empty = torch.empty(batch, self.kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        return empty, empty

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        q, k, v = self.project(x_t[:, None])
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return self.proj(join_heads(attention(q, k, v)))[:, 0], (k, v)

    def widths(self) -> dict[str, int]:
        return {"groups": self.kv_heads}

    def importance(self, axis: str) -> Float[Tensor, " g"]:
        check_axis(self, axis)
        inner = self.kv_heads * self.head_dim
        values = self.qkv.weight.detach()[-inner:].view(self.kv_heads, -1).norm(dim=1)
        return values * self.proj.weight.detach().view(self.dim, self.kv_heads, -1).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        share = self.heads // self.kv_heads
        queries = expand_heads(index, share * self.head_dim)
        keys = expand_heads(index, self.head_dim) + self.heads * self.head_dim
        rows = torch.cat((queries, keys, keys + self.kv_heads * self.head_dim))
        slice_linear(self.qkv, rows, inputs=False)
        slice_linear(self.proj, queries, inputs=True)
        self.kv_heads = len(index)
        self.heads = share * len(index)


def group_heads(rows: Float[Tensor, "r *c"], heads: int, kv_heads: int) -> Float[Tensor, "s *c"]:
    """Weights or biases of a multi-head product (rows ordered q, k, v) as those of a grouped one.

    Queries stay; keys and values become the mean of each group's heads.

    Raises:
        ValueError: `kv_heads` does not divide `heads`, or the rows are not three for each channel of a head.
    """
    check_groups(heads, kv_heads)
    if rows.shape[0] % (3 * heads):
        raise ValueError(f"rows must be 3 * heads * head width; got {rows.shape[0]} rows, {heads} heads")
    q, *kv = rows.chunk(3)
    means = [part.unflatten(0, (kv_heads, heads // kv_heads, -1)).mean(1).flatten(0, 1) for part in kv]
    return torch.cat((q, *means))
