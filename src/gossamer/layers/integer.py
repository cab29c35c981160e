"""Cells of a transformer that calculates with integers alone, and the same cells while they still learn their scales.

Source: Li and Gu 2022, "I-ViT"; I-Segmenter 2025 (16-bit residual stream and attention weights, λ-ShiftGELU).

A cell is in one of two states:

- *simulated*: tensors are real, but multiples of their scale, and everything is rounded as the integers will be
  (`gossamer.ops.integer`, `…_simulated`); ranges follow the data while training; gradients go straight through
- *fixed* (`fix`): integers in, integers out; scales have become constants, multiply and shift

Between cells goes `(x, scale)`; fixed cells take integers for `x` and give None for `scale`. Everything a fixed cell
does is done with operators, so that a symbol of `gossamer.io.integer_graph` can take the place of `x`: that is how the
ONNX file is written, from this one description.

`gossamer.layers.integer_blocks` and `gossamer.layers.integer_ends` are made of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.norms import BatchNorm
from gossamer.ops import integer as op

Scaled = tuple[Any, Tensor | None]
"""Integers and None, or real numbers and the scale they are multiples of."""

MOMENTUM = 0.95
# Shifts above this lose bits of the mantissa, which can no longer be seen; offsets then stay below 2^62.
MOST_SHIFT = 44
INNER, STREAM = 8, 16


class Fixable(nn.Module):
    """What turns from a simulation into integers by `fix`."""

    fixed = False

    def fix(self) -> None:
        """Turns ranges and real weights into integer constants."""
        self.settle()
        self.fixed = True

    def settle(self) -> None:
        """What `fix` changes."""

    def replace(self, name: str, value: Tensor) -> None:
        """A constant in the place of a parameter or buffer."""
        if name in self._parameters:
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)


class Cell(Fixable):
    """A part with constants of its own: `simulate` before, `integers` after it was fixed."""

    def forward(self, x: Any, scale: Tensor | None = None, *more: Any) -> Scaled:
        if self.fixed:
            return self.integers(x, *more[::2]), None
        return self.simulate(x, scale, *more)

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        raise TypeError(f"{type(self).__name__} has no simulation")

    def integers(self, x: Any, *more: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no integer form")


def fix(model: nn.Module) -> None:
    """Fixes all parts of `model`."""
    for part in list(model.modules()):
        if isinstance(part, Fixable):
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


class Affine(Cell):
    """`y = w x + b` with a scale and a shift a channel, requantised in the same multiplication.

    Args:
        weight, bias: real ones.
        bits: of the integers that leave.
    """

    mantissa: Tensor
    shift: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, bits: int = INNER) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(weight.detach().clone())
        self.bias: nn.Parameter | None = nn.Parameter(bias.detach().clone())
        self.bits = bits
        self.range = Range()
        self.source: Tensor = torch.ones(())

    @classmethod
    def of(cls, norm: BatchNorm, bits: int = INNER) -> Affine:
        """A batch norm whose statistics no longer change."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        return cls(gain, norm.bias.detach() - gain * norm.running_mean, bits)

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
        target = self.range.scale(self.bits).double()
        mantissa, shift = op.dyadic(self._gain(self.weight).detach() / target, MOST_SHIFT)
        offset = torch.ldexp(self.bias.detach().double() / target, shift).round().clamp(-(2.0**61), 2.0**61)
        self.weight = self.bias = None
        self.replace("mantissa", mantissa.int())
        self.replace("shift", shift.to(torch.int8))
        self.replace("offset", offset.long())

    def _gain(self, weight: Tensor) -> Tensor:
        """What an integer that comes in is multiplied by."""
        return weight.double() * self.source.double()

    def integers(self, x: Any, *more: Any) -> Any:
        y = op.requantise(x, self.mantissa.long(), self.shift.long(), self.offset, bits=self.bits)
        return y.to(torch.int8) if self.bits <= 8 else y


class Norm(Affine):
    """A layer norm: `y = sqrt(c) integer_norm(x) w + b`.

    Args:
        norm: with its weights.
        bits: of the integers that leave.
    """

    eps: Tensor

    def __init__(self, norm: nn.LayerNorm, bits: int = INNER) -> None:
        super().__init__(norm.weight, norm.bias, bits)
        self.small = norm.eps

    def simulate(self, x: Tensor, scale: Tensor | None, *more: Any) -> Scaled:
        assert scale is not None
        dim = x.shape[-1]
        y = op.integer_norm_simulated(x, scale, self._eps(dim, scale.detach())) * dim**0.5
        return super().simulate(y, scale)

    def settle(self) -> None:
        assert self.weight is not None
        self.replace("eps", self._eps(len(self.weight), self.source).long())
        super().settle()

    def _gain(self, weight: Tensor) -> Tensor:
        return weight.double() * len(weight) ** 0.5 / 2**30

    def _eps(self, dim: int, source: Tensor) -> Tensor:
        return (self.small * dim / source.double() ** 2 + 0.5).floor().clamp(max=2.0**40).float()

    def integers(self, x: Any, *more: Any) -> Any:
        return super().integers(op.integer_norm(x, self.eps))


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
        return Affine.of(norm, bits)
    raise ValueError(f"norm must be a LayerNorm with weights or a BatchNorm, got {type(norm).__name__}")
