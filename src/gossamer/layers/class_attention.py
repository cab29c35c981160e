"""Blocks whose class token says which tokens matter: its row of the attention, without the other rows.

Source: Dosovitskiy et al. 2020 (the class token); EET (2025, `ContentBlock`): "Rethinking Vision Transformer for
Large-Scale Fine-Grained Image Retrieval".

- the values are read by fused attention; the one row is computed beside it, `n d` multiply-adds a head
- tokens leave after the block's MLP, on the word of that block's attention
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.layers.blocks import Block
from gossamer.layers.linear import linear
from gossamer.layers.ranking import best, share_down
from gossamer.layers.reduce import ReducingBlock, Tokens, note, second_branch
from gossamer.ops import tokens as ops
from gossamer.ops.attention import attention, join_heads


class Heads(NamedTuple):
    """What attention did, head by head: weights of the first token `(b, h, n)`, outputs of all `(b, h, n, d)`."""

    row: Tensor
    outputs: Tensor


def added(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """`x` with the mixer's branch added, as `block` does it before its second branch."""
    x = block._add(x, mixed, block.scale1)
    if block.residual == "post":
        x = block.norm1(x)
    return block.norm2(x) if block.residual == "stream" else x


def attend(block: Any, x: Tensor, mask: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Heads]:
    """The block up to its second branch, and what its heads did."""
    mixer = block.mixer
    q, k, v = mixer.project(block.norm1(x) if block.residual in ("pre", "stream") else x)
    seen = None if mask is None else mask[:, None, None, :]
    bias = None if sizes is None else sizes.log()[:, None, None, :]
    drop = mixer.attn_drop if mixer.training else 0.0
    wide = None if bias is None else bias.expand(-1, -1, x.shape[1], -1)
    outputs = attention(q, k, v, mask=seen, bias=wide, dropout=drop)
    logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    row = (logits if seen is None else logits.masked_fill(~seen, -float("inf"))).softmax(-1)[:, :, 0]
    y = linear(mixer.proj, join_heads(outputs))
    return added(block, x, y if mixer.drop is None else mixer.drop(y)), Heads(row, outputs)


class ClassAttentionBlock(ReducingBlock):
    """Base of blocks that reduce tokens by what their heads did; a subclass overrides `reduce`."""

    wants: ClassVar[frozenset[str]] = frozenset({"weights"})

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        sizes: Float[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None, Float[Tensor, "b m"] | None]:
        x, heads = attend(self.block, x, mask, sizes)
        tokens = self.reduce(Tokens(second_branch(self.block, x), mask, sizes), heads)
        return tokens.x, tokens.mask, tokens.sizes

    def reduce(self, tokens: Tokens, heads: Heads) -> Tokens:
        """The tokens that stay."""
        return tokens


def content_map(heads: Heads) -> Float[Tensor, "b n"]:
    """`m_i = sum_h w_hi A_h,cls,i`, `w_hi = |O_hi| / (sum_h |O_hi| + 1e-8)`: heads count by the content they give."""
    norms = heads.outputs.norm(dim=-1)
    return (norms / (norms.sum(1, keepdim=True) + 1e-8) * heads.row).sum(1)


def keep_best(tokens: Tokens, scores: Tensor, protect: int, count: Callable[[Any], Any]) -> Tokens:
    """`protect` tokens in front and those of the best `scores (b, n - protect)`, in their old order."""
    x, mask, sizes = tokens
    index, real = best(scores, None if mask is None else mask[:, protect:], count)
    front = index[:, :1] * 0 + torch.arange(protect, device=x.device)  # of as many samples, traced too
    index = torch.cat((front, index + protect), 1)
    note(x, index)
    if mask is not None and real is not None:
        mask = torch.cat((mask[:, :protect], real), 1)
    return Tokens(ops.take(x, index), mask, None if sizes is None else sizes.gather(1, index))


class ContentBlock(ClassAttentionBlock):
    """Keeps the share `keep` of the tokens, rounded down, that the content map ranks highest.

    Args:
        block: the block whose work is done.
        keep: share of the tokens behind the first `protect`.
        protect: leading tokens that stay; the first is the class token.

    Raises:
        ValueError: `keep` is not in (0, 1], or there is no class token.
    """

    def __init__(self, block: Block, keep: float, *, protect: int = 1) -> None:
        super().__init__(block, protect=protect)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if protect < 1:
            raise ValueError(f"protect must be at least 1, the class token; got {protect}")
        self.keep = keep

    def reduce(self, tokens: Tokens, heads: Heads) -> Tokens:
        if self.keep == 1:
            return tokens
        return keep_best(tokens, content_map(heads)[:, self.protect :], self.protect, share_down(self.keep))

    def extra_repr(self) -> str:
        return f"keep={self.keep:g}, protect={self.protect}"
