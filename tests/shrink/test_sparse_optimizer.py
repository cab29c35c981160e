"""The pass: exact zeros to the wanted share, whole members sliced, and accuracy held where pruning alone loses it."""

import copy
import time

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers import Block
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink.base import run_pass
from gossamer.shrink.masks import members
from gossamer.shrink.passes.sparse_optimizer import block_matrices, density, slice_dead
from gossamer.train.moreau_yosida import MoreauYosida
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision


@pytest.fixture(scope="module")
def trained():
    calibration = digits()
    return calibration, learned(vision(), calibration, steps=250, lr=5e-3)


@pytest.fixture(scope="module")
def sparse(trained):
    calibration, model = trained
    return run_pass("sparse_optimizer", model, calibration, keep=0.3, steps=120, lr=3e-3)


def magnitude_pruned(model, keep):
    """The largest weights of the blocks, the share `keep` of all, and no training."""
    pruned = copy.deepcopy(model)
    matrices = list(block_matrices(pruned).values())
    limit = torch.cat([w.detach().abs().flatten() for w in matrices]).quantile(1 - keep)
    with torch.no_grad():
        for w in matrices:
            w.mul_(w.abs() > limit)
    return pruned


def test_weights_are_exactly_zero_to_the_wanted_share_at_little_loss(trained, sparse):
    calibration, model = trained
    shrunk, _ = sparse
    assert density(model)[""] == 1
    assert density(shrunk)[""] == pytest.approx(0.3, abs=0.01)
    assert shrunk.shrink_report["sparse_optimizer"]["density"] == density(shrunk)
    before, after = calibration.score(model), calibration.score(shrunk)
    assert before > 0.85
    assert after > before - 0.02
    assert calibration.score(magnitude_pruned(model, 0.3)) < after - 0.02


def test_the_dense_model_trained_as_many_steps_is_hardly_better(trained, sparse):
    calibration, model = trained
    dense = copy.deepcopy(model)
    calibration.trainer(dense, lr=3e-3, ema=0.0).train(steps=120, schedule="linear")
    assert calibration.score(sparse[0]) > calibration.score(dense.eval()) - 0.02
    assert calibration.score(magnitude_pruned(dense, 0.3)) < calibration.score(sparse[0])


@pytest.mark.parametrize("weights", ["plain", "reweighted"])
def test_exact_zeros_of_a_transformer_grow_with_the_penalty(weights):
    calibration, shares = texts(), []
    for shrink in (0.0, 0.01, 0.03, 0.1):
        net = encoder()

        def optimiser(model, settings, shrink=shrink):
            inner = list(block_matrices(model).values())
            others = [p for p in model.parameters() if all(p is not q for q in inner)]
            groups = [{"params": inner, "shrink": shrink}, {"params": others}]
            return MoreauYosida(torch.optim.AdamW(groups, lr=settings.lr), weights=weights)

        calibration.trainer(net, lr=3e-3, ema=0.0, optimiser=optimiser).train(steps=30, schedule="linear")
        values = torch.cat([w.detach().flatten() for w in block_matrices(net).values()])
        shares.append(float((values == 0).float().mean()))
        assert float((values[values != 0].abs() < 1e-8).float().mean()) < 1e-3  # zeros, not small numbers
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > shares[1] > 0


def test_only_matrices_of_the_blocks_have_zeros(sparse):
    shrunk, _ = sparse
    inner = set(block_matrices(shrunk))
    for name, p in shrunk.named_parameters():
        if name not in inner:
            assert not bool((p == 0).all()), name
            assert float((p == 0).float().mean()) < 0.1, name


@pytest.mark.parametrize("kind", ["text", "image"])
def test_whole_heads_and_units_go_and_are_sliced_away(kind, trained, tmp_path):
    if kind == "image":
        calibration, model = trained
    else:
        calibration = texts()
        model = learned(encoder(), calibration, steps=80)
    shrunk, steps = run_pass("sparse_optimizer", model, calibration, keep=0.5, unit="members", steps=160, lr=3e-3)
    before, after = members(model), members(shrunk)
    for axis in ("heads", "hidden"):
        was, now = (sum(n for (_, a), n in found.items() if a == axis) for found in (before, after))
        assert now == pytest.approx(0.5 * was, abs=8)
    assert all(n % 8 == 0 for (_, axis), n in after.items() if axis == "hidden")
    assert {step["step"] for step in steps} == {"prune"}
    assert shrunk.recipe == steps
    assert density(shrunk)[""] > 0.98
    assert calibration.score(shrunk) > calibration.score(model) - 0.05
    x = calibration.example(4)
    same_after_loading(shrunk, x, tmp_path)
    certificate = export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"


def test_what_gives_nothing_is_sliced_without_a_trace():
    model = vision().eval()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 5:40] = 0
        model.blocks[1].mixer.proj.weight[:, 8:16] = 0
        model.blocks[1].mixer.proj.weight[3, 9] = 0
        want = model(x)
        steps = slice_dead(model)
        torch.testing.assert_close(model(x), want, atol=1e-6, rtol=0)
    assert model.blocks[0].mlp.widths() == {"hidden": 128 - 35}
    assert model.blocks[1].mixer.widths() == {"heads": 3}
    assert len(steps) == 2


def test_zeros_are_the_same_after_loading(sparse, tmp_path):
    shrunk, _ = sparse
    same_after_loading(shrunk, torch.randn(2, 1, 8, 8), tmp_path)


def test_a_pyramid_with_windows_is_shrunk_too():
    calibration = digits()
    torch.manual_seed(0)
    sizes = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depths": (1, 1), "heads": (2, 4)}
    model = create_model("swin_t", **sizes, patch=1, window=4)
    shrunk, steps = run_pass("sparse_optimizer", model, calibration, keep=0.5, unit="members", steps=6)
    assert steps
    assert sum(members(shrunk).values()) < 0.6 * sum(members(model).values())


def test_it_stops_when_its_time_is_over_with_the_share_reached(trained):
    calibration, model = trained
    short = copy.copy(calibration)
    short.seconds = 1.0
    start = time.perf_counter()
    shrunk, _ = run_pass("sparse_optimizer", model, short, keep=0.4, steps=100000)
    assert density(shrunk)[""] == pytest.approx(0.4, abs=0.01)
    assert time.perf_counter() - start < 60


def test_keep_all_changes_nothing(trained):
    calibration, model = trained
    shrunk, steps = run_pass("sparse_optimizer", model, calibration, keep=1.0)
    assert steps == []
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(shrunk(x), model(x))


@pytest.mark.parametrize(
    ("model", "unit", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "weights", "Sequential has no residual blocks of ours"),
        (nn.Sequential(Block(4, create_mixer("pool", 4), None)), "weights", "blocks of Sequential have no linear"),
        (
            nn.Sequential(Block(4, create_mixer("pool", 4), nn.Sequential(nn.Linear(4, 4)))),
            "members",
            "no part of Sequential states a pruning rule for heads",
        ),
    ],
)
def test_a_model_without_matrices_or_members_in_blocks_is_refused_untouched(model, unit, message):
    refuses("sparse_optimizer", model, digits(), message, (torch.randn(2, 5, 4),), unit=unit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"keep": 0.0}, "keep must be in"), ({"unit": "layers"}, "unit must be"), ({"steps": 0}, "steps must be")],
)
def test_what_makes_no_sense_is_refused(settings, message, trained):
    calibration, model = trained
    with pytest.raises(ValueError, match=message):
        run_pass("sparse_optimizer", model, calibration, **settings)
