"""Greenformers: factors equal to the authors', ranks that pay, and whitening that loses less."""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers import BatchNorm, Mlp
from gossamer.layers.low_rank import LowRankConv, LowRankLinear, best_factors, break_even, low_rank, semi_nonnegative
from gossamer.measure import macs, parameters
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.greenformers import _decompose, _fill, _Moments, factorise, greenformers
from gossamer.shrink.products import products
from gossamer.shrink.recipe import replay
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision

GOLDEN = Path(__file__).parents[1] / "golden" / "greenformers.npz"


def decaying(*shape: int, seed: int) -> torch.Tensor:
    """A weight of falling singular values, so that a randomised decomposition finds them too."""
    matrix = torch.randn(shape[0], int(np.prod(shape[1:])), generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return ((u * 0.4 ** torch.arange(len(s))) @ v).reshape(shape)


def mixed() -> nn.Module:
    """Convolutions and linear layers of all the kinds the authors' code takes."""
    turned = pytest.importorskip("transformers.pytorch_utils").Conv1D(30, 23)
    net = nn.Sequential(
        nn.Conv2d(6, 20, 3, 2, 1),
        nn.Sequential(nn.Conv2d(20, 24, 3, padding=2, dilation=2), nn.Conv2d(24, 16, 1)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 18, 3), turned),
        nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 24, bias=False), nn.Linear(24, 3)),
        nn.Linear(3, 2),
    )
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(decaying(*p.shape, seed=i) if p.ndim > 1 else torch.linspace(-1, 1, len(p)))
    return net


def found(net: nn.Module) -> dict[str, LowRankLinear | LowRankConv]:
    return {n: m for n, m in net.named_modules() if isinstance(m, LowRankLinear | LowRankConv)}


@pytest.mark.parametrize("rank", [0.5, 5])
def test_factors_equal_the_authors_up_to_sign(rank):
    golden = np.load(GOLDEN)
    net = mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factorise(net, rank, solver="svd")
    names = {key.split("/")[1] for key in golden.files if key.startswith(f"{rank}/")}
    assert set(found(net)) == names
    for name, layer in found(net).items():
        down, up = (torch.from_numpy(golden[f"{rank}/{name}/{half}"]) for half in ("down", "up"))
        own_down, own_up = layer.down.weight.flatten(1), layer.up.weight.flatten(1)
        sign = (own_up * up).sum(0).sign()
        torch.testing.assert_close(own_down * sign[:, None], down, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own_up * sign, up, atol=1e-5, rtol=1e-4)
    x = torch.from_numpy(golden["x"])
    torch.testing.assert_close(net(x), torch.from_numpy(golden[f"y_{rank}"]), atol=1e-4, rtol=1e-4)


def test_semi_nonnegative_steps_equal_those_of_the_library_the_authors_use():
    golden = np.load(GOLDEN)
    w, start = (torch.from_numpy(golden[f"snmf/{key}"]) for key in ("w", "start"))
    for steps in (1, 10):
        _, up = semi_nonnegative(w, start, steps)
        torch.testing.assert_close(up.float(), torch.from_numpy(golden[f"snmf/up_{steps}"]), atol=1e-3, rtol=1e-3)


def test_full_rank_is_the_layer_and_less_rank_loses_the_singular_values_left_out():
    layer = nn.Linear(24, 17)
    x = torch.randn(5, 3, 24)
    down, up, energy = best_factors(layer.weight.detach())
    torch.testing.assert_close((up @ down).float(), layer.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x @ (up @ down).float().T + layer.bias, layer(x), atol=1e-5, rtol=1e-5)
    singular = torch.linalg.svdvals(layer.weight.detach().double())
    for rank in (1, 5, 16):
        error = (layer.weight - up[:, :rank] @ down[:rank]).norm()
        torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(energy, singular.square(), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 10, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, (3, 2), padding=2, dilation=2, padding_mode="circular"),
        nn.Conv2d(8, 12, 3, groups=4, bias=False),
        nn.Conv1d(4, 6, 5, stride=3),
        nn.Conv3d(2, 3, 2),
    ],
    ids=["stride", "dilation", "groups", "1d", "3d"],
)
def test_a_convolution_of_full_rank_is_the_convolution(conv):
    factors = _decompose(conv, None)
    full = conv.groups * len(factors.down[0])
    new = low_rank(conv, full)
    _fill(new, conv, factors, full, None)
    x = torch.randn(2, conv.in_channels, *[9] * (conv.weight.ndim - 2))
    torch.testing.assert_close(new(x), conv(x), atol=1e-5, rtol=1e-5)


