"""Attention, MLP and residual block that calculate with integers alone, made of `gossamer.layers.integer`'s cells.

Source: Li and Gu 2022, "I-ViT"; I-Segmenter 2025 (16-bit residual stream and attention weights, λ-ShiftGELU).
"""

from typing import Any

from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.integer import (
    INNER,
    STREAM,
    Activation,
    Cell,
    Linear,
    Requantise,
    Scaled,
    Sum,
    activation_name,
    norm_cell,
)
from gossamer.layers.mlp import Mlp
from gossamer.ops import integer as op

# Steps of attention logits in one.
LOGIT_UNIT = 64


class IntegerAttention(Cell):
    """Multi-head attention over 8-bit tokens: 8-bit queries, keys and values, 16-bit weights, 32-bit sums.

    Args:
        mixer: with its weights.
        gain: multiplies each channel that leaves.
    """

    def __init__(self, mixer: Any, gain: Tensor | float = 1.0) -> None:
        super().__init__()
        self.heads, self.head_dim = mixer.heads, mixer.head_dim
        self.qkv = Linear(mixer.qkv.weight, mixer.qkv.bias)
        self.parts = Requantise(INNER, len(mixer.qkv.weight), groups=3)
        self.logits = Requantise(16, unit=LOGIT_UNIT)
        self.mixed = Requantise(INNER)
        self.proj = Linear(mixer.proj.weight, mixer.proj.bias, gain)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        mask = more[0] if more else None
        x, scales = self.parts(*self.qkv(x, scale))
        q, k, v = self._split(x)
        sq, sk, sv = scales.unbind()
        small = self.head_dim**-0.5
        x, _ = self.logits(q @ k.transpose(-1, -2) * small, sq * sk * small)
        x = op.shiftmax_simulated(x, 1 / LOGIT_UNIT, mask=mask, reciprocal=op.WIDE)
        x, scale = self.mixed(x @ v, sv * 2.0**-15)
        return self.proj(x.transpose(1, 2).flatten(-2), scale)

    def integers(self, x: Any, *more: Any) -> Any:
        q, k, v = self._split(self.parts(self.qkv(x)[0])[0])
        x, _ = self.logits(op.product(q, k.transpose(-1, -2)))
        x = op.shiftmax(x, LOGIT_UNIT, mask=more[0] if more else None, reciprocal=op.WIDE)
        x, _ = self.mixed(op.product(x, v))
        return self.proj(x.transpose(1, 2).flatten(-2))[0]

    def _split(self, x: Any) -> list[Any]:
        x = x.unflatten(-1, (3, self.heads, self.head_dim))
        return [x.select(2, i).transpose(1, 2) for i in range(3)]


class IntegerMlp(nn.Module):
    """`W2 act(W1 x)` of 8-bit tokens, 32-bit sums."""

    def __init__(self, mlp: Mlp, lam: float | None, gain: Tensor | float = 1.0) -> None:
        super().__init__()
        self.fc1 = Linear(mlp.fc1.weight, mlp.fc1.bias)
        self.act = Activation(activation_name(mlp.act), mlp.fc1.out_features, lam)
        self.fc2 = Linear(mlp.fc2.weight, mlp.fc2.bias, gain)

    def forward(self, x: Any, scale: Tensor | None) -> Scaled:
        return self.fc2(*self.act(*self.fc1(x, scale)))


class IntegerBlock(nn.Module):
    """A pre-norm or post-norm block with a residual stream of 16 bits.

    Args:
        block: with its weights; its LayerScale becomes part of the products.
        lam: λ of λ-ShiftGELU, or None.
    """

    def __init__(self, block: Block, lam: float | None) -> None:
        super().__init__()
        dim = block.mixer.dim
        self.post = block.residual == "post"
        bits = STREAM if self.post else INNER
        self.norm1, self.norm2 = norm_cell(block.norm1, bits), norm_cell(block.norm2, bits)
        self.narrow1 = Requantise(INNER) if self.post else None
        self.narrow2 = Requantise(INNER) if self.post else None
        self.mixer = IntegerAttention(block.mixer, 1.0 if block.scale1 is None else block.scale1)
        self.mlp = IntegerMlp(block.mlp, lam, 1.0 if block.scale2 is None else block.scale2)
        self.add1, self.add2 = Sum(dim), Sum(dim)

    def forward(self, x: Scaled, mask: Any = None) -> Scaled:
        if self.post:
            assert self.narrow1 is not None
            assert self.narrow2 is not None
            x = self.norm1(*self.add1(*x, *self._attend(self.narrow1(*x), mask)))
            return self.norm2(*self.add2(*x, *self.mlp(*self.narrow2(*x))))
        x = self.add1(*x, *self._attend(self.norm1(*x), mask))
        return self.add2(*x, *self.mlp(*self.norm2(*x)))

    def _attend(self, x: Scaled, mask: Any) -> Scaled:
        if mask is None:
            return self.mixer(*x)
        keys = mask.unflatten(-1, (1, 1, -1))
        return self.mixer(*x, keys)
