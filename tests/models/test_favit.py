"""FaViT: equal to the authors' code run beside it, few keys for every query, and reach over the whole map."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.mixers.factorized import FactorizedAttention, TiledKeys
from gossamer.models import create_model, load_official
from official import golden, manifest, seeded_state
from pyramids import (
    costs_are_published,
    equals_official,
    manifest_fits,
)

TINY = {
    "dims": (16, 16, 32),
    "depths": (1, 1, 1),
    "heads": (1, 1, 2),
    "mlp_ratios": (2, 2, 2),
    "reductions": (2, 2, 1),
    "num_classes": 7,
}
OFFICIAL = {
    "favit": ({}, (2, 3, 56, 56), "block1.0.attn.fcs.1.weight"),
    "favit_odd": ({"reductions": (2, 1, 1)}, (1, 3, 61, 75), "block1.0.attn.sr.weight"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_favit_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "favit", {**TINY, **settings}, shape, key)


def test_every_official_checkpoint_of_favit_fits() -> None:
    for name in manifest("favit"):
        manifest_fits("favit", name)


@pytest.mark.parametrize("name", ["favit_b0", "favit_b1", "favit_b2", "favit_b3"])
def test_favit_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize("size", [(14, 20), (33, 16), (56, 56)])
def test_tiled_groups_have_49_keys_and_the_coarse_group_a_reduction_less_on_each_axis(size: tuple[int, int]) -> None:
    mixer = create_mixer("factorized", 32, heads=2, reduction=4)
    assert mixer.split == [4, 14, 14]
    x = torch.randn(2, *size, 32)
    k, v = mixer.coarse(x[..., :4])
    assert k.shape == v.shape == (2, 1, (size[0] // 4) * (size[1] // 4), 4)
    for part in mixer.tiled:
        k, v = part(x[..., :14])
        assert k.shape == v.shape == (2, 2, 49, 7)
    assert [part.dilation for part in mixer.tiled] == [1, 4]


def taps_by_loop(keys: TiledKeys, x: Tensor) -> Tensor:
    """The mean entry at each tap, by a walk over tiles; for maps that need no padding, or that reflection pads."""
    b, h, w, c = x.shape
    side, width = keys.dilation * (keys.window - 1) + 1, c // keys.heads
    at = lambda p, length: p if p < length else 2 * (length - 1) - p  # noqa: E731
    rows, columns = -(-h // side), -(-w // side)
    out = torch.zeros(b, keys.heads, keys.window**2, width, dtype=x.dtype)
    for head in range(keys.heads):
        for tap in range(keys.window**2):
            i, j = divmod(tap, keys.window)
            entries = [
                x[
                    :,
                    at(r * side + i * keys.dilation, h),
                    at(s * side + j * keys.dilation, w),
                    head * width : (head + 1) * width,
                ]
                for r in range(rows)
                for s in range(columns)
            ]
            if keys.pool == "per_channel":
                out[:, head, tap] = torch.stack(entries).mean(0)
            else:
                out[:, head, tap] = F.adaptive_avg_pool1d(torch.cat(entries, -1)[:, None], width)[:, 0]
    return out


@pytest.mark.parametrize("pool", ["official", "per_channel"])
@pytest.mark.parametrize(("size", "dilation"), [((14, 21), 1), ((13, 13), 2), ((15, 20), 2), ((9, 8), 1)])
def test_taps_are_means_over_the_tiles_of_a_padded_map(size, dilation, pool) -> None:
    keys = TiledKeys(12, 3, window=7, dilation=dilation, pool=pool)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(keys.taps(x), taps_by_loop(keys, x))


def test_both_ways_of_averaging_are_one_where_there_is_one_tile_and_differ_where_there_are_more() -> None:
    one, two = (create_mixer("factorized", 16, reduction=1, pool=pool, heads=2) for pool in ("official", "per_channel"))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 7, 7, 16)
    torch.testing.assert_close(one(x), two(x))
    x = torch.randn(2, 14, 7, 16)
    assert not torch.allclose(one(x), two(x), atol=1e-4)


def test_factorized_attention_equals_its_groups_written_out() -> None:
    mixer = create_mixer("factorized", 32, heads=2, reduction=2).double()
    x = torch.randn(2, 13, 14, 32, dtype=torch.float64)
    q = mixer.q(x).flatten(1, 2)
    k, v = (t[:, 0] for t in mixer.coarse(x[..., :4]))
    parts = [(q[..., :4] @ k.mT / 2).softmax(-1) @ v]
    image = F.conv2d(x[..., 4:].movedim(-1, 1), *mixer.near[0].parameters(), padding=1, groups=28).movedim(1, -1)
    maps = mixer.near[1](image)
    # A head's 14 query channels are 7 for the near taps and 7 for the far ones.
    for i, keys in enumerate(mixer.tiled):
        k, v = keys(maps[..., 14 * i : 14 * i + 14])
        heads = []
        for head in range(2):
            start = 4 + 14 * head + 7 * i
            heads.append((q[..., start : start + 7] @ k[:, head].mT * 7**-0.5).softmax(-1) @ v[:, head])
        parts.append(torch.cat(heads, -1))
    torch.testing.assert_close(mixer(x).flatten(1, 2), mixer.proj(torch.cat(parts, -1)))


@pytest.mark.parametrize("pool", ["official", "per_channel"])
def test_one_token_reaches_every_output_though_the_coarse_group_is_silent(pool: str) -> None:
    mixer = create_mixer("factorized", 32, reduction=2, pool=pool)
    with torch.no_grad():
        mixer.proj.weight[:, :4] = 0
        x = torch.randn(1, 26, 30, 32)
        other = x.clone()
        other[0, 3, 4] += 30
        assert bool(((mixer(other) - mixer(x)).abs().amax(-1) > 1e-7).all())


def local_macs(side: int) -> float:
    """Products of the tiled groups' queries with keys and of their weights with values."""
    with torch.device("meta"):
        mixer = create_mixer("factorized", 32, reduction=4)
        total = measure.macs(mixer.eval(), (torch.empty(1, side, side, 32),)).total
        for part, shape in (
            (mixer.q, (1, side, side, 32)),
            (mixer.proj, (1, side, side, 32)),
            (mixer.near, (1, side, side, 28)),
        ):
            total -= measure.macs(part, (torch.empty(shape),)).total
        total -= measure.macs(mixer.coarse, (torch.empty(1, side, side, 4),)).total
        return total - 2 * side**2 * (side // 4) ** 2 * 4


def test_cost_of_the_tiled_groups_is_linear_in_tokens() -> None:
    small, large = local_macs(32), local_macs(128)
    assert large / small == pytest.approx(16, rel=0.05)
    # Beyond what their 49 keys cost once.
    assert large - small == 2 * (128**2 - 32**2) * 49 * 28


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (24, {"reduction": 2}, "multiple of 16 with reduction=2, got 24"),
        (20, {}, "multiple of 8 with reduction=1, got 20"),
        (32, {"reduction": 2, "heads": 4}, "heads must divide the 14 channels"),
        (16, {"pool": "max"}, "pool must be"),
        (16, {"reduction": 0}, "reduction must be at least 1"),
    ],
)
def test_settings_that_make_no_groups_are_refused(dim: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("factorized", dim, **options)
    with pytest.raises(ValueError, match="of one length"):
        create_model("favit", **{**TINY, "heads": (1, 1)})


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 4)])
def test_maps_smaller_than_a_tile_are_padded_by_their_border(size: tuple[int, int]) -> None:
    mixer = create_mixer("factorized", 32, reduction=8)
    x = torch.randn(1, *size, 32)
    assert bool(mixer(x).isfinite().all())
    border = x[:, :, [min(p, size[1] - 1) for p in range(49)]][:, [min(p, size[0] - 1) for p in range(49)]]
    far = mixer.tiled[1]
    if max(size) < 25:
        torch.testing.assert_close(far.taps(x[..., :14]), far.taps(border[..., :14]))


