"""Deformable reads: equal to the sum over all pixels, to a convolution at offset zero, and to loops over points."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.ops.deform import bilinear, bilinear_reference, deform_conv, multi_scale_deform

DOUBLE = torch.float64


@pytest.mark.parametrize(("size", "points"), [((5, 7), (11,)), ((1, 6), (3, 4)), ((4, 1), (2, 2, 3)), ((9, 9), (50,))])
def test_bilinear_reads_equal_the_sum_over_all_pixels_forward_and_gradient(size, points) -> None:
    x = torch.randn(2, *size, 3, dtype=DOUBLE, requires_grad=True)
    # Half of the points lie outside of the map or on its border.
    at = (torch.rand(2, *points, 2, dtype=DOUBLE) * 2 - 0.5) * torch.tensor(size)
    at.requires_grad_()
    one, two = bilinear(x, at), bilinear_reference(x, at)
    assert one.shape == (2, *points, 3)
    torch.testing.assert_close(one, two)
    seed = torch.randn_like(one)
    for got, want in zip(torch.autograd.grad(one, (x, at), seed), torch.autograd.grad(two, (x, at), seed), strict=True):
        torch.testing.assert_close(got, want)


def test_whole_points_read_pixels_and_what_lies_outside_is_zero() -> None:
    x = torch.randn(1, 3, 4, 2)
    at = torch.tensor([[[0.0, 0.0], [2.0, 3.0], [1.0, 2.0], [-1.0, 0.0], [0.0, 4.0], [-0.5, 3.0]]])
    y = bilinear(x, at)[0]
    want = [x[0, 0, 0], x[0, 2, 3], x[0, 1, 2], torch.zeros(2), torch.zeros(2), x[0, 0, 3] / 2]
    torch.testing.assert_close(y, torch.stack(want), atol=1e-6, rtol=1e-5)


CONVS = [((6, 8), (2, 2), 2, 0), ((7, 5), (3, 3), 1, 1), ((9, 7), (3, 3), 2, 1), ((5, 6), (1, 3), 1, 0)]


def conv_parts(size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int) -> tuple[Tensor, ...]:
    x = torch.randn(2, *size, 4, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(5, 4, *kernel, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    i, j = ((n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel, strict=True))
    offsets = torch.zeros(2, i, j, kernel[0] * kernel[1], 2, dtype=DOUBLE, requires_grad=True)
    return x, offsets, weight, bias


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CONVS)
def test_offsets_of_zero_make_it_a_convolution_forward_and_gradient(size, kernel, stride, padding) -> None:
    x, offsets, weight, bias = conv_parts(size, kernel, stride, padding)
    one = deform_conv(x, offsets, weight, bias, stride=stride, padding=padding)
    two = F.conv2d(x.movedim(-1, 1), weight, bias, stride, padding).movedim(1, -1)
    torch.testing.assert_close(one, two)
    seed = torch.randn_like(one)
    parts = (x, weight, bias)
    for got, want in zip(torch.autograd.grad(one, parts, seed), torch.autograd.grad(two, parts, seed), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CONVS)
def test_moved_taps_equal_a_loop_over_taps_forward_and_gradient(size, kernel, stride, padding) -> None:
    x, offsets, weight, bias = conv_parts(size, kernel, stride, padding)
    offsets = (torch.randn_like(offsets) * 1.5).requires_grad_()
    one = deform_conv(x, offsets, weight, bias, stride=stride, padding=padding)
    rows = torch.arange(one.shape[1], dtype=DOUBLE)[:, None] * stride - padding
    columns = torch.arange(one.shape[2], dtype=DOUBLE)[None] * stride - padding
    two = bias.expand(one.shape)
    for tap in range(kernel[0] * kernel[1]):
        a, b = divmod(tap, kernel[1])
        row, column = rows + a + offsets[:, :, :, tap, 0], columns + b + offsets[:, :, :, tap, 1]
        two = two + bilinear_reference(x, torch.stack((row, column), -1)) @ weight[:, :, a, b].T
    torch.testing.assert_close(one, two)
    seed = torch.randn_like(one)
    parts = (x, offsets, weight, bias)
    for got, want in zip(torch.autograd.grad(one, parts, seed), torch.autograd.grad(two, parts, seed), strict=True):
        torch.testing.assert_close(got, want)


def test_an_offset_of_a_whole_pixel_moves_the_map() -> None:
    x, offsets, weight, _ = conv_parts((6, 6), (3, 3), 1, 1)
    moved = offsets.detach().clone()
    moved[..., 1] = 1
    y = deform_conv(x, moved, weight, None, padding=1)
    shifted = F.pad(x[:, :, 1:], (0, 0, 0, 1))
    want = deform_conv(shifted, offsets, weight, None, padding=1)
    # The column that enters from outside differs: there the shifted map has lost its first column.
    torch.testing.assert_close(y[:, :, 1:], want[:, :, 1:])
    assert not torch.allclose(y[:, :, 0], want[:, :, 0])


def test_offsets_of_another_shape_are_refused() -> None:
    x, offsets, weight, bias = conv_parts((6, 8), (2, 2), 2, 0)
    with pytest.raises(ValueError, match=r"offsets must be \(b, 3, 4, 4, 2\), got \(2, 2, 4, 4, 2\)"):
        deform_conv(x, offsets[:, 1:], weight, bias, stride=2)


def test_multi_scale_sampling_equals_a_loop_over_heads_levels_and_points_forward_and_gradient() -> None:
    b, n, heads, levels, p, width = 2, 5, 3, 2, 4, 6
    sizes = ((6, 5), (3, 4))
    maps = [torch.randn(b, *size, heads * width, dtype=DOUBLE, requires_grad=True) for size in sizes]
    points = (torch.rand(b, n, heads, levels, p, 2, dtype=DOUBLE) * 1.4 - 0.2).requires_grad_()
    weights = torch.randn(b, n, heads, levels, p, dtype=DOUBLE).softmax(-1).requires_grad_()
    one = multi_scale_deform(maps, points, weights)
    parts = []
    for head in range(heads):
        total = torch.zeros(b, n, width, dtype=DOUBLE)
        for level, size in enumerate(sizes):
            own = maps[level][..., head * width : (head + 1) * width]
            for k in range(p):
                # Fractions of the sides, 0 and 1 the outer edges: a pixel's centre lies half a pixel in.
                at = points[:, :, head, level, k] * torch.tensor(size) - 0.5
                total = total + bilinear_reference(own, at) * weights[:, :, head, level, k, None]
        parts.append(total)
    two = torch.cat(parts, -1)
    torch.testing.assert_close(one, two)
    seed = torch.randn_like(one)
    leaves = (*maps, points, weights)
    for got, want in zip(torch.autograd.grad(one, leaves, seed), torch.autograd.grad(two, leaves, seed), strict=True):
        torch.testing.assert_close(got, want)


def test_maps_and_points_must_have_the_same_number_of_levels() -> None:
    with pytest.raises(ValueError, match="points are for 2 levels, got 1 maps"):
        multi_scale_deform([torch.randn(1, 3, 3, 4)], torch.rand(1, 2, 2, 2, 1, 2), torch.rand(1, 2, 2, 2, 1))
