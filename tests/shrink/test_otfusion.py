"""Optimal-transport fusion against the authors' code, exact permutations and plain averages."""

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.measure import parameters
from gossamer.models import create_model
from gossamer.ops.transport import exact_plan, sinkhorn_plan
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.otfusion import Fusion, Record, _Alignment, align, ground_cost
from official import GOLDEN, seeded_input, seeded_state
from shrink.loading import same_after_loading
from shrink.toys import digits, encoder, learned, texts, vision


def permuted(model, seed=3):
    """The same function with its stream, its hidden units and its heads' units in another order."""
    g = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    state = twin.state_dict()
    dim = model.blocks[0].mixer.dim
    stream = torch.randperm(dim, generator=g)
    for key, value in state.items():
        if key.startswith("blocks."):
            continue
        if not key.startswith("head."):
            state[key] = value[stream] if value.ndim in (1, 4) else value[..., stream]
        elif value.ndim == 2 and (key != "head.fc.weight" or "head.dense.weight" not in state):
            state[key] = value[:, stream]
    if "head.dense.weight" in state:
        inner = torch.randperm(dim, generator=g)
        state["head.dense.weight"] = state["head.dense.weight"][inner]
        state["head.dense.bias"] = state["head.dense.bias"][inner]
        state["head.fc.weight"] = state["head.fc.weight"][:, inner]
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}."
        own = {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}
        width, heads = block.mixer.head_dim, block.mixer.heads
        order = torch.cat([h * width + torch.randperm(width, generator=g) for h in torch.randperm(heads, generator=g)])
        rows = torch.cat([order + k * width * heads for k in range(3)])
        hidden = torch.randperm(block.mlp.fc1.out_features, generator=g)
        own["mixer.qkv.weight"] = own["mixer.qkv.weight"][rows][:, stream]
        own["mixer.qkv.bias"] = own["mixer.qkv.bias"][rows]
        own["mixer.proj.weight"] = own["mixer.proj.weight"][stream][:, order]
        own["mlp.fc1.weight"] = own["mlp.fc1.weight"][hidden][:, stream]
        own["mlp.fc1.bias"] = own["mlp.fc1.bias"][hidden]
        own["mlp.fc2.weight"] = own["mlp.fc2.weight"][stream][:, hidden]
        for key in own:
            if key.startswith(("norm", "scale")) or key in ("mixer.proj.bias", "mlp.fc2.bias"):
                own[key] = own[key][stream]
        state |= {at + k: v for k, v in own.items()}
    twin.load_state_dict(state)
    return twin.eval()


def random_encoder(**settings):
    return noisy(encoder(**settings))


def random_vision(**settings):
    return noisy(vision(**settings))


