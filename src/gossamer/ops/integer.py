"""A transformer in integers alone: scales as multiply and shift, and softmax, GELU, tanh and norms out of shifts.

A number is `scale * int`, symmetric, zero-point 0. Only the integers are calculated with; the scales are constants.

Source: Li and Gu 2022, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference" (Shiftmax,
ShiftGELU, I-LayerNorm); Kim et al. 2021, "I-BERT: Integer-only BERT Quantization" (integer square root); I-Segmenter
2025 (16-bit Shiftmax and residual stream, limited range ahead of ShiftGELU).

- `exp(x) = 2^(x log2 e)`, `log2 e ~ 1 + 1/2 - 1/16`; a power of two is a shift for its whole part and `1 - r/2` for the
  rest: shifts and additions
- each function has its floating simulation, `…_simulated`: the same rounding on real numbers, written from the
  formulas, with straight-through gradients for training
- the integer functions use only operators, so that they work on integer tensors and on anything with the same operators
  (the symbols of `gossamer.io.integer_graph`); they are exact in int64, and everything that is shifted is below 2^62
- here as an option, other than in the papers: a reciprocal of more than 31 bits, whose floor costs nearly nothing
  (`reciprocal=WIDE`); and the square root starts from the bit length, so that six steps serve up to 2^44
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Ints = Any
"""An integer tensor, or a symbol that stands for one."""

NARROW, WIDE = 31, 46
"""Bits of a reciprocal: the papers', and those of int64."""
SOFTMAX_BITS, GELU_BITS = 15, 23
"""Octaves below the largest entry at which an exponential ends: the papers' `n`."""


# --- scales -------------------------------------------------------------------------------------------------------


def check_bits(bits: object) -> int:
    """Raises a ValueError where integers of `bits` are not supported."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"bits must be a whole number from 2 to 16, got {bits!r}")
    return bits


def scale_of(top: Float[Tensor, "*n"], bits: int) -> Float[Tensor, "*n"]:
    """`top / (2^(bits-1) - 1)`, the scale at which integers of `bits` reach `top`."""
    return top.clamp(min=1e-12) / (2 ** (check_bits(bits) - 1) - 1)


def dyadic(ratio: Float[Tensor, "*n"], most: int = 62) -> tuple[Int[Tensor, "*n"], Int[Tensor, "*n"]]:
    """`(m, e)` with `ratio ~ m * 2^-e`, m of 31 bits, to a relative error below 2^-30.

    Args:
        ratio: of either sign, below 2^30.
        most: largest shift; what would need a larger one loses bits of m.

    Raises:
        ValueError: a ratio that is not finite, or is too large.
    """
    _, exponent = torch.frexp(ratio.double())
    if not bool(torch.isfinite(ratio).all()) or int(exponent.max()) > 30:
        raise ValueError("a ratio of scales must be finite and below 2^30")
    shift = (31 - exponent.long()).clamp(max=most)
    mantissa = torch.ldexp(ratio.double(), shift).round().long()
    # 1 - 2^-33 rounds up to 2^31, one bit too many.
    full = mantissa.abs() == 2**31
    return torch.where(full, mantissa // 2, mantissa), torch.where(full, shift - 1, shift)


def requantise(x: Ints, mantissa: Ints, shift: Ints, offset: Ints = 0, *, bits: int = 8) -> Ints:
    """`clamp(round((x m + offset) 2^-e))`: integers at another scale, in `bits`; int64."""
    half = (1 << (shift - 1)) if isinstance(shift, int) else torch.ones_like(shift) << (shift - 1)
    y = (x.to(torch.int64) * mantissa + (half + offset)) >> shift
    return y.clamp(min=-(2 ** (bits - 1)), max=2 ** (bits - 1) - 1)


def requantise_simulated(
    x: Float[Tensor, "*n"], scale: Float[Tensor, "*m"] | float, bits: int = 8
) -> Float[Tensor, "*n"]:
    """The multiple of `scale` nearest to `x`, within `bits`; the gradient is that of the clamp."""
    return floor(x / scale + 0.5).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def floor(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The floor, with the gradient of the identity (straight through)."""
    return _Floor.apply(x)


