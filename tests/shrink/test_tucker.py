"""Chains of convolutions: exact at full rank, never worse with a higher one, and as cheap as they are said to be."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers.conv import Conv
from gossamer.layers.tucker import (
    CpConv,
    Spaces,
    TuckerConv,
    cp_factors,
    fill,
    kernel,
    separable_factors,
    separable_share,
)
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.tucker import tucker
from shrink.loading import same_after_loading
from shrink.toys import digits, learned, vision


def tucker_of(conv: nn.Module, rank_in: int, rank_out: int) -> TuckerConv:
    new = TuckerConv(conv, rank_in, rank_out)
    fill(new, conv, *Spaces(kernel(conv)).factors(rank_in, rank_out))
    return new


def cp_of(conv: nn.Module, rank: int) -> CpConv:
    new = CpConv(conv, rank)
    last, mix, places = cp_factors(kernel(conv), rank)
    fill(new, conv, mix.T, places.T, last)
    return new


def separable_of(conv: nn.Module) -> CpConv:
    new = CpConv(conv, None)
    core, last = separable_factors(kernel(conv))
    fill(new, conv, None, core, last)
    return new


CONVS = {
    "2-d": (lambda: nn.Conv2d(6, 9, 3, padding=1), (2, 6, 7, 5)),
    "stride and dilation": (lambda: nn.Conv2d(5, 4, (3, 2), stride=2, padding=(2, 0), dilation=2), (2, 5, 9, 8)),
    "1-d, reflected": (lambda: nn.Conv1d(4, 7, 5, padding=2, padding_mode="reflect", bias=False), (2, 4, 11)),
    "3-d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 4)),
    "channels last": (lambda: Conv(6, 8, 3), (2, 5, 6, 6)),
}


@pytest.mark.parametrize("name", CONVS)
def test_at_full_rank_tucker_and_cp_give_the_convolution_itself(name):
    make, shape = CONVS[name]
    torch.manual_seed(0)
    conv, x = make(), torch.randn(shape)
    out, inputs, places = kernel(conv).shape
    full = min(out * inputs, out * places, inputs * places)
    with torch.no_grad():
        want = conv(x)
        torch.testing.assert_close(tucker_of(conv, inputs, out)(x), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cp_of(conv, full)(x), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cp_of(conv, full + 2)(x), want, atol=1e-4, rtol=1e-4)


def test_the_error_falls_with_every_rank_and_is_that_of_the_directions_left_out():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 10, 3)
    weight = kernel(conv).double()
    spaces = Spaces(weight)

    def error(rank_in, rank_out):
        first, core, last = spaces.factors(rank_in, rank_out)
        return float((weight - torch.einsum("qi,rqs,or->ois", first, core, last)).square().sum())

    for rank_out in (3, 10):
        errors = [error(r, rank_out) for r in range(1, 9)]
        assert all(a > b - 1e-12 for a, b in pairwise(errors))
    errors = [error(8, r) for r in range(1, 11)]
    assert all(a > b for a, b in pairwise(errors))
    # With the inputs whole it is the truncated singular value decomposition of the outputs' unfolding.
    singular = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close(
        torch.tensor(errors[:9]), torch.stack([singular[r:].square().sum() for r in range(1, 10)]).float()
    )
    for share in (0.3, 0.8, 0.99, 1.0):
        rank_in, rank_out = spaces.ranks(share)
        held = singular.square().cumsum(0) / singular.square().sum()
        assert held[rank_out - 1] >= share - 1e-9
        assert rank_out == 1 or held[rank_out - 2] < share
        assert error(rank_in, rank_out) <= 2 * (1 - share) * float(weight.square().sum()) + 1e-9


def test_cp_never_gets_worse_with_more_components_and_finds_what_there_is():
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 9, dtype=torch.float64)
    errors = []
    for rank in (1, 2, 4, 8, 16, 32, 48):
        a, b, c = cp_factors(weight, rank)
        assert a.shape == (8, rank)
        errors.append(float((weight - torch.einsum("or,ir,sr->ois", a, b, c)).square().sum()))
    assert all(a >= b for a, b in pairwise(errors))
    assert errors[-1] < 1e-20
    assert errors[3] < 0.6 * errors[0]
    parts = [torch.randn(n, 2, dtype=torch.float64) for n in (8, 6, 9)]
    made = torch.einsum("or,ir,sr->ois", *parts)
    a, b, c = cp_factors(made, 2)
    assert float((made - torch.einsum("or,ir,sr->ois", a, b, c)).square().sum()) < 1e-3 * float(made.square().sum())


@pytest.mark.parametrize(("out", "inputs", "size", "stride"), [(16, 8, 3, 1), (32, 5, 5, 2), (7, 12, 3, 1)])
def test_a_separable_swap_has_exactly_the_stated_share_of_multiply_adds(out, inputs, size, stride):
    conv = nn.Conv2d(inputs, out, size, padding=size // 2, stride=stride, bias=False)
    x = torch.randn(1, inputs, 12, 12)
    new = separable_of(conv)
    before, after = macs(conv, x).total, macs(new, x).total
    assert after * out * size**2 == before * (size**2 + out)
    assert separable_share(conv) == pytest.approx(1 / out + 1 / size**2)
    with torch.no_grad():
        assert new(x).shape == conv(x).shape


def test_the_separable_swap_is_the_nearest_there_is_and_exact_where_one_exists():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    weight = kernel(conv).double()
    core, last = separable_factors(weight)
    near = torch.einsum("is,oi->ois", core, last)
    for i in range(4):
        lost = float((weight[:, i] - near[:, i]).square().sum())
        assert lost == pytest.approx(float(torch.linalg.svdvals(weight[:, i])[1:].square().sum()))
    with torch.no_grad():
        conv.weight.copy_(near.view_as(conv.weight))
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(separable_of(conv)(x), conv(x), atol=1e-5, rtol=1e-5)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["tucker", "cp", "separable"])
def test_a_trained_network_of_convolutions_keeps_its_answers_with_fewer_multiply_adds(kind):
    calibration = digits()
    net = learned(cnn(), calibration, steps=120)
    training = {"steps": 150, "lr": 3e-3} if kind == "separable" else {"steps": 60, "lr": 1e-3}
    small, steps = run_pass("tucker", net, calibration, kind=kind, keep=0.5, **training)
    assert [step["part"] for step in steps] == ["2", "4"]
    x = calibration.example()
    middle = [sum(macs(n, x, per_layer=True).by_module[part] for part in ("2", "4")) for n in (net, small)]
    assert middle[1] <= 0.5 * middle[0]
    if kind == "separable":
        share = (16 * 32 * 9 * 16 * (1 / 32 + 1 / 9) + 32 * 32 * 9 * 16 * (1 / 32 + 1 / 9)) / middle[0]
        assert middle[1] == pytest.approx(share * middle[0])
    assert calibration.score(small) > calibration.score(net) - 0.03


def test_more_energy_is_more_of_the_answer():
    calibration = digits()
    net = learned(cnn(), calibration, steps=60)
    x = calibration.example(32)
    errors = []
    for energy in (0.5, 0.7, 0.85):
        small, _ = run_pass("tucker", net, calibration, energy=energy, steps=0)
        with torch.no_grad():
            errors.append(float((small(*x) - net(*x)).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["vit tucker", "vit cp", "vit stem", "efficientformer"])
def test_transformers_shrink_load_in_a_fresh_process_and_export(kind, tmp_path):
    calibration = digits()
    if kind == "efficientformer":
        sizes = {"widths": (16, 24, 32, 48), "depths": (1, 1, 1, 1), "attention_blocks": 1}
        net = create_model("efficientformer_l1", **sizes, **{**calibration.data.spec}).eval()
        setting = {"keep": 0.6}
    elif kind == "vit stem":
        net, setting = vision(in_chans=1, dim=32).eval(), {"kind": "separable", "submodules": ["stem"]}
    else:
        net, setting = vision().eval(), {"kind": kind.split()[1], "keep": 0.5}
    small, steps = run_pass("tucker", net, calibration, **setting, steps=1)
    assert any(step["step"] == "tucker.chain" for step in steps)
    x = calibration.example(3)
    before, after = (macs(n, x).total for n in (net, small))
    assert after < before
    same_after_loading(small, x, tmp_path)
    assert export_onnx(small, x, tmp_path / "m.onnx", exporter="fast", input_names=["x"]).passed


def test_what_has_no_cheaper_chain_is_said_and_left_as_it_was():
    calibration = digits()
    net = vision().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(Unsupported, match=r"no product|fewer multiply-adds as a separable"):
        tucker(net, calibration, kind="separable", steps=0)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not getattr(net, "recipe", [])
    for wrong, word in (({"keep": 0.0}, "keep"), ({"energy": 1.5}, "energy"), ({"kind": "cp", "energy": 0.5}, "alone")):
        with pytest.raises(ValueError, match=word):
            tucker(net, calibration, **wrong)
    for make in (lambda: TuckerConv(nn.Conv2d(4, 4, 3, groups=2), 1, 1), lambda: CpConv(nn.Linear(3, 3), 2)):
        with pytest.raises(ValueError, match="without groups"):
            make()
    with pytest.raises(ValueError, match="rank_in must be in 1"):
        TuckerConv(nn.Conv2d(4, 4, 3), 5, 1)
