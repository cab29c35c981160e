"""GPUSQ-ViT: two of four stay two of four, packing loses nothing, rounding is what it says, the teacher helps."""

import itertools

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from gossamer.io import export_onnx, quantize_onnx
from gossamer.layers.sparse_quant import (
    SparseQuantLinear,
    SparseTrainingLinear,
    best_places,
    fake_quantise,
    is_two_of_four,
    pack,
    stored_bits,
    two_of_four,
    unpack,
    weighted_macs,
)
from gossamer.measure.parameters import weight_bytes
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.gpusq_vit import Distillation, gpusq_vit, importance, sparse_layers
from gossamer.train.trainer import model_outputs
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision


def parts(net: nn.Module) -> dict[str, SparseQuantLinear]:
    return {name: part for name, part in net.named_modules() if isinstance(part, SparseQuantLinear)}


def test_the_kept_two_of_four_are_the_best_of_all_six_patterns():
    weight = torch.randn(5, 16)
    weight[0, :4] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    kept = (weight.abs() * two_of_four(weight)).unflatten(1, (-1, 4)).sum(-1)
    patterns = [weight.abs().unflatten(1, (-1, 4))[..., list(p)].sum(-1) for p in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(kept, torch.stack(patterns).amax(0))
    assert two_of_four(weight)[0, :4].tolist() == [True, True, False, False]
    pairs = weight.unflatten(1, (-1, 4, 2)).square().sum(-1)
    kept = (weight * two_of_four(weight, paired=True)).square().unflatten(1, (-1, 8)).sum(-1)
    patterns = [pairs[..., list(p)].sum(-1) for p in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(kept, torch.stack(patterns).amax(0))
    assert not is_two_of_four(weight)
    assert is_two_of_four(weight * two_of_four(weight))


@pytest.mark.parametrize("paired", [False, True])
def test_packing_loses_nothing_even_where_kept_codes_are_zero(paired):
    codes = torch.randint(-3, 4, (6, 24), dtype=torch.int8)
    codes = codes * two_of_four(codes.float(), paired=paired)
    values, places = pack(codes, paired=paired)
    assert values.shape == (6, 12)
    assert len(places) == 6 * 24 // (16 if paired else 8)
    assert torch.equal(unpack(values, places, paired=paired), codes)
    with pytest.raises(ValueError, match="two of every four"):
        pack(torch.ones(2, 8))
    with pytest.raises(ValueError, match="multiple of 8"):
        best_places(torch.ones(2, 12), paired=True)


def test_rounding_errs_by_half_a_step_keeps_zero_and_is_done_once():
    x = torch.linspace(-1, 1, 201).requires_grad_()
    for bits in (4, 8):
        scale = torch.tensor(0.8 / (2 ** (bits - 1) - 1))
        y = fake_quantise(x, scale, bits)
        inside = x.detach().abs() <= 0.8
        assert ((y - x).abs()[inside] <= scale / 2 + 1e-6).all()
        assert float(fake_quantise(torch.zeros(1), scale, bits)) == 0
        torch.testing.assert_close(fake_quantise(y, scale, bits), y)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, inside.float())
    assert fake_quantise(x, torch.tensor(0.1), 32) is x
    with pytest.raises(ValueError, match="bits must be one of"):
        SparseQuantLinear(8, 8, bits=6)
    with pytest.raises(ValueError, match="multiple of 4"):
        SparseQuantLinear(6, 8)


@pytest.mark.parametrize(("bits", "paired"), [(8, False), (4, True), (4, False), (32, False)])
def test_pattern_and_grid_hold_through_training_storing_and_loading(bits, paired):
    torch.manual_seed(0)
    layer = SparseTrainingLinear(nn.Linear(32, 24), paired=paired)
    x, target = torch.randn(64, 32), torch.randn(64, 24)
    if bits < 32:
        layer.quantise(bits, x.flatten())
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert (layer.weight.grad[~layer.mask] == 0).all()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    kept = layer.stored(input_bits=bits)
    assert is_two_of_four(kept.weight, paired=paired)
    # In floats exactly two of every four; what is then rounded to zero is zero in its place.
    for pattern in (layer.mask, *([kept.weight != 0] if bits == 32 else [])):
        assert (pattern.unflatten(1, (-1, 4, 2 if paired else 1)).any(-1).sum(-1) == 2).all()
    assert not kept.weight[~layer.mask].any()
    torch.testing.assert_close(kept(x), layer(x), atol=1e-5, rtol=1e-5)
    again = SparseQuantLinear(32, 24, bits=bits, paired=paired, input_bits=bits)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again.weight, kept.weight)
    assert torch.equal(again(x), kept(x))
    # Scales of the rows, one of the inputs and the bias are stored beside the codes.
    assert weight_bytes(kept) == kept.stored_bits() / 8 + 4 * (24 * (bits < 32) + 1 + 24)
    if bits < 32:
        with torch.no_grad():
            kept.weight.add_(kept.weight_scale[:, None] * 0.3)
        with pytest.raises(ValueError, match="no longer on its grid"):
            kept.state_dict()


