"""PVT: equal to the authors' code in both versions, keys come from a shrunken map, cost falls as the ratio says."""

from typing import Any

import pytest
import torch
from torch import nn

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.registry import system
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY: dict[str, Any] = {
    "dims": (8, 16, 24, 32),
    "heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (1, 2, 1, 1),
    "num_classes": 7,
}
OFFICIAL = {
    "pvt": ({"img_size": 32}, (2, 3, 32, 32), "block1.0.attn.sr.weight"),
    # Position tables resized.
    "pvt_odd": ({"img_size": 64}, (1, 3, 70, 101), "block2.1.attn.kv.weight"),
    "pvt_v2": ({"v2": True}, (1, 3, 45, 61), "block1.0.mlp.dwconv.dwconv.weight"),
    "pvt_v2_linear": ({"v2": True, "linear": True}, (2, 3, 33, 40), "block3.0.attn.sr.weight"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_pvt_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "pvt", {**TINY, **settings}, shape, key)


@pytest.mark.parametrize("name", system("pvt").variants)
def test_every_official_checkpoint_of_pvt_fits(name: str) -> None:
    assert set(system("pvt").variants) == set(manifest("pvt"))
    manifest_fits("pvt", name)


@pytest.mark.parametrize("name", [v for v in system("pvt").variants if v != "pvt_huge_v2"])
def test_pvt_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 2)])
def test_spatial_reduction_of_ratio_one_is_multi_head_attention(shape: tuple[int, ...]) -> None:
    one = create_mixer("spatial_reduction", 16, heads=4, ratio=1, axes=len(shape)).double()
    two = create_mixer("attention", 16, heads=4).double()
    two.load_state_dict(
        {
            **{f"qkv.{k}": torch.cat((getattr(one.q, k), getattr(one.kv, k))) for k in ("weight", "bias")},
            **{f"proj.{k}": getattr(one.proj, k) for k in ("weight", "bias")},
        }
    )
    x = torch.randn(2, *shape, 16, dtype=torch.float64)
    torch.testing.assert_close(one(x), two(x), atol=1e-6, rtol=1e-6)


def test_means_of_constant_cells_as_keys_are_full_attention() -> None:
    """A key that is there R^2 times counts R^2 times in every sum of the softmax, so the quotient is the same."""
    one = create_mixer("spatial_reduction", 16, heads=4, ratio=3, reduce="pool", norm=None).double()
    two = create_mixer("spatial_reduction", 16, heads=4, ratio=1).double()
    two.load_state_dict(one.state_dict())
    cells = torch.randn(2, 2, 4, 16, dtype=torch.float64)
    x = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(one(x), two(x), atol=1e-6, rtol=1e-6)
    assert (one(torch.randn_like(x)) - two(torch.randn_like(x))).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(13,), (9, 16), (3, 8, 10)])
def test_reduction_means_equal_a_loop_and_the_exported_form(shape: tuple[int, ...], monkeypatch) -> None:
    x = torch.randn(2, *shape, 8)
    mixer = create_mixer("spatial_reduction", 8, heads=2, reduce="adaptive", size=4, axes=len(shape))
    plain = mixer(x)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(mixer(x), plain, atol=1e-6, rtol=1e-5)
    pool = create_mixer("spatial_reduction", 8, heads=2, reduce="pool", ratio=4, norm=None, axes=len(shape))
    first = tuple(slice(0, min(4, n)) for n in shape)
    torch.testing.assert_close(pool.reduced(x)[:, 0], x[(slice(None), *first)].flatten(1, -2).mean(1))


