"""DSFormer: factors stand for the matrix, the solver beats low rank where rows differ, storage is as reported."""

import itertools

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx, save_weights
from gossamer.layers import Block
from gossamer.layers.dense_sparse import (
    DenseSparseLinear,
    StraightThroughLinear,
    pack_bits,
    pursue,
    solve,
    solve_config,
    turns,
    unpack_bits,
)
from gossamer.measure.parameters import weight_bytes
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.dsformer import dsformer
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision


def subspaces(rows: int = 512, width: int = 64, spaces: int = 8, dim: int = 4) -> torch.Tensor:
    """Rows from a union of random low-dimensional subspaces, rescaled to length about 1."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(spaces, dim, width, generator=generator)
    mix = torch.randn(spaces, rows // spaces, dim, generator=generator)
    return (mix @ bases).flatten(0, 1) / width**0.5


def parts(net: nn.Module) -> dict[str, DenseSparseLinear]:
    return {name: part for name, part in net.named_modules() if isinstance(part, DenseSparseLinear)}


@pytest.mark.parametrize(("inputs", "group"), [(24, 8), (21, 8), (24, 24)])
def test_the_factorised_product_is_that_of_the_matrix_it_stands_for(inputs, group):
    layer = DenseSparseLinear(inputs, 10, group=group, basis=5, nonzeros=2)
    weight = torch.randn(10, inputs)
    layer.set_factors(*solve(weight, group=group, basis=5, nonzeros=2, rounds=2))
    naive = torch.zeros(10, -(-inputs // group) * group)
    for g, o, j in itertools.product(range(layer.basis.shape[0]), range(10), range(2)):
        place = int(layer.columns[g, o, j])
        naive[o, g * group : (g + 1) * group] += layer.values[g, o, j].detach() * layer.basis[g, place].detach()
    torch.testing.assert_close(layer.to_dense(), naive[:, :inputs], atol=1e-6, rtol=1e-5)
    for x in (torch.randn(3, inputs), torch.randn(2, 4, inputs)):
        torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias, atol=1e-5, rtol=1e-5)


def test_all_coefficients_of_one_group_are_the_truncated_singular_value_decomposition():
    weight = torch.randn(40, 24)
    for rank in (3, 10):
        vectors, coefficients = solve(weight, group=24, basis=rank, nonzeros=rank)
        error = (weight - coefficients[0] @ vectors[0]).norm()
        want = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
        torch.testing.assert_close(error, want, atol=0, rtol=1e-4)


def test_rows_of_different_subspaces_are_fitted_more_than_twice_as_well_as_by_low_rank():
    weight = subspaces()
    vectors, coefficients = solve(weight, group=64, basis=32, nonzeros=4, rounds=20)
    assert ((coefficients != 0).sum(-1) <= 4).all()
    error = float((weight - coefficients[0] @ vectors[0]).norm() / weight.norm())
    # 32 * 64 + 512 * 4 numbers and 512 * 4 places of 5 bits are those of rank 7.
    low = float(torch.linalg.svdvals(weight)[7:].square().sum().sqrt() / weight.norm())
    assert error < 0.25
    assert low > 2 * error


def test_matching_pursuit_of_one_number_is_the_best_and_of_two_is_near_brute_force():
    weight, vectors = torch.randn(30, 6), torch.randn(7, 6)

    def fit(row, chosen):
        atoms = vectors[list(chosen)]
        return float((row - torch.linalg.lstsq(atoms.T, row[:, None]).solution[:, 0] @ atoms).square().sum())

    for count, slack in ((1, 1.0), (2, 1.3)):
        found = pursue(weight, vectors, count)
        assert ((found != 0).sum(1) == count).all()
        errors = (weight - found @ vectors).square().sum(1)
        best = torch.tensor([min(fit(w, c) for c in itertools.combinations(range(7), count)) for w in weight])
        assert (errors >= best - 1e-4).all()
        assert float(errors.sum()) <= slack * float(best.sum()) + 1e-3


def test_least_squares_never_loses_and_the_best_pair_is_kept():
    weight = subspaces()[::4]
    errors = [
        float((weight - s @ d).square().sum()) for d, s in turns(weight, 16, 3, 6, torch.Generator().manual_seed(0))
    ]
    assert all(fitted <= pursued * (1 + 1e-5) for pursued, fitted in zip(errors[::2], errors[1::2], strict=True))
    vectors, coefficients = solve(weight, group=64, basis=16, nonzeros=3, rounds=6)
    assert float((weight - coefficients[0] @ vectors[0]).square().sum()) == pytest.approx(min(errors), rel=1e-4)


def test_rows_keep_their_number_and_what_is_left_out_is_still_trained():
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    vectors, coefficients = solve(weight, group=8, basis=6, nonzeros=2, rounds=2)
    layer = StraightThroughLinear(16, vectors, coefficients, 2, nn.Parameter(torch.zeros(12)))
    target, x = torch.randn(64, 12), torch.randn(64, 16)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    before = layer.coefficients() != 0
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert (layer.latent.grad[~(layer.coefficients() != 0)] != 0).any()
        optimiser.step()
        used = layer.coefficients() != 0
        assert (used.sum(-1) == 2).all()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert (used != before).any()
    torch.testing.assert_close(layer.stored()(x), layer(x), atol=1e-5, rtol=1e-5)


def test_straight_through_training_wins_more_back_than_training_with_the_places_frozen():
    calibration = digits()
    net = learned(vision(), calibration, steps=100)
    with torch.no_grad():
        inputs, _ = calibration.task.batch(calibration.data.val, torch.arange(128))
        taught = net(*inputs)
    settings = {"group": 32, "basis": 16, "nonzeros": 2, "rounds": 3}

    def distance(model):
        with torch.no_grad():
            return float((model(*inputs) - taught).square().mean())

    frozen, _ = run_pass("dsformer", net, calibration, steps=0, **settings)
    untrained = distance(frozen)
    calibration.trainer(frozen, teacher=net, lr=3e-3, ema=0.0).train(steps=60, schedule="linear")
    through, _ = run_pass("dsformer", net, calibration, steps=60, lr=3e-3, **settings)
    assert distance(through) < distance(frozen.eval()) < untrained


def test_packed_numbers_come_back_and_take_the_bits_they_need():
    for bits in (1, 3, 5, 8, 11):
        numbers = torch.randint(0, 2**bits, (37,))
        packed = pack_bits(numbers, bits)
        assert len(packed) == -(-37 * bits // 8)
        assert torch.equal(unpack_bits(packed, bits, 37), numbers)


def test_the_bits_reported_are_the_bytes_on_disk(tmp_path):
    layer = DenseSparseLinear(256, 512, group=64, basis=32, nonzeros=8, bias=False)
    save_weights(layer.state_dict(), tmp_path / "w.safetensors")
    size = (tmp_path / "w.safetensors").stat().st_size
    assert layer.stored_bits() == 4 * (32 * 32 * 64 + 512 * 8 * (32 + 5))
    assert size == pytest.approx(layer.stored_bits() / 8, rel=0.01)
    assert size == pytest.approx(weight_bytes(layer), rel=0.01)


def test_sizes_are_found_for_a_ratio():
    weight = subspaces(spaces=16)
    for ratio in (2.0, 3.57):
        sizes = solve_config(weight, ratio)
        layer = DenseSparseLinear(64, 512, bias=False, **sizes)
        assert 0.7 * 32 * weight.numel() / ratio < layer.stored_bits() <= 32 * weight.numel() / ratio
    assert solve_config(torch.randn(2, 2), 10.0) is None
    with pytest.raises(ValueError, match="ratio must be above 1"):
        solve_config(weight, 1.0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group": 8, "basis": 4, "nonzeros": 5}, "nonzeros must be in"),
        ({"group": 8, "basis": 0, "nonzeros": 1}, "basis must be at least 1"),
        ({"group": 17, "basis": 4, "nonzeros": 1}, "group must be in"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        DenseSparseLinear(16, 8, **sizes)
    if sizes["group"] <= 16:
        with pytest.raises(ValueError, match="basis"):
            dsformer(encoder(), texts(), **sizes)


@pytest.mark.parametrize("kind", ["bert", "vit", "swin"])
def test_shrunk_models_are_smaller_on_disk_load_in_a_fresh_process_and_export(kind, tmp_path):
    calibration = texts() if kind == "bert" else digits()
    if kind == "bert":
        net = encoder(dim=64, hidden=256)
    elif kind == "vit":
        net = vision(dim=64)
    else:
        sizes = {"embed_dim": 32, "depths": (2, 2), "heads": (2, 4), "patch": 1, "window": 4}
        net = create_model("swin_t", **sizes, **calibration.data.spec)
    low, steps = run_pass("dsformer", net.eval(), calibration, keep=0.5, rounds=2, steps=2)
    dense = {name: net.get_submodule(name).weight.numel() * 4 for name in parts(low)}
    assert {step["part"] for step in steps} == set(dense)
    packed = sum(part.stored_bits() / 8 for part in parts(low).values())
    assert 0.35 < packed / sum(dense.values()) <= 0.5
    x = calibration.example(3)
    same_after_loading(low, x, tmp_path)
    save_weights(net.state_dict(), tmp_path / "dense.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("m/model.safetensors", "dense.safetensors")]
    assert sizes[0] < sizes[1] - 0.45 * sum(dense.values())
    assert export_onnx(low, x, tmp_path / "m.onnx", exporter="fast").passed


def test_weights_of_other_sizes_or_without_places_are_refused():
    layer = DenseSparseLinear(16, 8, group=8, basis=4, nonzeros=2)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "index"})
    with pytest.raises(RuntimeError, match="index holds"):
        layer.load_state_dict({**state, "index": state["index"][:3]})


def test_what_cannot_be_smaller_is_left_as_it_was_and_keeping_all_changes_nothing():
    net, calibration = encoder(dim=8, heads=2, hidden=8).eval(), texts()
    said = r"no linear layer of blocks\.0\.mixer\.qkv … blocks\.1\.mlp\.fc2 would be smaller"
    refuses("dsformer", net, calibration, said, keep=0.1)
    pooling = nn.Sequential(
        nn.Flatten(2),
        Block(64, create_mixer("pool", 64), None),
        nn.Linear(64, 16),
        nn.Linear(16, 16),
        nn.Linear(16, 10),
    )
    refuses("dsformer", pooling.eval(), digits(), "residual blocks of Sequential have no linear layers")
    same, steps = run_pass("dsformer", net, calibration, keep=1.0)
    assert steps == []
    x = calibration.example(2)
    assert torch.equal(same(*x), net(*x))
    low, _ = run_pass("dsformer", encoder().eval(), calibration, keep=0.6, rounds=1, steps=0)
    with pytest.raises(Unsupported, match="states a pruning rule"):
        run_pass("magnitude", low, calibration)
