"""Grids of tokens, channels last: windows, dilated windows, strips, shifts, padding, on any number of axes.

A strip is a window as long as the grid on one axis; a dilated window takes every k-th token (MaxViT's grid attention).

Source: Liu et al. 2021, "Swin Transformer", section 3.2 (windows, shifts); Tu et al. 2022, "MaxViT" (dilated).

- windows come row-major, the batch outermost, so they can be treated as a larger batch
- padding is at the end of each axis; `crop` undoes it
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gossamer.ops.compiled import conv2d
from gossamer.ops.constants import of_sizes


def lengths(x: Float[Tensor, "b *grid c"]) -> tuple[int, ...]:
    """Sizes of the grid axes, as numbers; a tracer gives tensors, and is held to them."""
    return tuple(int(n) if isinstance(n, Tensor) else n for n in x.shape[1:-1])


def pad_to_multiple(x: Float[Tensor, "b *grid c"], size: Sequence[int]) -> Float[Tensor, "b *padded c"]:
    """Zero-pads the end of each grid axis to a multiple of `size`."""
    grid = x.shape[1:-1]
    missing = [-g % s for g, s in zip(grid, size, strict=True)]
    # A size that a tracer left open is never known to need no padding: the pad stays in the graph.
    if all(isinstance(m, int) and m == 0 for m in missing):
        return x
    return F.pad(x, [0, 0] + [p for m in reversed(missing) for p in (0, m)])


def crop(x: Float[Tensor, "b *padded c"], grid: Sequence[int]) -> Float[Tensor, "b *grid c"]:
    """The first `grid` tokens of each axis."""
    for axis, length in enumerate(grid, 1):
        if not (isinstance(length, int) and x.shape[axis] == length):
            x = x.narrow(axis, 0, length)
    return x


def pad_same(
    x: Float[Tensor, "b *grid c"], kernel: int, stride: int, value: float = 0.0
) -> Float[Tensor, "b *padded c"]:
    """TensorFlow's SAME padding: windows of `kernel` at `stride` then give `ceil(grid / stride)` answers.

    `missing = max((ceil(g / stride) - 1) stride + kernel - g, 0)`, half of it, rounded down, in front.
    """
    missing = [max((-(-g // stride) - 1) * stride + kernel - g, 0) for g in x.shape[1:-1]]
    return F.pad(x, [0, 0] + [p for m in reversed(missing) for p in (m // 2, m - m // 2)], value=value)


def windows(x: Float[Tensor, "b *grid c"], size: Sequence[int]) -> Float[Tensor, "bw n c"]:
    """Non-overlapping windows of `size` tokens: `(b * windows, prod(size), c)`.

    Raises:
        ValueError: `size` does not divide the grid.
    """
    return _partition(x, size, dilated=False)


def dilated_windows(x: Float[Tensor, "b *grid c"], size: Sequence[int]) -> Float[Tensor, "bw n c"]:
    """Windows of `size` tokens spread evenly over the grid: token i of a window lies at `i * grid / size + window`."""
    return _partition(x, size, dilated=True)


def unwindows(w: Float[Tensor, "bw n c"], size: Sequence[int], grid: Sequence[int]) -> Float[Tensor, "b *grid c"]:
    """Inverse of `windows`."""
    return _unpartition(w, size, grid, dilated=False)


def undilated_windows(
    w: Float[Tensor, "bw n c"], size: Sequence[int], grid: Sequence[int]
) -> Float[Tensor, "b *grid c"]:
    """Inverse of `dilated_windows`."""
    return _unpartition(w, size, grid, dilated=True)


def shift(x: Float[Tensor, "b *grid c"], offset: Sequence[int]) -> Float[Tensor, "b *grid c"]:
    """Cyclic shift: token p moves to `p + offset`, modulo the grid."""
    if not any(offset):
        return x
    if torch.onnx.is_in_onnx_export():
        # One gather an axis; written out, a roll is two slices and a concatenation.
        for axis, (moved, length) in enumerate(zip(offset, lengths(x), strict=True), 1):
            x = x.index_select(axis, (torch.arange(length, device=x.device) - moved) % length)
        return x
    return torch.roll(x, tuple(offset), tuple(range(1, x.ndim - 1)))


def shift_mask(grid: Sequence[int], size: Sequence[int], offset: Sequence[int]) -> Bool[Tensor, "w n n"]:
    """Which tokens of each window were neighbours before the grid was shifted back by `offset`.

    The shifted grid falls into regions cut at `-size` and `-offset` on each axis; tokens of one window may attend
    only inside their region (Swin, figure 4).
    """
    return _shift_mask(tuple(grid), tuple(size), tuple(offset))


def shift_penalty(
    grid: Sequence[int], size: Sequence[int], offset: Sequence[int], penalty: float
) -> Float[Tensor, "w n n"]:
    """The same as a term of the logits: 0 inside a region, `penalty` between regions. Not to be written to."""
    return _shift_penalty(tuple(grid), tuple(size), tuple(offset), penalty)


def relative_index(size: Sequence[int]) -> Int[Tensor, "n n"]:
    """Row of a relative bias table for each pair of a window's tokens.

    `index(i, j) = mixed radix of (coord_i - coord_j + size - 1)` with radices `2 * size - 1`, first axis slowest.
    """
    offsets = _offsets(size) + np.array(size) - 1
    return torch.from_numpy(_mixed_radix(offsets, [2 * s - 1 for s in size]))


def absolute_offset_index(size: Sequence[int]) -> Int[Tensor, "n n"]:
    """Row of a bias table over `|coord_i - coord_j|`, mixed radix `size` (LeViT's attention biases)."""
    return torch.from_numpy(_mixed_radix(np.abs(_offsets(size)), size))


def mean_filter(x: Float[Tensor, "b *grid c"], size: int) -> Float[Tensor, "b *grid c"]:
    """Mean over a neighbourhood `size` tokens wide (odd); at the border only tokens that exist count."""
    if x.ndim == 5 and min(x.shape[1:-1]) < size:
        # The library's pooling refuses volumes smaller than the window: the mean inside planes, then across them.
        planes = mean_filter(x.flatten(0, 1), size).view(x.shape)
        lines = planes.movedim(1, 3)
        return mean_filter(lines.flatten(0, 2), size).view(lines.shape).movedim(3, 1)
    planes = x.movedim(-1, 1)
    if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu":
        # A compiler asks at each tap of each pixel whether it exists; a convolution with ones is one call.
        conv = (F.conv1d, conv2d, F.conv3d)[x.ndim - 3]
        ones = x.new_ones(x.shape[-1], 1, *[size] * (x.ndim - 2))
        total = conv(planes, ones, padding=[size // 2] * (x.ndim - 2), groups=x.shape[-1]).movedim(1, -1)
        for axis, length in enumerate(x.shape[1:-1], 1):
            place = torch.arange(length, device=x.device)
            count = (place + size // 2).clamp(max=length - 1) - (place - size // 2).clamp(min=0) + 1
            total = total / count.view(-1, *[1] * (x.ndim - 1 - axis))
        return total
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    return pool(planes, size, 1, size // 2, count_include_pad=False).movedim(1, -1)


def _partition(x: Tensor, size: Sequence[int], *, dilated: bool) -> Tensor:
    grid = x.shape[1:-1]
    if len(grid) != len(size) or any(g % s for g, s in zip(grid, size, strict=True)):
        raise ValueError(f"window must divide the padded grid; got window={tuple(size)}, grid={tuple(grid)}")
    axes = len(size)
    pairs = [(s, g // s) if dilated else (g // s, s) for g, s in zip(grid, size, strict=True)]
    split = x.reshape(x.shape[0], *[p for pair in pairs for p in pair], x.shape[-1])
    counts, inner = list(range(1, 2 * axes, 2)), list(range(2, 2 * axes + 1, 2))
    if dilated:
        counts, inner = inner, counts
    return split.permute(0, *counts, *inner, 2 * axes + 1).reshape(-1, prod(size), x.shape[-1])


def _unpartition(w: Tensor, size: Sequence[int], grid: Sequence[int], *, dilated: bool) -> Tensor:
    axes = len(size)
    counts = [g // s for g, s in zip(grid, size, strict=True)]
    split = w.reshape(-1, *counts, *size, w.shape[-1])
    order = [0]
    for axis in range(axes):
        pair = (1 + axis, 1 + axes + axis)
        order += reversed(pair) if dilated else pair
    return split.permute(*order, 2 * axes + 1).reshape(-1, *grid, w.shape[-1])


def _same_region(grid: tuple[int, ...], size: tuple[int, ...], offset: tuple[int, ...]) -> np.ndarray:
    labels = np.zeros(grid, np.int64)
    for axis, (length, window, moved) in enumerate(zip(grid, size, offset, strict=True)):
        if moved:
            place = np.arange(length)
            region = (place >= length - window).astype(np.int64) + (place >= length - moved)
            labels = labels * 3 + region.reshape([-1 if a == axis else 1 for a in range(len(grid))])
    counts = [g // s for g, s in zip(grid, size, strict=True)]
    split = labels.reshape([p for pair in zip(counts, size, strict=True) for p in pair])
    axes = len(grid)
    regions = split.transpose(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).reshape(prod(counts), prod(size))
    return regions[:, :, None] == regions[:, None, :]


def _between_regions(
    grid: tuple[int, ...], size: tuple[int, ...], offset: tuple[int, ...], penalty: float
) -> np.ndarray:
    return np.where(_same_region(grid, size, offset), np.float32(0), np.float32(penalty))


_shift_mask = of_sizes(_same_region)
_shift_penalty = of_sizes(_between_regions)


def _offsets(size: Sequence[int]) -> np.ndarray:
    coords = np.stack(np.meshgrid(*(np.arange(s) for s in size), indexing="ij"), -1).reshape(-1, len(size))
    return coords[:, None] - coords[None]


def _mixed_radix(digits: np.ndarray, radices: Sequence[int]) -> np.ndarray:
    index = np.zeros(digits.shape[:-1], np.int64)
    for axis, radix in enumerate(radices):
        index = index * radix + digits[..., axis]
    return index