def test_weights_of_deit_small_are_smaller_by_what_the_paper_says():
    with torch.device("meta"):
        net = create_model("deit_small_patch16_224")
    weights = sum(p.numel() for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2)
    assert 32 * weights / stored_bits(weights, 8) == pytest.approx(6.4, rel=0.01)
    assert 32 * weights / stored_bits(weights, 4, paired=True) == pytest.approx(12.8, rel=0.01)
    assert weighted_macs(3200, 8) == 100
    assert weighted_macs(6400, 4) == 100
    with pytest.raises(ValueError, match="factors must say"):
        weighted_macs(1, 6)


@pytest.mark.parametrize(("bits", "paired", "times", "whole"), [(8, False, 6.4, 5.2), (4, True, 12.8, 8.6)])
def test_a_whole_deit_small_is_smaller_by_exactly_what_is_packed(bits, paired, times, whole):
    net = create_model("deit_small_patch16_224", depth=1)
    layers = {n: p for n, p in net.named_modules() if type(p) is nn.Linear and n.startswith("blocks.")}
    before, dense = weight_bytes(net), sum(4 * p.weight.numel() for p in layers.values())
    for name in layers:
        how = {"bits": bits, "paired": paired, "input_bits": 32}
        recipe.apply(net, {"step": "gpusq_vit.sparse", "part": name, **how})
    state = net.state_dict()
    packed = sum(t.numel() * t.element_size() for n, t in state.items() if n.endswith((".values", ".places")))
    scales = sum(4 * (p.out_features + 1) for p in layers.values())
    assert dense / packed == pytest.approx(times, rel=0.01)
    assert weight_bytes(net) == before - dense + packed + scales
    with torch.device("meta"):
        full = weight_bytes(create_model("deit_small_patch16_224"))
    assert whole < full / (full - 12 * (dense - packed - scales)) < times


def test_without_the_hard_loss_no_label_is_read():
    calibration, net = texts(), encoder().eval()
    swapped = texts()
    swapped.data.train.targets = 1 - swapped.data.train.targets
    for hard, same in ((0.0, True), (1.0, False)):
        states = [
            run_pass("gpusq_vit", net, c, hard=hard, steps=3, lr=1e-3)[0].state_dict() for c in (calibration, swapped)
        ]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()) == same
    assert not torch.equal(states[0]["blocks.0.norm1.weight"], net.state_dict()["blocks.0.norm1.weight"])


def test_a_student_like_its_teacher_has_the_hard_loss_alone_and_none_without_labels():
    net, calibration = encoder().eval(), texts()
    inputs, target = next(iter(calibration.batches(16)))
    for hard, weighted in ((1.0, False), (0.0, True)):
        loss = Distillation(net, encoder().eval(), calibration, hard=hard, soft=10, features=5, weighted=weighted)
        loss.teacher.load_state_dict(net.state_dict())
        with loss.watching():
            want = hard * float(calibration.loss(net, inputs, target).detach())
            assert float(loss(net, inputs, target).detach()) == pytest.approx(want, abs=1e-5)


