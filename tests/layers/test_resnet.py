"""ResNet: blocks are what their formulas say, maps lie at strides 4 to 32, batch norms fold away."""

import pytest
import torch
import torch.nn.functional as F

from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.mobile import InvertedResidual
from gossamer.layers.resnet import Basic, Bottleneck, ResNet


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            value.data.uniform_(0.5, 1.5) if "var" in name else value.data.normal_(std=0.3)
    return module.eval()


def apply(part: torch.nn.Module, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    weight, norm = part.conv.weight, part.norm
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_equal_their_formulas_channels_first(stride: int) -> None:
    x = torch.randn(2, 6, 7, 5)
    basic, bottle = drawn(Basic(6, 6, stride=stride)), drawn(Bottleneck(6, 3, stride=stride))
    short = apply(basic.shortcut, x, stride) if stride == 2 else x
    assert (basic.shortcut is None) == (stride == 1)
    want = F.relu(apply(basic.conv2, F.relu(apply(basic.conv1, x, stride))) + short)
    torch.testing.assert_close(basic(x.movedim(1, -1)).movedim(-1, 1), want, atol=1e-5, rtol=1e-5)
    y = F.relu(apply(bottle.conv2, F.relu(apply(bottle.conv1, x)), stride))
    want = F.relu(apply(bottle.conv3, y) + apply(bottle.shortcut, x, stride))
    torch.testing.assert_close(bottle(x.movedim(1, -1)).movedim(-1, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "stride", "out"), [(1, 1, 4), (6, 1, 4), (2, 2, 4), (2, 1, 8)])
def test_an_inverted_residual_equals_its_formula(ratio: int, stride: int, out: int) -> None:
    part, x = drawn(InvertedResidual(4, out, ratio=ratio, stride=stride)), torch.randn(2, 4, 7, 5)
    y = x if ratio == 1 else F.relu6(apply(part.expand, x))
    y = apply(part.project, F.relu6(apply(part.depthwise, y, stride, groups=4 * ratio)))
    want = x + y if stride == 1 and out == 4 else y
    torch.testing.assert_close(part(x.movedim(1, -1)).movedim(-1, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "millions", "dims"), [
    ("resnet18", 11.177, [64, 128, 256, 512]),
    ("resnet50", 23.508, [256, 512, 1024, 2048]),
])  # fmt: skip
def test_the_named_networks_have_their_parameters_and_maps_at_strides_4_to_32(name, millions, dims) -> None:
    with torch.device("meta"):
        net = ResNet(name)
        maps = net(torch.empty(1, 3, 224, 160))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.001)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (224 // s, 160 // s, d) for s, d in zip((4, 8, 16, 32), dims, strict=True)
    ]
    assert (net.dims, net.stride) == (dims, 32)
    with pytest.raises(ValueError, match=r"resnet18, .* got 'resnet19'"):
        ResNet("resnet19")
    with pytest.raises(ValueError, match="1 or even, got 3"):
        ResNet("resnet18", stride=3)


@pytest.mark.parametrize("stride", [None, 1, 2])
def test_folding_leaves_the_maps_and_no_batch_norm(stride: int | None) -> None:
    net = drawn(ResNet(("bottleneck", (1, 1)), width=4, in_chans=1, stride=stride))
    x = torch.randn(2, 1, 24, 16)
    before = net(x)
    assert before[-1].shape[1:3] == (24 // net.stride, 16 // net.stride)
    fold_batch_norm(net)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    for a, b in zip(net(x), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
