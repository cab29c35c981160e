"""Parts of a transformer that calculate with integers alone, and the same parts while they still learn their scales.

Source: Li and Gu 2022, "I-ViT"; I-Segmenter 2025 (16-bit residual stream and attention weights, λ-ShiftGELU).

A part is in one of two states:

- *simulated*: tensors are real, but multiples of their scale, and everything is rounded as the integers will be
  (`gossamer.ops.integer`, `…_simulated`); ranges follow the data while training; gradients go straight through
- *fixed* (`fix`): integers in, integers out; scales have become constants, multiply and shift

Between parts goes `(x, scale)`; fixed parts take integers for `x` and give None for `scale`. Everything a fixed part
does is done with operators, so that a symbol of `gossamer.io.integer_graph` can take the place of `x`: that is how the
ONNX file is written, from this one description.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.embed import PatchEmbed, TextStem, TokenStem
from gossamer.layers.heads import Classifier, DenseClassifier, SentenceVector
from gossamer.layers.mlp import Mlp
from gossamer.layers.norms import BatchNorm
from gossamer.ops import integer as op

Scaled = tuple[Any, Tensor | None]
"""Integers and None, or real numbers and the scale they are multiples of."""

MOMENTUM = 0.95
# Steps of attention logits in one.
LOGIT_UNIT = 64
# Shifts above this lose bits of the mantissa, which can no longer be seen; offsets then stay below 2^62.
MOST_SHIFT = 44
INNER, STREAM = 8, 16


class Cell(nn.Module):
    """A part with constants of its own: `simulate` before, `integers` after it was fixed."""

    fixed = False

    def forward(self, x: Any, scale: Tensor | None = None, *more: Any) -> Scaled:
        if self.fixed:
            return self.integers(x, *more[::2]), None
        return self.simulate(x, scale, *more)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        raise TypeError(f"{type(self).__name__} has no simulation")

    def integers(self, x: Any, *more: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no integer form")

    def fix(self) -> None:
        """Turns ranges and real weights into integer constants."""
        self.settle()
        self.fixed = True

    def settle(self) -> None:
        """What `fix` changes."""

    def replace(self, name: str, value: Tensor) -> None:
        """An integer tensor in the place of a parameter or buffer."""
        if name in self._parameters:
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)


def fix(model: nn.Module) -> None:
    """Fixes all parts of `model`."""
    for part in list(model.modules()):
        if isinstance(part, Cell | Answer):
            part.fix()


class Range(nn.Module):
    """The running largest absolute value and deviation of what passes, in groups of channels.

    Args:
        groups: equal parts of the last axis, each with a range of its own.
        lam: deviations at which the range ends, or None.
    """

    top: Tensor
    deviation: Tensor

    def __init__(self, groups: int = 1, lam: float | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.lam = lam
        self.moving = False
        # Constants are saved, ranges are not: a range below 0 is not known.
        self.register_buffer("top", torch.full((groups,), -1.0), persistent=False)
        self.register_buffer("deviation", torch.zeros(groups), persistent=False)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Takes note of `x` in training mode: the largest so far, or where `moving` a moving average of it."""
        if not self.training:
            return
        parts = x.detach().unflatten(-1, (self.groups, -1)).movedim(-2, 0).flatten(1).to(self.top.dtype)
        top, deviation = parts.abs().amax(1), parts.std(1, correction=0)
        known = self.top >= 0
        kept = torch.lerp(top, self.top, MOMENTUM) if self.moving else torch.maximum(top, self.top)
        self.top = torch.where(known, kept, top)
        self.deviation = torch.where(known, torch.lerp(deviation, self.deviation, MOMENTUM), deviation)

    def scale(self, bits: int) -> Tensor:
        """One scale a group; a single one has no axis.

        Raises:
            ValueError: nothing was seen yet.
        """
        if bool((self.top < 0).any()):
            raise ValueError("ranges are not known yet: run the model on data in training mode first")
        scale = op.scale_of(op.limit_of(self.top, self.deviation, self.lam), bits)
        return scale if self.groups > 1 else scale[0]


