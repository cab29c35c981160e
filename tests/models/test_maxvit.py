"""MaxViT: equal to timm's port of the authors' code, windows see near and lattices see far."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.layers.fold import fold_batch_norm
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.maxvit import SameConv
from gossamer.ops import grid as g
from official import golden, seeded_input, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY = {"depths": (2, 1), "dims": (32, 64), "stem": 8, "strides": (2, 2, 2), "num_classes": 7}
OFFICIAL = {
    "maxvit": (
        {**TINY, "window": 4, "img_size": (32, 64)},
        (1, 3, 32, 64),
        "stages.0.blocks.1.attn_grid.attn.rel_pos.relative_position_bias_table",
    ),
    "maxvit_odd": (
        {**TINY, "window": 3, "img_size": (72, 24), "in_chans": 1},
        (2, 1, 72, 24),
        "stages.1.blocks.0.conv.conv2_kxk.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_maxvit_equals_timm(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "maxvit", settings, shape, key)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xlarge"])
def test_every_checkpoint_of_maxvit_fits(size: str) -> None:
    for side in (224, 384, 512) if size == "tiny" else (224,):
        manifest_fits("maxvit", f"maxvit_{size}_tf_{side}")


@pytest.mark.parametrize("name", ["maxvit_t", "maxvit_s", "maxvit_b", "maxvit_l"])
def test_maxvit_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize(("name", "printed"), [("maxvit_t", 5.6), ("maxvit_s", 11.7), ("maxvit_b", 24.2)])
def test_what_is_counted_is_near_what_the_authors_print(name: str, printed: float) -> None:
    assert catalogue.published(name).macs_g == pytest.approx(printed, rel=0.015)


@pytest.mark.parametrize(("shape", "window"), [((6, 8), 2), ((6, 9), 3), ((8, 8, 4), 2), ((10,), 5)])
@torch.no_grad()
def test_grid_attention_equals_attention_among_the_tokens_of_one_lattice(shape, window) -> None:
    mixer = create_mixer("grid_attention", 8, heads=2, window=window, axes=len(shape)).double()
    nn.init.normal_(mixer.bias_table)
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, -2)
    step = torch.tensor(shape) // window
    same = (place[:, None] % step == place[None] % step).all(-1)
    offsets = place[:, None] // step - place[None] // step + window - 1
    row = torch.zeros(offsets.shape[:2], dtype=torch.long)
    for axis in range(len(shape)):
        row = row * (2 * window - 1) + offsets[..., axis]
    q, k, v = mixer.project(x.flatten(1, -2))
    logits = q @ k.transpose(-2, -1) / 2 + mixer.bias_table[row].permute(2, 0, 1)
    y = logits.masked_fill(~same, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(mixer(x).flatten(1, -2), mixer.proj(y.transpose(1, 2).flatten(2)))


def test_a_lattice_is_a_window_with_its_inner_and_outer_axes_exchanged() -> None:
    x = torch.randn(2, 12, 8, 3)
    assert torch.equal(g.undilated_windows(g.dilated_windows(x, (4, 4)), (4, 4), (12, 8)), x)
    local = g.windows(x, (3, 2)).view(2, 16, 6, 3)
    assert torch.equal(g.dilated_windows(x, (4, 4)).view(2, 6, 16, 3), local.transpose(1, 2))


@torch.no_grad()
def test_on_a_map_of_one_window_both_attentions_are_global_attention_with_the_bias_table() -> None:
    one, two = (create_mixer(name, 8, heads=2, window=5) for name in ("window", "grid_attention"))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 5, 5, 8)
    q, k, v = one.project(x.flatten(1, 2))
    bias = one.bias_table[g.relative_index((5, 5))].permute(2, 0, 1)
    y = one.proj(((q @ k.transpose(-2, -1) / 2 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
    for mixer in (one, two):
        torch.testing.assert_close(mixer(x).flatten(1, 2), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "side", "everything"),
    [(3, 6, True), (3, 9, True), (3, 12, False), (7, 14, True), (7, 28, True), (7, 49, True), (7, 56, False)],
)
def test_a_window_and_a_lattice_reach_every_token_where_no_side_is_longer_than_their_square(
    window: int, side: int, everything: bool
) -> None:
    near, far = (create_mixer(name, 8, heads=2, window=window) for name in ("window", "grid_attention"))
    x = torch.randn(1, side, side, 8, requires_grad=True)
    reach = torch.autograd.grad(far(near(x))[0, 1, side - 2].sum(), x)[0].abs().sum((0, 3)) > 0
    assert bool(reach.all()) is everything


def test_attention_of_a_block_is_linear_in_pixels() -> None:
    with torch.device("meta"):
        for name in ("window", "grid_attention"):
            mixer = create_mixer(name, 32, heads=1, window=7)
            small, large = (measure.macs(mixer, (torch.empty(1, n, 28, 32),)).total for n in (28, 112))
            assert large == 4 * small
            assert small == 28 * 28 * (4 * 32**2 + 2 * 49 * 32)


def test_a_strided_convolution_pads_at_the_end_only_and_an_odd_map_on_both_sides() -> None:
    conv = SameConv(2, 3, stride=2)
    x = torch.randn(1, 8, 7, 2)
    image = x.movedim(-1, 1)
    by_hand = F.conv2d(F.pad(image, (1, 1, 0, 1)), conv.weight, conv.bias, 2).movedim(1, -1)
    torch.testing.assert_close(conv(x), by_hand)
    assert not torch.allclose(by_hand, F.conv2d(image, conv.weight, conv.bias, 2, 1).movedim(1, -1))


def test_only_the_padding_form_takes_any_image_and_its_strides_are_4_8_16_32() -> None:
    settings = {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64), "stem": 8, "num_classes": 3}
    padded, strict = create_model("maxvit", **settings, pad=True), create_model("maxvit", **settings)
    maps = padded.features(torch.randn(1, 3, 130, 95))
    assert [tuple(m.shape) for m in maps] == [(1, 33, 24, 32), (1, 17, 12, 32), (1, 9, 6, 64), (1, 5, 3, 64)]
    padded.load_state_dict(strict.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(padded.eval()(x), strict.eval()(x))
    with pytest.raises(ValueError, match=r"multiple of 224.*130x95"):
        strict(torch.randn(1, 3, 130, 95))
    with pytest.raises(ValueError, match=r"multiple of 224.*256x256"):
        create_model("maxvit", **settings, img_size=256)


def test_weights_of_another_window_load_with_resized_tables_turned_round() -> None:
    state = seeded_state(golden("maxvit")["shapes"])
    settings = {**TINY, "img_size": (48, 96), "window": 6}
    model = load_official(create_model("maxvit", **settings), state)
    table = model.stages[0][0].window.mixer.bias_table
    old = state["stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"]
    want = F.interpolate(old[None], (11, 11), mode="bilinear")[0].flip(1, 2).flatten(1).T
    torch.testing.assert_close(table.detach(), want)


def test_folded_norms_leave_the_outputs_unchanged() -> None:
    settings, shape, _ = OFFICIAL["maxvit"]
    model = load_official(create_model("maxvit", **settings), seeded_state(golden("maxvit")["shapes"])).eval()
    x = seeded_input("maxvit", shape)
    with torch.no_grad():
        before = model(x)
        count = sum(isinstance(m, nn.BatchNorm1d) for m in model.modules())
        fold_batch_norm(model)
        # The norm ahead of each block has no product before it.
        assert (count, sum(isinstance(m, nn.BatchNorm1d) for m in model.modules())) == (10, 3)
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_drop_path_grows_from_block_to_block_and_never_reaches_its_rate() -> None:
    model = create_model("maxvit", **{**TINY, "depths": (2, 2)}, drop_path=0.4, window=4, img_size=64)
    blocks = [block for stage in model.stages for block in stage]
    assert isinstance(blocks[0].conv.drop_path, nn.Identity)
    for block, rate in zip(blocks[1:], (0.1, 0.2, 0.3), strict=True):
        assert [p.drop_path.rate for p in (block.conv, block.window, block.grid)] == pytest.approx([rate] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (1,)}, "one longer"),
        ({"depths": (1, 0, 1, 1)}, r"depths and stem must be at least 1, got \(1, 0, 1, 1\)"),
        ({"head_dim": 48}, "head_dim must divide every width, got 48"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("maxvit", **settings)


def test_a_small_maxvit_exports_to_onnx_for_any_batch(tmp_path) -> None:
    settings = {"depths": (1,), "dims": (32,), "stem": 8, "strides": (2, 2), "window": 4, "num_classes": 7}
    model = create_model("maxvit", **settings, img_size=42, pad=True)
    certificate = export_onnx(model, torch.randn(1, 3, 42, 42), tmp_path / "m.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
