"""Windows come and go without loss, on any number of axes, and agree with loops over tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gossamer.ops import grid as g

CASES = [((12,), (4,)), ((6, 8), (3, 2)), ((4, 6, 9), (2, 3, 3))]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_window_i_holds_the_tokens_of_its_cell_in_order(shape, size) -> None:
    x = torch.randn(2, *shape, 3)
    w = g.windows(x, size).view(2, -1, *size, 3)
    cells = itertools.product(*(range(n // s) for n, s in zip(shape, size, strict=True)))
    for i, cell in enumerate(cells):
        part = x[:, *(slice(c * s, (c + 1) * s) for c, s in zip(cell, size, strict=True))]
        assert torch.equal(w[:, i], part)
    assert torch.equal(g.unwindows(g.windows(x, size), size, shape), x)


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_a_dilated_window_holds_every_kth_token(shape, size) -> None:
    x = torch.randn(2, *shape, 3)
    w = g.dilated_windows(x, size).view(2, -1, *size, 3)
    steps = [n // s for n, s in zip(shape, size, strict=True)]
    for i, cell in enumerate(itertools.product(*(range(k) for k in steps))):
        assert torch.equal(w[:, i], x[:, *(slice(c, None, k) for c, k in zip(cell, steps, strict=True))])
    assert torch.equal(g.undilated_windows(g.dilated_windows(x, size), size, shape), x)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (3, 5, 4)])
def test_padding_and_cropping_undo_each_other_and_shifts_their_opposite(shape) -> None:
    x = torch.randn(2, *shape, 3)
    size = (4,) * len(shape)
    padded = g.pad_to_multiple(x, size)
    assert all(n % 4 == 0 for n in padded.shape[1:-1])
    assert padded.sum() == pytest.approx(float(x.sum()), abs=1e-4)
    full = tuple(padded.shape[1:-1])
    assert torch.equal(g.crop(g.unwindows(g.windows(padded, size), size, full), shape), x)
    offset = tuple(range(1, len(shape) + 1))
    moved = g.shift(x, offset)
    place = tuple((2 + o) % n for o, n in zip(offset, shape, strict=True))
    assert torch.equal(moved[:, *place], x[:, *(2,) * len(shape)])
    assert torch.equal(g.shift(moved, [-o for o in offset]), x)


def test_a_window_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window=\(7, 7\), grid=\(8, 9\)"):
        g.windows(torch.randn(1, 8, 9, 2), (7, 7))
    with pytest.raises(ValueError, match="divide"):
        g.windows(torch.randn(1, 8, 2), (4, 4))


@pytest.mark.parametrize(
    ("shape", "size", "offset"), [((8, 12), (4, 4), (2, 2)), ((6,), (3,), (1,)), ((8, 8), (4, 4), (0, 2))]
)
def test_tokens_attend_in_a_shifted_window_if_no_border_of_the_grid_lies_between_them(shape, size, offset) -> None:
    """Shifted back by `offset`, a token is a neighbour of another if neither came round the end of the grid."""
    mask = g.shift_mask(shape, size, offset)
    index = torch.arange(int(torch.tensor(shape).prod())).view(1, *shape, 1).float()
    origin = g.windows(g.shift(index, [-o for o in offset]), size)[..., 0].long()
    coords = torch.stack(torch.unravel_index(origin, shape), -1)
    for window in range(len(mask)):
        for i, j in itertools.product(range(mask.shape[1]), repeat=2):
            a, b = coords[window, i], coords[window, j]
            near = bool(((a - b).abs() < torch.tensor(size)).all())
            assert bool(mask[window, i, j]) == near
    penalty = g.shift_penalty(shape, size, offset, -100.0)
    assert torch.equal(penalty == 0, mask)
    assert torch.equal(penalty[~mask], torch.full_like(penalty[~mask], -100))


@pytest.mark.parametrize("size", [(3,), (2, 4), (2, 3, 2)])
def test_bias_rows_are_one_for_each_offset(size) -> None:
    coords = torch.tensor(list(itertools.product(*(range(s) for s in size))))
    offsets = coords[:, None] - coords[None]
    for index, of in ((g.relative_index(size), offsets), (g.absolute_offset_index(size), offsets.abs())):
        rows = {}
        for row, offset in zip(index.flatten().tolist(), of.flatten(0, 1).tolist(), strict=True):
            assert rows.setdefault(row, offset) == offset
        assert len({tuple(o) for o in rows.values()}) == len(rows)
        assert min(rows) == 0
        assert max(rows) == len(rows) - 1
    n = len(coords)
    assert g.relative_index(size)[0, n - 1] == 0
    assert g.relative_index(size)[n - 1, 0] == g.relative_index(size).max()


@pytest.mark.parametrize("shape", [(9,), (5, 7), (3, 4, 5), (2, 4, 5), (5, 1, 2), (1, 1, 1)])
def test_mean_filter_counts_only_tokens_that_exist(shape) -> None:
    x = torch.randn(2, *shape, 3, requires_grad=True)
    y = g.mean_filter(x, 3)
    for place in itertools.product(*(range(n) for n in shape)):
        near = x[:, *(slice(max(p - 1, 0), p + 2) for p in place)]
        torch.testing.assert_close(y[:, *place], near.flatten(1, -2).mean(1))


def test_grids_of_two_axes_are_laid_out_as_the_unfold_of_pytorch() -> None:
    x = torch.randn(2, 6, 8, 3)
    unfolded = F.unfold(x.movedim(-1, 1), (3, 4), stride=(3, 4)).unflatten(1, (3, 12)).permute(0, 3, 2, 1)
    assert torch.equal(g.windows(x, (3, 4)), unfolded.flatten(0, 1))


@pytest.mark.parametrize(("length", "kernel", "stride"), [(5, 3, 2), (6, 3, 2), (7, 3, 1), (4, 2, 2), (5, 2, 2)])
def test_same_padding_gives_a_window_to_every_stride_and_the_odd_token_to_the_end(length, kernel, stride) -> None:
    padded = g.pad_same(torch.ones(1, length, length, 1), kernel, stride, value=-1.0)
    line = padded[0, :, padded.shape[2] // 2, 0]
    assert (len(line) - kernel) // stride + 1 == -(-length // stride)
    front = int((line == -1).int().cumprod(0).sum())
    assert len(line) - length - front in (front, front + 1)
