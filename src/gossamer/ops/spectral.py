"""Products by Fourier transform: circular correlation and convolution, long convolution, Toeplitz products.

Source: Wu et al. 2021, "Autoformer" (circular correlation); Poli et al. 2023, "Hyena" and Zimerman & Wolf 2023,
"Multi-Dimensional Hyena" (long convolution); Luo et al. 2021, "Stable, Fast and Accurate" (Toeplitz products).

- channels last; any number of grid axes; odd and even sizes
- the FFT runs in float32 or wider and the result has the dtype of the input
- `form="dft"` writes each transform as a matrix product, equal and O(n^2). It is taken while exporting: ONNX
  Runtime's DFT operator fails at a free length, and at a fixed one is slower than the product and less exact
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FORMS = ("fft", "dft")


def _form(form: str | None) -> str:
    if form is None:
        return "dft" if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else "fft"
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS} or None, got {form!r}")
    return form


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _fast_length(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is not below `least`: lengths an FFT is quick at."""
    if torch.compiler.is_exporting():
        return least  # matrix products are as quick at any length, and `least` may be symbolic
    best = 2 ** max(math.ceil(math.log2(max(least, 2))), 1)
    five = 1
    while five < best:
        three = five
        while three < best:
            two = 2 * three
            while two < least:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best


# ---- transforms as matrix products ---------------------------------------------------------------------------


def _turns(n: int, m: int, size: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of `2 pi t f / size` for t < n and start <= f < start + m.

    The phase is reduced in integers, so it is exact.
    """
    t = torch.arange(n, device=like.device)[:, None]
    f = torch.arange(m, device=like.device) + start
    period = torch.full((1,), size, device=like.device)  # a tensor: ONNX takes no remainder by a symbolic number
    phase = (t * f % period).to(like.dtype) * (2 * math.pi / size)
    return phase.cos(), phase.sin()


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


def _dft(x: Tensor, sizes: Sequence[int], axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `rfftn(x, s=sizes, dim=axes)`."""
    axis, size = axes[-1], sizes[-1]
    cos, sin = _turns(x.shape[axis], size // 2 + 1, size, x)
    re, im = _along(x, cos, axis), -_along(x, sin, axis)
    for axis, size in zip(axes[:-1], sizes[:-1], strict=True):
        cos, sin = _turns(x.shape[axis], size, size, x)
        re, im = (
            _along(re, cos, axis) + _along(im, sin, axis),
            _along(im, cos, axis) - _along(re, sin, axis),
        )
    return re, im


def _inverse_dft(
    re: Tensor, im: Tensor, sizes: Sequence[int], axes: Sequence[int], parts: Sequence[tuple[int, int]]
) -> Tensor:
    """`irfftn(re + i im, s=sizes, dim=axes)`, of each axis the `(start, length)` in `parts`."""
    for axis, size, (start, n) in zip(axes[:-1], sizes[:-1], parts[:-1], strict=True):
        cos, sin = _turns(size, n, size, re, start)
        re, im = (
            (_along(re, cos, axis) - _along(im, sin, axis)) / size,
            (_along(im, cos, axis) + _along(re, sin, axis)) / size,
        )
    axis, size, (start, n) = axes[-1], sizes[-1], parts[-1]
    half = size // 2 + 1
    cos, sin = _turns(half, n, size, re, start)
    # every frequency stands for itself and its mirror image, but 0 and (even sizes) size / 2 are their own
    f = torch.arange(half, device=re.device)[:, None]
    weight = torch.where((f == 0) | (2 * f == size), 1.0, 2.0).to(re.dtype) / size
    return _along(re, weight * cos, axis) - _along(im, weight * sin, axis)


def _product(
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    axes: Sequence[int],
    parts: Sequence[tuple[int, int]],
    form: str | None,
    conjugate: bool = False,
) -> Tensor:
    """The circular convolution of periods `sizes` (with `conjugate`: correlation), of each axis a part.

    Args:
        sizes: period of each axis; shorter inputs are continued by zeros.
        axes: the axes to convolve along.
        parts: `(start, length)` of what is wanted of each axis.
        form: "fft", "dft", or None for the one that fits.
        conjugate: correlate.
    """
    dtype = x.dtype
    x, y = _wide(x), _wide(y)
    if _form(form) == "dft":
        (xr, xi), (yr, yi) = _dft(x, sizes, axes), _dft(y, sizes, axes)
        yi = -yi if conjugate else yi
        out = _inverse_dft(xr * yr - xi * yi, xr * yi + xi * yr, sizes, axes, parts)
    else:
        fx, fy = (torch.fft.rfftn(t, s=list(sizes), dim=list(axes)) for t in (x, y))
        # the sizes are given: without them an odd last axis would come back one short
        out = torch.fft.irfftn(fx * (fy.conj() if conjugate else fy), s=list(sizes), dim=list(axes))
        for axis, (start, n) in zip(axes, parts, strict=True):
            out = out.narrow(axis, start, n)
    return out.to(dtype)


# ---- circular ------------------------------------------------------------------------------------------------


def circular_correlation(
    q: Float[Tensor, "b n *c"], k: Float[Tensor, "b n *c"], *, form: str | None = None
) -> Float[Tensor, "b n *c"]:
    """`R(tau) = sum_t q_t k_(t - tau mod n)` along the second axis, per channel.

    Args:
        form: "fft", "dft" (matrix products), or None: "fft", and "dft" while exporting.
    """
    n = q.shape[1]
    return _product(q, k, (n,), (1,), ((0, n),), form, conjugate=True)


def circular_correlation_reference(q: Float[Tensor, "b n *c"], k: Float[Tensor, "b n *c"]) -> Float[Tensor, "b n *c"]:
    """`circular_correlation`, one delay after the other."""
    return torch.stack([(q * k.roll(tau, 1)).sum(1) for tau in range(q.shape[1])], dim=1)


def circular_convolution(
    x: Float[Tensor, "b n *c"], k: Float[Tensor, "#b n *#c"], *, form: str | None = None
) -> Float[Tensor, "b n *c"]:
    """`y_t = sum_s k_s x_(t - s mod n)` along the second axis, per channel."""
    n = x.shape[1]
    return _product(x, k, (n,), (1,), ((0, n),), form)


def circular_convolution_reference(x: Float[Tensor, "b n *c"], k: Float[Tensor, "#b n *#c"]) -> Float[Tensor, "b n *c"]:
    """`circular_convolution`, one delay after the other."""
    return torch.stack([k[:, s, None] * x.roll(s, 1) for s in range(x.shape[1])]).sum(0)


# ---- long convolution ----------------------------------------------------------------------------------------


def long_convolution(
    x: Float[Tensor, "b *grid c"], k: Float[Tensor, "*sizes #c"], *, form: str | None = None
) -> Float[Tensor, "b *grid c"]:
    """`y_t = sum_(s <= t) k_s x_(t - s)`, causal on every grid axis (in 2-D: on a quadrant), per channel.

    Args:
        k: a filter as long as the grid or shorter; what reaches beyond the grid is ignored.
        form: "fft", "dft" (matrix products), or None: "fft", and "dft" while exporting.

    Raises:
        ValueError: `k` has not as many axes as a sample of `x`.
    """
    k = _filter(x, k)
    grid = x.shape[1:-1]
    axes = tuple(range(1, x.ndim - 1))
    # only y[:n] is wanted, so what wraps around must not reach below n: period n + k - 1 keeps it out
    sizes = [_fast_length(n + m - 1) for n, m in zip(grid, k.shape, strict=False)]
    return _product(x, k[None], sizes, axes, [(0, n) for n in grid], form)


def long_convolution_reference(
    x: Float[Tensor, "b *grid c"], k: Float[Tensor, "*sizes #c"]
) -> Float[Tensor, "b *grid c"]:
    """`long_convolution`, one filter entry after the other."""
    k = _filter(x, k)
    y = torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in k.shape[:-1])).view(-1, k.ndim - 1).tolist():
        pads = [size for s in reversed(place) for size in (s, 0)]
        moved = F.pad(x, (0, 0, *pads))[(slice(None), *(slice(0, n) for n in x.shape[1:-1]))]
        y = y + k[tuple(place)] * moved
    return y