class Requantise(Cell):
    """The same numbers at the scale of their own range, in `bits`.

    Args:
        bits: of the integers that leave.
        size: channels whose incoming scales differ; 1 where there is one scale.
        groups: equal parts of the channels with a scale each.
        lam: where the range ends, in deviations (λ-ShiftGELU).
        unit: a scale of `1 / unit` in place of one from the data.
    """

    mantissa: Tensor
    shift: Tensor

    def __init__(
        self,
        bits: int = INNER,
        size: int = 1,
        *,
        groups: int = 1,
        lam: float | None = None,
        unit: int | None = None,
    ) -> None:
        super().__init__()
        self.bits = op.check_bits(bits)
        self.size = size
        self.range = Range(groups, lam)
        self.unit = unit
        self.source: Tensor = torch.ones(())

    def target(self) -> Tensor:
        return self.range.scale(self.bits) if self.unit is None else torch.tensor(1 / self.unit)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        assert scale is not None
        self.source = scale.detach()
        if self.unit is None:
            self.range.watch(x)
        target = self.target()
        return op.requantise_simulated(x, self._spread(target), self.bits), target

    def _spread(self, target: Tensor) -> Tensor:
        return target if target.ndim == 0 else target.repeat_interleave(self.size // len(target))

    def settle(self) -> None:
        ratio = self.source.double() / self._spread(self.target()).double()
        mantissa, shift = op.dyadic(ratio if self.size == 1 else ratio.expand(self.size), MOST_SHIFT)
        self.replace("mantissa", mantissa.int())
        self.replace("shift", shift.to(torch.int8))

    def integers(self, x: Any, *more: Any) -> Any:
        y = op.requantise(x, self.mantissa.long(), self.shift.long(), bits=self.bits)
        return y.to(torch.int8) if self.bits <= 8 else y


class Sum(Cell):
    """`x + y` at a scale of its own: the residual stream, 16 bits.

    Args:
        size: channels of `y`, whose scales may differ; `x` has one scale.
    """

    def __init__(self, size: int = 1, bits: int = STREAM) -> None:
        super().__init__()
        self.size = size
        self.bits = bits
        self.range = Range()
        self.sources: tuple[Tensor, Tensor] = (torch.ones(()), torch.ones(()))

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        y, other = more
        assert scale is not None
        self.sources = scale.detach(), other.detach()
        self.range.watch(x + y)
        target = self.range.scale(self.bits)
        x, y = (op.requantise_simulated(part, target, self.bits) for part in (x, y))
        return op.requantise_simulated(x + y, target, self.bits), target

    def settle(self) -> None:
        target = self.range.scale(self.bits).double()
        for name, source, size in zip(("first", "second"), self.sources, (1, self.size), strict=True):
            ratio = source.double() / target
            mantissa, shift = op.dyadic(ratio if size == 1 else ratio.expand(size), MOST_SHIFT)
            self.replace(f"{name}_mantissa", mantissa.int())
            self.replace(f"{name}_shift", shift.to(torch.int8))

    def integers(self, x: Any, *more: Any) -> Any:
        parts = [
            op.requantise(
                part, getattr(self, f"{name}_mantissa").long(), getattr(self, f"{name}_shift").long(), bits=16
            )
            for name, part in zip(("first", "second"), (x, more[0]), strict=True)
        ]
        top = 2 ** (self.bits - 1)
        return (parts[0] + parts[1]).clamp(min=-top, max=top - 1)


class Linear(Cell):
    """`y = W x + b`, weights of 8 bits with one scale an output, sums of 32 bits.

    Args:
        weight, bias: real ones.
        gain: multiplies each output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gain: Tensor | float = 1.0) -> None:
        super().__init__()
        gain = torch.as_tensor(gain, dtype=weight.dtype).detach()
        self.weight = nn.Parameter((weight.detach().T * gain).T.contiguous().clone())
        self.bias = None if bias is None else nn.Parameter((bias.detach() * gain).clone())
        self.source: Tensor = torch.ones(())

    def _scale(self) -> Tensor:
        return op.scale_of(self.weight.detach().abs().amax(1), INNER)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        assert scale is not None
        self.source = scale.detach()
        own = self._scale()
        y = x @ op.requantise_simulated(self.weight, own[:, None], INNER).T
        scale = own * scale
        return (y if self.bias is None else y + op.whole(self.bias, scale) * scale), scale

    def settle(self) -> None:
        own = self._scale()
        weight = op.whole(self.weight.detach(), own[:, None])
        if self.bias is not None:
            bias = op.whole(self.bias.detach(), own * self.source)
            self.replace("bias", bias.clamp(-(2**31) + 2**7, 2**31 - 2**7).int())
        self.replace("weight", weight.clamp(-128, 127).to(torch.int8))

    def integers(self, x: Any, *more: Any) -> Any:
        y = op.product(x, self.weight.t())
        return y if self.bias is None else y + self.bias


class Norm(Cell):
    """A layer norm: `y = sqrt(c) integer_norm(x) w + b`, requantised in the same multiplication.

    Args:
        norm: with its weights.
        bits: of the integers that leave.
    """

    mantissa: Tensor
    shift: Tensor
    offset: Tensor
    eps: Tensor

    def __init__(self, norm: nn.LayerNorm, bits: int = INNER) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(norm.weight.detach().clone())
        self.bias: nn.Parameter | None = nn.Parameter(norm.bias.detach().clone())
        self.small = norm.eps
        self.bits = bits
        self.range = Range()
        self.source: Tensor = torch.ones(())

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        assert scale is not None
        assert self.weight is not None
        assert self.bias is not None
        self.source = scale.detach()
        y = op.integer_norm_simulated(x, scale, self._eps(x.shape[-1])) * x.shape[-1] ** 0.5
        y = y * self.weight + self.bias
        self.range.watch(y)
        target = self.range.scale(self.bits)
        return op.requantise_simulated(y, target, self.bits), target

    def _eps(self, dim: int) -> Tensor:
        return (self.small * dim / self.source.double() ** 2 + 0.5).floor().clamp(max=2.0**40).float()

    def settle(self) -> None:
        assert self.weight is not None
        assert self.bias is not None
        dim = len(self.weight)
        self.replace("eps", self._eps(dim).long())
        _affine(self, self.weight.double() * dim**0.5 / 2**30, self.bias)

    def integers(self, x: Any, *more: Any) -> Any:
        return _scaled(self, op.integer_norm(x, self.eps))


class Affine(Cell):
    """A batch norm with fixed statistics: one scale and one shift a channel.

    Args:
        norm: with its weights and statistics.
        bits: of the integers that leave.
    """

    mantissa: Tensor
    shift: Tensor
    offset: Tensor

    def __init__(self, norm: BatchNorm, bits: int = INNER) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.weight: nn.Parameter | None = nn.Parameter(gain)
        self.bias: nn.Parameter | None = nn.Parameter(norm.bias.detach() - gain * norm.running_mean)
        self.bits = bits
        self.range = Range()
        self.source: Tensor = torch.ones(())

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        assert scale is not None
        assert self.weight is not None
        assert self.bias is not None
        self.source = scale.detach()
        y = x * self.weight + self.bias
        self.range.watch(y)
        target = self.range.scale(self.bits)
        return op.requantise_simulated(y, target, self.bits), target

    def settle(self) -> None:
        assert self.weight is not None
        assert self.bias is not None
        _affine(self, self.weight.double() * self.source.double(), self.bias)

    def integers(self, x: Any, *more: Any) -> Any:
        return _scaled(self, x)


def _affine(cell: Norm | Affine, gain: Tensor, bias: Tensor) -> None:
    """Constants of `y = gain * x + bias` for integers `x`, and no real weights any more."""
    target = cell.range.scale(cell.bits).double()
    mantissa, shift = op.dyadic(gain.detach() / target, MOST_SHIFT)
    offset = torch.ldexp(bias.detach().double() / target, shift).round().clamp(-(2.0**61), 2.0**61)
    cell.weight = cell.bias = None
    cell.replace("mantissa", mantissa.int())
    cell.replace("shift", shift.to(torch.int8))
    cell.replace("offset", offset.long())


def _scaled(cell: Norm | Affine, x: Any) -> Any:
    y = op.requantise(x, cell.mantissa.long(), cell.shift.long(), cell.offset, bits=cell.bits)
    return y.to(torch.int8) if cell.bits <= 8 else y


class Activation(Cell):
    """GELU, SiLU, ReLU or tanh of 32-bit sums, as 8 bits.

    Args:
        kind: name of the function.
        size: channels.
        lam: λ of λ-ShiftGELU; None for ShiftGELU.
    """

    unit: Tensor
    FINER, BITS, TANH_BITS = 6, 16, 12

    def __init__(self, kind: str, size: int, lam: float | None) -> None:
        super().__init__()
        self.kind = kind
        self.before = Requantise(
            self.TANH_BITS if kind == "tanh" else INNER, size, lam=lam if kind in op.GAIN else None
        )
        self.after = None if kind == "relu" else Requantise(INNER)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        x, scale = self.before(x, scale)
        assert scale is not None
        if self.after is None:
            return x.clamp(min=0), scale
        if self.kind == "tanh":
            y, scale = op.shift_tanh_simulated(x, scale), torch.tensor(2.0**-15)
        else:
            gain = op.GAIN[self.kind]
            y = op.shift_gelu_simulated(x, scale, gain=gain, bits=self.BITS, reciprocal=op.WIDE, finer=self.FINER)
            scale = scale * 2.0 ** (1 - self.BITS)
        return self.after(y, scale)

    def settle(self) -> None:
        step = self.before.target()
        step = 2 * step if self.kind == "tanh" else op.GAIN.get(self.kind, 1.0) * step / 2**self.FINER
        self.replace("unit", torch.tensor(op.unit_of(step)))

    def integers(self, x: Any, *more: Any) -> Any:
        x, _ = self.before(x)
        if self.after is None:
            return x.clamp(min=0)
        if self.kind == "tanh":
            y = op.shift_tanh(x, int(self.unit))
        else:
            y = op.shift_gelu(x, int(self.unit), bits=self.BITS, reciprocal=op.WIDE, finer=self.FINER)
        return self.after(y)[0]


class Attention(Cell):
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
        self.mixer = Attention(block.mixer, 1.0 if block.scale1 is None else block.scale1)
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


# --- ends ---------------------------------------------------------------------------------------------------------


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


class Answer(nn.Module):
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

    @property
    def fixed(self) -> bool:
        return "quantum" in self._buffers

    def fix(self) -> None:
        """Notes the scale of the answers."""
        if self.out is None:
            quantum = torch.tensor(2.0**-30)
        else:
            quantum = self.out.range.scale(STREAM)
        self.register_buffer("quantum", quantum.float())

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


# --- what can be had ----------------------------------------------------------------------------------------------


ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh"}


def activation_name(act: nn.Module) -> str:
    """Name of an activation that has an integer form.

    Raises:
        ValueError: it has none.
    """
    if type(act) not in ACTIVATIONS:
        names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}; got {type(act).__name__}")
    return ACTIVATIONS[type(act)]


def norm_cell(norm: nn.Module | None, bits: int) -> Any:
    """The integer form of a norm; None for none.

    Raises:
        ValueError: it has none.
    """
    if norm is None:
        return None
    if type(norm) is nn.LayerNorm and norm.elementwise_affine and len(norm.normalized_shape) == 1:
        return Norm(norm, bits)
    if type(norm) is BatchNorm:
        return Affine(norm, bits)
    raise ValueError(f"norm must be a LayerNorm with weights or a BatchNorm, got {type(norm).__name__}")


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
