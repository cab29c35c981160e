"""Cosine transforms of blocks and JPEG's colours: orthonormal, in the order of a file, undone by their inverses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from gossamer.ops.frequency import block_dct, block_idct, dct_matrix, jpeg_channels, rgb_to_ycbcr, ycbcr_to_rgb


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_block_dct_is_scipys_orthonormal_dct_of_each_block(size: int) -> None:
    x = torch.randn(2, 2 * size, 3 * size, 3, dtype=torch.float64)
    y = block_dct(x, size)
    assert y.shape == (2, 2, 3, 3, size * size)
    for i in range(2):
        for j in range(3):
            block = x[1, i * size : (i + 1) * size, j * size : (j + 1) * size, 2].numpy()
            np.testing.assert_allclose(y[1, i, j, 2], dctn(block, norm="ortho").ravel(), atol=1e-12)


def test_the_inverse_restores_the_image_and_energy_is_kept() -> None:
    x = torch.rand(2, 24, 40, 3) * 255
    y = block_dct(x)
    torch.testing.assert_close(block_idct(y), x, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(y.double().square().sum(), x.double().square().sum())
    torch.testing.assert_close(dct_matrix(8) @ dct_matrix(8).T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize(("down", "across"), [(0, 3), (5, 0), (2, 6)])
def test_a_cosine_of_u_down_and_v_across_excites_channel_8u_plus_v_alone(down: int, across: int) -> None:
    place = (2 * torch.arange(8, dtype=torch.float64) + 1) * torch.pi / 16
    wave = torch.outer((down * place).cos(), (across * place).cos())
    y = block_dct(wave.repeat(2, 3)[None, :, :, None])
    assert torch.equal(y.abs().amax((0, 1, 2, 3)) > 1e-9, torch.arange(64) == 8 * down + across)


def test_keeping_some_coefficients_equals_selecting_them_and_their_inverse_leaves_the_rest_zero() -> None:
    x, keep = torch.randn(1, 16, 16, 2), (0, 9, 33)
    y = block_dct(x, keep=keep)
    torch.testing.assert_close(y, block_dct(x)[..., list(keep)])
    full = torch.zeros(1, 2, 2, 2, 64)
    full[..., list(keep)] = y
    torch.testing.assert_close(block_idct(y, keep=keep), block_idct(full))


def test_colours_are_those_of_a_jpeg_file() -> None:
    from PIL import Image

    x = torch.randint(0, 256, (1, 9, 7, 3), dtype=torch.uint8)
    want = torch.from_numpy(np.array(Image.fromarray(x[0].numpy()).convert("YCbCr")))[None]
    y = rgb_to_ycbcr(x.double())
    # Pillow rounds.
    torch.testing.assert_close(y, want.double(), atol=1.01, rtol=0)
    torch.testing.assert_close(ycbcr_to_rgb(y), x.double())


def test_channels_of_an_image_are_luma_then_both_chroma_at_half_resolution_of_twice_the_image() -> None:
    image = torch.rand(1, 16, 24, 3, dtype=torch.float64) * 255
    planes = rgb_to_ycbcr(image) - 128
    twice = F.interpolate(planes.movedim(-1, 1), scale_factor=2, mode="bilinear")
    half = twice.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)).movedim(1, -1)
    y = jpeg_channels(image)
    assert y.shape == (1, 2, 3, 192)
    torch.testing.assert_close(y[..., :64], block_dct(planes)[:, :, :, 0])
    torch.testing.assert_close(y[..., 64:128], block_dct(half)[:, :, :, 1])
    torch.testing.assert_close(y[..., 128:], block_dct(half)[:, :, :, 2])
    some = jpeg_channels(image, keep=((0, 9), (1,), (2,)))
    torch.testing.assert_close(some, y[..., [0, 9, 65, 130]])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of 8, got 16x20"):
        block_dct(torch.zeros(1, 16, 20, 1))
    with pytest.raises(ValueError, match="64 coefficients, got 63"):
        block_idct(torch.zeros(1, 2, 2, 1, 63))
