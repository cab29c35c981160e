"""LITv2: equal to the authors' code in its two forms, HiLo's two kinds of heads see what they should, merging moves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.mlp import ConvMlp
from gossamer.mixers import create_mixer
from gossamer.mixers.hilo import HiLo
from gossamer.models import create_model, load_official
from gossamer.models.hilo import DeformMerging
from official import golden, manifest, seeded_state
from pyramids import (
    costs_are_published,
    equals_official,
    manifest_fits,
)

TINY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}
OFFICIAL = {
    "hilo": (
        {"img_size": 32, "num_classes": 7, "alpha": 0.5},
        (2, 3, 32, 32),
        "layers.1.downsample.dconv.weight",
    ),
    "hilo_dense": ({"alpha": 0.8, "dense": True}, (2, 3, 41, 58), "layers.2.blocks.0.attn.h_qkv.weight"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_litv2_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "hilo", {**TINY, **settings}, shape, key)


def test_every_official_checkpoint_of_litv2_fits() -> None:
    for name in manifest("hilo"):
        manifest_fits("hilo", name)


@pytest.mark.parametrize("name", ["litv2_s", "litv2_m", "litv2_b", "litv2_b_384"])
def test_litv2_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize("grid", [(9,), (4, 6), (2, 3, 4)])
def test_hilo_of_one_token_windows_is_plain_attention(grid: tuple[int, ...]) -> None:
    mixer, plain = create_mixer("hilo", 12, heads=3, window=1), create_mixer("attention", 12, heads=3)
    assert mixer.high is None
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat((mixer.low.q.weight, mixer.low.kv.weight)))
        plain.qkv.bias.copy_(torch.cat((mixer.low.q.bias, mixer.low.kv.bias)))
        plain.proj.load_state_dict(mixer.low.proj.state_dict())
    x = torch.randn(2, *grid, 12)
    torch.testing.assert_close(mixer(x), plain(x), atol=1e-6, rtol=1e-5)


def reach(mixer: nn.Module, at: tuple[int, int]) -> torch.Tensor:
    """Which outputs change when the token `at` does."""
    x = torch.randn(1, 6, 8, 16)
    other = x.clone()
    other[0, at[0], at[1]] += 1
    with torch.no_grad():
        return ((mixer(other) - mixer(x)).abs().amax(-1) > 1e-6)[0]


def test_high_heads_see_their_window_and_low_heads_see_everything() -> None:
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[2:4, 4:6] = True
    assert torch.equal(reach(create_mixer("hilo", 16, heads=4, alpha=0.0), (3, 4)), inside)
    assert bool(reach(create_mixer("hilo", 16, heads=4, alpha=1.0), (3, 4)).all())
    half = create_mixer("hilo", 16, heads=4, alpha=0.5)
    assert bool(reach(half, (3, 4)).all())
    # High heads come first among the channels.
    x = torch.randn(1, 6, 8, 16)
    other = x.clone()
    other[0, 3, 4] += 1
    changed = (half(other) - half(x)).abs() > 1e-6
    assert torch.equal(changed[0, ..., :8].any(-1), inside)


@pytest.mark.parametrize("grid", [(6, 4), (4,), (2, 4, 6)])
def test_hilo_equals_a_loop_over_windows_and_means(grid: tuple[int, ...]) -> None:
    mixer = create_mixer("hilo", 12, heads=3, window=2, alpha=0.4).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    coords = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).flatten(0, -2)
    cells, cell = torch.unique(coords // 2, dim=0, return_inverse=True)
    tokens = x.flatten(1, -2)
    q, k, v = mixer.high.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / 2
    high = logits.masked_fill(cell[:, None] != cell[None], -torch.inf).softmax(-1) @ v
    means = torch.stack([tokens[:, cell == i].mean(1) for i in range(len(cells))], 1)
    q = mixer.low.q(tokens)
    k, v = mixer.low.kv(means).chunk(2, -1)
    low = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
    want = torch.cat((mixer.high.proj(high.transpose(1, 2).flatten(2)), mixer.low.proj(low)), -1)
    torch.testing.assert_close(mixer(x).flatten(1, -2), want)


def test_maps_that_do_not_fit_are_as_maps_padded_with_zeros_and_cropped() -> None:
    mixer = create_mixer("hilo", 16, heads=4, window=4, alpha=0.5)
    x = torch.randn(2, 15, 13, 16)
    y = mixer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, mixer(F.pad(x, (0, 0, 0, 3, 0, 1)))[:, :15, :13])


def macs(mixer: nn.Module, *grid: int) -> float:
    return measure.macs(mixer.eval(), (torch.empty(1, *grid, mixer.dim),)).total


def test_hilo_counts_what_the_authors_demo_prints() -> None:
    with torch.device("meta"):
        assert macs(create_mixer("hilo", 384, heads=12, window=2, alpha=0.5), 14, 14) == 83_467_776


def test_cost_of_high_heads_is_linear_and_of_low_heads_a_window_less_than_full() -> None:
    with torch.device("meta"):
        high = create_mixer("hilo", 32, heads=4, window=4, alpha=0.0)
        assert macs(high, 32, 32) == 16 * macs(high, 8, 8)
        n, c = 32 * 32, 32
        low, full = (create_mixer("hilo", c, heads=4, window=w, alpha=1.0) for w in (4, 1))
        # What is left without the products with weights: queries times keys, weights times values.
        of_low = macs(low, 32, 32) - (2 * n * c * c + 2 * n // 16 * c * c)
        of_full = macs(full, 32, 32) - 4 * n * c * c
        assert of_low * 16 == of_full == 2 * n * n * c


@pytest.mark.parametrize("kind", ["high", "low"])
def test_heads_of_either_kind_are_pruned_exactly(kind: str) -> None:
    mixer = create_mixer("hilo", 24, heads=6, alpha=0.5)
    part = getattr(mixer, kind)
    with torch.no_grad():
        part.proj.weight.view(12, 3, 4)[:, 1] = 0
    x = torch.randn(2, 5, 6, 24)
    before = mixer(x)
    assert int(part.importance("heads").argmin()) == 1
    part.keep("heads", torch.tensor([0, 2]))
    assert part.widths() == {"heads": 2}
    torch.testing.assert_close(mixer(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide dim; got heads=5, dim=16"),
        ({"alpha": 1.2}, r"alpha must be in \[0, 1\], got 1.2"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_hilo_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("hilo", 16, **options)


def test_merging_starts_as_a_plain_convolution_and_then_moves_its_taps() -> None:
    merge = DeformMerging(6, 10, odd="refuse").eval()
    x = torch.randn(2, 6, 8, 6)
    plain = F.conv2d(x.movedim(-1, 1), merge.conv.weight, merge.conv.bias, 2).movedim(1, -1)
    torch.testing.assert_close(merge(x), merge.act(merge.norm(plain)), atol=1e-5, rtol=1e-5)
    nn.init.normal_(merge.conv.offset.weight)
    assert not torch.allclose(merge(x), merge.act(merge.norm(plain)), atol=1e-2)
    # Far offsets read a pixel outside of the tap's own square.
    nn.init.zeros_(merge.conv.offset.weight)
    nn.init.constant_(merge.conv.offset.bias, 2.0)
    x.requires_grad_()
    read = torch.autograd.grad(merge(x)[0, 0, 0].sum(), x)[0][0].abs().sum(-1) > 0
    assert bool(read[2:4, 2:4].all())
    assert int(read.sum()) == 4


def test_odd_maps_are_refused_or_padded_or_cut_before_they_are_halved() -> None:
    settings = {**TINY, "num_classes": 4}
    image = torch.randn(1, 3, 100, 70)
    with pytest.raises(ValueError, match="must be even before they are halved, got 25x18; build with pad=True"):
        create_model("hilo", **settings)(image)
    maps = create_model("hilo", **settings, pad=True).features(image)
    assert [tuple(m.shape) for m in maps] == [(1, 25, 18, 16), (1, 13, 9, 32), (1, 7, 5, 64), (1, 4, 3, 128)]
    maps = create_model("hilo", **settings, dense=True).features(image)
    assert [tuple(m.shape[1:3]) for m in maps] == [(25, 18), (12, 9), (6, 4), (3, 2)]


def test_only_small_maps_attend() -> None:
    model = create_model("hilo", **TINY)
    kinds = [[type(block.mixer) for block in stage] for stage in model.stages]
    assert kinds == [[ConvMlp], [ConvMlp], [HiLo, HiLo], [HiLo]]
    assert model.stages[2][0].mixer.window == 2
    assert model.stages[3][0].mixer.window == 1
    with pytest.raises(ValueError, match="of one length"):
        create_model("hilo", depths=(1, 1), heads=(1, 2), windows=(1,))


def test_the_dense_form_takes_the_backbone_of_a_classifier() -> None:
    state = seeded_state(golden("hilo")["shapes"])
    dense = load_official(create_model("hilo", **TINY, alpha=0.5, dense=True), state).eval()
    strict = load_official(create_model("hilo", **TINY, alpha=0.5, num_classes=7), state).eval()
    x = torch.randn(1, 3, 64, 64)
    for one, two in zip(dense.features(x), strict.features(x), strict=True):
        torch.testing.assert_close(one, F.layer_norm(two, two.shape[-1:]))


def test_folded_norms_leave_the_outputs_unchanged() -> None:
    settings = {**TINY, "alpha": 0.5, "num_classes": 7}
    model = load_official(create_model("hilo", **settings), seeded_state(golden("hilo")["shapes"])).eval()
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        before = model(x)
        fold_batch_norm(model)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


def test_another_mixer_takes_hilos_place() -> None:
    x = torch.randn(2, 3, 64, 64)
    outputs = {}
    for mixer in ("hilo", "pool", "attention"):
        torch.manual_seed(0)
        outputs[mixer] = create_model("hilo", **TINY, img_size=64, mixer=mixer, num_classes=5).eval()(x)
    assert len({tuple(y[0].tolist()) for y in outputs.values()}) == 3


def test_an_exported_litv2_agrees_for_every_batch_size(tmp_path) -> None:
    small = {"embed_dim": 16, "depths": (1, 1), "heads": (1, 2), "windows": (0, 2), "alpha": 0.5}
    model = create_model("hilo", **small, num_classes=5, pad=True)
    nn.init.normal_(model.merges[0].conv.offset.weight, std=0.1)
    certificate = export_onnx(model, torch.randn(2, 3, 28, 36), tmp_path / "m.onnx")
    assert certificate.passed
    assert certificate.held == "batch"