def test_any_image_gives_maps_at_strides_4_8_and_16_each_normalised() -> None:
    maps = create_model("favit", **TINY).features(torch.randn(1, 3, 75, 50))
    assert [tuple(m.shape) for m in maps] == [(1, 19, 13, 16), (1, 10, 7, 16), (1, 5, 4, 32)]
    for m in maps:
        torch.testing.assert_close(m.mean(-1), torch.zeros(m.shape[:-1]), atol=1e-5, rtol=0)


def test_a_backbone_takes_the_weights_of_a_classifier() -> None:
    state = seeded_state(golden("favit")["shapes"])
    whole = load_official(create_model("favit", **TINY), state).eval()
    backbone = load_official(create_model("favit", **{**TINY, "num_classes": 0}), state).eval()
    x = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(whole.head.fc(backbone(x)), whole(x))
    torch.testing.assert_close(backbone.features(x)[-1].mean((1, 2)), backbone(x))


def test_another_mixer_takes_its_place() -> None:
    x = torch.randn(2, 3, 64, 64)
    outputs = {}
    for mixer in ("factorized", "pool", "attention"):
        torch.manual_seed(0)
        outputs[mixer] = create_model("favit", **TINY, img_size=64, mixer=mixer).eval()(x)
    assert len({tuple(y[0].tolist()) for y in outputs.values()}) == 3
    assert isinstance(create_model("favit", **TINY).stages[0][0].mixer, FactorizedAttention)


def digits_known(mixer: str, seed: int = 0, **own: object) -> tuple[float, float]:
    """Share of unseen digits, 16 pixels a side, told right after one pass over 1,500, and the model's MMACs."""
    torch.manual_seed(seed)
    settings = {"dims": (16, 32), "depths": (1, 1), "heads": (1, 1), "mlp_ratios": (2, 2), "reductions": (4, 2)}
    settings |= {"patch": 1, "in_chans": 1, "num_classes": 10, "init_std": None, "img_size": 16, "mixer": mixer, **own}
    model = create_model("favit", **settings)
    digits = load_digits()
    x = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, (16, 16), mode="bilinear")
    y = torch.tensor(digits.target)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for index in torch.randperm(1500).split(25):
        loss = F.cross_entropy(model(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
        return float(right), measure.macs(model, (x[:1],)).total / 1e6


def test_in_one_pass_over_digits_factorised_attention_learns_what_spatial_reduction_of_its_cost_does() -> None:
    known, cost = digits_known("factorized")
    # A wider MLP spends what the shrunken map saves.
    beside, other = digits_known("spatial_reduction", mixer_options={"ratio": 4}, mlp_ratios=(4, 4))
    assert cost == pytest.approx(other, rel=0.1)
    assert min(known, beside) > 0.5
    # Seeds differ by some 0.06.
    assert known > beside - 0.08


def test_an_exported_favit_agrees_for_every_batch_size(tmp_path) -> None:
    small = {"dims": (16, 32), "depths": (1, 1), "heads": (1, 1), "mlp_ratios": (2, 2), "reductions": (2, 1)}
    model = create_model("favit", **small, num_classes=5)
    certificate = export_onnx(model, torch.randn(2, 3, 56, 40), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"
