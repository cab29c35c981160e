"""Sparse Transformer attention: a token sees its own block, and of every other block the columns that sum it up.

Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (fixed pattern), with Long Range
Arena's first column and class token.

- not causal, as an encoder needs it (the benchmark's released code keeps the lower triangle)
- gathered: `tokens * (block + share of summary columns)` logits, never `tokens^2`
- the tokens in front that are global (a class token) see everything and are seen by everyone
- prunable: heads
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer, blocks_with_columns
from gossamer.ops.attention import attention


@register_mixer("sparse", grids=(1,))
class SparseAttention(SequenceMixer):
    """`y_i = softmax` attention over `j` in the block of `i`, `j mod block` 0 or `>= block - last`, `j` global.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        block: tokens of a block.
        last: columns at the end of each block that everyone sees.
        global_tokens: tokens in front that see everything and are seen by everyone.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `last` is not in `0 .. block`, `global_tokens` is below 0, or `heads` does not divide `dim` and no
            `head_dim` is given.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        block: int = 50,
        last: int = 10,
        global_tokens: int = 1,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        if block < 1 or not 0 <= last <= block or global_tokens < 0:
            raise ValueError(
                f"block must be at least 1, last in 0..block and global_tokens at least 0; "
                f"got block={block}, last={last}, global_tokens={global_tokens}"
            )
        self.block, self.last, self.global_tokens = block, last, global_tokens

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        n, block, g = x.shape[1], self.block, self.global_tokens
        blocks = -(-n // block)
        pad = blocks * block - n
        places = torch.arange(n, device=x.device)
        offset = places % block
        columns = places[(offset == 0) | (offset >= block - self.last) | (places < g)]
        if mask is None:
            mask = torch.ones(1, n, dtype=torch.bool, device=x.device)
        own = F.pad(mask, (0, pad)).view(-1, 1, blocks, 1, block)
        # A column inside the query's own block is seen there already.
        apart = columns // block != torch.arange(blocks, device=x.device)[:, None, None]
        seen = mask[:, columns][:, None, None, None] & apart
        bq, bk, bv = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (blocks, block)) for t in (q, k, v))
        y = blocks_with_columns(bq, bk, bv, own, (k[:, :, columns], v[:, :, columns]), seen)
        y = y.flatten(2, 3)[:, :, :n]
        if not g:
            return y
        return torch.cat((attention(q[:, :, :g], k, v, mask=mask[:, None, None]), y[:, :, g:]), 2)
