"""PPMA-ViT: equal to the authors' code in its two forms, and the mask is the length of the way between two tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.layers.fold import fold_batch_norm
from gossamer.mixers import create_mixer
from gossamer.mixers.polyline import line_mask, polyline_mask, polyline_product
from gossamer.models import create_model, load_official
from official import golden, manifest, seeded_state
from pyramids import (
    costs_are_published,
    equals_official,
    manifest_fits,
)

DOUBLE = torch.float64
TINY = {
    "dims": (16, 32, 32),
    "depths": (1, 1, 2),
    "heads": (2, 2, 4),
    "mlp_ratios": (3, 2, 3),
    "separable": (True, True, False),
    "layer_scale": (None, 0.5, None),
    "projection": 24,
    "num_classes": 7,
}
OFFICIAL = {
    "ppma": ({}, (2, 3, 32, 48), "layers.0.blocks.0.retention.path_embed.dt_linear.weight"),
    "ppma_dense": (
        {"separable": (True, False, True), "layer_scale": (None, None, 0.5), "dense": True},
        (2, 3, 41, 58),
        "layers.1.blocks.0.retention.lepe.conv.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_ppma_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "ppma", {**TINY, **settings}, shape, key)


def test_every_official_checkpoint_of_ppma_fits() -> None:
    for name in manifest("ppma"):
        manifest_fits("ppma", name)


@pytest.mark.parametrize("name", ["ppma_t", "ppma_s", "ppma_b"])
def test_ppma_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


def steps(*shape: int) -> tuple[Tensor, Tensor]:
    return -torch.rand(shape, dtype=DOUBLE), -torch.rand(shape, dtype=DOUBLE)


def test_the_mask_is_the_product_of_the_decays_on_the_way() -> None:
    h, w = 5, 7
    across, down = steps(h, w)
    mask = polyline_mask(across, down).exp().view(h, w, h, w)
    for i in range(h):
        for k in range(w):
            for j in range(h):
                for l in range(w):
                    # Along row i between the columns, along column l between the rows; the nearer end is left out.
                    way = across[i, min(k, l) + 1 : max(k, l) + 1].exp().prod()
                    way = way * down[min(i, j) + 1 : max(i, j) + 1, l].exp().prod()
                    torch.testing.assert_close(mask[i, k, j, l], way, atol=1e-10, rtol=1e-10)


def test_no_way_is_longer_than_nothing_and_the_way_to_oneself_is_none() -> None:
    across, down = steps(2, 3, 4, 6)
    mask = polyline_mask(across, down)
    assert mask.shape == (2, 3, 24, 24)
    assert torch.equal(polyline_mask(across, down, column_first=True), mask.mT)
    assert float(mask.max()) == 0
    assert bool((mask.diagonal(dim1=-2, dim2=-1) == 0).all())
    assert not torch.allclose(mask, mask.mT)


def test_with_even_steps_the_mask_is_the_manhattan_distance() -> None:
    h, w = 4, 6
    even = torch.full((h, w), -0.3, dtype=DOUBLE)
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    distance = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    torch.testing.assert_close(polyline_mask(even, even), -0.3 * distance.to(DOUBLE))


def test_the_quick_product_with_the_mask_equals_the_dense_one() -> None:
    across, down = steps(2, 3, 5, 7)
    x = torch.randn(2, 3, 5, 7, 4, dtype=DOUBLE)
    dense = polyline_mask(across, down).exp() @ x.flatten(2, 3)
    torch.testing.assert_close(polyline_product(across, down, x).flatten(2, 3), dense)


def turned(x: Tensor) -> Tensor:
    """Rotary positions of `(b, n, tokens, d)`, written with complex numbers."""
    angle = 10000 ** -torch.linspace(0, 1, x.shape[-1] // 2)
    turn = torch.polar(torch.ones(1), torch.arange(x.shape[2])[:, None] * angle)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


@pytest.mark.parametrize("separable", [False, True])
def test_without_decay_it_is_plain_attention_with_rotary_positions(separable: bool) -> None:
    mixer = create_mixer("polyline", 16, heads=2, separable=separable)
    x = torch.randn(2, 4, 5, 16)
    nn.init.constant_(mixer.step_bias, 1.0)
    decayed = mixer(x)
    nn.init.constant_(mixer.log_rate, -60.0)
    q, k, v = mixer.project(x.flatten(1, 2))
    logits = turned(q) @ turned(k).mT * 8**-0.5
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    if separable:
        in_rows = logits.masked_fill(row[:, None] != row, -torch.inf).softmax(-1)
        in_columns = logits.masked_fill(column[:, None] != column, -torch.inf).softmax(-1)
        y = (in_columns @ in_rows @ v + in_rows @ in_columns @ v) / 2
    else:
        y = logits.softmax(-1) @ v
    values = v.transpose(1, 2).reshape(2, 4, 5, 16)
    near = F.conv2d(values.movedim(-1, 1), mixer.near.weight, mixer.near.bias, padding=2, groups=16).movedim(1, -1)
    want = mixer.proj(y.transpose(1, 2).reshape(2, 4, 5, 16) + near)
    torch.testing.assert_close(mixer(x), want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decayed, want, atol=1e-3)


def test_both_ways_have_the_same_weight_and_steps_read_their_own_head() -> None:
    mixer = create_mixer("polyline", 12, heads=3)
    nn.init.constant_(mixer.step_bias, 1.0)
    x = torch.randn(1, 3, 4, 12)
    across, down = mixer.steps(x)
    rate = F.softplus(x.unflatten(-1, (3, 4)) @ mixer.step_weight.weight.T + mixer.step_bias[:, None])
    rate = -mixer.log_rate.exp()[:, None] * rate
    torch.testing.assert_close(torch.stack((across, down), -1), rate.permute(0, 3, 1, 2, 4))
    q, k, v = mixer.project(x.flatten(1, 2))
    logits = turned(q) @ turned(k).mT * 0.5
    mask = polyline_mask(across, down)
    y = ((logits + mask).softmax(-1) + (logits + mask.mT).softmax(-1)) / 2 @ v
    nn.init.zeros_(mixer.near.weight)
    nn.init.zeros_(mixer.near.bias)
    torch.testing.assert_close(mixer(x).flatten(1, 2), mixer.proj(y.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)


def attention_macs(side: int, separable: bool) -> float:
    """Multiply-adds of the products between tokens: what is left without linear layers and convolution."""
    with torch.device("meta"):
        mixer = create_mixer("polyline", 32, heads=2, separable=separable)
        total = measure.macs(mixer.eval(), (torch.empty(1, side, side, 32),)).total
    return total - side**2 * (4 * 32 * 32 + 25 * 32 + 2 * 32)


def test_cost_of_separable_attention_grows_with_tokens_to_the_three_halves_and_of_full_with_their_square() -> None:
    sides = (8, 16, 32)
    # Two products of logits and four with values, of side tokens each; one and one, of all tokens.
    assert [attention_macs(s, True) for s in sides] == [6 * s**3 * 32 for s in sides]
    assert [attention_macs(s, False) for s in sides] == [2 * s**4 * 32 for s in sides]


def test_pruned_heads_leave_the_steps_of_the_others_alone() -> None:
    mixer = create_mixer("polyline", 16, heads=4)
    x = torch.randn(1, 4, 5, 16)
    across, _ = mixer.steps(x)
    mixer.keep("heads", torch.tensor([1, 3]))
    mixer.keep("heads", torch.tensor([1]))
    torch.testing.assert_close(mixer.steps(x)[0], across[:, 3:])
    assert mixer.near.weight.shape == (4, 1, 5, 5)
    assert mixer(x).shape == x.shape


def test_maps_of_other_axes_and_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="grid axes"):
        create_mixer("polyline", 16)(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match="heads must divide dim"):
        create_mixer("polyline", 16, heads=3)
    with pytest.raises(ValueError, match=r"even number of channels; got 3 \(12 / 4\)"):
        create_mixer("polyline", 12, heads=4)
    with pytest.raises(ValueError, match="of one length"):
        create_model("ppma", **{**TINY, "heads": (2, 2)})


def test_any_image_gives_maps_at_strides_4_8_and_16() -> None:
    maps = create_model("ppma", **TINY).features(torch.randn(1, 3, 75, 50))
    assert [tuple(m.shape) for m in maps] == [(1, 19, 13, 16), (1, 10, 7, 32), (1, 5, 4, 32)]


def test_lines_are_symmetric_and_add_up() -> None:
    mask = line_mask(-torch.tensor([5.0, 1.0, 2.0, 4.0]))
    assert torch.equal(mask[0], -torch.tensor([0.0, 1.0, 3.0, 7.0]))
    assert torch.equal(mask, mask.T)


def test_the_dense_form_takes_the_backbone_of_a_classifier() -> None:
    state = seeded_state(golden("ppma")["shapes"])
    dense = load_official(create_model("ppma", **TINY, dense=True), state).eval()
    strict = load_official(create_model("ppma", **TINY), state).eval()
    x = torch.randn(1, 3, 32, 32)
    for one, two in zip(dense.features(x), strict.features(x), strict=True):
        torch.testing.assert_close(one, F.layer_norm(two, two.shape[-1:]))


def test_folded_norms_leave_the_outputs_unchanged() -> None:
    model = load_official(create_model("ppma", **TINY), seeded_state(golden("ppma")["shapes"])).eval()
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        before = model(x)
        fold_batch_norm(model)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


def test_another_mixer_takes_its_place() -> None:
    x = torch.randn(2, 3, 64, 64)
    outputs = {}
    for mixer in ("polyline", "pool", "attention"):
        torch.manual_seed(0)
        outputs[mixer] = create_model("ppma", **TINY, img_size=64, mixer=mixer).eval()(x)
    assert len({tuple(y[0].tolist()) for y in outputs.values()}) == 3


def test_an_exported_ppma_agrees_for_every_batch_size(tmp_path) -> None:
    small = {"dims": (16, 16), "depths": (1, 1), "heads": (2, 2), "mlp_ratios": (2, 2), "separable": (True, False)}
    model = create_model("ppma", **small, layer_scale=(None, None), projection=24, num_classes=5)
    certificate = export_onnx(model, torch.randn(2, 3, 28, 36), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"
