"""Few bits: weights are the numbers the papers state, the nearest there are, and the file holds codes."""

import itertools
import math

import pytest
import torch
from torch import nn

import gossamer
from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx, load_weights
from gossamer.layers.coded import Grid, announce_coded, coded_parameters, keep_coded, straight_through
from gossamer.models import create_model
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.passes.low_bits import low_bits
from gossamer.tasks import create_task
from shrink.loading import same_after_loading
from shrink.toys import digits, encoder, learned, texts, vision

KINDS = Grid.KINDS


def small_cnn(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip


def words() -> Calibration:
    """Rows in which every token is the one before and one more, round and round."""
    ids = (torch.arange(12) + torch.arange(64)[:, None]) % 23 + 1
    splits = [Split((ids[:, :-1],), ids[:, 1:]) for _ in range(3)]
    spec = {"vocab_size": 24, "max_len": 11, "pad_id": 0}
    return Calibration(create_task("language-modelling", spec, {}), Dataset("language-modelling", *splits, spec, {}))


def test_ternary_and_binary_weights_have_the_stated_values_and_the_best_alpha():
    weight = torch.randn(6, 5, 3, 3)
    rows = weight.flatten(1)
    for kind in ("ternary", "binary"):
        near = Grid(kind).round(weight).flatten(1)
        signs = near.sign()
        if kind == "ternary":
            assert torch.equal(signs != 0, rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True))
            alpha = [float(r[s != 0].abs().mean()) for r, s in zip(rows, signs, strict=True)]
        else:
            assert (signs != 0).all()
            alpha = rows.abs().mean(1).tolist()
        for row, sign, value, own in zip(rows, signs, near, alpha, strict=True):
            assert torch.equal(sign[sign != 0], row[sign != 0].sign())
            torch.testing.assert_close(value, own * sign)
            tried = torch.linspace(0.5 * own, 1.5 * own, 401)
            errors = (row - tried[:, None] * sign).square().sum(1)
            assert float((row - value).square().sum()) <= float(errors.min()) + 1e-5
    assert float(Grid("binary").round(torch.tensor([[0.0, 2.0]]))[0, 0]) == 1.0


def test_powers_of_two_are_the_nearest_and_two_of_them_are_nearer():
    weight = torch.randn(4, 40) * 3
    weight[1, 3] = 0.0
    near = Grid("power").round(weight)
    some = near[near != 0].abs().log2()
    assert torch.equal(some, some.round())
    for row, value in zip(weight, near, strict=True):
        top = float(value.abs().max())
        allowed = torch.tensor([0.0, *(s * top / 2**k for s in (1, -1) for k in range(7))])
        best = (row[:, None] - allowed).abs().min(1).values
        torch.testing.assert_close((row - value).abs(), best)
    sums = Grid("power2").round(weight)
    assert float((sums - weight).square().sum()) < 0.1 * float((near - weight).square().sum())
    for row, value in zip(weight, sums, strict=True):
        top = 2.0 ** round(math.log2(float(row.abs().max()) / 1.5) + 0.5)
        single = [0.0, *(s * top / 2**k for s in (1, -1) for k in range(7))]
        pairs = torch.tensor([a + b for a, b in itertools.product(single, single)])
        assert float((value[:, None] - pairs).abs().min(1).values.max()) == 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_numbers_err_by_half_a_step_of_their_own_group(bits):
    torch.manual_seed(1)
    weight = torch.randn(3, 300)
    weight[:, 128:256] *= 100
    grid = Grid("int", bits, 128)
    parts = grid.parts(weight)
    assert parts["scale"].shape == (3, 3)
    assert parts["codes"].numel() == 900 * bits // 8
    scale = parts["scale"].float().repeat_interleave(128, 1)[:, :300]
    near = grid.value(parts, weight.shape)
    assert torch.equal((near / scale).round(), (near / scale))
    most = 2 ** (bits - 1) - 1
    inside = weight.abs() <= scale * (most + 0.5)
    assert ((near - weight).abs() <= scale / 2 * 1.001)[inside].all()
    whole = Grid("int", bits, 300).round(weight)
    errors = [float((w - weight)[:, :128].square().sum()) for w in (near, whole)]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_parts_hold_the_weight_and_no_more_bits_than_they_say(kind):
    for shape in ((7, 13), (5, 3, 3, 3), (1, 1)):
        weight = torch.randn(shape)
        grid = Grid(kind, 3, 8)
        parts = grid.parts(weight)
        assert torch.equal(grid.value(parts, weight.shape), grid.round(weight))
        count = weight.numel()
        assert parts["codes"].dtype == torch.uint8
        bits = {"ternary": 1.6, "binary": 1, "power": 4, "power2": 8, "int": 3}[kind]
        assert parts["codes"].numel() == math.ceil(count * bits / 8)
        with pytest.raises(ValueError, match="codes hold"):
            grid.value({**parts, "codes": parts["codes"].repeat(2)}, weight.shape)
    zero = torch.zeros(2, 5)
    assert torch.equal(Grid(kind, 3, 8).round(zero), zero)


def test_the_gradient_passes_straight_through_the_rounding():
    layer = nn.Linear(6, 4)
    grid = Grid("ternary")
    before = layer.weight.detach().clone()
    straight_through(layer, "weight", grid.round)
    x, pull = torch.randn(3, 6), torch.randn(3, 4)
    y = layer(x)
    torch.testing.assert_close(y, x @ grid.round(before).T + layer.bias)
    y.backward(pull)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, pull.T @ x)


