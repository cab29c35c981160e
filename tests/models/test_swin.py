"""Swin: equal to the authors' code in its three forms, windows are local, shifts let information cross."""

import pytest
import torch
import torch.nn.functional as F

from gossamer import catalogue, load, measure, save
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.ops import grid as g
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY = {"embed_dim": 16, "depths": (2, 2), "heads": (2, 4), "window": 4}
OFFICIAL = {
    "swin": (
        {"img_size": (32, 64), "num_classes": 7},
        (2, 3, 32, 64),
        "layers.0.blocks.1.attn.relative_position_bias_table",
    ),
    "swin_ape": ({"img_size": 32, "num_classes": 7, "ape": True}, (2, 3, 32, 32), "absolute_pos_embed"),
    "swin_mlp": (
        {"img_size": (32, 64), "num_classes": 7, "mixer": "window_mlp"},
        (2, 3, 32, 64),
        "layers.0.blocks.1.spatial_mlp.weight",
    ),
    "swin_dense": ({"img_size": 32, "ape": True, "dense": True}, (2, 3, 41, 27), "layers.1.blocks.1.attn.qkv.weight"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_swin_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "swin", {**TINY, **settings}, shape, key)


def test_every_official_checkpoint_of_swin_fits() -> None:
    for name in manifest("swin"):
        manifest_fits("swin", name)


@pytest.mark.parametrize("name", [row.name for row in catalogue.find("swin").published])
def test_swin_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


def macs(model: torch.nn.Module, side: int) -> float:
    return measure.macs(model.eval(), (torch.empty(1, 3, side, side),)).total


def test_cost_of_window_attention_is_linear_in_pixels_and_that_of_global_attention_is_not() -> None:
    settings = {"depths": (1, 1), "heads": (2, 4), "embed_dim": 32, "pad": True, "num_classes": 0, "img_size": 112}
    with torch.device("meta"):
        windowed = create_model("swin", **settings)
        dense = create_model("swin", **settings, mixer="attention")
        assert macs(windowed, 224) / macs(windowed, 112) == pytest.approx(4, rel=0.02)
        assert macs(dense, 224) / macs(dense, 112) > 5


def test_products_of_queries_and_keys_grow_with_the_pixels_in_windows_and_with_their_square_without() -> None:
    with torch.device("meta"):
        for mixer, growth in ((create_mixer("window", 32, heads=1), 4), (create_mixer("attention", 32, heads=1), 16)):
            small, large = (
                measure.macs(mixer, (torch.empty(1, n, n, 32),)).total - 4 * n * n * 32**2 for n in (56, 112)
            )
            assert large / small == pytest.approx(growth, rel=0.02)


@pytest.mark.parametrize("small", ["shrink", "pad"])
@pytest.mark.parametrize("shape", [(8, 12), (9, 10), (5,), (4, 6, 5)])
def test_shifted_windows_equal_global_attention_with_other_cells_and_regions_masked(shape, small) -> None:
    mixer = create_mixer("window", 8, heads=2, window=4, shifted=True, axes=len(shape), small=small).double()
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    full = [-(-n // 4) * 4 for n in shape]
    # The cell and the region of each token of the padded grid, told by its coordinates before the shift.
    coords = torch.stack(torch.meshgrid(*(torch.arange(n) for n in full), indexing="ij"), -1).flatten(0, -2)
    moves = 0 if small == "shrink" and min(shape) <= 4 else 2
    moved = (coords - moves) % torch.tensor(full)
    cell = moved // 4
    region = (moved >= torch.tensor(full) - moves).long() if moves else torch.zeros_like(moved)
    same = (torch.cat((cell, region), 1)[:, None] == torch.cat((cell, region), 1)[None]).all(-1)
    offsets = moved[:, None] % 4 - moved[None] % 4 + 3
    row = torch.zeros(offsets.shape[:2], dtype=torch.long)
    for axis in range(len(shape)):
        row = row * 7 + offsets[..., axis]
    padded = g.pad_to_multiple(x, (4,) * len(shape)).flatten(1, -2)
    q, k, v = mixer.project(padded)
    logits = q @ k.transpose(-2, -1) * 4**-0.5 + mixer.bias_table[row].permute(2, 0, 1)
    y = logits.masked_fill(~same, -torch.inf).softmax(-1) @ v
    y = mixer.proj(y.transpose(1, 2).flatten(2)).view(2, *full, 8)
    torch.testing.assert_close(mixer(x), g.crop(y, shape), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), g.crop(y, shape), atol=1e-5, rtol=1e-5)


def test_a_window_as_large_as_the_map_is_global_attention_with_the_bias_table() -> None:
    mixer = create_mixer("window", 8, heads=2, window=7, shifted=True, grid=(5, 5))
    assert mixer.size == (5, 5)
    x = torch.randn(2, 5, 5, 8)
    q, k, v = mixer.project(x.flatten(1, 2))
    bias = mixer.bias_table[g.relative_index((5, 5))].permute(2, 0, 1)
    y = (q @ k.transpose(-2, -1) * 4**-0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(mixer(x).flatten(1, 2), mixer.proj(y.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mixer", ["window", "window_mlp"])
def test_information_stays_in_its_window_until_a_shifted_block(mixer: str) -> None:
    model = create_model("swin", **{**TINY, "depths": (2,), "heads": (2,)}, img_size=64, mixer=mixer)
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    first, second = model.stages[0]
    reach = torch.autograd.grad(first(x)[0, 5, 5].sum(), x)[0].abs().sum((0, 3)) > 0
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert torch.equal(reach, inside)
    reach = torch.autograd.grad(second(first(x))[0, 5, 5].sum(), x)[0].abs().sum((0, 3)) > 0
    inside[:8, :8] = True
    assert torch.equal(reach, inside)


def test_only_the_padding_forms_take_any_image_and_their_strides_are_4_8_16_32() -> None:
    settings = {"embed_dim": 8, "depths": (1, 2, 1, 2), "heads": (1, 1, 2, 2)}
    for form in ({"pad": True}, {"dense": True}):
        maps = create_model("swin", **settings, **form).features(torch.randn(1, 3, 250, 190))
        assert [tuple(m.shape) for m in maps] == [(1, 63, 48, 8), (1, 32, 24, 16), (1, 16, 12, 32), (1, 8, 6, 64)]
    strict = create_model("swin", **settings)
    with pytest.raises(ValueError, match=r"multiple of 224.*250x190"):
        strict(torch.randn(1, 3, 250, 190))
    with pytest.raises(ValueError, match=r"multiple of 32.*250x190"):
        create_model("swin", **settings, img_size=(250, 190))
    with pytest.raises(ValueError, match=r"multiple of 1344.*192x192"):
        create_model("swin", **settings, img_size=192)


def test_small_maps_shift_in_the_dense_form_and_not_in_the_classification_form() -> None:
    settings = {**TINY, "depths": (2,), "heads": (2,), "img_size": 16}
    strict, dense = create_model("swin", **settings), create_model("swin", **settings, dense=True)
    state = {k: v for k, v in strict.state_dict().items() if k.startswith(("stem.", "stages."))}
    dense.load_state_dict(state, strict=False)
    x = torch.randn(1, 4, 4, 16)
    torch.testing.assert_close(dense.stages[0][0](x), strict.stages[0][0](x))
    assert (dense.stages[0][1](x) - strict.stages[0][1](x)).abs().max() > 1e-6


def test_weights_of_another_window_load_with_tables_resized_as_images_and_a_file_gives_the_same_bits(tmp_path) -> None:
    settings = {**TINY, "num_classes": 7}
    shapes = golden("swin")["shapes"]
    # The released sizes: tables of windows of 7 tokens, for windows of 12.
    shapes = {k: [169, v[1]] if k.endswith("bias_table") else v for k, v in shapes.items() if "index" not in k}
    state = seeded_state({k: v for k, v in shapes.items() if "attn_mask" not in k})
    one = load_official(create_model("swin", **{**settings, "window": 7}, img_size=56), state)
    wider = load_official(create_model("swin", **{**settings, "window": 12}, img_size=96), state)
    for s, stage in enumerate(wider.stages):
        for b, block in enumerate(stage):
            old = state[f"layers.{s}.blocks.{b}.attn.relative_position_bias_table"]
            assert torch.equal(one.stages[s][b].mixer.bias_table, old)
            image = F.interpolate(old.T.view(1, -1, 13, 13), (23, 23), mode="bicubic")
            torch.testing.assert_close(block.mixer.bias_table.detach(), image[0].flatten(1).T)
    torch.save({"model": state}, tmp_path / "swin.pth")
    two = load_official(create_model("swin", **{**settings, "window": 7}, img_size=56), tmp_path / "swin.pth")
    save(one, tmp_path / "own")
    x = torch.randn(1, 3, 56, 56)
    for again in (two, load(tmp_path / "own")):
        assert torch.equal(one.eval()(x), again.eval()(x))
    with pytest.raises(ValueError, match="head"):
        load_official(create_model("swin", **{**settings, "num_classes": 8, "window": 7}, img_size=56), state)


def test_positions_of_an_image_that_is_not_square_load_as_they_are() -> None:
    state = seeded_state(golden("swin_ape")["shapes"])
    wide = load_official(create_model("swin", **TINY, num_classes=7, img_size=(16, 64), ape=True), state)
    assert torch.equal(wide.stem[1].table.flatten(1, 2), state["absolute_pos_embed"])
    with pytest.raises(ValueError, match="60 positions is of no square image"):
        load_official(wide, {**state, "absolute_pos_embed": torch.zeros(1, 60, 16)})


def test_the_dense_form_takes_the_backbone_of_a_classifier() -> None:
    state = seeded_state(golden("swin")["shapes"])
    dense = load_official(create_model("swin", **TINY, img_size=(32, 64), dense=True), state)
    strict = load_official(create_model("swin", **TINY, num_classes=7, img_size=(32, 64)), state)
    x = torch.randn(1, 3, 32, 64)
    torch.testing.assert_close(dense.stages[0](dense.stem(x)), strict.stages[0](strict.stem(x)))
    assert torch.equal(dense.out_norms[0].weight, torch.ones(16))


def test_any_mixer_stands_in_the_blocks_of_swin() -> None:
    x = torch.randn(2, 3, 32, 32)
    outputs = {}
    for mixer in ("window", "pool", "attention", "depthwise", "spatial_fc", "kdgqa", "hyena"):
        torch.manual_seed(0)
        outputs[mixer] = create_model("swin", **TINY, img_size=32, mixer=mixer, num_classes=5)(x)
    assert len({tuple(y[0].tolist()) for y in outputs.values()}) == 7
