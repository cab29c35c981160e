"""Deformable attention: a few chosen places are read, between pixels, in every map."""

import pytest
import torch

from gossamer.layers.deform import DeformableAttention, centres, join_maps, split_maps, swap_offsets
from gossamer.ops.deform import bilinear

SIZES = [(4, 6), (2, 3), (5, 1)]
TOKENS = sum(h * w for h, w in SIZES)


def drawn(**options) -> DeformableAttention:
    layer = DeformableAttention(8, **{"heads": 2, "levels": 3, "points": 2, **options}).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_each_token_reads_its_own_places_with_its_own_weights(ratio: float, boxes: bool) -> None:
    layer = drawn(value_ratio=ratio)
    x, z = torch.randn(2, 7, 8).double(), torch.randn(2, TOKENS, 8).double()
    reference = torch.rand(2, 7, 3, 4 if boxes else 2).double()
    want = torch.zeros(2, 7, layer.proj.in_features).double()
    offsets = layer.offsets(x).view(2, 7, 2, 3, 2, 2)
    weights = layer.weights(x).view(2, 7, 2, 6).softmax(-1).view(2, 7, 2, 3, 2)
    for level, m in enumerate(split_maps(layer.value(z), SIZES)):
        size = torch.tensor(SIZES[level]).double()
        for head, part in enumerate(m.chunk(2, -1)):
            for point in range(2):
                step = offsets[:, :, head, level, point]
                step = step / 2 * reference[:, :, level, 2:] / 2 if boxes else step / size
                at = (reference[:, :, level, :2] + step) * size - 0.5
                read = bilinear(part, at) * weights[:, :, head, level, point, None]
                want[..., head * part.shape[-1] : (head + 1) * part.shape[-1]] += read
    torch.testing.assert_close(layer(x, z, SIZES, reference), layer.proj(want))


def test_with_one_point_and_no_offset_it_is_a_bilinear_reading_at_the_reference() -> None:
    layer = drawn(levels=1, points=1, heads=1)
    torch.nn.init.zeros_(layer.offsets.weight)
    torch.nn.init.zeros_(layer.offsets.bias)
    x, z, at = torch.randn(2, 5, 8).double(), torch.randn(2, 24, 8).double(), torch.rand(2, 5, 2).double()
    read = bilinear(layer.value(z).view(2, 4, 6, 8), at * torch.tensor([4.0, 6.0]) - 0.5)
    torch.testing.assert_close(layer(x, z, [(4, 6)], at[:, :, None]), layer.proj(read))


def test_at_the_start_each_head_averages_over_points_on_a_ray_of_its_own() -> None:
    layer = DeformableAttention(8, heads=4, levels=1, points=3).double()
    image = torch.randn(1, 9, 11, 8).double()
    rays = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    y = layer(torch.randn(1, 99, 8).double(), image.flatten(1, 2), [(9, 11)], centres([(9, 11)], dtype=torch.float64))
    z = layer.value(image).view(9, 11, 4, 2)
    want = torch.cat([sum(z[4 + p * r, 5 + p * c, h] for p in (1, 2, 3)) / 3 for h, (r, c) in enumerate(rays)])
    torch.testing.assert_close(y.view(9, 11, 8)[4, 5], layer.proj(want))


def test_masked_tokens_of_the_maps_read_as_zeros() -> None:
    layer = drawn()
    x, z, reference = torch.randn(1, 7, 8).double(), torch.randn(1, TOKENS, 8).double(), torch.rand(1, 7, 1, 2).double()
    mask = torch.rand(1, TOKENS) < 0.5
    other = torch.where(mask[..., None], z, torch.randn_like(z))
    torch.testing.assert_close(layer(x, z, SIZES, reference, mask=mask), layer(x, other, SIZES, reference, mask=mask))
    assert (layer(x, z, SIZES, reference) - layer(x, other, SIZES, reference)).abs().max() > 1e-3


def test_a_pruned_layer_is_the_layer_with_the_other_heads_silenced() -> None:
    layer, x, z = drawn(heads=4), torch.randn(2, 7, 8).double(), torch.randn(2, TOKENS, 8).double()
    reference = torch.rand(1, 7, 1, 2).double()
    with torch.no_grad():
        layer.proj.weight[:, 2:4] = 0
    assert layer.importance("heads").argmin() == 1
    y = layer(x, z, SIZES, reference)
    layer.keep("heads", torch.tensor([0, 2, 3]))
    torch.testing.assert_close(layer(x, z, SIZES, reference), y)
    assert layer.widths() == {"heads": 3}


@pytest.mark.parametrize("image", [(224, 224), (256, 256), (512, 384)])
def test_tokens_of_a_pyramid_are_split_and_joined_without_loss(image: tuple[int, int]) -> None:
    sizes = [(image[0] // s, image[1] // s) for s in (8, 16, 32)]
    maps = [torch.randn(2, h, w, 3) for h, w in sizes]
    tokens = join_maps(maps)
    # The three maps hold tokens as 16 : 4 : 1.
    assert [m.shape[1] * m.shape[2] * 21 for m in maps] == [tokens.shape[1] * n for n in (16, 4, 1)]
    assert all(torch.equal(a, b) for a, b in zip(split_maps(tokens, sizes), maps, strict=True))
    with pytest.raises(ValueError, match="tokens together, got"):
        split_maps(tokens[:, 1:], sizes)


def test_centres_are_those_of_the_pixels_of_each_map() -> None:
    want = [((r + 0.5) / h, (c + 0.5) / w) for h, w in SIZES for r in range(h) for c in range(w)]
    torch.testing.assert_close(centres(SIZES)[0, :, 0], torch.tensor(want))


def test_offsets_of_columns_and_rows_change_places() -> None:
    assert swap_offsets(torch.tensor([1, 2, 3, 4]).float()).tolist() == [2, 1, 4, 3]


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"heads=3, 8 \* 0.5 = 4"):
        DeformableAttention(8, heads=3, value_ratio=0.5)
    with pytest.raises(ValueError, match="3 maps"):
        drawn()(
            torch.randn(1, 2, 8).double(), torch.randn(1, 24, 8).double(), [(4, 6)], torch.rand(1, 2, 1, 2).double()
        )
