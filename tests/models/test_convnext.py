"""ConvNeXt: equal to the authors' code, channels last equals channels first, 7x7 and nothing more is seen."""

import pytest
import torch
import torch.nn.functional as F

from gossamer import load, measure, save
from gossamer.models import create_model, load_official
from gossamer.models._convnext_roadmap import STEPS
from gossamer.models.registry import system
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

FOUR = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
OFFICIAL = {
    "convnext": ({**FOUR, "num_classes": 7}, (2, 3, 66, 41), "stages.1.0.dwconv.weight"),
    "convnext_isotropic": (
        {"depths": (2,), "dims": (16,), "patch": 16, "layer_scale": None, "stem_norm": False, "num_classes": 7},
        (1, 3, 66, 41),
        "blocks.0.pwconv1.weight",
    ),
    "convnext_dense": ({**FOUR, "depths": (1, 1, 1, 1), "dense": True}, (1, 3, 66, 41), "stages.1.0.gamma"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_convnext_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "convnext", settings, shape, key)


def test_every_official_checkpoint_of_convnext_fits() -> None:
    for name in manifest("convnext"):
        manifest_fits("convnext", name)


@pytest.mark.parametrize("name", list(system("convnext").variants)[:8])
def test_convnext_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize(("name", "macs"), [("convnext_b", 45.12), ("convnext_l", 101.0), ("convnext_xl", 179.0)])
def test_convnext_costs_what_is_published_at_384_pixels_too(name: str, macs: float) -> None:
    with torch.device("meta"):
        count = measure.macs(create_model(name).eval(), (torch.empty(1, 3, 384, 384),)).total
    assert count / 1e9 == pytest.approx(macs, rel=0.01)


def test_saved_weights_are_read_bit_for_bit(tmp_path) -> None:
    model = create_model("convnext", **FOUR, num_classes=7).eval()
    save(model, tmp_path)
    again, x = load(tmp_path), torch.randn(1, 3, 66, 41)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), again.eval()(x))


def test_cost_is_linear_in_pixels() -> None:
    with torch.device("meta"):
        model = create_model("convnext_t", num_classes=0).eval()
        counts = [measure.macs(model, (torch.empty(1, 3, side, side),)).total for side in (128, 256)]
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.01)


def test_a_block_equals_its_channels_first_form_with_1x1_convolutions() -> None:
    model = create_model("convnext", **FOUR, layer_scale=0.7)
    block = model.stages[1][0]
    x = torch.randn(2, 9, 7, 16)
    y = F.conv2d(x.movedim(-1, 1).contiguous(), block.mixer.conv.weight, block.mixer.conv.bias, padding=3, groups=16)
    mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
    y = (y - mean) / (var + 1e-6).sqrt() * block.norm1.weight[:, None, None] + block.norm1.bias[:, None, None]
    y = F.gelu(F.conv2d(y, block.mlp.fc1.weight[:, :, None, None], block.mlp.fc1.bias))
    y = F.conv2d(y, block.mlp.fc2.weight[:, :, None, None], block.mlp.fc2.bias)
    want = x.movedim(-1, 1) + 0.7 * y
    torch.testing.assert_close(block(x), want.movedim(1, -1), atol=1e-5, rtol=1e-5)


def test_a_block_is_the_identity_at_scale_zero_and_nearly_so_at_the_start() -> None:
    x = torch.randn(2, 9, 9, 8)
    zero = create_model("convnext", **FOUR, layer_scale=0.0).stages[0][0]
    assert torch.equal(zero(x), x)
    start = create_model("convnext", **FOUR).stages[0][0]
    assert 0 < (start(x) - x).norm() < 1e-4 * x.norm()


def test_one_block_sees_7x7_and_no_more() -> None:
    block = create_model("convnext", **FOUR, layer_scale=1.0).stages[0][0]
    x = torch.randn(1, 15, 15, 8, requires_grad=True)
    (reach,) = torch.autograd.grad(block(x)[0, 7, 7].sum(), x)
    inside = torch.zeros(15, 15, dtype=torch.bool)
    inside[4:11, 4:11] = True
    assert torch.equal(reach.abs().sum((0, 3)) > 0, inside)


