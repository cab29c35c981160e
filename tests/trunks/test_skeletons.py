"""Skeletons: parts are called in the order their formula says, masks and maps reach where they should."""

import pytest
import torch
from torch import nn

from gossamer.layers import GroupNorm1
from gossamer.trunks import Isotropic, Pyramid


class Affine(nn.Module):
    """`scale * x + shift`: two of them do not commute."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.masks: list[torch.Tensor | None] = []

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.masks.append(mask)
        return self.scale * x + self.shift


class Stem(nn.Module):
    grid = (2, 3)

    def __init__(self, masked: bool, tokens: int = 0) -> None:
        super().__init__()
        self.masked, self.tokens = masked, tokens

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = image.movedim(1, -1).flatten(1, 2)
        x = torch.cat((torch.zeros(len(x), self.tokens, x.shape[-1]), x), 1)
        return x, x[..., 0] > 0 if self.masked else None


class First(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self.mask = mask
        return x[:, 0]


@pytest.mark.parametrize("masked", [True, False])
def test_isotropic_calls_stem_blocks_norm_and_head_in_turn_and_hands_on_the_mask(masked: bool) -> None:
    blocks, head = [Affine(2, 1), Affine(3, -1)], First()
    model = Isotropic(Stem(masked), blocks, norm=Affine(5, 0), head=head)
    image = torch.randn(2, 4, 2, 3)
    torch.testing.assert_close(model(image), 5 * (3 * (2 * image[:, :, 0, 0] + 1) - 1))
    for block in blocks:
        assert (block.masks[0] is not None) == masked
    assert (head.mask is not None) == masked


def test_learned_tokens_are_no_part_of_an_isotropic_map() -> None:
    model = Isotropic(Stem(False, tokens=2), [Affine(2, 0)], norm=None, head=First())
    image = torch.randn(1, 4, 2, 3)
    (found,) = model.features(image)
    torch.testing.assert_close(found, 2 * image.movedim(1, -1))


class Halve(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2, ::2]


def test_pyramid_maps_are_finest_first_and_each_has_its_own_norm() -> None:
    class Map(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.movedim(1, -1)

    stages = [[Affine(2, 0), Affine(1, 1)], [Affine(3, 0)]]
    norms = [GroupNorm1(4), GroupNorm1(4)]
    nn.init.constant_(norms[1].weight, 7)
    model = Pyramid(Map(), stages, [Halve()], norm=Affine(1, 10), head=nn.Identity(), out_norms=norms)
    image = torch.randn(2, 4, 6, 8)
    first = 2 * image.movedim(1, -1) + 1
    second = 3 * first[:, ::2, ::2]
    torch.testing.assert_close(model(image), second + 10)
    for found, want in zip(model.features(image), (norms[0](first), norms[1](second)), strict=True):
        torch.testing.assert_close(found, want)
    with pytest.raises(ValueError, match="one fewer"):
        Pyramid(Map(), stages, [], norm=None, head=nn.Identity())
