"""Patches summarised from the bottom up: key patches stay, the others become one, and a small decoder sums up.

Source: Jiang et al. 2023, "BUS: Efficient and Effective Vision-language Pre-training with Bottom-Up Patch
Summarization". A reconstruction: no code is public, and the form of the scoring MLP and the decoder is ours.

- `PatchSelector`: how well each patch fits a text, `s_i = sigmoid(MLP([v_i; W t]))`
- `SummaryBlock`: after a block, `ceil(alpha n)` key patches stay, best first, and `f = sum softmax(a_i) v_i` of the
  others; `a` is s where there is a text, else the class token's attention c (mean over heads), or their product
- `PatchAbstraction`: after all blocks, the `ceil(beta u)` best of the u kept patches read all that is left
- padding is neither kept nor part of f
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.class_attention import ClassAttentionBlock, Heads
from gossamer.layers.mlp import Mlp
from gossamer.layers.ranking import highest, share_up
from gossamer.layers.reduce import Tokens, following, note
from gossamer.ops import tokens as ops
from gossamer.ops.attention import attention, join_heads, split_heads


class PatchSelector(nn.Module):
    """`s_i = sigmoid(w2 gelu(W1 [v_i; W t]))`: how well patch i fits the text.

    Args:
        dim: channels of a patch.
        text: channels of the text vector.
    """

    def __init__(self, dim: int, text: int) -> None:
        super().__init__()
        self.text = nn.Linear(text, dim)
        self.fc1 = nn.Linear(2 * dim, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, patches: Float[Tensor, "b n c"], text: Float[Tensor, "b t"]) -> Float[Tensor, "b n"]:
        return self.logits(patches, text).sigmoid()

    def logits(self, patches: Float[Tensor, "b n c"], text: Float[Tensor, "b t"]) -> Float[Tensor, "b n"]:
        said = self.text(text)[:, None].expand(-1, patches.shape[1], -1)
        return self.fc2(nn.functional.gelu(self.fc1(torch.cat((patches, said), -1))))[..., 0]


class SummaryBlock(ClassAttentionBlock):
    """Key patches and one for the rest, after the block.

    Args:
        block: the block whose work is done.
        alpha: share of the patches that stay, rounded up.
        protect: leading tokens that stay; the first is the class token.
        fuse: whether the others become one token, or go.
        selector: scores patches by `guide`, a text vector `(b, t)`, while there is one.
        salient: multiply those scores with the class token's attention.

    Raises:
        ValueError: `alpha` is not in (0, 1], or there is no class token.
    """

    def __init__(
        self,
        block: Block,
        alpha: float,
        *,
        protect: int = 1,
        fuse: bool = True,
        selector: PatchSelector | None = None,
        salient: bool = False,
    ) -> None:
        super().__init__(block, protect=protect)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}")
        if protect < 1:
            raise ValueError(f"protect must be at least 1, the class token; got {protect}")
        self.alpha = alpha
        self.fuse = fuse
        self.selector = selector
        self.salient = salient
        self.guide: Tensor | None = None

    def reduce(self, tokens: Tokens, heads: Heads) -> Tokens:
        x, mask, _ = tokens
        patches = x[:, self.protect :]
        n = int(patches.shape[1])
        kept = share_up(self.alpha)(n)
        if kept >= n:
            return tokens
        score = heads.row.mean(1)[:, self.protect :]
        if self.selector is not None and self.guide is not None:
            fits = self.selector(patches, self.guide)
            score = fits * score if self.salient else fits
        real = None if mask is None else mask[:, self.protect :]
        order = highest(score if real is None else score.masked_fill(~real, -float("inf")), n)
        patches = ops.take(patches, order)
        stays = torch.arange(n, device=x.device) < kept
        if real is not None:
            real = real.gather(1, order)
            stays = torch.arange(n, device=x.device) < share_up(self.alpha)(real.sum(1))[:, None]
        others = ~stays if real is None else real & ~stays
        if following():
            front = torch.arange(self.protect, device=x.device).expand(len(x), -1)
            behind = order + self.protect
            last = torch.full_like(order, self.protect + kept)
            note(x, torch.cat((front, behind[:, :kept]), 1), behind, last, others.expand_as(order) & self.fuse)
        parts = [x[:, : self.protect], patches[:, :kept]]
        marks = None if mask is None or real is None else [mask[:, : self.protect], (real & stays)[:, :kept]]
        if self.fuse:
            parts.append(fused(patches, score.gather(1, order), others.expand(patches.shape[:2])))
            if marks is not None:
                marks.append(others.any(1, keepdim=True))
        return Tokens(torch.cat(parts, 1), None if marks is None else torch.cat(marks, 1))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, protect={self.protect}, fuse={self.fuse}"


def fused(patches: Tensor, scores: Tensor, others: Tensor) -> Float[Tensor, "b 1 c"]:
    """`sum softmax(a_i) v_i` over the `others (b, n)`; zeros where there is none."""
    weights = scores.masked_fill(~others, torch.finfo(scores.dtype).min).softmax(1)
    return ((weights * others)[:, None] @ patches).to(patches.dtype)


class PatchAbstraction(nn.Module):
    """The class token and the best patches, after `depth` layers of reading all the others.

    `q = q + self(norm(q)); q = q + cross(norm(q), rest); q = q + mlp(norm(q))`; a learned vector for each place is
    added to the queries first. What the branches give starts at zero, so a new one passes the queries on.

    Args:
        dim: channels; `heads` of each attention.
        patches: that are expected, of which `ceil(beta patches)` become queries; of another number, as large a share.
        beta: share of the patches that become queries.
        protect: leading tokens that are queries anyway.
        depth: layers.

    Raises:
        ValueError: `beta` is not in (0, 1], or `depth` is below 1.
    """

    reduces: ClassVar[bool] = True

    def __init__(
        self, dim: int, heads: int, patches: int, *, beta: float = 0.3, protect: int = 1, depth: int = 2
    ) -> None:
        super().__init__()
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.beta = beta
        self.protect = protect
        self.places = nn.Parameter(torch.zeros(1, protect + share_up(beta)(patches), dim))
        self.layers = nn.ModuleList(_Abstract(dim, heads) for _ in range(depth))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        sizes: Float[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None, None]:
        # The last token stands for those that were dropped; it is read, not asked.
        count = min(self.protect + share_up(self.beta)(x.shape[1] - self.protect - 1), self.places.shape[1])
        if following():
            note(x, torch.arange(count, device=x.device).expand(len(x), -1))
        q, rest = x[:, :count] + self.places[:, :count], x[:, count:]
        own, read = (None, None) if mask is None else (mask[:, :count], mask[:, count:])
        for layer in self.layers:
            q = layer(q, rest, own, read)
        return q, own, None


class _Abstract(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.own = _Attention(dim, heads)
        self.cross = _Attention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)
        for last in (self.own.proj, self.cross.proj, self.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, q: Tensor, rest: Tensor, own: Tensor | None, read: Tensor | None) -> Tensor:
        x = self.norms[0](q)
        q = q + self.own(x, x, own)
        if rest.shape[1]:
            q = q + self.cross(self.norms[1](q), rest, read)
        return q + self.mlp(self.norms[2](q))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, read: Tensor, mask: Tensor | None) -> Tensor:
        q, (k, v) = self.q(x), self.kv(read).chunk(2, -1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        seen = None if mask is None else mask[:, None, None, :]
        return self.proj(join_heads(attention(q, k, v, mask=seen)))


def box_labels(boxes: Sequence[Sequence[float]], grid: tuple[int, int], size: tuple[int, int]) -> Bool[Tensor, "n"]:
    """Which patches of a `grid` over an image of `size` (height, width) a box `(x0, y0, x1, y1)` overlaps, in pixels.

    Raises:
        ValueError: a box ends before it begins.
    """
    rows, columns = grid
    top = torch.arange(rows) * size[0] / rows
    left = torch.arange(columns) * size[1] / columns
    hit = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        if x1 < x0 or y1 < y0:
            raise ValueError(f"a box is (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got {(x0, y0, x1, y1)}")
        down = (top < y1) & (top + size[0] / rows > y0)
        across = (left < x1) & (left + size[1] / columns > x0)
        hit |= down[:, None] & across
    return hit.flatten()


def matching_loss(logits: Float[Tensor, "b n"], labels: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Patch-text matching: cross entropy of `sigmoid(logits)` against which patches the text speaks of."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def text_vector(tokens: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b c"]:
    """The first token of each text.

    Raises:
        ValueError: a text has no token.
    """
    if not bool(mask.any(1).all()):
        raise ValueError(
            f"every text must have a token; the mask of sample {int((~mask.any(1)).nonzero()[0])} is empty"
        )
    return tokens[:, 0]


def summarise(model: Any, x: Tensor, text: Float[Tensor, "b t"] | None = None) -> Tensor:
    """The tokens a vision model with a `SummaryBlock` leaves of images, guided by a text vector if there is one."""
    blocks = [b for b in model.blocks if isinstance(b, SummaryBlock)]
    for block in blocks:
        block.guide = text
    try:
        return model.encode(x)[0]
    finally:
        for block in blocks:
            block.guide = None
