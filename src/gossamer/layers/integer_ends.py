"""Stems and heads that calculate with integers alone: from pixels or words to 16-bit tokens, and from those to answers.

Source: Li and Gu 2022, "I-ViT"; I-Segmenter 2025 (16-bit residual stream). Made of `gossamer.layers.integer`'s cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.embed import PatchEmbed, TextStem, TokenStem
from gossamer.layers.heads import Classifier, DenseClassifier, SentenceVector
from gossamer.layers.integer import (
    INNER,
    MOST_SHIFT,
    STREAM,
    Activation,
    Cell,
    Fixable,
    Linear,
    Range,
    Requantise,
    Scaled,
    Sum,
    activation_name,
    norm_cell,
)
from gossamer.ops import integer as op


class ImageStem(Cell):
    """An image as 16-bit tokens: patches of 8-bit pixels, a product, learned tokens and positions as constants."""

    quantum: Tensor
    mantissa: Tensor
    shift: Tensor

    def __init__(self, stem: TokenStem) -> None:
        super().__init__()
        embed: Any = stem.embed
        self.patch = embed.proj.kernel_size[0]
        self.grid = stem.grid
        self.proj = Linear(embed.proj.weight.flatten(1), embed.proj.bias)
        constant = embed.proj.weight.new_zeros(1, stem.grid[0] * stem.grid[1], len(self.proj.weight))
        places: Any = stem.positions
        if places is not None and not stem.position_tokens:
            constant = constant + places
        self.front = 0 if stem.tokens is None else stem.tokens.shape[1]
        if stem.tokens is not None:
            constant = torch.cat((stem.tokens, constant), 1)
        if places is not None and stem.position_tokens:
            constant = constant + places
        self.constant = nn.Parameter(constant.detach().clone())
        self.pixels = Range()
        self.range = Range()
        self.source: Tensor = torch.ones(())

    def quantised(self, image: Tensor) -> Tensor:
        """The 8-bit pixels: the one step from real numbers to integers."""
        return (image / self.quantum).round().clamp(-128, 127).to(torch.int8)

    def simulate(self, x: Tensor, scale: Tensor | None = None, *more: Any) -> Scaled:
        self.pixels.watch(x.unsqueeze(-1))
        scale = self.pixels.scale(INNER)
        # Half to even, as QuantizeLinear does.
        x, scale = self.proj(self._patches((x / scale).round().clamp(-128, 127) * scale), scale)
        assert scale is not None
        self.source = scale.detach()
        x = nn.functional.pad(x, (0, 0, self.front, 0))
        self.range.watch(x + self.constant)
        target = self.range.scale(STREAM)
        total = op.requantise_simulated(x, target, STREAM) + op.whole(self.constant, target) * target
        return op.requantise_simulated(total, target, STREAM), target

    def settle(self) -> None:
        target = self.range.scale(STREAM)
        ratio = (self.source.double() / target.double()).expand(self.constant.shape[-1])
        mantissa, shift = op.dyadic(ratio, MOST_SHIFT)
        self.replace("mantissa", mantissa.int())
        self.replace("shift", shift.to(torch.int8))
        self.replace("quantum", self.pixels.scale(INNER))
        constant = op.whole(self.constant.detach(), target)
        self.replace("constant", constant.clamp(-(2**15), 2**15 - 1).to(torch.int16))

    def integers(self, x: Any, *more: Any) -> Any:
        x, _ = self.proj(self._patches(x))
        x = op.requantise(x, self.mantissa.long(), self.shift.long(), bits=STREAM)
        if self.front:
            x = x.pad_front(self.front) if not isinstance(x, Tensor) else nn.functional.pad(x, (0, 0, self.front, 0))
        return (x + self.constant.long()).clamp(min=-(2**15), max=2**15 - 1)

    def _patches(self, x: Any) -> Any:
        """`(b, c, h, w)` to `(b, n, c * patch * patch)`."""
        height, width = x.shape[-2:]
        p, (rows, columns) = self.patch, self.grid
        if (-(-height // p), -(-width // p)) != tuple(self.grid) or min(height, width) < 1:
            raise ValueError(
                f"the position table is for a {rows}x{columns} grid of {p}-pixel patches, the image is {height}x{width}"
            )
        if height % p or width % p:
            below, right = rows * p - height, columns * p - width
            x = nn.functional.pad(x, (0, right, 0, below)) if isinstance(x, Tensor) else x.pad_end(below, right)
        x = x.unflatten(-1, (columns, p)).unflatten(-3, (rows, p)).permute(0, 2, 4, 1, 3, 5)
        return x.flatten(-3).flatten(1, 2)


class WordStem(Cell):
    """Words as 16-bit tokens: 8-bit rows with a scale each, positions as constants, and the norm."""

    words: Any
    gains: Tensor
    shift: Tensor

    def __init__(self, stem: TextStem) -> None:
        super().__init__()
        self.pad_id, self.max_len = stem.pad_id, stem.max_len
        self.words = nn.Parameter(stem.words.weight.detach().clone())
        places: Any = stem.positions
        dim = self.words.shape[1]
        self.constant = nn.Parameter(torch.zeros(1, stem.max_len, dim) if places is None else places.detach().clone())
        self.norm = norm_cell(stem.norm, STREAM)
        self.range = Range()

    def forward(self, ids: Any, *_: Any) -> Any:
        if ids.shape[1] > self.max_len:
            raise ValueError(f"text is {ids.shape[1]} tokens long, the model takes {self.max_len} (max_len)")
        return super().forward(ids)

    def simulate(self, x: Tensor, scale: Tensor | None = None, *more: Any) -> Scaled:
        own = self._scale()[:, None]
        places = self.constant[:, : x.shape[1]]
        words = op.requantise_simulated(self.words[x], own[x], INNER)
        self.range.watch(words + places)
        target = self.range.scale(STREAM)
        total = op.requantise_simulated(words, target, STREAM) + op.whole(places, target) * target
        y = op.requantise_simulated(total, target, STREAM), target
        return y if self.norm is None else self.norm(*y)

    def _scale(self) -> Tensor:
        return op.scale_of(self.words.detach().abs().amax(1), INNER)

    def settle(self) -> None:
        target, own = self.range.scale(STREAM), self._scale()
        ratio = own.double() / target.double()
        # One shift for all words, so that only the mantissas are looked up.
        shift = op.dyadic(ratio.amax(), MOST_SHIFT)[1]
        self.replace("gains", torch.ldexp(ratio, shift).round().int()[:, None])
        self.replace("shift", shift.to(torch.int8))
        constant = op.whole(self.constant.detach(), target)
        self.replace("constant", constant.clamp(-(2**15), 2**15 - 1).to(torch.int16))
        words = op.whole(self.words.detach(), own[:, None]).clamp(-128, 127).to(torch.int8)
        self.replace("words", words)

    def integers(self, x: Any, *more: Any) -> Any:
        words, gains = op.rows(self.words, x).to(torch.int64), op.rows(self.gains, x).to(torch.int64)
        y = op.requantise(words * gains, 1, int(self.shift), bits=STREAM)
        y = (y + self.constant[:, : x.shape[1]].long()).clamp(min=-(2**15), max=2**15 - 1)
        return y if self.norm is None else self.norm(y)[0]


class Answer(Fixable):
    """From 16-bit tokens to the answer, and the scale its integers have: `scale * integers(x)`.

    Args:
        head: with its weights.
    """

    quantum: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.pool = "token"
        self.norm: nn.Module | None = None
        self.dense: Linear | None = None
        self.act: Activation | None = None
        self.fc: Linear | None = None
        self.second: Linear | None = None
        self.unit_length = False
        if isinstance(head, DistilledClassifier):
            self.pool = "token" if head.kind == "token" else "mean"
            self.fc = Linear(head.fc.weight, head.fc.bias, 0.5)
            self.second = Linear(head.distilled.weight, head.distilled.bias, 0.5)
        elif isinstance(head, Classifier):
            self.pool = head.kind
            self.norm = norm_cell(head.norm, STREAM)
            self.fc = None if head.fc is None else Linear(head.fc.weight, head.fc.bias)
        elif isinstance(head, DenseClassifier):
            self.dense = Linear(head.dense.weight, head.dense.bias)
            self.act = Activation(activation_name(head.act), head.dense.out_features, None)
            self.fc = Linear(head.fc.weight, head.fc.bias)
        elif isinstance(head, SentenceVector):
            self.pool, self.unit_length = head.pool, head.normalize
        self.narrow = Requantise(INNER) if self.fc is not None else None
        self.narrow2 = Requantise(INNER) if self.second is not None else None
        size = 1 if self.fc is None else len(self.fc.weight)
        self.widen = Requantise(STREAM, size) if self.second is not None else None
        # Answers are one scale, so that the largest integer is the largest answer.
        self.out: Sum | Requantise | None = Sum(size) if self.second is not None else Requantise(STREAM, size)
        if self.unit_length:
            self.out = None

    def settle(self) -> None:
        if self.out is None:
            quantum = torch.tensor(2.0**-30)
        else:
            quantum = self.out.range.scale(STREAM)
        self.replace("quantum", quantum.float())

    def forward(self, x: Scaled, mask: Any = None) -> Any:
        """Integers of `quantum` each where fixed; else real numbers."""
        if self.second is not None:
            assert self.fc is not None
            assert self.narrow is not None
            assert self.narrow2 is not None
            assert self.widen is not None
            assert isinstance(self.out, Sum)
            first, other = (self._pooled(x, mask, place) for place in (0, 1))
            first = self.widen(*self.fc(*self.narrow(*first)))
            return self.out(*first, *self.second(*self.narrow2(*other)))[0]
        x = self._pooled(x, mask, 0)
        if self.norm is not None:
            x = self.norm(*x)
        if self.narrow is not None:
            x = self.narrow(*x)
        if self.dense is not None:
            assert self.act is not None
            x = self.act(*self.dense(*x))
        if self.fc is not None:
            x = self.fc(*x)
        if self.out is not None:
            return self.out(*x)[0]
        if self.fixed:
            return op.unit_vector(x[0])
        assert x[1] is not None
        return op.integer_norm_simulated(x[0], x[1], centre=False)

    def _pooled(self, x: Scaled, mask: Any, place: int) -> Scaled:
        tokens, scale = x
        if self.pool == "token":
            return tokens.select(1, place), scale
        if self.pool == "max":
            low = -(2**15)
            if not self.fixed:
                return (tokens if mask is None else tokens.masked_fill(~mask[..., None], -torch.inf)).amax(1), scale
            if mask is None:
                return tokens.amax(1), scale
            shown = mask.to(torch.int64).unflatten(-1, (-1, 1))
            return (tokens * shown + (1 - shown) * low).amax(1), scale
        n = tokens.shape[1]
        if not self.fixed:
            assert scale is not None
            total = op.whole(tokens, scale)
            if mask is None:
                return op.floor(total.mean(1) + 0.5) * scale, scale
            count = mask.sum(1, keepdim=True).clamp(min=1)
            return op.floor((total * mask[..., None]).sum(1) / count + 0.5) * scale, scale
        if mask is None:
            return _mean(tokens.sum(1), n), scale
        shown = mask.to(torch.int64)
        count = shown.sum(-1, keepdim=True).clamp(min=1)
        return _mean((tokens * shown.unflatten(-1, (-1, 1))).sum(1), count), scale


def _mean(total: Any, count: Any) -> Any:
    """`floor(total / count + 1/2)`; a whole number of means keeps the dividend positive."""
    return ((2 * total + (count + count * 2**17)).clamp(min=0)) // (2 * count) - 2**16


def integer_stem(stem: nn.Module) -> Cell:
    """The integer form of a stem.

    Raises:
        ValueError: it has none; the message says why.
    """
    if isinstance(stem, TextStem):
        if stem.token is not None:
            raise ValueError("a class token in front of words has no integer form here")
        return WordStem(stem)
    embed = getattr(stem, "embed", None)
    if not isinstance(stem, TokenStem) or not stem.flat or not isinstance(embed, PatchEmbed):
        raise ValueError(f"stem must be words or flat patches, got {type(stem).__name__} of {type(embed).__name__}")
    proj = embed.proj
    whole = proj.kernel_size == proj.stride and proj.padding == (0, 0) and proj.groups == 1
    if not whole or embed.norm is not None:
        raise ValueError("patches must not overlap, and have no norm of their own")
    return ImageStem(stem)
