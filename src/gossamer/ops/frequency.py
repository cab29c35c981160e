"""Images as a JPEG decoder meets them: luma and chroma, and the cosine transforms of their blocks.

Source: JPEG (ITU-T T.81, annex A.3.3; JFIF 1.02 for the colours); Xu et al. 2020, "Learning in the Frequency Domain",
section 3.1.

- maps are channels last; pixel values are 0 to 255, as in a file
- coefficient `f = size * u + v` has u half-cycles down and v across; transforms are orthonormal, so energy is kept
- linear in the pixels and differentiable; nothing is quantised or rounded, as if JPEG's quality were above 100
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.constants import of_sizes

# JFIF 1.02: rows are Y, Cb, Cr of red, green, blue.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.886 / 1.772),
    (0.701 / 1.402, -0.587 / 1.402, -0.114 / 1.402),
)
_RGB = np.linalg.inv(np.array(_YCBCR)).tolist()


def rgb_to_ycbcr(x: Float[Tensor, "b *grid 3"]) -> Float[Tensor, "b *grid 3"]:
    """`Y = 0.299 R + 0.587 G + 0.114 B`, `Cb = 128 + (B - Y) / 1.772`, `Cr = 128 + (R - Y) / 1.402`."""
    return x @ x.new_tensor(_YCBCR).T + x.new_tensor((0.0, 128.0, 128.0))


def ycbcr_to_rgb(x: Float[Tensor, "b *grid 3"]) -> Float[Tensor, "b *grid 3"]:
    """The inverse: `R = Y + 1.402 (Cr - 128)`, `B = Y + 1.772 (Cb - 128)`, and G from Y."""
    return (x - x.new_tensor((0.0, 128.0, 128.0))) @ x.new_tensor(_RGB).T


def dct_matrix(size: int) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II in double precision: `C[u, x] = s_u cos(pi u (2 x + 1) / (2 n))`, `C C^T = 1`."""
    return torch.from_numpy(_matrix(size))


def block_dct(
    x: Float[Tensor, "b h w c"], size: int = 8, keep: Sequence[int] | None = None
) -> Float[Tensor, "b i j c f"]:
    """`X = C x C^T` of each block of `size` pixels a side; the coefficients row-major on the last axis.

    Args:
        keep: the coefficients that are computed, all by default.

    Raises:
        ValueError: `size` does not divide the sides.
    """
    height, width = x.shape[1:3]
    if height % size or width % size:
        raise ValueError(f"image sides must be multiples of {size}, got {height}x{width}")
    blocks = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(0, 1, 3, 5, 2, 4)
    return blocks.flatten(-2) @ _both_axes(size, None if keep is None else tuple(keep)).to(x).T


def block_idct(
    coefficients: Float[Tensor, "b i j c f"], size: int = 8, keep: Sequence[int] | None = None
) -> Float[Tensor, "b h w c"]:
    """The inverse: `x = C^T X C` of each block; coefficients that are not in `keep` are zero.

    Raises:
        ValueError: there are not as many coefficients as `size` or `keep` says.
    """
    count = size * size if keep is None else len(keep)
    if coefficients.shape[-1] != count:
        raise ValueError(f"a block must have {count} coefficients, got {coefficients.shape[-1]}")
    blocks = (coefficients @ _both_axes(size, None if keep is None else tuple(keep)).to(coefficients)).unflatten(
        -1, (size, size)
    )
    return blocks.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


def jpeg_channels(
    image: Float[Tensor, "b h w 3"],
    size: int = 8,
    keep: Sequence[Sequence[int]] | None = None,
    *,
    centre: float = 128.0,
) -> Float[Tensor, "b i j f"]:
    """Coefficients of Y, Cb and Cr of every block of an RGB image, side by side: `3 * size^2` channels.

    Chroma has half the resolution in a file (4:2:0). As in the paper it is taken from the image at twice the size, so
    that its blocks lie where those of the luma lie.

    Args:
        keep: the coefficients of Y, of Cb and of Cr that are computed.
        centre: what is taken from the luma first, half of the range in a file.

    Raises:
        ValueError: `size` does not divide the sides.
    """
    planes = rgb_to_ycbcr(image)
    luma, chroma = planes[..., :1] - centre, planes[..., 1:] - 128.0
    twice = F.interpolate(chroma.movedim(-1, 1), scale_factor=2, mode="bilinear", align_corners=False)
    chroma = F.avg_pool2d(twice, 2).movedim(1, -1)
    kept = (None, None, None) if keep is None else keep
    parts = [luma, chroma[..., :1], chroma[..., 1:]]
    return torch.cat([block_dct(p, size, k)[:, :, :, 0] for p, k in zip(parts, kept, strict=True)], -1)


@of_sizes
def _both_axes(size: int, keep: tuple[int, ...] | None) -> np.ndarray:
    """`C x C^T`, flattened, is `(C kron C)` times x flattened."""
    matrix = np.kron(_matrix(size), _matrix(size))
    return matrix if keep is None else matrix[list(keep)]


def _matrix(size: int) -> np.ndarray:
    u, x = np.arange(size)[:, None], np.arange(size)
    scale = np.where(u == 0, 1.0, 2.0**0.5) / size**0.5
    return scale * np.cos(np.pi * u * (2 * x + 1) / (2 * size))
