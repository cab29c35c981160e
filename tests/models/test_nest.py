"""NesT: equal to timm's port, blocks keep to themselves until they are merged, the tree can be walked both ways."""

import pytest
import torch
import torch.nn.functional as F

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.nest import Aggregate, Decoder, Spread, gradcat
from gossamer.ops import grid as g
from gossamer.ops.grid import pad_same
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY = {"dims": (8, 12, 16), "depths": (1, 1, 1), "heads": (2, 2, 2), "num_classes": 7}
OFFICIAL = {
    "nest": (
        {**TINY, "depths": (1, 2, 1), "heads": (2, 2, 4), "patch": 2, "img_size": 32},
        (2, 3, 32, 32),
        "levels.1.transformer_encoder.0.attn.proj.weight",
    ),
    "nest_odd": (
        {**TINY, "heads": (2, 3, 2), "patch": 3, "img_size": 60, "in_chans": 1},
        (1, 1, 60, 60),
        "levels.0.pos_embed",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_nest_equals_timm(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "nest", settings, shape, key)


@pytest.mark.parametrize("name", ["nest_tiny_jx", "nest_small_jx", "nest_base_jx"])
def test_every_checkpoint_of_nest_fits(name: str) -> None:
    assert name in manifest("nest")
    manifest_fits("nest", name)


@pytest.mark.parametrize("name", ["nest_t_224", "nest_s_224", "nest_b_224"])
def test_nest_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize(("name", "millions"), [("nest_t_cifar", 6.0), ("nest_s_cifar", 22.9), ("nest_b_cifar", 89.0)])
def test_models_for_cifar_have_as_many_parameters_as_published_and_end_in_one_block_of_16(name, millions) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert [tuple(stage[0].positions.shape[1:3]) for stage in model.stages] == [(64, 16), (16, 16), (4, 16), (1, 16)]


def test_at_224_pixels_blocks_are_16_4_and_1_of_14_tokens_a_side() -> None:
    with torch.device("meta"):
        model = create_model("nest_t_224")
    assert [tuple(stage[0].positions.shape[1:3]) for stage in model.stages] == [(16, 196), (4, 196), (1, 196)]


def test_blocks_come_row_by_row_and_go_back_where_they_were() -> None:
    x = torch.arange(64.0).view(1, 8, 8, 1)
    blocks = g.windows(x, (4, 4))
    assert torch.equal(blocks[1, :, 0].view(4, 4), x[0, :4, 4:, 0])
    assert torch.equal(g.unwindows(blocks, (4, 4), (8, 8)), x)


@torch.no_grad()
def test_only_aggregation_lets_information_cross_blocks_and_only_at_their_borders() -> None:
    model = create_model("nest", **TINY, patch=2, img_size=32, init_std=None).double()
    level, merge = model.stages[0], model.merges[0]
    x = torch.randn(1, 16, 16, 8, dtype=torch.float64)  # Blocks of 4x4 tokens.
    other = x.clone()
    other[0, 5, 6] += torch.randn(8)

    def box(a: torch.Tensor, b: torch.Tensor) -> list[list[int]]:
        """First and last row and column of what differs."""
        places = (a != b).any(-1)[0].nonzero()
        return [places.amin(0).tolist(), places.amax(0).tolist()]

    before, after = level(x), level(other)
    assert int((before != after).any(-1).sum()) == 16
    assert box(before, after) == [[4, 4], [7, 7]]
    # The block becomes 2..3; its border pixels reach one place over the border before it, and behind it.
    (top, left), (bottom, right) = box(merge(before), merge(after))
    assert (top, left) == (1, 1)
    assert (bottom, right) == (4, 4)
    # A pixel in its middle stays with what it becomes.
    inner = before.clone()
    inner[0, 6, 6] += torch.randn(8)
    (top, left), (bottom, right) = box(merge(before), merge(inner))
    assert min(top, left) >= 2
    assert max(bottom, right) <= 3


def test_pooling_pads_at_the_end_only() -> None:
    merge, x = Aggregate(2, 3), torch.randn(2, 6, 8, 2)
    y = merge.norm(merge.conv(x))
    by_hand = F.max_pool2d(pad_same(y, 3, 2, value=-torch.inf).movedim(-1, 1), 3, 2).movedim(1, -1)
    explicit = F.max_pool2d(F.pad(y.movedim(-1, 1), (0, 1, 0, 1), value=-torch.inf), 3, 2).movedim(1, -1)
    assert torch.equal(merge(x), by_hand)
    assert torch.equal(merge(x), explicit)
    assert not torch.equal(merge(x), F.max_pool2d(y.movedim(-1, 1), 3, 2, 1).movedim(1, -1))


@torch.no_grad()
def test_multi_query_attention_is_attention_whose_heads_have_the_same_keys_and_values() -> None:
    shared, full = create_mixer("gqa", 12, heads=3, kv_heads=1), create_mixer("attention", 12, heads=3)
    for name in ("weight", "bias"):
        query, key, value = getattr(shared.qkv, name).split((12, 4, 4))
        getattr(full.qkv, name).copy_(torch.cat([query, *[key] * 3, *[value] * 3]))
    full.proj.load_state_dict(shared.proj.state_dict())
    x = torch.randn(2, 3, 5, 12)
    torch.testing.assert_close(shared(x), full(x), atol=1e-6, rtol=1e-5)
    mask = torch.rand(2, 3, 5) < 0.7
    mask[:, 0, 0] = True
    torch.testing.assert_close(shared(x, mask=mask), full(x, mask=mask), atol=1e-6, rtol=1e-5)


def test_cost_is_linear_in_the_number_of_blocks() -> None:
    with torch.device("meta"):
        model = create_model("nest", **{**TINY, "dims": (16,) * 3}, patch=2, img_size=32)
        one, four, sixteen = (
            measure.macs(stage, (torch.empty(1, side, side, 16),)).total
            for stage, side in zip(reversed(model.stages), (4, 8, 16), strict=True)
        )
    assert (four, sixteen) == (4 * one, 16 * one)
    assert one == 16 * (12 * 16**2 + 2 * 16 * 16)


def test_drop_path_drops_whole_images_and_not_single_blocks() -> None:
    model = create_model("nest", **{**TINY, "depths": (1, 1, 1)}, patch=2, img_size=32, drop_path=0.8, init_std=0.5)
    layer, x = model.train().stages[1][0].layers[0], torch.randn(64, 4, 16, 12)
    kept = (layer(x) != x).flatten(2).any(-1)
    assert bool((kept.all(1) | ~kept.any(1)).all())
    assert 0 < int(kept.any(1).sum()) < 64


def test_what_does_not_fit_is_refused_unless_padded() -> None:
    for size in (72, (64, 80)):
        with pytest.raises(ValueError, match=r"square and a multiple of 16 .*pad=True"):
            create_model("nest", **TINY, img_size=size)
    model = create_model("nest", **TINY, img_size=(30, 45), pad=True)
    maps = model.features(torch.randn(1, 3, 30, 45))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 12, 8), (1, 4, 6, 12), (1, 2, 3, 16)]
    with pytest.raises(ValueError, match=r"30x45, got 32x32; build the model with img_size=\(32, 32\)"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="of one length"):
        create_model("nest", depths=(1, 1))


