"""NDDR-CNN: branches that hear each other, the sizes of LargeFOV, losses and learning rates of the paper."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.layers.fold import fold_batch_norm
from gossamer.models import create_model
from gossamer.models.nddr_cnn import VggStage, loss, normal_loss, parameter_groups, segmentation_loss

TINY = {"outputs": (4, 3), "widths": (4, 6, 8, 8, 8), "depths": (1, 1, 1, 1, 1), "hidden": 8, "reduce": 8}
VIT = {"outputs": (4, 3), "dim": 16, "depths": (1, 1), "heads": 2, "patch": 8, "img_size": (33, 41)}
NAMES = [("nddr_cnn_vgg16", TINY), ("nddr_cnn_vgg16_shortcut", TINY), ("nddr_vit_tiny", VIT)]


def drawn(model: nn.Module) -> nn.Module:
    for name, p in model.named_parameters():
        if not name.startswith("nddr"):
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("name", "sizes"), NAMES)
def test_every_task_is_answered_for_every_pixel(name: str, sizes: dict) -> None:
    model = create_model(name, **sizes).eval()
    x = torch.randn(2, 3, 33, 41)
    scores, normals = model(x)
    assert scores.shape == (2, 4, 33, 41)
    assert normals.shape == (2, 3, 33, 41)


def test_the_stages_have_the_sizes_of_large_fov() -> None:
    with torch.device("meta"):
        model = create_model("nddr_cnn_vgg16").eval()
        x = model.branches[0].start(torch.empty(1, 3, 321, 321))
        sizes = []
        for stage in model.branches[0].stages:
            x = stage(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(161, 161, 64), (81, 81, 128), (41, 41, 256), (41, 41, 512), (41, 41, 512)]


def test_parameters_are_those_of_two_vggs_and_five_fusions() -> None:
    convs = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    vgg = sum(9 * a * b + 2 * b for a, b in pairwise(convs))
    head = 9 * 512 * 1024 + 2 * 1024 + 1024**2 + 2 * 1024
    fusions = sum(2 * (2 * c * c + 2 * c) for c in (64, 128, 256, 512, 512))
    for name, reduce in (("nddr_cnn_vgg16", 0), ("nddr_cnn_vgg16_shortcut", 1472 * 512 + 2 * 512)):
        with torch.device("meta"):
            model = create_model(name)
        last = sum(1024 * k + k for k in (40, 3))
        assert sum(p.numel() for p in model.parameters()) == 2 * (vgg + head + reduce) + last + fusions


def test_fusion_adds_the_products_of_its_formula() -> None:
    with torch.device("meta"):
        fused, alone = create_model("nddr_cnn_vgg16", **TINY), create_model("nddr_cnn_vgg16", **TINY, fused=False)
        x = torch.empty(1, 3, 32, 48)
    extra = measure.macs(fused, (x,)).total - measure.macs(alone, (x,)).total
    places = (16 * 24, 8 * 12, 4 * 6, 4 * 6, 4 * 6)
    assert extra == sum(4 * c * c * n for c, n in zip((4, 6, 8, 8, 8), places, strict=True))


@pytest.mark.parametrize(("name", "sizes"), NAMES)
def test_without_the_others_share_the_networks_are_single_tasks(name: str, sizes: dict) -> None:
    fused = drawn(create_model(name, **sizes, alpha=1.0, beta=0.0, plain=True))
    alone = create_model(name, **sizes, fused=False).eval()
    alone.branches.load_state_dict(fused.branches.state_dict())
    x = torch.randn(1, 3, 33, 41)
    for a, b in zip(fused(x), alone(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # A task trained by itself becomes a branch.
    single = create_model(name, **{**sizes, "outputs": (3,)}, fused=False).eval()
    single.branches[0].load_state_dict(fused.branches[1].state_dict())
    torch.testing.assert_close(single(x)[0], fused(x)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3])
def test_a_tasks_answer_teaches_the_other_networks_only_when_they_are_heard(tasks: int) -> None:
    sizes = {**TINY, "outputs": (3,) * tasks}
    for beta, reached in ((0.1, True), (0.0, False)):
        model = drawn(create_model("nddr_cnn_vgg16", **sizes, beta=beta))
        model(torch.randn(1, 3, 32, 32))[0].square().sum().backward()
        first = model.branches[1].stages[0].convs[0].conv.weight.grad
        assert bool(first is not None and first.abs().sum() > 0) == reached


def test_the_shortcut_reads_every_stage_and_teaches_every_fusion() -> None:
    model = drawn(create_model("nddr_cnn_vgg16_shortcut", **TINY))
    assert model.branches[0].reduce.conv.weight.shape[:2] == (8, 34)
    stages = [torch.randn(1, 4, 5, c, requires_grad=True) for c in (4, 6, 8, 8, 8)]
    model.branches[0].finish(stages, (8, 10)).sum().backward()
    assert all(bool(s.grad.abs().sum() > 0) for s in stages)
    plain = drawn(create_model("nddr_cnn_vgg16", **TINY))
    grads = torch.autograd.grad(plain.branches[0].finish(stages, (8, 10)).sum(), stages, allow_unused=True)
    assert [g is not None for g in grads] == [False, False, False, False, True]


@pytest.mark.parametrize("side", [9, 12])
def test_pooling_pads_as_tensorflow_does(side: int) -> None:
    stage = VggStage(1, 1, 1, stride=2).eval()
    stage.convs = nn.Identity()
    x = torch.randn(1, side, side, 1)
    y = stage(x)
    out = -(-side // 2)
    assert y.shape == (1, out, out, 1)
    before = ((out - 1) * 2 + 3 - side) // 2
    for i in range(out):
        rows = slice(max(0, 2 * i - before), 2 * i - before + 3)
        assert y[0, i, 0, 0] == x[0, rows, max(0, -before) : 3 - before].max()
    mean = VggStage(1, 1, 1, stride=1, mean=True)
    mean.convs = nn.Identity()
    torch.testing.assert_close(mean(torch.ones(1, 5, 5, 1)), torch.ones(1, 5, 5, 1))


def test_segmentation_ignores_255_and_normals_what_is_not_valid() -> None:
    scores, labels = torch.randn(2, 4, 3, 5), torch.randint(4, (2, 3, 5))
    labels[:, 0] = 255
    expected = F.cross_entropy(scores[:, :, 1:], labels[:, 1:])
    torch.testing.assert_close(segmentation_loss(scores, labels), expected)
    assert segmentation_loss(scores, torch.full_like(labels, 255)) == 0
    v = torch.randn(2, 3, 3, 5)
    valid = torch.rand(2, 3, 5) < 0.5
    assert float(normal_loss(v, 4 * v, valid)) == pytest.approx(0, abs=1e-6)
    assert float(normal_loss(v, -0.1 * v, valid)) == pytest.approx(2, abs=1e-6)
    other = torch.where(valid[:, None], v, -v)
    assert float(normal_loss(v, other, valid)) == pytest.approx(0, abs=1e-6)
    assert normal_loss(v, v, torch.zeros_like(valid)) == 0
    total = loss((scores, v), labels, -v, torch.ones_like(valid))
    torch.testing.assert_close(total, expected + 40)


@pytest.mark.parametrize(("name", "sizes"), NAMES)
def test_every_parameter_is_in_one_group_with_its_learning_rate(name: str, sizes: dict) -> None:
    model = create_model(name, **sizes)
    groups = {group["name"]: group for group in parameter_groups(model, lr=2e-3)}
    rates = {key: group["lr"] / 2e-3 for key, group in groups.items()}
    assert rates == pytest.approx({"network": 1, "last weight": 10, "last bias": 20, "fusion": 100})
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert {id(p) for p in groups["fusion"]["params"]} == {id(p) for p in model.nddr.parameters()}
    assert [p.shape[0] for p in groups["last weight"]["params"]] == [4, 3]
    assert [tuple(p.shape) for p in groups["last bias"]["params"]] == [(4,), (3,)]
    torch.optim.SGD(list(groups.values()), momentum=0.9)


def test_names_are_those_of_its_layout() -> None:
    keys = set(create_model("nddr_cnn_vgg16", **TINY).state_dict())
    assert {"nddr.0.proj.1.weight", "nddr.4.norm.0.weight", "nddr.4.norm.0.running_mean"} <= keys


def test_folding_the_norms_of_the_branches_changes_nothing() -> None:
    model = drawn(create_model("nddr_cnn_vgg16_shortcut", **TINY))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    x = torch.randn(1, 3, 32, 32)
    before = [y.detach() for y in model(x)]
    for a, b in zip(fold_batch_norm(model)(x), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def test_it_exports(tmp_path) -> None:
    model = create_model("nddr_cnn_vgg16_shortcut", **TINY).eval()
    certificate = export_onnx(model, (torch.randn(1, 3, 32, 40),), tmp_path / "m.onnx")
    assert certificate.passed, certificate.reason


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        create_model("nddr_cnn_vgg16", **{**TINY, "outputs": (4,)})
    with pytest.raises(ValueError, match="shortcut"):
        create_model("nddr_vit_tiny", **VIT, shortcut=True)


def scores_of_a_blind_task(fused: bool) -> list[float]:
    """Shares of right pixels of two tasks (which quarters are light, which dark) whose second network sees nothing."""
    draw = torch.Generator().manual_seed(0)
    levels = (torch.rand(80, 1, 2, 2, generator=draw) < 0.5).float()
    x = F.interpolate(levels, (32, 32)) + 0.5 * torch.randn(80, 1, 32, 32, generator=draw)
    light = F.interpolate(levels, (32, 32))[:, 0].long()
    targets = [light, 1 - light]
    sizes = {"widths": (8,) * 5, "depths": (1,) * 5, "hidden": 8, "drop": 0.0, "in_chans": 1}
    model = create_model("nddr_cnn_vgg16", outputs=(2, 2), fused=fused, **sizes)
    for p in model.branches[1].stages.parameters():
        nn.init.zeros_(p).requires_grad_(False)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        answers = model(x[:32])
        total = sum(segmentation_loss(a, t[:32]) for a, t in zip(answers, targets, strict=True))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        return [float((a.argmax(1) == t[32:]).float().mean()) for a, t in zip(model(x[32:]), targets, strict=True)]


def test_a_network_that_sees_nothing_learns_by_what_it_hears() -> None:
    (seeing, hearing), (alone, blind) = (scores_of_a_blind_task(fused) for fused in (True, False))
    assert min(seeing, alone) > 0.7
    assert hearing > 0.7
    assert blind < 0.6
