"""Reading maps between their pixels: bilinear sampling, deformable convolution, multi-scale deformable sampling.

Source: Dai et al. 2017, "Deformable Convolutional Networks", equations 2 and 3; Zhu et al. 2020, "Deformable DETR",
equation 3.

- points are `(row, column)` in pixels; the centre of the first pixel is 0; what lies outside a map is zero
- all reads go through `grid_sample`, so they run and export wherever PyTorch does
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bilinear(x: Float[Tensor, "b h w c"], points: Float[Tensor, "b *n 2"]) -> Float[Tensor, "b *n c"]:
    """`y_p = sum_q max(0, 1 - |p_r - q_r|) max(0, 1 - |p_c - q_c|) x_q`."""
    h, w = x.shape[1:3]
    size = torch.tensor([w, h], dtype=points.dtype, device=points.device)
    # grid_sample counts columns first, from -1 to 1 between the outer edges of the outer pixels.
    at = (points.flip(-1) * 2 + 1) / size - 1
    read = F.grid_sample(x.movedim(-1, 1), at.flatten(1, -2)[:, None], padding_mode="zeros", align_corners=False)
    return read[:, :, 0].transpose(1, 2).unflatten(1, points.shape[1:-1])


def bilinear_reference(x: Float[Tensor, "b h w c"], points: Float[Tensor, "b *n 2"]) -> Float[Tensor, "b *n c"]:
    """The sum over all pixels, written out."""
    rows = torch.arange(x.shape[1], dtype=points.dtype, device=points.device)
    columns = torch.arange(x.shape[2], dtype=points.dtype, device=points.device)
    by_row = (1 - (points[..., :1] - rows).abs()).clamp(min=0)
    by_column = (1 - (points[..., 1:] - columns).abs()).clamp(min=0)
    return torch.einsum("b...h,b...w,bhwc->b...c", by_row, by_column, x)


def deform_conv(
    x: Float[Tensor, "b h w c"],
    offsets: Float[Tensor, "b i j k 2"],
    weight: Float[Tensor, "o c kh kw"],
    bias: Float[Tensor, " o"] | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Float[Tensor, "b i j o"]:
    """A convolution whose taps move: `y_p = b + sum_t W_t x(stride p - padding + t + offset_{p, t})`.

    Args:
        offsets: (row, column) of each of the `k = kh * kw` taps, row-major, at each place of the answer.

    Raises:
        ValueError: `offsets` has not one entry for each tap and place.
    """
    kh, kw = weight.shape[2:]
    i, j = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    if offsets.shape[1:4] != (i, j, kh * kw):
        raise ValueError(f"offsets must be (b, {i}, {j}, {kh * kw}, 2), got {tuple(offsets.shape)}")
    like: dict[str, Any] = {"dtype": offsets.dtype, "device": offsets.device}
    places = _grid(i, j, like)[:, :, None] * stride - padding
    taps = _grid(kh, kw, like).flatten(0, 1)
    read = bilinear(x, places + taps + offsets)
    return F.linear(read.flatten(-2), weight.permute(0, 2, 3, 1).flatten(1), bias)


def multi_scale_deform(
    maps: Sequence[Float[Tensor, "b _h _w c"]],
    points: Float[Tensor, "b n heads levels p 2"],
    weights: Float[Tensor, "b n heads levels p"],
) -> Float[Tensor, "b n c"]:
    """`y_h = sum_{l, p} weight_{h, l, p} map_l(point_{h, l, p})` for each head's channels, heads side by side.

    Args:
        maps: one map a level; channels head-major.
        points: (row, column) as fractions of each map's sides, 0 and 1 its outer edges.
        weights: of each read; the caller normalises them over levels and points.
    """
    heads, levels = points.shape[2:4]
    if levels != len(maps):
        raise ValueError(f"points are for {levels} levels, got {len(maps)} maps")
    reads = []
    for level, x in enumerate(maps):
        size = torch.tensor(x.shape[1:3], dtype=points.dtype, device=points.device)
        split = x.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        at = points[:, :, :, level].transpose(1, 2).flatten(0, 1) * size - 0.5
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        reads.append((bilinear(split, at) * share[..., None]).sum(-2))
    return torch.stack(reads).sum(0).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def _grid(rows: int, columns: int, like: dict[str, Any]) -> Tensor:
    """The (row, column) of each place of a grid."""
    # Not `cartesian_prod`, which the quick exporter to ONNX does not know.
    axes = torch.meshgrid(torch.arange(rows, **like), torch.arange(columns, **like), indexing="ij")
    return torch.stack(axes, -1)