def whole(x: Float[Tensor, "*n"], scale: Float[Tensor, "*m"] | float) -> Float[Tensor, "*n"]:
    """The integers that `x`, a multiple of `scale`, stands for, as floats."""
    return floor(x / scale + 0.5)


# --- exponentials -------------------------------------------------------------------------------------------------


def unit_of(scale: Float[Tensor, "*n"] | float) -> int:
    """How many steps of `scale` make at least one: `-floor(-1 / scale)`."""
    return max(1, -int(torch.floor(-1 / torch.as_tensor(scale, dtype=torch.float64))))


def shift_exp(below: Ints, unit: Ints, octaves: int) -> Ints:
    """`exp(-below * scale)` for integers `below >= 0`, with scale `scale / 2^octaves`; `unit` is `unit_of(scale)`."""
    # Of the papers' x = -below: floor(x/2) and floor(x/16) are the ceilings here.
    t = _positive(below + ((below + 1) >> 1) - ((below + 15) >> 4)).clamp(max=int(octaves * unit))
    q = t // unit
    # (r/2 - x0) 2^(n - q) with r = -(t - q unit) and x0 = -unit
    return (_positive(2 * unit - (t - q * unit)) * 2**octaves) >> (q + 1)


def shift_exp_simulated(x: Float[Tensor, "*n"], scale: Float[Tensor, ""] | float, octaves: int) -> Float[Tensor, "*n"]:
    """`shift_exp` on real numbers `x <= 0`, multiples of `scale`."""
    i = whole(x, scale)
    x0 = -unit_of(scale)
    i = i + floor(i / 2) - floor(i / 16)
    i = i.clamp(min=octaves * x0)
    q = floor(i / x0).detach()
    return floor((((i - x0 * q) / 2 - x0) * 2 ** (octaves - q)).clamp(min=0)) * (scale / 2**octaves)


def shiftmax(x: Ints, unit: Ints, *, bits: int = 16, mask: Ints | None = None, reciprocal: int = NARROW) -> Ints:
    """Softmax over the last axis, with scale `2^-(bits-1)`; a row with nothing valid gives zeros.

    `p = floor(e floor((2^R - 1) / sum e) / 2^(R - bits + 1))`, `e = shift_exp(max x - x)`, R = 31 in the paper.

    Args:
        x: integers of 16 bits, whose scale has `unit` steps in one.
        mask: True where valid; broadcasts.
    """
    x = x.to(torch.int64)
    if mask is not None:
        mask = mask.to(torch.int64)
        x = x * mask - (1 - mask) * 2**24
    e = shift_exp(_positive(x.amax(-1, keepdim=True) - x), unit, SOFTMAX_BITS)
    total = e.sum(-1, keepdim=True)
    if mask is not None:
        e = e * mask
        total = e.sum(-1, keepdim=True) + (mask.amax(-1, keepdim=True) < 1).to(torch.int64)
    total = _at_most(total, reciprocal)
    return (e * _over(reciprocal, total)) >> (reciprocal - bits + 1)


def shiftmax_simulated(
    x: Float[Tensor, "*n m"],
    scale: Float[Tensor, ""] | float,
    *,
    bits: int = 16,
    mask: Bool[Tensor, "..."] | None = None,
    reciprocal: int = NARROW,
) -> Float[Tensor, "*n m"]:
    """`shiftmax` on real numbers, multiples of `scale`."""
    if mask is not None:
        x = x.masked_fill(~mask, -(2.0**20))
    e = shift_exp_simulated(x - x.amax(-1, keepdim=True).detach(), scale, SOFTMAX_BITS) * (2**SOFTMAX_BITS / scale)
    if mask is not None:
        e = e * mask
    total = e.sum(-1, keepdim=True).clamp(1, 2**reciprocal - 1)
    return floor(e * floor((2**reciprocal - 1) / total) / 2 ** (reciprocal - bits + 1)) / 2 ** (bits - 1)