def test_keys_are_made_of_whole_cells_of_the_map() -> None:
    mixer = create_mixer("spatial_reduction", 8, heads=2, ratio=4)
    x = torch.randn(1, 9, 14, 8, requires_grad=True)
    assert mixer.reduced(x).shape == (1, 6, 8)
    (reach,) = torch.autograd.grad(mixer.reduced(x)[0, 4].square().sum(), x)
    inside = torch.zeros(9, 14, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert torch.equal(reach.abs().sum((0, 3)) > 0, inside)
    # Where an axis is shorter than a cell, one cell covers it.
    assert mixer.reduced(torch.randn(1, 3, 8, 8)).shape == (1, 2, 8)


def macs(module: nn.Module, x: torch.Tensor) -> float:
    with torch.device("meta"):
        return measure.macs(module.to("meta").eval(), (x.to("meta"),)).total


def test_products_of_attention_shrink_by_the_square_of_the_ratio() -> None:
    x, n, c = torch.empty(1, 32, 32, 16), 1024, 16
    for ratio in (2, 4, 8):
        mixer = create_mixer("spatial_reduction", c, heads=2, ratio=ratio)
        keys = n // ratio**2
        # Query and output products on all tokens, keys and values and the convolution on the cells.
        others = 2 * n * c * c + 2 * keys * c * c + n * c * c
        assert macs(mixer, x) - others == pytest.approx(2 * n * n * c / ratio**2, rel=0.01)


def test_cost_of_the_linear_form_is_linear_in_pixels_and_that_of_the_other_quadratic() -> None:
    def ratio(**options: Any) -> float:
        counts = []
        for side in (112, 224):
            mixer = create_mixer("spatial_reduction", 16, heads=2, **options)
            products = macs(mixer, torch.empty(1, side, side, 16)) - 4 * side * side * 16 * 16
            counts.append(products)
        return counts[1] / counts[0]

    assert ratio(ratio=4) == pytest.approx(16, rel=0.05)
    whole = [
        macs(create_mixer("spatial_reduction", 16, heads=2, reduce="adaptive"), torch.empty(1, s, s, 16))
        for s in (112, 224)
    ]
    assert whole[1] / whole[0] == pytest.approx(4, rel=0.05)


def test_maps_have_strides_4_8_16_32_for_any_image() -> None:
    for settings, image, want in (
        ({}, (224, 224), [(56, 56), (28, 28), (14, 14), (7, 7)]),
        ({}, (256, 320), [(64, 80), (32, 40), (16, 20), (8, 10)]),
        ({"dense": True}, (250, 190), [(62, 47), (31, 23), (15, 11), (7, 5)]),
        ({"v2": True}, (250, 190), [(63, 48), (32, 24), (16, 12), (8, 6)]),
        ({"v2": True, "dense": True, "linear": True}, (20, 20), [(5, 5), (3, 3), (2, 2), (1, 1)]),
    ):
        model = create_model("pvt", **{**TINY, **settings}).eval()
        maps = model.features(torch.randn(1, 3, *image))
        assert [tuple(m.shape[1:]) for m in maps] == [(*g, c) for g, c in zip(want, TINY["dims"], strict=True)]


def test_position_tables_resize_to_themselves_and_keep_the_class_slot() -> None:
    state = seeded_state(golden("pvt")["shapes"])
    same = load_official(create_model("pvt", **TINY, img_size=32), state)
    torch.testing.assert_close(same.stem[1].table.flatten(1, 2), state["pos_embed1"], atol=1e-6, rtol=0)
    larger = load_official(create_model("pvt", **TINY, img_size=(64, 96)), state)
    image = state["pos_embed1"].view(1, 8, 8, 8).movedim(-1, 1)
    want = nn.functional.interpolate(image, (16, 24), mode="bilinear").movedim(1, -1)
    torch.testing.assert_close(larger.stem[1].table.detach(), want)
    assert larger.merges[2][1].table.shape == (1, 2, 3, 32)
    assert torch.equal(larger.merges[2][2].position, state["pos_embed4"][:, :1])
    dense = load_official(create_model("pvt", **TINY, img_size=32, dense=True), state)
    x = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(dense.features(x)[:3], same.features(x)[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    # Only the class token is missing from what the last stage attends to.
    assert not torch.allclose(dense.features(x)[3], same.features(x)[3])


def test_wrong_images_and_settings_are_refused_by_name() -> None:
    model = create_model("pvt", **TINY, img_size=32)
    with pytest.raises(ValueError, match=r"3 channels \(in_chans\), got 4"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="at least 32 pixels, got 31x40"):
        model(torch.randn(1, 3, 31, 40))
    with pytest.raises(ValueError, match="at least 32 pixels, got img_size=16"):
        create_model("pvt", **TINY, img_size=16)
    with pytest.raises(ValueError, match="heads must divide dim; got heads=3, dim=8"):
        create_model("pvt", **{**TINY, "heads": (3, 2, 3, 4)})
    with pytest.raises(ValueError, match="of one length"):
        create_model("pvt", **{**TINY, "ratios": (8, 4, 2)})
    with pytest.raises(ValueError, match="class token wants"):
        create_model("pvt", **TINY, mixer="pool")
    with pytest.raises(ValueError, match="ratio must be at least 1, got 0"):
        create_mixer("spatial_reduction", 8, heads=2, ratio=0)


def test_other_mixers_and_norms_stand_in_the_stages_of_pvt() -> None:
    x = torch.randn(2, 3, 32, 32)
    names = ("pool", "depthwise", "spatial_reduction", "attention")
    model = create_model("pvt", **TINY, img_size=32, mixer=names, norm=nn.Identity, token=False)
    assert [stage[0].mixer.name for stage in model.stages] == list(names)
    assert not [m for m in model.merges.modules() if isinstance(m, nn.LayerNorm)]
    assert model(x).shape == (2, 7)
    options = [{"size": 5}, {}, {"reduce": "pool"}, {}]
    model = create_model("pvt", **TINY, v2=True, mixer=names, mixer_options=options)
    assert model.stages[2][0].mixer.kind == "pool"
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("settings", [{"img_size": 32}, {"v2": True, "linear": True, "img_size": 40}])
def test_an_exported_pvt_agrees_for_every_batch_size(settings: dict[str, Any], tmp_path) -> None:
    model = create_model("pvt", **{**TINY, "depths": (1, 1, 1, 1)}, **settings)
    x = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    certificate = export_onnx(model, x, tmp_path / "model.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