def test_factorised_bert_base_has_the_parameters_of_the_formula():
    with torch.device("meta"):
        net = create_model("bert_base")
        before = parameters(net)
        for rank in (64, 128):
            shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
            recipe = [
                {"step": "greenformers.low_rank", "part": f"blocks.{i}.{part}", "rank": rank}
                for i in range(12)
                for part in ("mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2")
            ]
            low = replay(create_model("bert_base"), recipe)
            saved = sum(a * b - rank * (a + b) for a, b in shapes)
            assert parameters(low) == before - 12 * saved
    # Query, key and value are one product here: two thirds of their first factors are shared.
    assert sum(a + b for a, b in shapes) == 13824 - 2 * 768


def test_a_rank_that_does_not_pay_leaves_the_layer_and_warns_once():
    net = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))
    layer = net[0][0]
    with pytest.warns(UserWarning, match="stays as it is: rank 8 is not below 8") as caught:
        factorise(net, 8, solver="svd")
    assert net[0][0] is layer
    assert len(caught) == 1


def test_settings_out_of_range_are_refused():
    layer = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="solver must be one of"):
        factorise(layer, 2, solver="lu")
    with pytest.raises(ValueError, match="rank must be above 0"):
        factorise(layer, 0)
    with pytest.raises(ValueError, match="no negative entry"):
        factorise(layer, 2, solver="nmf")
    with pytest.raises(ValueError, match="submodules must name modules"):
        greenformers(vision(), digits(), submodules=["blocks.9"])
    with pytest.raises(ValueError, match="keep must be in"):
        greenformers(vision(), digits(), keep=0.0)


def test_a_copy_leaves_the_original_and_submodules_alone_are_touched():
    net = nn.Sequential(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)), nn.Sequential(nn.Linear(16, 16)))
    low = factorise(net, 0.5, solver="svd", submodules=[net[0]], copy=True)
    assert not found(net)
    assert set(found(low)) == {"0.0", "0.1"}
    whole = factorise(net, 0.5, copy=True)
    assert set(found(whole)) == {"0.0", "0.1", "1.0"}
    assert isinstance(factorise(nn.Linear(16, 16), 2), LowRankLinear)
    assert set(found(factorise(whole, 0.5))) == {"0.0", "0.1", "1.0"}


def test_nonnegative_solvers_find_what_is_of_that_form():
    torch.manual_seed(0)
    left, right = torch.rand(20, 3), torch.rand(3, 16)
    for solver, weight in (("nmf", left @ right), ("snmf", left @ (right - 0.5))):
        layer = nn.Linear(16, 20)
        with torch.no_grad():
            layer.weight.copy_(weight)
        new = factorise(layer, 3, solver=solver, iterations=400)
        assert new.up.weight.min() >= 0
        if solver == "nmf":
            assert new.down.weight.min() >= 0
        assert (new.weight - weight).norm() < 0.03 * weight.norm()
        torch.testing.assert_close(new.bias, layer.bias)


@pytest.mark.parametrize("solver", ["svd", "whitened"])
@pytest.mark.parametrize("ranks", ["even", "threshold"])
def test_what_is_kept_is_the_share_asked_for(solver, ranks):
    net, calibration = vision(dim=64, heads=4), digits()
    x = calibration.example()
    dense = sum(p.macs for p in products(net, x))
    before = macs(net, x).total
    low, steps = run_pass("greenformers", net, calibration, keep=0.5, solver=solver, ranks=ranks, samples=64)
    saved = before - macs(low, x).total
    assert 0.5 * dense <= saved < 0.62 * dense
    names = {step["part"] for step in steps}
    assert "stem.embed.proj" not in names
    assert "head.fc" not in names
    assert parameters(low) < parameters(net)


def test_whitened_factors_are_the_best_affine_map_on_what_the_layer_sees():
    torch.manual_seed(0)
    for inputs, outputs in ((12, 20), (20, 12)):
        layer = nn.Linear(inputs, outputs)
        x = torch.randn(500, inputs) * 0.6 ** torch.arange(inputs) + 1.0
        y = layer(x).detach()
        centre = y.mean(0)
        values = torch.linalg.svdvals((y - centre).double())
        moments = _Moments(layer)
        moments.add(x, y, None)
        new = low_rank(layer, 4)
        _fill(new, layer, _decompose(layer, moments), 4, moments)
        error = (new(x) - y).double().norm()
        torch.testing.assert_close(error, values[4:].square().sum().sqrt(), atol=1e-5, rtol=1e-3)
        assert error < 0.7 * (factorise(layer, 4, solver="svd")(x) - y).norm()