def _filter(x: Tensor, k: Tensor) -> Tensor:
    if k.ndim != x.ndim - 1:
        raise ValueError(f"k must have {x.ndim - 1} axes (grid and channels) as x has, got shape {tuple(k.shape)}")
    return k[tuple(slice(0, n) for n in x.shape[1:-1])]


# ---- Toeplitz ------------------------------------------------------------------------------------------------


def toeplitz(
    x: Float[Tensor, "..."], table: Float[Tensor, "..."], *, axes: int = 1, form: str | None = None
) -> Float[Tensor, "..."]:
    """`y_i = sum_j table_(j - i) x_j` along the `axes` grid axes before the last one.

    Args:
        x: `(*b, *grid, c)`.
        table: `(*b, *offsets, c)` with `2n - 1` offsets `-(n - 1) .. n - 1` per grid axis; leading axes and
            channels broadcast. Zeros at positive offsets make the product causal.
        axes: 1 for a sequence, 2 for an image (block Toeplitz with Toeplitz blocks), ...
        form: "fft", "dft" (matrix products), or None: "fft", and "dft" while exporting.

    Raises:
        ValueError: `table` does not hold `2n - 1` offsets per axis.
    """
    grid = _offsets(x, table, axes)
    where = tuple(range(-axes - 1, -1))
    sizes = [_fast_length(2 * n - 1) for n in grid]
    # turned round, the table is a filter that begins n - 1 steps too late: w_(n - 1 + i - j) = table_(j - i), so
    # y_i is entry n - 1 + i of w * x, and a period of 2n - 1 wraps only into entries before those
    return _product(x, table.flip(where), sizes, where, [(n - 1, n) for n in grid], form)


def toeplitz_reference(x: Float[Tensor, "..."], table: Float[Tensor, "..."], *, axes: int = 1) -> Float[Tensor, "..."]:
    """`toeplitz`, with the whole matrix written out."""
    grid = _offsets(x, table, axes)
    cells = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in grid)).view(-1, axes)
    offset = cells[None] - cells[:, None] + torch.tensor(grid, device=x.device) - 1  # (i, j, axes): j - i
    strides = [math.prod(2 * n - 1 for n in grid[i + 1 :]) for i in range(axes)]
    flat = table.flatten(-axes - 1, -2)
    matrix = flat[..., (offset * torch.tensor(strides, device=x.device)).sum(-1), :]  # (*b, i, j, c)
    y = (matrix * x.flatten(-axes - 1, -2)[..., None, :, :]).sum(-2)
    return y.unflatten(-2, grid)


def _offsets(x: Tensor, table: Tensor, axes: int) -> tuple[int, ...]:
    grid = tuple(x.shape[-axes - 1 : -1])
    need = tuple(2 * n - 1 for n in grid)
    if tuple(table.shape[-axes - 1 : -1]) != need:
        raise ValueError(f"table must hold {need} offsets for grid {grid}, got shape {tuple(table.shape)}")
    return grid
