"""Blocks that change how many tokens there are, around a plain residual block.

The two residual branches of the block, and three places where tokens may go:

`before -> x = first(x) -> between -> x = second(x) -> after`

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (`MergingBlock`: bipartite soft matching between
attention and MLP, proportional attention); Rao et al. 2021, "DynamicViT" (a mask while training, a gather afterwards).

- tokens travel as `(x, mask, sizes)`: `mask` marks real tokens, `sizes` how many original ones each stands for; both
  are None where there is nothing to say
- leading tokens (class, distillation, registers) are protected
- keys and attention weights of the block are there for the asking, from the one attention that is computed anyway
- where sizes are carried, attention adds `log s` to the logits of each key: a merged token counts as its members
- the number of tokens left depends on shapes alone, so the blocks export, with a free batch
- whoever asks (`Trail`) is told where each token of the stem went, through all reductions, and gets them back in their
  old number; nobody else pays for it
"""

from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.linear import linear
from gossamer.ops import tokens as ops
from gossamer.ops.attention import attention, attention_maps, join_heads


class Tokens(NamedTuple):
    """Tokens `(b, n, c)` on their way, which are real, and how many each stands for."""

    x: Tensor
    mask: Tensor | None = None
    sizes: Tensor | None = None


class Seen(NamedTuple):
    """What the attention of a block computed: `keys (b, h, n, d)` and, if wanted, `weights (b, h, n, n)`."""

    keys: Tensor | None = None
    weights: Tensor | None = None