def test_padding_does_not_count_in_what_layers_see():
    net, calibration = encoder().eval(), texts()
    low, _ = run_pass("greenformers", net, calibration, keep=0.5, solver="whitened", samples=64)
    with torch.no_grad():
        # Were padding seen, another word there would change the factors; it is read by nothing else.
        net.stem.words.weight[0] += 50.0
    other, _ = run_pass("greenformers", net, calibration, keep=0.5, solver="whitened", samples=64)
    for name, layer in found(low).items():
        if name.startswith("blocks.0.mixer.qkv"):
            torch.testing.assert_close(other.get_submodule(name).weight, layer.weight, atol=1e-4, rtol=1e-4)


def test_whitening_loses_less_than_plain_singular_values_and_training_wins_the_rest_back():
    calibration = digits()
    net = learned(vision(dim=48, heads=4), calibration, steps=150)
    dense = calibration.score(net)
    losses = {}
    for solver in ("svd", "whitened", "random"):
        low, _ = run_pass("greenformers", net, calibration, keep=0.4, solver=solver)
        with torch.no_grad():
            index = torch.arange(100)
            inputs, _ = calibration.task.batch(calibration.data.val, index)
            losses[solver] = float((low(*inputs) - net(*inputs)).square().mean())
    assert losses["whitened"] < 0.7 * losses["svd"] < 0.7 * losses["random"]
    low, _ = run_pass("greenformers", net, calibration, rank=0.5, solver="svd")
    learned(low, calibration, steps=100, lr=1e-3)
    assert calibration.score(low) > dense - 0.02


@pytest.mark.parametrize("kind", ["vit", "swin", "bert"])
def test_shrunk_models_load_in_a_fresh_process_and_export(kind, tmp_path):
    if kind == "bert":
        net, calibration = encoder().eval(), texts()
    elif kind == "vit":
        net, calibration = vision(layer_scale=0.1).eval(), digits()
    else:
        calibration = digits()
        sizes = {"embed_dim": 32, "depths": (2, 2), "heads": (2, 4), "patch": 1, "window": 4}
        net = create_model("swin_t", **sizes, **calibration.data.spec).eval()
    low, steps = run_pass("greenformers", net, calibration, keep=0.5, solver="whitened", samples=32)
    assert steps
    x = calibration.example(3)
    same_after_loading(low, x, tmp_path)
    assert export_onnx(low, x, tmp_path / "m.onnx", exporter="fast").passed


