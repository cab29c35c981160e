"""Longformer: a sliding window, and a few tokens in front that see everything and are seen by everyone.

Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer".

- the global tokens' own reading has its own queries, keys and values, so there are seven products, not four
- by default the first token is global (the class token, as in the paper's classification); `global_tokens=0` is the
  plain sliding window with four products
- cost grows linearly with tokens; any length
- prunable: heads
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.prune import expand_heads, slice_linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer, blocks_with_columns
from gossamer.ops.attention import attention, split_heads
from gossamer.ops.patterns import band_attention


@register_mixer("longformer", grids=(1,))
class Longformer(SequenceMixer):
    """`y_i = softmax` attention over `i - (window-1)//2 <= j <= i + window//2` and `j < global_tokens`.

    Rows `i < global_tokens` read every token, with queries, keys and values of their own.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        window: tokens a token sees around itself, itself included.
        global_tokens: tokens in front that are global.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `window` is below 1, `global_tokens` below 0, or `heads` does not divide `dim` and no `head_dim`
            is given.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        window: int = 512,
        global_tokens: int = 1,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        if window < 1 or global_tokens < 0:
            raise ValueError(
                f"window must be at least 1 and global_tokens at least 0, got {window} and {global_tokens}"
            )
        self.back, self.ahead = (window - 1) // 2, window // 2
        self.global_tokens = global_tokens
        self.qkv_global = nn.Linear(dim, 3 * self.heads * self.head_dim, bias=qkv_bias) if global_tokens else None

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        y = self._near(q, k, v, mask)
        return y if self.qkv_global is None else torch.cat((self._far(x, mask), y[:, :, self.global_tokens :]), 2)

    def maps(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b h n n"]:
        q, k, _ = self.project(x)
        one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*q.shape[:2], -1, -1)
        y = self._near(q, k, one, mask)
        return y if self.qkv_global is None else torch.cat((self._far(x, mask, one), y[:, :, self.global_tokens :]), 2)

    def _far(self, x: Tensor, mask: Tensor | None, v: Tensor | None = None) -> Tensor:
        """What the global tokens read."""
        assert self.qkv_global is not None
        inner = self.heads * self.head_dim
        weight, bias = self.qkv_global.weight, self.qkv_global.bias
        cut = (slice(0, inner), slice(inner, None))
        wq, wkv = (weight[s] for s in cut)
        bq, bkv = (None if bias is None else bias[s] for s in cut)
        q = split_heads(F.linear(x[:, : self.global_tokens], wq, bq), self.heads)
        k, own = (split_heads(t, self.heads) for t in F.linear(x, wkv, bkv).chunk(2, -1))
        return attention(q, k, own if v is None else v, mask=None if mask is None else mask[:, None, None])

    def _near(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What a token reads of its window and of the global tokens."""
        n, g = q.shape[2], self.global_tokens
        back, ahead = min(self.back, n - 1), min(self.ahead, n - 1)
        if back == ahead == n - 1:
            return attention(q, k, v, mask=None if mask is None else mask[:, None, None])
        if not g:
            return band_attention(q, k, v, back, ahead, mask=mask)
        chunk = min(max(back + ahead + 1, 32), n)
        pad = -n % chunk
        reach = chunk + back + ahead
        if mask is None:
            mask = torch.ones(1, n, dtype=torch.bool, device=q.device)
        blocks = F.pad(q, (0, 0, 0, pad)).unflatten(2, (-1, chunk))
        # The keys of a chunk start `back` before its first query; global tokens are left to the columns.
        near_k, near_v = (F.pad(t, (0, 0, back, ahead + pad)).unfold(2, reach, chunk).mT for t in (k, v))
        there = mask.index_fill(1, torch.arange(min(g, n), device=q.device), False)
        there = F.pad(there, (back, ahead + pad)).unfold(1, reach, chunk)[:, None, :, None]
        offset = torch.arange(reach, device=q.device) - torch.arange(chunk, device=q.device)[:, None]
        seen = there & (offset >= 0) & (offset <= back + ahead)
        columns = (k[:, :, :g], v[:, :, :g])
        y = blocks_with_columns(blocks, near_k, near_v, seen, columns, mask[:, None, None, None, :g])
        return y.flatten(2, 3)[:, :, :n]

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        inner = self.heads * self.head_dim
        super().keep(axis, index)
        if self.qkv_global is not None:
            rows = expand_heads(index, self.head_dim)
            slice_linear(self.qkv_global, torch.cat([rows + part * inner for part in range(3)]), inputs=False)