def test_blocks_that_are_hurt_most_weigh_most():
    weights = importance(torch.tensor([1.0, 3.0, 0.0]))
    assert float(weights.mean()) == pytest.approx(1.0)
    assert torch.equal(importance(torch.zeros(3)), torch.ones(3))
    net, calibration = vision(depth=3).eval(), digits()
    loss = Distillation(net, vision(depth=3).eval(), calibration, hard=0, soft=0, features=1, weighted=True)
    with torch.no_grad():
        for p in net.blocks[1].mlp.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    inputs, target = next(iter(calibration.batches(16)))
    with loss.watching():
        loss(net, inputs, target)
    assert loss.weights.argmin() == 0
    assert float(loss.weights.mean()) == pytest.approx(1.0)
    assert (loss.weights >= 0).all()
    assert loss.weights[1] > 1


def test_with_its_teacher_a_sparse_rounded_network_is_near_the_dense_one():
    calibration = digits()
    net = learned(vision(), calibration, steps=150)
    dense = calibration.score(net)
    untrained, _ = run_pass("gpusq_vit", net, calibration, steps=0)
    trained, _ = run_pass("gpusq_vit", net, calibration, steps=120, lr=1e-3, inputs="int")
    assert all(is_two_of_four(part.weight) for part in parts(trained).values())
    assert calibration.score(trained) > dense - 0.04
    assert calibration.score(trained) > calibration.score(untrained) + 0.03
    with torch.no_grad():
        want, _ = model_outputs(net, calibration.task, calibration.data.val)
        errors = [
            float((model_outputs(m, calibration.task, calibration.data.val)[0] - want).square().mean())
            for m in (untrained, trained)
        ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", ["vit", "swin", "bert"])
def test_shrunk_models_load_in_a_fresh_process_export_and_become_int8_files(kind, tmp_path):
    calibration = texts() if kind == "bert" else digits()
    if kind == "bert":
        net = encoder()
    elif kind == "vit":
        net = vision()
    else:
        sizes = {"embed_dim": 16, "depths": (2, 2), "heads": (2, 4), "patch": 1, "window": 4}
        net = create_model("swin_t", **sizes, **calibration.data.spec)
    low, steps = run_pass("gpusq_vit", net.eval(), calibration, bits=4 if kind == "bert" else 8, steps=2)
    assert {step["part"] for step in steps} == set(sparse_layers(net, calibration))
    assert ("merges.0.reduction" in parts(low)) == (kind == "swin")
    dense = sum(4 * part.weight.numel() for part in parts(low).values())
    saved = weight_bytes(net) - weight_bytes(low)
    assert saved > (0.85 if kind == "bert" else 0.75) * dense
    x = calibration.example(3)
    same_after_loading(low, x, tmp_path)
    assert export_onnx(low, x, tmp_path / "m.onnx", exporter="fast", input_names=["x"]).passed
    if kind == "vit":
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "int8.onnx", mode="dynamic")
        graph = onnx.load(tmp_path / "int8.onnx").graph
        codes = [numpy_helper.to_array(t) for t in graph.initializer]
        wide = [c for c in codes if c.dtype == "int8" and c.ndim == 2]
        halves = [c for c in wide if any(is_two_of_four(torch.from_numpy(t.copy())) for t in (c, c.T))]
        assert len(halves) == len(parts(low))


def test_what_cannot_be_pruned_is_left_as_it_was_and_later_pruning_finds_no_width():
    calibration = texts()
    odd = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 10)).eval()
    refuses("gpusq_vit", odd, digits(), "no linear layer of Sequential has a multiple of 4 inputs", steps=0)
    pairs = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10)).eval()
    refuses("gpusq_vit", pairs, digits(), "has a multiple of 8 inputs", steps=0, bits=4)
    low, _ = run_pass("gpusq_vit", encoder().eval(), calibration, steps=0, bits=32)
    with pytest.raises(Unsupported, match="states a pruning rule"):
        run_pass("magnitude", low, calibration)
    net = encoder()
    for wrong, message in (
        ({"soft": -1.0}, "soft must be at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"bits": 6}, "bits must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            gpusq_vit(net, calibration, **wrong)
    assert not parts(net)


def test_a_module_of_somebody_else_is_pruned_and_rounded_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))
    low, steps = run_pass("gpusq_vit", net.eval(), digits(), steps=2)
    assert [step["part"] for step in steps] == ["3"]
    assert is_two_of_four(low[3].weight)