def shift_sigmoid(x: Ints, unit: Ints, *, bits: int = 8, reciprocal: int = NARROW) -> Ints:
    """`1 / (1 + exp(-x))`, with scale `2^-(bits-1)`: `e^(x-t) / (e^(x-t) + e^-t)`, t the row's largest entry or 0."""
    x = x.to(torch.int64)
    top = x.amax(-1, keepdim=True).clamp(min=0)
    e = shift_exp(_positive(top - x), unit, GELU_BITS)
    total = _at_most(e + shift_exp(top, unit, GELU_BITS), reciprocal)
    return (e * _over(reciprocal, total)) >> (reciprocal - bits + 1)


def shift_sigmoid_simulated(
    x: Float[Tensor, "*n m"], scale: Float[Tensor, ""] | float, *, bits: int = 8, reciprocal: int = NARROW
) -> Float[Tensor, "*n m"]:
    """`shift_sigmoid` on real numbers, multiples of `scale`."""
    top = x.amax(-1, keepdim=True).clamp(min=0).detach()
    e, e0 = (shift_exp_simulated(y, scale, GELU_BITS) * (2**GELU_BITS / scale) for y in (x - top, -top))
    total = (e + e0).clamp(1, 2**reciprocal - 1)
    return floor(e * floor((2**reciprocal - 1) / total) / 2 ** (reciprocal - bits + 1)) / 2 ** (bits - 1)


GAIN = {"gelu": 1.702, "silu": 1.0}
"""Activations `x sigmoid(gain x)`."""


def shift_gelu(x: Ints, unit: Ints, *, bits: int = 8, reciprocal: int = NARROW, finer: int = 0) -> Ints:
    """`x sigmoid(1.702 x)` with scale `scale 2^-(bits-1)`.

    Args:
        unit: `unit_of(1.702 scale / 2^finer)`; for SiLU without the factor.
        finer: further bits of the sigmoid's argument: with few steps in one, `unit` is off by up to one of them.
    """
    x = x.to(torch.int64)
    return x * shift_sigmoid(x * 2**finer, unit, bits=bits, reciprocal=reciprocal)


def shift_gelu_simulated(
    x: Float[Tensor, "*n m"],
    scale: Float[Tensor, ""] | float,
    *,
    gain: float = 1.702,
    bits: int = 8,
    reciprocal: int = NARROW,
    finer: int = 0,
) -> Float[Tensor, "*n m"]:
    """`shift_gelu` on real numbers, multiples of `scale`."""
    return x * shift_sigmoid_simulated(gain * x, gain * scale / 2**finer, bits=bits, reciprocal=reciprocal)


def shift_tanh(x: Ints, unit: Ints, *, bits: int = 16, reciprocal: int = WIDE) -> Ints:
    """`2 sigmoid(2 x) - 1` with scale `2^-(bits-1)`; `unit` is `unit_of(2 scale)`."""
    return 2 * shift_sigmoid(x, unit, bits=bits, reciprocal=reciprocal) - 2 ** (bits - 1)


def shift_tanh_simulated(
    x: Float[Tensor, "*n m"], scale: Float[Tensor, ""] | float, *, bits: int = 16, reciprocal: int = WIDE
) -> Float[Tensor, "*n m"]:
    """`shift_tanh` on real numbers, multiples of `scale`."""
    return 2 * shift_sigmoid_simulated(2 * x, 2 * scale, bits=bits, reciprocal=reciprocal) - 1


def limit_of(top: Float[Tensor, "*n"], deviation: Float[Tensor, "*n"], lam: float | None) -> Float[Tensor, "*n"]:
    """λ-ShiftGELU: the range ahead of ShiftGELU ends at `lam` deviations; None gives ShiftGELU, the whole range.

    A long tail would spread the few integers over values that hardly occur.
    """
    return top if lam is None else torch.minimum(top, lam * deviation)


# --- norms --------------------------------------------------------------------------------------------------------