@pytest.mark.parametrize("kind", ["ternary", "int"])
@pytest.mark.parametrize("net", ["vit", "cnn"])
def test_trained_straight_through_few_bits_answer_nearly_as_before(kind, net):
    calibration = digits()
    dense = learned(vision() if net == "vit" else small_cnn(), calibration, steps=150)
    setting = {"kind": kind, "bits": 2 if kind == "int" else 4}
    rounded, steps = run_pass("low_bits", dense, calibration, **setting, steps=0)
    trained, _ = run_pass("low_bits", dense, calibration, **setting, steps=60, lr=2e-3)
    for name, module in trained.named_modules():
        if name in {step["part"] for step in steps}:
            rows = module.weight.flatten(1)
            alphas = 1 if kind == "ternary" else -(-rows.shape[1] // 128)
            assert all(len(row[row != 0].abs().unique()) <= alphas for row in rows)
    before, untrained, after = (calibration.score(m) for m in (dense, rounded, trained))
    assert after > untrained
    assert after > before - 0.05


def test_sensitive_layers_get_more_bits_within_the_mean():
    calibration = digits()
    dense = learned(vision(), calibration, steps=100)
    with torch.no_grad():
        dense.blocks[1].mlp.fc2.weight.mul_(1e-4)
    found, steps = run_pass("low_bits", dense, calibration, bits="auto", mean_bits=4, steps=0)
    bits = {step["part"]: step["bits"] for step in steps}
    numel = {name: found.get_submodule(name).weight.numel() for name in bits}
    assert sum(bits[n] * numel[n] for n in bits) <= 4 * sum(numel.values())
    assert bits["blocks.1.mlp.fc2"] == 2
    assert max(bits.values()) > 4

    def error(net):
        x = calibration.example(64)
        with torch.no_grad():
            return float((net(*x) - dense(*x)).square().mean())

    even, _ = run_pass("low_bits", dense, calibration, bits=4, steps=0)
    assert error(found) < error(even)


@pytest.mark.parametrize("kind", ["vit", "swin", "bert", "gpt2"])
def test_shrunk_models_are_small_on_disk_load_in_a_fresh_process_and_export(kind, tmp_path):
    calibration = {"bert": texts, "gpt2": words}.get(kind, digits)()
    if kind == "bert":
        net = encoder()
    elif kind == "vit":
        net = vision()
    elif kind == "gpt2":
        torch.manual_seed(0)
        net = create_model("gpt2", dim=32, depth=2, heads=4, **calibration.data.spec)
    else:
        sizes = {"embed_dim": 16, "depths": (1, 1), "heads": (2, 4), "patch": 2, "window": 2}
        net = create_model("swin_t", **sizes, **calibration.data.spec)
    setting = {"kind": {"vit": "ternary", "swin": "power", "bert": "binary", "gpt2": "int"}[kind]}
    low, steps = run_pass("low_bits", net.eval(), calibration, **setting, steps=2)
    assert len(steps) >= 8
    gossamer.save(low, tmp_path / "small")
    gossamer.save(net, tmp_path / "large")
    state = load_weights(tmp_path / "small" / "model.safetensors")
    floats = sum(4 * low.get_submodule(step["part"]).weight.numel() for step in steps)
    codes = sum(v.numel() * v.element_size() for k, v in state.items() if k.endswith(("weight_codes", "weight_scale")))
    assert codes < floats * (Grid(**setting).code_bits / 32 + 0.05)
    assert not any(f"{step['part']}.weight" in state for step in steps)
    saved = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("large", "small")]
    assert saved[0] - saved[1] > 0.7 * floats
    x = calibration.example(3)
    same_after_loading(low, x, tmp_path)
    assert export_onnx(low, x, tmp_path / "m.onnx", exporter="fast", input_names=["x"]).passed


def test_a_weight_that_was_changed_since_is_stored_whole():
    net = nn.Sequential(nn.Linear(8, 8))
    keep_coded(net, "0", "weight", Grid("binary"))
    assert "0.weight" not in net.state_dict()
    assert set(coded_parameters(net)) == {"0.weight"}
    other = nn.Sequential(nn.Linear(8, 8))
    announce_coded(other, "0", "weight", Grid("binary"))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other[0].weight, net[0].weight)
    assert not other[0].weight.requires_grad
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    whole = net.state_dict()
    assert torch.equal(whole["0.weight"], net[0].weight)
    other.load_state_dict(whole)
    assert torch.equal(other[0].weight, net[0].weight)
    broken = {
        "0.weight_codes": torch.zeros(3, dtype=torch.uint8),
        "0.weight_scale": torch.ones(8),
        "0.bias": net[0].bias,
    }
    with pytest.raises(RuntimeError, match=r"0.weight cannot be decoded: codes hold"):
        other.load_state_dict(broken)


def test_settings_out_of_range_and_models_without_products_are_refused_and_left_alone():
    calibration = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(Unsupported, match="no product"):
        low_bits(net, calibration)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for wrong, word in (
        ({"bits": 9}, "bits must be in 2"),
        ({"bits": "auto", "kind": "ternary"}, "kind='int' alone"),
        ({"bits": "auto", "mean_bits": 1.0}, "mean_bits must be in"),
        ({"group": 0}, "group must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
    ):
        with pytest.raises(ValueError, match=word):
            low_bits(vision(), calibration, **wrong)
    with pytest.raises(ValueError, match="kind must be one of"):
        Grid("quaternary")
    low, _ = run_pass("low_bits", vision().eval(), calibration, steps=0)
    with pytest.raises(Unsupported, match="in few bits already"):
        run_pass("low_bits", low, calibration, steps=0)
    with pytest.raises(Unsupported, match="states a pruning rule"):
        run_pass("magnitude", low, calibration)