@pytest.mark.parametrize("shape", [(224, 224), (256, 320), (250, 190)])
def test_feature_strides_are_4_8_16_32(shape: tuple[int, int]) -> None:
    maps = create_model("convnext", **FOUR, dense=True).features(torch.randn(1, 3, *shape))
    grids = [(shape[0] // 4, shape[1] // 4)]
    for _ in range(3):
        grids.append((grids[-1][0] // 2, grids[-1][1] // 2))
    assert [tuple(m.shape[1:3]) for m in maps] == grids


def test_images_smaller_than_the_deepest_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 32.*31x64"):
        create_model("convnext", **FOUR)(torch.randn(1, 3, 31, 64))


def test_the_dense_form_takes_the_backbone_of_a_classifier() -> None:
    state = seeded_state(golden("convnext")["shapes"])
    dense = load_official(create_model("convnext", **FOUR, dense=True), state)
    strict = load_official(create_model("convnext", **FOUR, num_classes=7), state)
    x = torch.randn(1, 3, 64, 64)
    maps = strict.features(x)
    torch.testing.assert_close(dense.features(x), [F.layer_norm(m, m.shape[-1:], eps=1e-6) for m in maps])


def test_head_init_scale_shrinks_the_first_logits() -> None:
    torch.manual_seed(0)
    one = create_model("convnext", **FOUR)
    torch.manual_seed(0)
    small = create_model("convnext", **FOUR, head_init_scale=0.001)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(small(x), one(x) * 0.001)


def test_the_roadmap_starts_at_resnet50_and_ends_at_convnext_t() -> None:
    """Multiply-adds in billions, by the paper's figure 2, to its one decimal."""
    published = {"resnet50": 4.1, "stage_ratio": 4.5, "patchify": 4.4, "depthwise": 5.3, "inverted": 4.6}
    published |= {"depthwise_first": 4.1, "kernel7": 4.1, "layer_norm": 4.1, "downsampling": 4.5}
    costs = {}
    for step in STEPS:
        with torch.device("meta"):
            model = create_model(f"convnext_roadmap_{step}").eval()
        image = torch.empty(1, 3, 224, 224, device="meta")
        costs[step] = measure.parameters(model), measure.macs(model, (image,)).total
    for step, figure in published.items():
        assert round(costs[step][1] / 1e9, 1) == figure
    assert costs["resnet50"][0] == 25_557_032
    assert costs["downsampling"][0] == 28_589_128
    # An activation costs nothing, a norm two numbers a channel.
    assert costs["kernel7"] == costs["gelu"] == costs["one_activation"]
    blocks = zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)
    # Without its norm a product has a bias: one number a channel less, for the inner and the outer product.
    assert costs["one_activation"][0] - costs["one_norm"][0] == sum(n * (4 * c + c) for n, c in blocks)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_every_step_of_the_roadmap_gives_maps_at_four_strides_and_learns(step: str) -> None:
    model = create_model(f"convnext_roadmap_{step}", dims=(12, 24, 48, 96), in_chans=1, num_classes=3)
    image = torch.randn(2, 1, 64, 32)
    assert [m.shape[1:3] for m in model.features(image)] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    model(image).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_only_the_later_steps_see_seven_pixels_and_only_the_early_ones_between_channels() -> None:
    def reach(step: str) -> tuple[int, int]:
        block = create_model(f"convnext_roadmap_{step}", dims=(12, 24, 48, 96)).eval().stages[0][1]
        x = torch.randn(1, 15, 15, block.branch[0].in_channels, requires_grad=True)
        block.branch(x)[0, 7, 7].sum().backward()
        seen = x.grad[0].abs().sum(-1) > 0
        return int(seen.sum()), block.branch[0].groups

    assert reach("resnet50")[0] == reach("depthwise_first")[0] == 9
    assert reach("kernel7")[0] == 49
    assert reach("inverted")[1] == 1 < reach("depthwise_first")[1]


def test_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="roadmap must be one of resnet50"):
        create_model("convnext_t", roadmap="resnet60")
