"""Sinkhorn attention: a token attends to its own block and to a block that a learned soft permutation puts there.

Source: Tay et al. 2020, "Sparse Sinkhorn Attention"; the form of Long Range Arena: two softmaxes, added.

- the permutation of each head is scored from the sum of each block's keys; blocks without a valid token are left out
- scores are rows normalised by softmax, or balanced by Sinkhorn's iterations
- the scores are bound to the number of blocks of the longest sequence; shorter ones use the first
- cost: tokens times block, and `(tokens / block)^2` block products
- prunable: heads
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.patterns import local_attention


@register_mixer("sinkhorn", grids=(1,))
class SinkhornAttention(SequenceMixer):
    """`y = local(q, k, v) + softmax(q k'^T / sqrt(d)) v'`, `k' = P k`, `v' = P v` blockwise.

    `P = softmax_j(W_j . sum(k in block i) + w_j)`.

    Args:
        dim: channels.
        grid: size of the token grid; its tokens are the longest sequence.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        block: tokens of a block.
        iterations: rounds of column and row normalisation after the softmax.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `block` is below 1, or `heads` does not divide `dim` and no `head_dim` is given; in use, more
            tokens than the grid has blocks for.
    """

    head_tables = ("sort_weight", "sort_bias")

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, ...],
        heads: int = 8,
        head_dim: int | None = None,
        block: int = 50,
        iterations: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block, self.iterations = block, iterations
        blocks = -(-math.prod(grid) // block)
        bound = self.head_dim**-0.5
        self.sort_weight = nn.Parameter(torch.empty(heads, blocks, self.head_dim).uniform_(-bound, bound))
        self.sort_bias = nn.Parameter(torch.zeros(heads, blocks))

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        n, block = x.shape[1], self.block
        blocks = -(-n // block)
        if blocks > self.sort_weight.shape[1]:
            longest = self.sort_weight.shape[1] * block
            raise ValueError(f"sinkhorn is bound to {longest} tokens (grid), got {n}")
        y = local_attention(q, k, v, block, mask=mask)
        pad = blocks * block - n
        if mask is None:
            mask = torch.ones(1, n, dtype=torch.bool, device=q.device)
        valid = F.pad(mask, (0, pad)).unflatten(1, (blocks, block))
        there = valid[:, None, :, :, None]
        q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (blocks, block)) for t in (q, k, v))
        k, v = k.masked_fill(~there, 0.0), v.masked_fill(~there, 0.0)
        permute = self._permutation(k.sum(3), valid.any(-1)).to(v.dtype)
        k, v = ((permute @ t.flatten(3)).unflatten(3, (block, -1)) for t in (k, v))
        # A place inside a block counts if any block has a token there.
        seen = valid.any(1)[:, None, None, None].expand(*q.shape[:4], -1)
        fq, fk, fv, fs = (t.flatten(0, 1) for t in (q, k, v, seen))
        far = F.scaled_dot_product_attention(fq, fk, fv, fs)
        return y + far.view(*q.shape[:2], blocks * block, -1)[:, :, :n]

    def _permutation(self, sums: Float[Tensor, "b h i d"], valid: Bool[Tensor, "#b i"]) -> Float[Tensor, "b h i i"]:
        blocks = sums.shape[2]
        scores = sums @ self.sort_weight[:, :blocks].mT + self.sort_bias[:, None, :blocks]
        scores = scores.masked_fill(~valid[:, None, None], torch.finfo(scores.dtype).min)
        permute = scores.softmax(-1)
        rows = valid[:, None, :, None].to(permute.dtype)
        for _ in range(self.iterations):
            permute = permute * rows
            permute = permute / permute.sum(-2, keepdim=True).clamp(min=1e-6)
            permute = permute / permute.sum(-1, keepdim=True).clamp(min=1e-6)
        return permute