class ReducingBlock(nn.Module):
    """Base of blocks that reduce tokens; a subclass overrides one or more of `before`, `between` and `after`.

    `reduces` tells the trunk to hand over sizes. A subclass that reads `keys` or attention `weights` lists them in
    `wants`; they, and sizes, need the mixer to be plain attention.

    Args:
        block: the block whose work is done.
        protect: leading tokens that must stay.

    Raises:
        ValueError: the block has one residual branch only, or its mixer does not show what is wanted.
    """

    reduces: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, block: Block, *, protect: int = 0) -> None:
        super().__init__()
        if block.norm2 is None:
            raise ValueError(f"a block of one residual branch ({block.residual}) has no place between two")
        if self.wants and not shows_attention(block.mixer):
            raise ValueError(f"mixer {type(block.mixer).__name__} does not show {', '.join(sorted(self.wants))}")
        self.block = block
        self.protect = protect

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        sizes: Float[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None, Float[Tensor, "b m"] | None]:
        tokens = self.before(Tokens(x, mask, sizes))
        x, seen = first_branch(self.block, *tokens, weights="weights" in self.wants)
        tokens = self.between(tokens._replace(x=x), seen)
        tokens = self.after(tokens._replace(x=second_branch(self.block, tokens.x)), seen)
        return tokens.x, tokens.mask, tokens.sizes

    def before(self, tokens: Tokens) -> Tokens:
        """Reduces what the block reads."""
        return tokens

    def between(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Reduces what the second branch reads; `seen` is of the tokens as they are here."""
        return tokens

    def after(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Reduces what the block gives; `seen` is of the tokens as they were in attention."""
        return tokens


def shows_attention(mixer: nn.Module) -> bool:
    """Whether `mixer` is plain attention, whose keys and weights the functions here can read."""
    return getattr(mixer, "name", None) == "attention"


def first_branch(
    block: Block, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None, *, weights: bool = False
) -> tuple[Tensor, Seen]:
    """The block up to its second branch, and what its attention computed.

    Raises:
        ValueError: sizes or weights are asked of a mixer that is no plain attention.
    """
    read = block.norm1(x) if block.residual in ("pre", "stream") else x
    if shows_attention(block.mixer):
        mixed, seen = _attend(block.mixer, read, mask, sizes, weights)
    elif weights or sizes is not None:
        raise ValueError(f"mixer {type(block.mixer).__name__} knows neither attention weights nor sizes of tokens")
    else:
        mixed, seen = block.mixer(read, mask=mask), Seen()
    x = block._add(x, mixed, block.scale1)
    if block.residual == "post":
        x = block.norm1(x)
    return (block.norm2(x) if block.residual == "stream" else x), seen


def second_branch(block: Block, x: Tensor) -> Tensor:
    """The rest of the block, which treats each token by itself."""
    x = block._add(x, block.mlp(block.norm2(x) if block.residual == "pre" else x), block.scale2)
    return block.norm2(x) if block.residual == "post" else x


def _attend(mixer: Any, x: Tensor, mask: Tensor | None, sizes: Tensor | None, weights: bool) -> tuple[Tensor, Seen]:
    q, k, v = mixer.project(x)
    hooks: dict[str, Any] = {"causal": mixer.causal}
    if mask is not None:
        hooks["mask"] = mask[:, None, None, :]
    if sizes is not None:
        hooks["bias"] = sizes.log()[:, None, None, :].expand(-1, -1, x.shape[1], -1)
    if weights:
        y, maps, _ = attention_maps(q, k, v, **hooks)
    else:
        y, maps = attention(q, k, v, dropout=mixer.attn_drop if mixer.training else 0.0, **hooks), None
    y = linear(mixer.proj, join_heads(y))
    return (y if mixer.drop is None else mixer.drop(y)), Seen(k, maps)


class MergingBlock(ReducingBlock):
    """Between the branches, `r` tokens go into those most like them, by the mean of their keys over heads.

    Args:
        r: tokens to merge where `tokens` come in; with more or fewer, as large a share of them, rounded down.
        tokens: how many are expected.
        protect: leading tokens that are never merged, neither way.

    Raises:
        ValueError: `r` is negative or `tokens` not positive.
    """

    wants = frozenset({"keys"})

    def __init__(self, block: Block, r: int, *, tokens: int, protect: int = 0) -> None:
        super().__init__(block, protect=protect)
        if r < 0 or tokens < 1:
            raise ValueError(f"r must be at least 0 and tokens at least 1, got r={r}, tokens={tokens}")
        self.r = r
        self.tokens = tokens

    def between(self, tokens: Tokens, seen: Seen) -> Tokens:
        x, mask, sizes = tokens
        r = self.count(int(x.shape[1]))  # tracers make tensors of shapes
        if r <= 0:
            return tokens
        assert seen.keys is not None
        found = ops.match(seen.keys.mean(1), r, protect=self.protect, mask=mask)
        note(x, found.stay, found.gone, found.into, found.real)
        sizes = torch.ones_like(x[..., 0]) if sizes is None else sizes
        x, sizes = ops.combine(x, sizes, found, self.moved(x, sizes, found))
        return Tokens(x, None if mask is None else mask.gather(1, found.stay), sizes)

    def count(self, n: int) -> int:
        """How many of `n` tokens go."""
        return min(self.r * n // self.tokens, (n - self.protect) // 2)

    def moved(self, x: Tensor, sizes: Tensor, found: ops.Matching) -> Tensor | None:
        """What the tokens that go bring, if it is not `sizes * x`."""
        return None

    def extra_repr(self) -> str:
        return f"r={self.r}, tokens={self.tokens}, protect={self.protect}"


# ---- where tokens went -----------------------------------------------------------------------------------------------


class Trail:
    """Follows the tokens of `model` while it is open: `with Trail(model) as trail: model(x)`.

    Args:
        model: a trunk of `blocks` and a `head` (`gossamer.trunks.Isotropic`).

    Attributes:
        counts: tokens that the MLP of each block worked on.
        source: `(b, n)`, the place that now holds each token of the stem, -1 where it was dropped.
        tokens, mask: what came to the head.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.counts: list[int] = []
        self.source: Tensor
        self.tokens: Tensor
        self.mask: Tensor | None = None

    def __enter__(self) -> "Trail":
        global _trail
        self._outer, _trail = _trail, self
        blocks = self.model.blocks
        self._hooks = [
            blocks[0].register_forward_pre_hook(self._begin),
            self.model.head.register_forward_pre_hook(self._end),
        ]
        for block in blocks:
            part = getattr(getattr(block, "block", block), "mlp", None)
            if part is not None:
                self._hooks.append(part.register_forward_pre_hook(lambda _, args: self.counts.append(args[0].shape[1])))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _trail
        _trail = self._outer
        for hook in self._hooks:
            hook.remove()

    def restore(self, fill: float = 0.0) -> Float[Tensor, "b n c"]:
        """The tokens at the head in the number and order of the stem's; `fill` where one was dropped or is padding.

        Merged tokens get what they became together.
        """
        found = ops.unmerge(self.tokens, self.source.clamp(min=0))
        return found.masked_fill((self.source < 0)[..., None], fill)

    def _begin(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        self.counts.clear()
        self.source = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])

    def _go(self, goes: Tensor) -> None:
        self.source = torch.where(self.source < 0, -1, goes.gather(1, self.source.clamp(min=0)))

    def _end(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens, self.mask = args[:2]
        if self.mask is not None:
            places = torch.arange(self.mask.shape[1], device=self.mask.device)
            self._go(torch.where(self.mask, places, -1))


_trail: Trail | None = None


def following() -> bool:
    """Whether somebody wants to know where tokens go."""
    return _trail is not None


def note(
    x: Float[Tensor, "b n c"],
    stay: Int[Tensor, "b m"],
    gone: Int[Tensor, "b r"] | None = None,
    into: Int[Tensor, "b r"] | None = None,
    real: Bool[Tensor, "b r"] | None = None,
) -> None:
    """Tells an open `Trail` that of the tokens `x` those at `stay` are left, in that order, and where the others went.

    Args:
        gone: tokens that went into others, `into` their places among those that stay, or behind them; what is not
            `real`, or named nowhere, was dropped.
    """
    if _trail is None:
        return
    places = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    goes = stay.new_full(x.shape[:2], -1).scatter(1, stay, places)
    if gone is not None and into is not None:
        goes = goes.scatter_reduce(1, gone, into if real is None else torch.where(real, into, -1), "amax")
    _trail._go(goes)
