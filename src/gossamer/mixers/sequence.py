"""What the efficient attentions of Long Range Arena share: the products around them, masks, maps, pruning by head.

Source: Tay et al. 2020, "Long Range Arena: A Benchmark for Efficient Transformers" (the shell and its ten mixers).

- the grid is read as one sequence, row by row; a mask marks the valid tokens, and keys outside it are not read
- head width is free of `dim / heads`, and no product has a bias unless asked (the benchmark's form)
- every one of them is linear in its values, so `maps` can write out who reads whom in any of them
- prunable: heads
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.prune import expand_heads
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.attention import join_heads


class SequenceMixer(HeadMixer, ABC):
    """`y = W_o concat_h(mix_h(q_h, k_h, v_h))`; a mechanism is its `mix`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.
    """

    head_tables: tuple[str, ...] = ()
    """Names of the parameters and buffers whose first axis is the heads."""

    def __init__(
        self, dim: int, heads: int, head_dim: int | None, *, qkv_bias: bool = False, out_bias: bool = False
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)

    @abstractmethod
    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        """The mechanism: what every query reads of the values."""

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        flat = x.flatten(1, -2)
        y = self.mix(*self.project(flat), None if mask is None else mask.flatten(1), flat)
        return self.proj(join_heads(y)).view(x.shape)

    def maps(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b h n n"]:
        """The weight with which each query (row) reads each token's value, written out: memory grows with `n^2`."""
        q, k, _ = self.project(x)
        one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return self.mix(q, k, one.expand(*q.shape[:2], -1, -1), mask, x)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        for name in self.head_tables:
            table = getattr(self, name)
            cut = table.detach().index_select(0, index).clone()
            setattr(self, name, nn.Parameter(cut) if isinstance(table, nn.Parameter) else cut)


def head_tensors(mixer: HeadMixer, index: Int[Tensor, " k"]) -> dict[str, Tensor]:
    """The tensors of the heads `index` alone, by the name they have in the mixer; gradients flow through.

    A mixer run on them gives those heads' share of the output: the shares of all heads add up to the whole. The
    output bias belongs to the share of head 0.
    """
    inner = mixer.heads * mixer.head_dim
    columns = expand_heads(index, mixer.head_dim)
    rows = torch.cat([columns + part * inner for part in range(3)])
    tensors = {"proj.weight": mixer.proj.weight[:, columns]}
    if mixer.proj.bias is not None and 0 not in index:
        tensors["proj.bias"] = torch.zeros_like(mixer.proj.bias)
    for name, linear in mixer.named_children():
        if isinstance(linear, nn.Linear) and name != "proj":
            tensors[f"{name}.weight"] = linear.weight[rows]
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias[rows]
    return tensors | {name: getattr(mixer, name)[index] for name in getattr(mixer, "head_tables", ())}


def blocks_with_columns(
    q: Float[Tensor, "b h blocks w d"],
    k: Float[Tensor, "b h blocks r d"],
    v: Float[Tensor, "b h blocks r e"],
    seen: Bool[Tensor, "#b 1 blocks #w r"],
    columns: tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s e"]],
    columns_seen: Bool[Tensor, "#b 1 #blocks 1 s"],
) -> Float[Tensor, "b h blocks w e"]:
    """Attention of blocks of queries, each over its own keys and over a few keys that all blocks share."""
    b, h, blocks, w, _ = q.shape
    k, v = (
        torch.cat((t, c[:, :, None].expand(-1, -1, blocks, -1, -1)), 3) for t, c in zip((k, v), columns, strict=True)
    )
    # Without padding one mask serves all samples and heads: written out for each it would be larger than the keys.
    alike = seen.shape[0] == columns_seen.shape[0] == 1
    seen = torch.cat([t.expand(1 if alike else b, 1, blocks, w, -1) for t in (seen, columns_seen)], -1)
    seen = seen[0] if alike else seen.expand(b, h, -1, -1, -1).flatten(0, 1)
    fq, fk, fv = (t.flatten(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(fq, fk, fv, seen).unflatten(0, (b, h))
