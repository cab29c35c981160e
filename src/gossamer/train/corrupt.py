"""Group-masked corruption: connected regions of an image are taken away, to be painted back by a network.

Source: Ahmed et al. 2021, "SiT", section 3.1 (group masked model learning).

- blocks are laid at random, over each other too, until the share that was drawn is covered
- what a block hides is replaced by nothing (0, the mean colour of normalised images), by noise, by another area of
  the same image, or by the same area of another image of the batch
- all images of a batch are worked on together, block by block
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Fill = Literal["zeros", "noise", "area", "other"]

LARGEST = 0.3  # side of a block, as a share of the image's


def corrupted(
    x: Float[Tensor, "b c h w"],
    *,
    share: float = 0.5,
    align: int = 1,
    fill: Fill = "zeros",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b 1 h w"]]:
    """The images with blocks replaced, and where.

    Each image has `u ~ U(min(0.5, share), share)` of its pixels covered at least; each block has sides between `align`
    and 0.3 of the image's, corner and sides multiples of `align`, cut off at the border.

    Args:
        share: most of the pixels that are aimed at, 0 to 1.
        align: grid of the blocks' borders, in pixels; the patch side makes whole tokens disappear.
        fill: what takes their place.

    Raises:
        ValueError: `share` outside of [0, 1], or `align` below 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if align < 1:
        raise ValueError(f"align must be positive, got {align}")
    b, _, h, w = x.shape
    low = min(0.5, share)
    target = (low + (share - low) * torch.rand(b, generator=generator)) * h * w
    changed = torch.zeros(b, h, w, dtype=torch.bool)
    y = x.clone()
    replacement = _replacement(x, fill, generator)
    while bool((todo := changed.flatten(1).sum(1) < target).any()):
        top, height = _spans(b, h, align, generator)
        left, width = _spans(b, w, align, generator)
        rows, columns = _inside(top, height, h), _inside(left, width, w)
        block = rows[:, :, None] & columns[:, None, :] & todo[:, None, None]
        if fill == "area":
            replacement = _elsewhere(x, top, height, left, width, generator)
        y = torch.where(block[:, None], replacement, y)
        changed |= block
    return y, changed[:, None]


def mixed_corruption(
    x: Float[Tensor, "b c h w"],
    *,
    share: float = 0.5,
    replaced: float = 0.3,
    align: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b 1 h w"]]:
    """The authors' default: of half of the images `share` becomes zeros; of the other half, `replaced` becomes what
    lies there in other images of the batch."""
    y, changed = corrupted(x, share=share, align=align, generator=generator)
    if not replaced or len(x) < 2:
        return y, changed
    other, elsewhere = corrupted(x, share=replaced, align=align, fill="other", generator=generator)
    pick = (torch.rand(len(x), generator=generator) < 0.5)[:, None, None, None]
    return torch.where(pick, other, y), torch.where(pick, elsewhere, changed)


def _replacement(x: Tensor, fill: Fill, generator: torch.Generator | None) -> Tensor:
    if fill == "noise":
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if fill == "other":
        # Everyone's neighbour in a shuffled circle: never the image itself.
        order = torch.randperm(len(x), generator=generator)
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return x[partner]
    if fill in ("zeros", "area"):
        return torch.zeros_like(x)
    raise ValueError(f"fill must be zeros, noise, area or other, got {fill!r}")


def _spans(
    b: int, side: int, align: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Where each block begins along one axis, and how long it is."""
    start = torch.randint(-(-side // align), (b,), generator=generator) * align
    longest = max(align, int(LARGEST * side))
    length = torch.randint(align, longest + 1, (b,), generator=generator)
    return start, (length.float() / align).round().long() * align


def _inside(start: Tensor, length: Tensor, side: int) -> Bool[Tensor, "b n"]:
    place = torch.arange(side)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def _elsewhere(
    x: Tensor, top: Tensor, height: Tensor, left: Tensor, width: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The image moved so that another area of it, of the block's size, lies where the block is."""
    b, _, h, w = x.shape
    index = []
    for start, length, side in ((top, height, h), (left, width, w)):
        room = (side - length).clamp(min=0) + 1
        source = (torch.rand(b, generator=generator) * room).long()
        index.append((torch.arange(side) + (source - start)[:, None]).clamp(0, side - 1))
    rows, columns = index
    return x[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