def test_weights_of_another_size_load_with_positions_resized_as_one_map() -> None:
    state = seeded_state(golden("nest")["shapes"])
    settings = OFFICIAL["nest"][0]
    key = "levels.0.pos_embed"
    same = load_official(create_model("nest", **settings), state)
    assert torch.equal(same.stages[0][0].positions, state[key])
    wide = load_official(create_model("nest", **{**settings, "img_size": 64}), state)
    plane = g.unwindows(state[key][0], (4, 4), (16, 16)).movedim(-1, 1)
    want = F.interpolate(plane, (32, 32), mode="bicubic").movedim(1, -1)
    torch.testing.assert_close(wide.stages[0][0].positions[0].detach(), g.windows(want, (8, 8)))


def test_gradcat_takes_the_child_of_largest_positive_gradient_times_activation() -> None:
    model = create_model("nest", **TINY, patch=1, img_size=8)
    image = torch.randn(3, 3, 8, 8)
    maps = model.features(image.requires_grad_())
    score = model.head(model.norm(maps[-1]))[:, 2].sum()
    gradients = torch.autograd.grad(score, maps[:2])
    fine, coarse = ((m * d).clamp(min=0).sum(-1) for m, d in zip(maps[:2], gradients, strict=True))
    for i, path in enumerate(gradcat(model, image, torch.full((3,), 2)).tolist()):
        quadrants = [coarse[i, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean() for r in (0, 1) for c in (0, 1)]
        assert path[0] == int(torch.stack(quadrants).argmax())
        r, c = divmod(path[0], 2)
        part = fine[i, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        cells = [part[2 * a : 2 * a + 2, 2 * b : 2 * b + 2].mean() for a in (0, 1) for b in (0, 1)]
        assert path[1] == int(torch.stack(cells).argmax())


def finds_the_quadrant(seed: int) -> tuple[float, float]:
    """Accuracy on noise with a quadrant full of one of three textures, or without; how often GradCAT finds it."""
    torch.manual_seed(seed)
    textures = torch.randint(2, (4, 8, 8)) * 2.0 - 1
    textures[0] = 0

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, label, place = torch.randn(count, 1, 4, 16, 16) / 2, torch.randint(4, (count,)), torch.randint(4, (count,))
        x[torch.arange(count), 0, place] += textures[label].repeat(1, 2, 2)
        return x.unflatten(2, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3), label, place

    sizes = {"dims": (16, 24, 32), "depths": (1, 1, 1), "heads": (2, 3, 4), "patch": 2, "img_size": 32}
    model = create_model("nest", **sizes, in_chans=1, num_classes=4, init_std=None)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=120)
    for _ in range(120):
        x, label, _ = draw(32)
        loss = F.cross_entropy(model(x), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    x, label, place = draw(400)
    with torch.no_grad():
        right = (model(x).argmax(1) == label).double().mean().item()
    there = label > 0
    found = gradcat(model, x[there])[:, 0] == place[there]
    return right, found.double().mean().item()


def test_gradcat_finds_the_quadrant_that_tells_the_class() -> None:
    right, found = finds_the_quadrant(0)
    assert right > 0.95
    assert found > 0.9


def test_the_decoder_draws_images_from_1_4_and_16_blocks() -> None:
    decoder = Decoder(5, (16, 8, 8), (1, 1, 1), (2, 2, 2), side=4, patch=2)
    assert [level.positions.shape[1] for level in decoder.levels] == [1, 4, 16]
    z = torch.randn(2, 5, requires_grad=True)
    image = decoder(z)
    assert image.shape == (2, 3, 32, 32)
    assert bool((torch.autograd.grad(image.square().sum(), z)[0] != 0).all())
    # In the last level each token sees its own block of 4x4 tokens, 8x8 pixels.
    held = {}
    decoder.spreads[1].register_forward_hook(lambda _m, _i, y: held.update(map=y))
    image = decoder(z)
    reach = torch.autograd.grad(image[0, :, 9, 17].sum(), held["map"])[0].abs().sum(-1)[0] > 0
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 8:12] = True
    assert torch.equal(reach, inside)
    with pytest.raises(ValueError, match="of one length"):
        Decoder(5, (16, 8), (1,), (2, 2))


def test_spreading_places_the_four_children_of_a_token_where_it_was() -> None:
    spread, x = Spread(3, 2), torch.randn(1, 2, 2, 3)
    y, flat = spread(x), spread.fc(x).unflatten(-1, (2, 2, 2))
    for r in range(2):
        for c in range(2):
            assert torch.equal(y[0, 2 + r, c], flat[0, 1, 0, :, r, c])


def test_any_mixer_stands_in_the_blocks_of_nest() -> None:
    x, answers = torch.randn(2, 3, 32, 32), set()
    for mixer in ("attention", "gqa", "pool", "depthwise", "spatial_fc"):
        torch.manual_seed(0)
        model = create_model("nest", **{**TINY, "dims": (8, 16, 16), "heads": (2, 2, 2)}, img_size=32, mixer=mixer)
        answers.add(tuple(model(x)[0].tolist()))
    assert len(answers) == 5


def test_a_small_nest_exports_to_onnx_for_any_batch(tmp_path) -> None:
    settings = {**TINY, "dims": (8, 12), "depths": (1, 1), "heads": (2, 2), "img_size": (30, 45), "pad": True}
    model = create_model("nest", **settings)
    certificate = export_onnx(model, torch.randn(1, 3, 30, 45), tmp_path / "m.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