def integer_sqrt(n: Int[Tensor, "*n"], *, steps: int = 6, start: int | None = None) -> Int[Tensor, "*n"]:
    """`floor(sqrt(n))` of `0 <= n < 2^44` by Newton's steps `k <- floor((k + floor(n / k)) / 2)`.

    Args:
        start: the first k; the power of two above the root if None. I-ViT starts 10 steps from 2^16.
    """
    return _root(n[..., None], steps, start)[..., 0]


def _root(n: Ints, steps: int = 6, start: int | None = None) -> Ints:
    """`integer_sqrt` of a tensor whose last axis is 1."""
    n = n.to(torch.int64)
    if start is None:
        powers = torch.arange(22)
        k = ((n >= 4**powers).to(torch.int64) * 2 ** (powers + 1)).amax(-1, keepdim=True).clamp(min=1)
    else:
        k = n * 0 + start
    for _ in range(steps):
        k = ((k + n // k) >> 1).clamp(min=1)
    return k - (k * k > n).to(torch.int64)


def integer_norm(x: Ints, eps: Ints = 0) -> Ints:
    """`(x - mean) / |x - mean|` over the last axis, with scale `2^-30`; a layer norm is `sqrt(c)` times that.

    Args:
        x: integers of at most 17 bits.
        eps: a layer norm's, times `c` over the square of the scale.
    """
    x = x.to(torch.int64)
    c = x.shape[-1]
    # A large whole number keeps the dividend positive.
    mean = _positive(2 * x.sum(-1, keepdim=True) + (c + 2 * c * 2**20)) // (2 * c) - 2**20
    return unit_vector(x - mean, eps)


def unit_vector(y: Ints, eps: Ints = 0) -> Ints:
    """`y / |y|` over the last axis, with scale `2^-30`."""
    y = y.to(torch.int64)
    squares = _positive(y * y).sum(-1, keepdim=True) + eps
    return (y * _over(31, _root(squares).clamp(min=1))) >> 1


def integer_norm_simulated(
    x: Float[Tensor, "*n c"],
    scale: Float[Tensor, ""] | float,
    eps: float | Float[Tensor, ""] = 0.0,
    *,
    centre: bool = True,
) -> Float[Tensor, "*n c"]:
    """`integer_norm` (`unit_vector` where not `centre`) on real numbers, multiples of `scale`."""
    i = whole(x, scale)
    y = i - floor(i.mean(-1, keepdim=True) + 0.5) if centre else i
    root = floor(((y * y).sum(-1, keepdim=True) + eps).clamp(min=1e-6).sqrt()).clamp(min=1)
    return floor(y * floor((2**31 - 1) / root) / 2) / 2**30


def _positive(x: Ints) -> Ints:
    """`x`, of which it is known that nothing is below 0: symbols want to be told."""
    return x if isinstance(x, Tensor) else x.known_positive()


def _at_most(x: Ints, bits: int) -> Ints:
    """Sums of exponentials below `2^bits`; those of 46 bits are so by themselves."""
    return x if bits == WIDE else x.clamp(max=2**bits - 1)


def _over(bits: int, x: Ints) -> Ints:
    """`floor((2^bits - 1) / x)`."""
    return (2**bits - 1) // x


# --- products -----------------------------------------------------------------------------------------------------


def product(a: Ints, b: Ints) -> Ints:
    """`a @ b` of 8-bit integers (`a` may have 16 bits and no sign), int32."""
    if not isinstance(a, Tensor):
        return a @ b
    if a.dtype == b.dtype == torch.int8 and b.ndim == 2 and a.device.type == "cpu":
        rows = a.reshape(-1, a.shape[-1])
        return torch._int_mm(rows, b).view(*a.shape[:-1], b.shape[-1])
    return a.to(torch.int32) @ b.to(torch.int32)


def rows(table: Int[Tensor, "v c"], ids: Ints) -> Ints:
    """Rows of a table."""
    return table[ids] if isinstance(ids, Tensor) else ids.rows(table)
