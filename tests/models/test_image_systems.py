"""What all image systems share: sides nothing divides, one or five channels, weights of another image size."""

import re
from typing import Any

import pytest
import torch

from gossamer.models import create_model, load_official
from official import golden, seeded_state

Grids = list[tuple[int, int]]
# Maps of an image of 97 by 123 pixels, whose sides are divided by 4, 8, 16 and 32 and rounded up, or down.
UP = [(25, 31), (13, 16), (7, 8), (4, 4)]
DOWN = [(24, 30), (12, 15), (6, 7), (3, 3)]
# A stem that overlaps has half of its kernel as padding: 24 = (97 + 4 - 7) // 4 + 1; what follows is rounded up.
OVERLAP = [(24, 31), (12, 16), (6, 8), (3, 4)]

FOUR: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
SYSTEMS: dict[str, tuple[str, dict[str, Any], Grids]] = {
    "swin": ("swin", {"embed_dim": 8, "depths": (1, 2, 1, 1), "heads": (1, 1, 2, 2), "window": 4, "pad": True}, UP),
    "swin, Swin-MLP": (
        "swin",
        {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "window": 4, "pad": True, "mixer": "window_mlp"},
        UP[:2],
    ),
    "cswin": (
        "cswin",
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "heads": (2, 4, 4, 4), "stripes": (1, 2, 7, 7), "pad": True},
        OVERLAP,
    ),
    "maxvit": ("maxvit", {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64), "stem": 8, "pad": True}, UP),
    "pvt": ("pvt", {**FOUR, "heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2), "img_size": 64}, DOWN),
    "pvt, second version": ("pvt", {**FOUR, "heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2), "v2": True}, UP),
    "crossvit": (
        "crossvit",
        {"dims": (16, 24), "heads": (2, 3), "depths": (1, 2), "blocks": 2, "img_size": 60, "patches": (12, 8)},
        [(5, 5), (7, 7)],
    ),
    "compact-transformers": (
        "cct_7_7x2_224",
        {"dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "positions": None},
        [(7, 8)],
    ),
    "metaformer": ("metaformer", FOUR, OVERLAP),
    "convnext": ("convnext", FOUR, DOWN),
    "uniformer": ("uniformer", {**FOUR, "dims": (8, 16, 32, 64), "head_dim": 16, "pad": True}, UP),
    "uniformer, convolutional stem": (
        "uniformer",
        {**FOUR, "dims": (8, 16, 32, 64), "head_dim": 16, "conv_stem": True},
        UP,
    ),
    "efficientformer": (
        "efficientformer_l1",
        {"widths": (8, 12, 16, 24), "depths": (1, 1, 2, 3), "img_size": (97, 123), "distillation": False},
        UP,
    ),
    "hilo": ("hilo", {"embed_dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "pad": True}, UP),
    "key-driven-gqa": (
        "key-driven-gqa",
        {"dim": 24, "depth": 2, "heads": 6, "kv_heads": 3, "pad": True, "img_size": (97, 123)},
        [(7, 8)],
    ),
    # Coefficients of 8x8 blocks: strides 8 to 64.
    "dct-learning": (
        "resnet50_dct24",
        {"backbone": ("basic", (1, 1, 1, 1)), "width": 8, "pixels": True},
        [*UP[1:], (2, 2)],
    ),
    "sit": ("sit_tiny", {"dim": 24, "depth": 2, "heads": 2, "pad": True, "img_size": (97, 123)}, [(7, 8)]),
}


@pytest.mark.parametrize("chans", [1, 5])
@pytest.mark.parametrize("name", SYSTEMS)
def test_an_odd_image_of_any_channels_is_classified_and_every_weight_learns(name: str, chans: int) -> None:
    variant, settings, grids = SYSTEMS[name]
    model = create_model(variant, **settings, in_chans=chans, num_classes=3)
    x = torch.randn(2, chans, 97, 123)
    y = model(x)
    assert y.shape == (2, 3)
    y.logsumexp(-1).sum().backward()
    lost = [
        k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not lost
    maps = model.features(x)
    assert [tuple(m.shape[1:3]) for m in maps] == grids
    x.requires_grad_()
    (grad,) = torch.autograd.grad(sum(m.square().sum() for m in model.eval().features(x)), x)
    seen = (grad != 0).any(1)
    assert seen.float().mean() > 0.9
    # What fills no patch is filled up or, where strides round down, left out.
    assert bool(seen[:, -1, -1].any()) == (grids is not DOWN)


def test_vit_comer_takes_any_channels_in_sides_of_whole_strides() -> None:
    settings = {"dim": 12, "depth": 4, "heads": 2, "deform_heads": 2, "points": 2, "width": 4, "img_size": 64}
    for chans in (1, 5):
        model = create_model("vit-comer", **settings, in_chans=chans)
        maps = model.features(torch.randn(1, chans, 96, 160))
        assert [tuple(m.shape) for m in maps] == [(1, 24, 40, 12), (1, 12, 20, 12), (1, 6, 10, 12), (1, 3, 5, 12)]
        with pytest.raises(ValueError, match="multiples of 32, got 97x123"):
            model(torch.randn(1, chans, 97, 123))


SWIN = {"embed_dim": 16, "depths": (2, 2), "heads": (2, 4), "num_classes": 7}
CSWIN = {"embed_dim": 8, "depths": (1, 2, 1, 1), "heads": (2, 4, 4, 4), "num_classes": 7}
MAXVIT = {"depths": (2, 1), "dims": (32, 64), "stem": 8, "strides": (2, 2, 2), "num_classes": 7}
PVT = {"dims": (8, 16, 24, 32), "heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2), "depths": (1, 2, 1, 1)}
CROSS = {"dims": (16, 24), "heads": (2, 3), "depths": (1, 2), "blocks": 2, "mlp_ratio": 2.0, "patches": (12, 8)}
META = {"depths": (1, 2), "dims": (32, 64), "mixers": ("pool", "attention"), "norm": "layer", "num_classes": 7}
COMER = {"dim": 12, "depth": 4, "heads": 2, "deform_heads": 2, "points": 2, "width": 4}
KEYS = {"dim": 24, "depth": 2, "heads": 6, "kv_heads": 4, "patch": 4, "in_chans": 1, "num_classes": 7}
# Golden file of the weights, variant, settings, those of one size and of another, and which tensors are resized.
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "swin": ("swin", SWIN, {"img_size": (32, 64), "window": 4}, {"img_size": 48, "window": 6}, r"bias_table$"),
    "swin_ape": (
        "swin",
        {**SWIN, "ape": True, "window": 4},
        {"img_size": 32},
        {"img_size": (64, 96)},
        r"^stem\.1\.table$",
    ),
    "cswin": (
        "cswin",
        CSWIN,
        {"img_size": 64, "stripes": (1, 2, 4, 2)},
        {"img_size": 128, "stripes": (1, 2, 8, 2)},
        "",
    ),
    "maxvit": ("maxvit", MAXVIT, {"img_size": 32, "window": 4}, {"img_size": (48, 96), "window": 6}, r"bias_table$"),
    "pvt": ("pvt", {**PVT, "num_classes": 7}, {"img_size": 32}, {"img_size": (64, 96)}, r"table$"),
    "pvt_v2": ("pvt", {**PVT, "num_classes": 7, "v2": True}, {"img_size": 32}, {"img_size": (64, 96)}, ""),
    "crossvit": ("crossvit", {**CROSS, "num_classes": 7}, {"img_size": 60}, {"img_size": (72, 96)}, r"positions$"),
    "compact_cct": (
        "cct_2_3x2_32",
        {"dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "num_classes": 5},
        {"img_size": 27},
        {"img_size": (40, 27)},
        r"^stem\.positions$",
    ),
    "metaformer_attention": ("metaformer", META, {"img_size": (38, 54)}, {"img_size": (70, 54)}, r"table$"),
    "convnext": ("convnext", {**FOUR, "num_classes": 7}, {"img_size": 32}, {"img_size": (64, 96)}, ""),
    "uniformer": (
        "uniformer",
        {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "head_dim": 16, "num_classes": 7},
        {"img_size": 32},
        {"img_size": (64, 96)},
        "",
    ),
    "efficientformer": (
        "efficientformer_l1",
        {"widths": (8, 12, 16, 24), "depths": (1, 1, 2, 3), "num_classes": 5, "attention_blocks": 2},
        {"img_size": 224},
        {"img_size": (96, 160)},
        r"bias_table$",
    ),
    "hilo": (
        "hilo",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "alpha": 0.5, "num_classes": 7},
        {"img_size": 32},
        {"img_size": (64, 96)},
        "",
    ),
    "vit_comer": (
        "vit-comer",
        {**COMER, "dim_ratio": 1.5, "deform_ratio": 1.0},
        {"img_size": 64},
        {"img_size": (64, 96)},
        r"^positions\.table$",
    ),
    "key_driven_kdgqa": (
        "key-driven-gqa",
        {**KEYS, "scheme": "kdgqa"},
        {"img_size": 16},
        {"img_size": (12, 24)},
        r"^stem\.positions$",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_weights_of_one_size_load_at_another_where_tables_of_places_alone_are_resized(name: str) -> None:
    variant, settings, one, two, resized = SIZES[name]
    state = seeded_state(golden(name)["shapes"])
    here, there = (load_official(create_model(variant, **settings, **size), state).eval() for size in (one, two))
    own, changed = here.state_dict(), set()
    for key, value in there.state_dict().items():
        if value.shape != own[key].shape:
            changed.add(key)
            # Interpolation keeps the mean of a table about where it was.
            assert (value.mean() - own[key].mean()).abs() < 0.3 * own[key].std(), key
        else:
            assert torch.equal(value, own[key]), key
    assert bool(changed) == bool(resized)
    assert all(re.search(resized, key) for key in changed)
    size = two["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        y = there(torch.randn(2, settings.get("in_chans", 3), height, width))
    assert all(bool(m.isfinite().all()) for m in ([y] if isinstance(y, torch.Tensor) else y))