def noisy(model):
    """No parameter is zero or constant, so that every unit is another."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


MODELS = {
    "vit": lambda: random_vision(depth=2),
    "deit3": lambda: random_vision(depth=2, layer_scale=0.5, position_tokens=False),
    "distilled": lambda: random_vision(depth=2, distilled=True),
    "bert": lambda: random_encoder(),
    "sentences": lambda: random_encoder(num_classes=0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cost", ["activations", "weights"])
def test_a_permuted_copy_is_found_again_where_a_plain_average_is_lost(name, cost):
    model = MODELS[name]()
    twin = permuted(model)
    calibration = texts() if name in ("bert", "sentences") else digits()
    x = calibration.example(16)
    if name != "sentences":  # a vector of another order is another vector
        torch.testing.assert_close(twin(*x), model(*x), atol=1e-5, rtol=1e-4)
    fused, steps = run_pass("otfusion", model, calibration, others=[twin], solver="emd", cost=cost, samples=64)
    assert steps == []
    for key, value in model.state_dict().items():
        assert float((fused.state_dict()[key] - value).abs().max()) < 1e-5, key
    torch.testing.assert_close(fused(*x), model(*x), atol=1e-5, rtol=1e-4)
    average = copy.deepcopy(model)
    average.load_state_dict({k: (v + twin.state_dict()[k]) / 2 for k, v in model.state_dict().items()})
    assert float((average(*x) - model(*x)).abs().max()) > 1e-2


@pytest.mark.parametrize("policy", ["mean", "only_residual", "no_residual", "weighted_scalar", "weighted_matrix"])
@pytest.mark.parametrize("qk", ["separate", "shared"])
def test_a_model_fused_with_itself_is_itself_under_every_policy(policy, qk):
    model = MODELS["bert"]()
    fused, _ = run_pass(
        "otfusion", model, texts(), others=[copy.deepcopy(model)], solver="emd", residual=policy, qk=qk, samples=32
    )
    for key, value in model.state_dict().items():
        assert float((fused.state_dict()[key] - value).abs().max()) < 1e-5, key


def official_vits():
    """The two ViTs of the golden file."""
    nets = []
    for seed in (1, 2):
        net = create_model(
            "vit_tiny_patch16_224", img_size=32, patch=4, dim=16, depth=2, heads=2, mlp_ratio=3.0, num_classes=5
        )
        state = seeded_state({f"{seed}/{key}": value.shape for key, value in net.state_dict().items()})
        net.load_state_dict({key.partition("/")[2]: value for key, value in state.items()})
        nets.append(net.eval())
    return nets


@pytest.mark.parametrize("case", ["emd", "sinkhorn", "weights", "only_resid", "no_resid", "eq_t_map"])
def test_fused_weights_equal_the_authors(case):
    how = {
        "emd": Fusion(solver="emd"),
        "sinkhorn": Fusion(),
        "weights": Fusion(solver="emd", cost="weights"),
        "only_resid": Fusion(residual="only_residual"),
        "no_resid": Fusion(residual="no_residual"),
        "eq_t_map": Fusion(qk="shared"),
    }[case]
    source, anchor = official_vits()
    x = seeded_input("otfusion", (20, 3, 32, 32))
    found = align(source, anchor, Record.of(source, [(x,)], 6), Record.of(anchor, [(x,)], 6), how)
    with np.load(GOLDEN / "otfusion.npz") as file:
        for key, value in found.items():
            if key == "stem.tokens" and how.solver == "emd":
                continue  # one number a unit: several plans are exact
            want = torch.from_numpy(file[f"{case}/{key}"])
            got = (value + anchor.state_dict()[key]) / 2
            # Every weight of the golden file is thinned to 64 entries.
            torch.testing.assert_close(got.flatten()[:: max(1, got.numel() // 64)], want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (9, 6), (4, 7)])
def test_plans_have_the_right_marginals_and_soft_ones_go_from_exact_to_even(n, m):
    cost = torch.rand(n, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for reg, close in ((0.1, 1e-7), (1e-3, 1e-4)):
        plan = sinkhorn_plan(cost, reg, most=20_000)
        torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=cost.dtype))
        torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=cost.dtype), atol=close, rtol=0)
    torch.testing.assert_close(sinkhorn_plan(cost, 1e3), torch.full_like(cost, 1 / (n * m)), atol=1e-4, rtol=1e-3)
    if n != m:
        pytest.importorskip("ot", reason="exact transport of unequal sizes needs POT")
    exact = exact_plan(cost)
    assert float((exact * cost).sum()) <= float((sinkhorn_plan(cost, 0.01) * cost).sum()) + 1e-12
    assert float((sinkhorn_plan(cost, 1e-3, most=20_000) * cost).sum()) < float((exact * cost).sum()) + 1e-3
    torch.testing.assert_close(exact.sum(0), torch.full((m,), 1 / m, dtype=cost.dtype))
    torch.testing.assert_close(exact.sum(1), torch.full((n,), 1 / n, dtype=cost.dtype))


def chain():
    """Three products with activations between."""
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4)).double()


def chain_units(net, x):
    """Standardised activations of its products, by name."""
    units = {}
    for name, part in net.named_children():
        x = part(x)
        if isinstance(part, nn.Linear):
            units[name] = ((x - x.mean(0)) / x.std(0, correction=0)).T.detach()
    return units


@pytest.mark.parametrize("cost", ["activations", "weights"])
def test_a_chain_of_three_products_is_aligned_as_by_explicit_permutation(cost):
    torch.manual_seed(0)
    anchor, other, x = chain(), chain(), torch.randn(200, 6, dtype=torch.float64)
    first, second = torch.randperm(20), torch.randperm(15)
    twin = copy.deepcopy(anchor)
    with torch.no_grad():
        for name, rows, columns in (("0", first, None), ("2", second, first), ("4", None, second)):
            layer = twin.get_submodule(name)
            weight = layer.weight if columns is None else layer.weight[:, columns]
            layer.weight.copy_(weight if rows is None else weight[rows])
            layer.bias.copy_(layer.bias if rows is None else layer.bias[rows])
    torch.testing.assert_close(twin(x), anchor(x))
    for source in (twin, other):
        records = [Record(), Record()]
        for record, net in zip(records, (source, anchor), strict=True):
            record.units = chain_units(net, x)
        work = _Alignment(source, anchor, *records, Fusion(solver="emd", cost=cost))
        maps = [work.product("0", None)]
        maps.append(work.product("2", maps[0]))
        work.product("4", maps[1], last=True)
        aligned = chain()
        aligned.load_state_dict(work.state)
        # An exact map between as many units is an order of them: the function is the source's, in the anchor's order.
        torch.testing.assert_close(aligned(x), source(x))
        for found in maps:
            torch.testing.assert_close(found.sum(0), torch.ones(len(found), dtype=found.dtype))
            assert set(found.flatten().tolist()) == {0.0, 1.0}
        if source is twin:
            assert torch.equal(maps[0].argmax(0), first.argsort())
            assert torch.equal(maps[1].argmax(0), second.argsort())
            torch.testing.assert_close(work.state, dict(anchor.state_dict()))


@pytest.mark.parametrize(("n", "m"), [(8, 8), (9, 6), (4, 7)])
@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_columns_of_a_map_sum_to_one_and_rows_to_the_ratio_of_the_widths(solver, n, m):
    if n != m and solver == "emd":
        pytest.importorskip("ot", reason="exact transport of unequal sizes needs POT")
    torch.manual_seed(0)
    work = _Alignment(chain(), chain(), Record(), Record(), Fusion(solver=solver))
    found = work.plan(torch.randn(n, 30), torch.randn(m, 30))
    torch.testing.assert_close(found.sum(0), torch.ones(m, dtype=found.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.full((n,), m / n, dtype=found.dtype), atol=1e-6, rtol=0)
    # What reads the units goes on reading all of each.
    torch.testing.assert_close(work.reader(found).sum(1), torch.ones(n, dtype=found.dtype), atol=1e-6, rtol=0)


def test_exact_plans_are_the_best_of_all_orders_and_sinkhorn_is_that_of_pot():
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    assert float((exact_plan(cost) * cost).sum()) == pytest.approx(best / 5)
    ot = pytest.importorskip("ot", reason="POT is not installed")
    want = ot.sinkhorn(np.full(5, 0.2), np.full(5, 0.2), cost.numpy(), 0.08)
    torch.testing.assert_close(sinkhorn_plan(cost, 0.08), torch.from_numpy(want), atol=1e-8, rtol=1e-6)


def test_unequal_exact_transport_without_pot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError, match="pip install pot"):
        exact_plan(torch.rand(3, 2))


def test_distances_are_divided_by_the_largest():
    a, b = torch.randn(4, 9), torch.randn(3, 9)
    cost = ground_cost(a, b, "euclidean")
    want = torch.stack([torch.stack([(x - y).norm() for y in b]) for x in a])
    torch.testing.assert_close(cost, want / want.max())
    assert float(ground_cost(a, a * 2, "cosine").diagonal().abs().max()) < 1e-6


def test_units_that_come_in_pairs_are_joined_without_a_change_of_the_answers():
    pytest.importorskip("ot", reason="exact transport of unequal sizes needs POT")
    narrow = noisy(encoder(hidden=16))
    wide = encoder(hidden=32).eval()
    state = narrow.state_dict()
    for key, value in state.items():
        if ".fc1." in key and "blocks" in key:
            state[key] = torch.cat((value, value))
        elif ".fc2.weight" in key:
            state[key] = torch.cat((value, value), 1) / 2
    wide.load_state_dict(state)
    calibration = texts()
    x = calibration.example(8)
    torch.testing.assert_close(wide(*x), narrow(*x), atol=1e-5, rtol=1e-4)
    fused, steps = run_pass("otfusion", wide, calibration, others=[narrow], solver="emd", samples=32)
    assert [s["step"] for s in steps] == ["otfusion.anchor"]
    assert parameters(fused) == parameters(narrow)
    torch.testing.assert_close(fused(*x), narrow(*x), atol=1e-4, rtol=1e-4)


def test_several_models_are_averaged_alike():
    model = MODELS["bert"]()
    fused, _ = run_pass("otfusion", model, texts(), others=[permuted(model, s) for s in (3, 4)], solver="emd")
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), atol=1e-5, rtol=1e-4)
    other = noisy(encoder(depth=2, act="gelu"))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    kept, _ = run_pass("otfusion", model, texts(), others=[other], alpha=1.0)
    torch.testing.assert_close(kept.state_dict(), model.state_dict())


def test_a_wide_model_becomes_narrow_and_is_the_same_after_loading(tmp_path):
    calibration = texts()
    wide, narrow = random_encoder(), random_encoder(dim=16, hidden=24)
    fused, _ = run_pass("otfusion", wide, calibration, others=[narrow], samples=32)
    assert parameters(fused) == parameters(narrow) < parameters(wide)
    x = calibration.example(4)
    same_after_loading(fused, x, tmp_path)
    certificate = export_onnx(fused, x, tmp_path / "fused.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.max_abs < 1e-4
    assert not torch.allclose(fused(*x), narrow(*x), atol=1e-3)


def test_one_shot_fusion_of_models_of_other_seeds_beats_their_plain_average():
    calibration = digits()
    first, gains = learned(vision(dim=32, depth=2), calibration, steps=120), []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        other = vision(dim=32, depth=2)
        with torch.no_grad():
            for p in other.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=torch.Generator().manual_seed(seed))
        other = learned(other, calibration, steps=120)
        fused, _ = run_pass("otfusion", first, calibration, others=[other])
        plain = copy.deepcopy(first)
        plain.load_state_dict({k: (v + other.state_dict()[k]) / 2 for k, v in first.state_dict().items()})
        gains.append(calibration.score(fused) - calibration.score(plain))
    assert sum(gains) / 3 > 0.1, gains


def test_what_cannot_be_fused_is_named_and_left_as_it_was():
    calibration = texts()
    model = MODELS["bert"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for others, message in (
        ([], "give others"),
        ([encoder(depth=3)], "agree in depth, got 3 and 2"),
        ([encoder(num_classes=3)], "head.fc.weight differs"),
        ([encoder(mixer="linear")], r"mixer \(\w+\) has no rule"),
        ([nn.Linear(2, 2)], "Linear is not an Isotropic trunk"),
    ):
        with pytest.raises(Unsupported, match=message):
            run_pass("otfusion", model, calibration, others=others)
    twin = [copy.deepcopy(model)]
    for setting in ({"residual": "sum"}, {"samples": 0}, {"alpha": 2.0}, {"reg": -1.0}, {"solver": "exact"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            run_pass("otfusion", model, calibration, others=twin, **setting)
    with pytest.raises(Unsupported, match="equal widths"):
        run_pass("otfusion", model, calibration, others=[encoder(dim=16, hidden=24)], residual="identity")
    assert not hasattr(model, "recipe")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_narrow_fusion_of_a_wide_model_learns_faster_than_a_model_from_scratch():
    calibration = texts()
    wide = learned(encoder(dim=48, hidden=96), calibration)
    narrow = learned(encoder(dim=16, hidden=32), calibration, steps=20)
    fused, _ = run_pass("otfusion", wide, calibration, others=[narrow], alpha=0.5)
    scratch = encoder(dim=16, hidden=32)
    scores = [calibration.score(learned(net, calibration, steps=16)) for net in (fused, scratch)]
    assert scores[0] > scores[1], scores
