"""Learning in the frequency domain: equal to the authors' networks; channels are kept by list or by a learned gate."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image

from gossamer.io import export_onnx
from gossamer.models import create_model, load_official
from gossamer.models.dct_learning import SUBSETS, FrequencyGate, kept
from gossamer.models.registry import rename, system
from gossamer.ops.frequency import block_idct, jpeg_channels
from official import golden, probe, seeded_input, seeded_state
from pyramids import costs_are_published

OFFICIAL = {
    "dct_resnet": ("resnet50_dct24", {"released": True}, (2, 24, 5, 7), "stages.0.0.shortcut.conv.weight"),
    "dct_mobilenet": ("mobilenetv2_dct24", {}, (2, 24, 9, 13), "stages.3.4.expand.conv.weight"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_networks_equal_the_authors(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant, settings, shape, key = OFFICIAL[name]
    saved = golden(name)
    model = load_official(create_model(variant, **settings), seeded_state(saved["shapes"], dtype)).to(dtype).eval()
    x = seeded_input(name, shape).to(dtype).requires_grad_()
    y = model(x)
    grad_x, grad_w = torch.autograd.grad(probe(y), [x, model.get_parameter(key)])
    for got, want in ((y, "output0"), (grad_x, "grad_input"), (grad_w.flatten()[:400], "grad_weight")):
        # Fifty layers deep: measured against the largest entry.
        scale = saved[want].abs().max()
        torch.testing.assert_close(got / scale, saved[want] / scale, atol=tolerance, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["resnet50_rgb", "resnet50_dct24", "resnet50_dct64", "resnet50_dct192"])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.01, macs=0.01)


def test_mobilenetv2_has_the_parameters_that_the_authors_has() -> None:
    with torch.device("meta"):
        model = create_model("mobilenetv2_dct24")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(3.504, rel=0.001)


@pytest.mark.parametrize("count", [n for n in SUBSETS if n != 192])
def test_subsets_hold_as_many_channels_as_they_say_and_low_frequencies_first(count: int) -> None:
    luma, chroma = SUBSETS[count]
    assert len(luma) + 2 * len(chroma) == count
    assert set(chroma) <= set(luma) or count == 6
    for part in (luma, chroma):
        # With a coefficient come all of fewer cycles on both axes.
        assert all(8 * u + v in part for f in part for u in range(f // 8 + 1) for v in range(f % 8 + 1))
    for planes, block in ((3, 4), (3, 8), (1, 8), (4, 2)):
        lists = kept(planes, min(count, planes * block * block), block)
        assert sum(map(len, lists)) == min(count, planes * block * block)


def test_24_of_192_channels_hold_nearly_all_of_a_photographs_energy_and_give_it_back_but_for_detail() -> None:
    image = torch.from_numpy(load_sample_image("china.jpg")[:424, :640].copy())[None].double()
    every = jpeg_channels(image)
    luma, chroma = SUBSETS[24]
    index = [*luma, *(64 + f for f in chroma), *(128 + f for f in chroma)]
    assert every[..., index].square().sum() / every.square().sum() > 0.95
    kept_luma = torch.zeros_like(every[..., :64])
    kept_luma[..., list(luma)] = every[..., list(luma)]
    back, full = (block_idct(c[:, :, :, None]) for c in (kept_luma, every[..., :64]))
    torch.testing.assert_close(block_idct(every[:, :, :, None, list(luma)], keep=luma), back)
    lost = (back - full).square().sum() / full.square().sum()
    assert 0 < lost < 0.05


def gate(dim: int = 12) -> tuple[FrequencyGate, torch.Tensor]:
    return FrequencyGate(dim), torch.randn(8, 3, 5, dim)


def test_gates_are_0_or_1_close_whole_channels_and_pass_gradients() -> None:
    layer, x = gate()
    torch.nn.init.zeros_(layer.bias)
    y = layer(x)
    ratio = y / x
    assert bool(((ratio - 1).abs() < 1e-5).logical_or(ratio.abs() < 1e-5).all())
    assert torch.equal(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert 0.2 < layer.share.item() < 0.8
    layer.share.backward()
    assert layer.bias.grad.abs().min() > 0
    assert bool((layer.bias.grad[:, 1] > 0).all())


def test_gates_start_open_and_all_close_when_openness_costs_much() -> None:
    layer, x = gate()
    layer(x)
    assert layer.share > 0.7
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for weight, expected in ((0.0, 1.0), (20.0, 0.0)):
        for _ in range(60):
            optimizer.zero_grad()
            y = layer(x)
            ((y - x).square().mean() + weight * layer.share).backward()
            optimizer.step()
        assert layer.eval().gates(x).mean() == expected
        layer.train()


def test_a_gate_stands_before_the_first_stage_and_samples_choose_for_themselves() -> None:
    model = create_model("resnet50_dct192_gate", backbone=("basic", (1,)), width=8, num_classes=3).eval()
    x = torch.randn(2, 192, 4, 4)
    with torch.no_grad():
        model.stem[1].weight[:, 0] = 400 * torch.randn(192).abs()
    gates = model.stem[1].gates(model.stem[0](x))
    assert 0 < gates.mean() < 1
    assert not torch.equal(gates[0], gates[1])
    silent = x.clone()
    silent[:1, gates[0] == 0] += 0.0
    torch.testing.assert_close(model.stem(x), (x * gates[:, :, None, None]).movedim(1, -1))


def test_pixels_are_the_same_network_behind_the_transform() -> None:
    small = {"backbone": ("basic", (1, 1)), "width": 8, "num_classes": 3}
    pixels = create_model("resnet50_dct24", **small, pixels=True).eval()
    coefficients = create_model("resnet50_dct24", **small).eval()
    own = coefficients.state_dict()
    coefficients.load_state_dict({k: v for k, v in pixels.state_dict().items() if k in own})
    image = torch.rand(2, 3, 32, 48)
    every = jpeg_channels(image.movedim(1, -1), centre=0.0)
    luma, chroma = SUBSETS[24]
    chosen = every[..., [*luma, *(64 + f for f in chroma), *(128 + f for f in chroma)]] / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(pixels(image), coefficients(chosen.movedim(-1, 1)), atol=1e-4, rtol=1e-4)


def test_maps_of_56_28_14_and_7_as_described_and_of_56_56_28_and_14_as_released() -> None:
    small = {"backbone": ("basic", (1, 1, 1, 1)), "width": 4, "num_classes": 3}
    x = torch.randn(1, 24, 56, 56)
    for released, sides in ((False, [56, 28, 14, 7]), (True, [56, 56, 28, 14])):
        maps = create_model("resnet50_dct24", **small, released=released).features(x)
        assert [tuple(m.shape[1:3]) for m in maps] == [(s, s) for s in sides]


def test_inputs_and_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="6, 24, 32, 48, 64, 192, got 25"):
        create_model("resnet50_dct24", channels=25)
    with pytest.raises(ValueError, match=r"multiples of 8 .* 450x448"):
        create_model("resnet50_dct24", img_size=(450, 448))
    with pytest.raises(ValueError, match="24 frequency channels, got 3"):
        create_model("resnet50_dct24", backbone=("basic", (1,)), width=8)(torch.randn(1, 3, 56, 56))
    with pytest.raises(ValueError, match="give channels="):
        create_model("resnet50_rgb", gate=True)
    with pytest.raises(ValueError, match=r"3 to 12 .* got 24"):
        create_model("resnet50_dct24", pixels=True, block=2)


def test_networks_on_rgb_take_the_names_of_their_authors() -> None:
    names = {
        "mobilenetv2_rgb": {
            "features.0.0.weight": "stem.convs.0.conv.weight",
            "features.0.1.running_var": "stem.convs.0.norm.running_var",
            "features.1.conv.0.weight": "stages.0.0.depthwise.conv.weight",
            "features.1.conv.4.bias": "stages.0.0.project.norm.bias",
            "features.12.conv.0.weight": "stages.3.5.expand.conv.weight",
            "conv.1.weight": "norm.norm.weight",
            "classifier.bias": "head.fc.bias",
        },
        "resnet50_rgb": {
            "conv1.weight": "stem.conv.weight",
            "bn1.running_mean": "stem.norm.running_mean",
            "layer4.2.conv3.weight": "stages.3.2.conv3.conv.weight",
            "layer2.0.downsample.1.bias": "stages.1.0.shortcut.norm.bias",
            "fc.weight": "head.fc.weight",
        },
    }
    entry = system("dct-learning")
    for name, pairs in names.items():
        with torch.device("meta"):
            model = create_model(name)
        own = model.state_dict()
        state = entry.convert(model, rename({k: own[v] for k, v in pairs.items()}, entry.rules))
        assert {k: v.shape for k, v in state.items()} == {v: own[v].shape for v in pairs.values()}


def test_weights_for_more_channels_give_their_first_ones_to_fewer() -> None:
    small = {"backbone": ("basic", (1, 1)), "width": 8, "num_classes": 3}
    wide, narrow = (create_model(f"resnet50_dct{n}", **small) for n in (192, 24))
    load_official(narrow, wide.state_dict())
    assert torch.equal(narrow.stages[0][0].conv1.conv.weight, wide.stages[0][0].conv1.conv.weight[:, :24])


def test_a_model_on_pixels_exports_to_onnx(tmp_path: Path) -> None:
    model = create_model("resnet50_dct24", backbone=("basic", (1, 1)), width=8, num_classes=3, pixels=True).eval()
    certificate = export_onnx(model, torch.randn(2, 3, 32, 32), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