class Foreign(nn.Module):
    """A module of somebody else, with all that a careless pass breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
        self.shared = nn.Linear(24, 24)
        self.again = self.shared
        self.tied = nn.Linear(24, 24)
        self.tied.weight = self.layer.self_attn.out_proj.weight
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.second(self.conv(x).relu()).flatten(2).transpose(1, 2)
        x = self.tied(self.again(self.shared(self.layer(x))))
        return self.head(x.mean(1))


def test_any_module_is_factorised_where_it_can_be(tmp_path):
    torch.manual_seed(0)
    net, calibration = Foreign().eval(), digits()
    low, steps = run_pass("greenformers", net, calibration, keep=0.7, solver="whitened", samples=64, ranks="even")
    assert [s["part"] for s in steps] == ["second", "layer.linear1", "layer.linear2", "shared"]
    assert low.again is low.shared
    x = calibration.example(4)
    with torch.no_grad():
        torch.testing.assert_close(low(*x), net(*x), atol=0.3, rtol=0.3)
        again = replay(Foreign().eval(), steps)
        again.load_state_dict(low.state_dict())
        assert torch.equal(again(*x), low(*x))


def test_batch_norms_are_folded_before_their_products_are_factorised():
    torch.manual_seed(0)
    calibration = digits()
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 32), Mlp(32, 64, norm=BatchNorm), nn.Flatten(1), nn.Linear(32, 10))
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.uniform_(part.weight, 0.5, 2.0)
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    net.eval()
    low, steps = run_pass("greenformers", net, calibration, keep=0.9, solver="svd", ranks="even")
    assert steps[0] == {"step": "fold_batch_norm"}
    assert {s["part"] for s in steps[1:]} == {"2.fc1", "2.fc2"}
    assert not any(isinstance(part, nn.BatchNorm1d) for part in low.modules())


def test_a_factorised_part_has_no_width_left_to_cut():
    net, calibration = vision().eval(), digits()
    low, _ = run_pass("greenformers", net, calibration, keep=0.5, ranks="even", submodules=["blocks.0", "blocks.1.mlp"])
    with pytest.raises(Unsupported, match="states a pruning rule"):
        run_pass("magnitude", low.blocks[0], calibration)
    again, steps = run_pass("magnitude", low, calibration, keep=0.5)
    assert {s["part"] for s in steps} == {"blocks.1.mixer"}
    again(*calibration.example())


def test_keeping_all_changes_nothing_and_what_cannot_be_factorised_is_left_as_it_was():
    net, calibration = vision().eval(), digits()
    x = calibration.example(2)
    same, steps = run_pass("greenformers", net, calibration, keep=1.0)
    assert steps == []
    assert torch.equal(same(*x), net(*x))
    thin = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Linear(2, 2), nn.Linear(2, 10)).eval()
    refuses("greenformers", thin, calibration, "no product of Sequential has fewer multiply-adds", keep=0.9)
    refuses("greenformers", nn.Flatten(), calibration, "Flatten has no product of its own")
    assert break_even(thin[2]) == 1.0


def test_a_weight_with_negative_entries_is_named_and_nothing_is_factorised_without_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        net[2].weight.abs_()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="nmf needs weights with no negative entry; 3 has some"):
        greenformers(net, digits(), solver="nmf", rank=2)
    assert not found(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    low, _ = run_pass("greenformers", net, digits(), solver="nmf", rank=2, submodules=["2"])
    assert set(found(low)) == {"2"}


def test_cost_falls_by_the_same_share_at_every_length():
    with torch.device("meta"):
        net = create_model("bert_base", dim=64, depth=2, heads=4, vocab_size=50, max_len=512)
        recipe = [
            {"step": "greenformers.low_rank", "part": f"blocks.{i}.{part}", "rank": 8}
            for i in range(2)
            for part in ("mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2")
        ]
        low = replay(create_model("bert_base", dim=64, depth=2, heads=4, vocab_size=50, max_len=512), recipe)
    per_token = []
    for n in (64, 128, 256, 512):
        ids = torch.ones(1, n, dtype=torch.long)
        dense, thin = macs(net, ids).total, macs(low, ids).total
        attention = 2 * 2 * n * n * 64
        per_token.append((dense - attention) / (thin - attention))
    assert all(abs(a - b) < 1e-6 for a, b in pairwise(per_token))


def test_beside_linformer_low_rank_grows_with_attention_as_the_dense_model_does_and_pays_up_to_a_length():
    """The comparison of the thesis, in multiply-adds: time is for the benchmarks."""
    dim, rank = 64, 16
    sizes = {"dim": dim, "depth": 1, "heads": 4, "vocab_size": 50, "max_len": 2048}
    layers = ("mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2")
    with torch.device("meta"):
        dense = create_model("bert_base", **sizes)
        steps = [{"step": "greenformers.low_rank", "part": f"blocks.0.{part}", "rank": rank} for part in layers]
        low = replay(create_model("bert_base", **sizes), steps)

    def cost(net, n):
        return macs(net, torch.ones(1, n, dtype=torch.long)).total

    def projected(n, keys=128):
        mixer = create_mixer("linformer", dim, heads=4, grid=(n,), rank=keys)
        return macs(mixer, torch.randn(1, n, dim)).total

    lengths = (256, 512, 1024, 2048)
    linformer = [projected(n) for n in lengths]
    full = [cost(dense, n) for n in lengths]
    thin = [cost(low, n) for n in lengths]
    # Linformer: as many times the work as times the length. Both others: a square beside it, the same in both.
    assert all(b == pytest.approx(2 * a, rel=0.01) for a, b in pairwise(linformer))
    assert all(b > 2.2 * a for a, b in pairwise(thin))
    saved = [(a - b) / n for a, b, n in zip(full, thin, lengths, strict=True)]
    assert saved == pytest.approx([saved[0]] * 4, rel=1e-6)
    # So low rank saves more in short texts, and Linformer in long ones.
    plain = [macs(create_mixer("attention", dim, heads=4), torch.randn(1, n, dim)).total for n in (64, *lengths)]
    gains = [a - b for a, b in zip(plain, (projected(64, 64), *linformer), strict=True)]
    assert gains[0] <= 64 * saved[0]
    assert gains[-1] > 2048 * saved[0]
