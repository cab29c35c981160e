"""Self-supervised pre-training: what is taken away, what is compared, who teaches, and that it helps."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gossamer.cli import app
from gossamer.data import read_dataset
from gossamer.data.base import Split
from gossamer.layers.init import init_by_width
from gossamer.models import create_model
from gossamer.models.sit import SiT
from gossamer.train import runs, train_model
from gossamer.train.corrupt import LARGEST, corrupted, mixed_corruption
from gossamer.train.ema import MovingAverage
from gossamer.train.pretrain import (
    MOMENTUM,
    Pretrainer,
    Views,
    contrast,
    cut_out,
    momentum,
    neighbours_accuracy,
    pretrain,
    reconstruction,
    turned,
    view_of,
)

TINY = {"dim": 16, "depth": 1, "heads": 2, "patch": 4}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return read_dataset("digits")


# --- corruption ---


@pytest.mark.parametrize("fill", ["zeros", "noise", "area", "other"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_as_much_is_covered_as_was_drawn_and_at_most_one_block_more(fill: str, share: float) -> None:
    x = torch.rand(12, 3, 40, 30) + 1
    y, changed = corrupted(x, share=share, fill=fill, generator=draw())
    covered = changed.flatten(1).float().mean(1)
    target = min(0.5, share) + (share - min(0.5, share)) * torch.rand(12, generator=draw())
    assert bool((covered >= target).all())
    assert bool((covered <= target + LARGEST**2).all())
    # What is not covered is as it was.
    assert torch.equal(torch.where(changed, x, y), x)


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_the_mask_is_exactly_what_has_changed(fill: str) -> None:
    x = torch.rand(4, 2, 24, 33) + 5
    y, changed = corrupted(x, fill=fill, generator=draw())
    assert torch.equal((x != y).all(1, keepdim=True), changed)
    assert torch.equal((x != y).any(1, keepdim=True), changed)
    if fill == "zeros":
        assert bool((y[changed.expand_as(y)] == 0).all())


def test_aligned_blocks_take_whole_cells_away() -> None:
    _, changed = corrupted(torch.rand(6, 1, 32, 48), align=8, generator=draw())
    cells = changed.view(6, 4, 8, 6, 8).float().mean((2, 4))
    assert set(cells.unique().tolist()) == {0.0, 1.0}


def test_areas_come_from_the_same_image_and_others_from_another_at_the_same_place() -> None:
    x = (torch.arange(4 * 900).view(4, 1, 30, 30)).float()
    y, changed = corrupted(x, fill="area", generator=draw())
    own = x.view(4, -1)
    assert all(set(y[i][changed[i]].tolist()) <= set(own[i].tolist()) for i in range(4))
    # A row of a moved area rises by one from pixel to pixel, as the image does.
    assert bool(((y[0, 0, :, 1:] - y[0, 0, :, :-1]) == 1).float().mean() > 0.6)
    y, changed = corrupted(x, fill="other", generator=draw())
    image = torch.div(y, 900, rounding_mode="floor")
    assert bool((image != torch.arange(4).view(4, 1, 1, 1))[changed].all())
    assert torch.equal(y % 900, x % 900)


def test_half_of_a_batch_has_zeros_and_half_has_parts_of_others() -> None:
    x = torch.rand(64, 1, 20, 20) + 1
    y, changed = mixed_corruption(x, generator=draw())
    zeros = ((y == 0) & changed).flatten(1).any(1)
    share = changed.flatten(1).float().mean(1)
    assert 16 < int(zeros.sum()) < 48
    assert bool((share[zeros] >= 0.5).all())
    assert bool((share[~zeros] < 0.3 + LARGEST**2).all())
    assert not bool((y == 0)[~zeros].any())


def test_corruption_refuses_impossible_shares() -> None:
    x = torch.rand(1, 1, 8, 8)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            corrupted(x, share=share)
    with pytest.raises(ValueError, match="align must be positive"):
        corrupted(x, align=0)
    y, changed = corrupted(x, share=0.0)
    assert torch.equal(x, y)
    assert not changed.any()


# --- losses and teacher ---


def test_the_contrast_is_the_explicit_formula() -> None:
    q, k = torch.randn(2, 5, 7)
    a, b = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(5):
        scores = [float(a[i] @ b[j]) / 0.2 for j in range(5)]
        expected -= (scores[i] - math.log(sum(math.exp(s) for s in scores))) / 5
    assert float(contrast(q, k)) == pytest.approx(0.4 * expected, rel=1e-5)
    # Equal answers that are at right angles to all others.
    known = math.log(1 + 3 * math.exp(-5)) * 0.4
    assert float(contrast(3 * torch.eye(4), torch.eye(4))) == pytest.approx(known, rel=1e-5)
    # Keys of other processes stand in front.
    assert float(contrast(q[2:], k, first=2)) != pytest.approx(float(contrast(q[2:], k)))


def test_the_reconstruction_counts_changed_pixels_alone() -> None:
    image, painted = torch.randn(2, 2, 3, 4, 5)
    changed = torch.rand(2, 1, 4, 5) < 0.4
    where = changed.expand(2, 3, 4, 5)
    expected = (painted - image).abs()[where].mean()
    torch.testing.assert_close(reconstruction(painted, image, changed), expected)
    assert reconstruction(painted, image, torch.zeros_like(changed)) == 0


def tiny_pretrainer(**options) -> Pretrainer:
    torch.manual_seed(0)
    model = create_model("sit_tiny", **TINY, img_size=8, drop_path=0.3)
    return Pretrainer(SiT(model, hidden=12, out=5), **options)


def test_the_loss_is_the_same_whichever_view_comes_first_and_weighs_the_reconstruction() -> None:
    network = tiny_pretrainer(weight=5.0).eval()
    views, bad = torch.randn(2, 6, 2, 3, 8, 8)
    changed = torch.rand(6, 2, 1, 8, 8) < 0.5
    one = network(views, bad, changed)
    parts = dict(network.losses)
    assert one.item() == pytest.approx(parts["contrast"] + 5 * parts["reconstruction"], rel=1e-5)
    torch.testing.assert_close(network(views.flip(1), bad.flip(1), changed.flip(1)), one)
    q, k = network.student.compare(bad[:, 0]), network.teacher.compare(views[:, 1])
    other = contrast(network.student.compare(bad[:, 1]), network.teacher.compare(views[:, 0]))
    assert parts["contrast"] == pytest.approx((contrast(q, k) + other).item(), rel=1e-5)


def test_the_teacher_has_no_gradient_drops_nothing_and_follows_by_its_momentum() -> None:
    network = tiny_pretrainer().train().double()
    changed = torch.ones(4, 2, 1, 8, 8, dtype=torch.bool)
    views = torch.randn(4, 2, 3, 8, 8).double()
    network(views, views, changed).backward()
    assert all(p.grad is None and not p.requires_grad for p in network.teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in network.student.parameters())
    torch.testing.assert_close(network.teacher.compare(views[:, 0]), network.teacher.compare(views[:, 0]))
    average = MovingAverage(network.student, MOMENTUM, into=network.teacher)
    before = [p.detach().clone() for p in network.teacher.parameters()]
    with torch.no_grad():
        for p in network.student.parameters():
            p.add_(torch.randn_like(p))
    average.update(0.9)
    pairs = zip(network.teacher.parameters(), network.student.parameters(), strict=True)
    for old, (teacher, student) in zip(before, pairs, strict=True):
        torch.testing.assert_close(teacher.detach(), 0.9 * old + 0.1 * student.detach(), atol=1e-7, rtol=0)


def test_the_momentum_rises_from_0_996_to_1_as_a_cosine() -> None:
    assert momentum(0.0) == pytest.approx(0.996)
    assert momentum(0.5) == pytest.approx(0.998)
    assert momentum(1.0) == 1.0


# --- rotations ---


def test_images_are_turned_by_the_quarters_they_are_asked_for() -> None:
    x = torch.arange(2 * 9.0).view(1, 2, 3, 3).repeat(4, 1, 1, 1)
    y = turned(x, torch.arange(4))
    # Counter-clockwise: the right column comes to lie on top.
    assert torch.equal(y[1, :, 0], x[1, :, :, 2])
    assert torch.equal(y[2], x[2].flip(1, 2))
    assert torch.equal(turned(y, -torch.arange(4) % 4), x)


def test_views_are_turned_before_they_are_corrupted_and_all_four_ways() -> None:
    spec, meta = (
        {"img_size": (8, 8), "in_chans": 1, "num_classes": 2},
        {"mean": [0.0], "std": [1.0], "classes": ["a", "b"]},
    )
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(60, 1, 1, 1) * 3
    split = Split((images,), torch.zeros(60, dtype=torch.long))
    task = Views(spec, meta, rotations=True)
    (views, bad, changed, turns), _ = task.batch(split, torch.arange(60), train=True, generator=draw())
    assert turns.shape == (60, 2)
    assert {int(n) for n in turns.unique()} == {0, 1, 2, 3}
    # Both views of an image are turned by themselves.
    assert 5 < int((turns[:, 0] == turns[:, 1]).sum()) < 30
    assert torch.equal(torch.where(changed, views, bad), views)
    # Rows are brighter further down; turned back, they are again. A second view may be solarised.
    for i, share in ((0, 0.95), (1, 0.7)):
        for x, rises in ((views[:, i], False), (turned(views[:, i], -turns[:, i] % 4), True)):
            rows = x[:, 0].mean(2)
            assert bool((rows[:, -1] > rows[:, 0] + 0.05).float().mean() > share) == rises
    with pytest.raises(ValueError, match=r"only square images .*8x9"):
        Views({**spec, "img_size": (8, 9)}, meta, rotations=True)


def test_with_rotations_the_losses_are_weighed_by_what_is_learnt_of_their_uncertainty() -> None:
    torch.manual_seed(0)
    model = create_model("sit_tiny", **TINY, img_size=8)
    network = Pretrainer(SiT(model, hidden=12, out=5, rotations=True)).eval()
    views, bad = torch.randn(2, 6, 2, 3, 8, 8)
    changed, turns = torch.rand(6, 2, 1, 8, 8) < 0.5, torch.randint(4, (6, 2))
    with torch.no_grad():
        network.spread.copy_(torch.tensor([0.3, -0.7, 1.1]))
    loss = network(views, bad, changed, turns)
    rotation = 0.0
    for i in (0, 1):
        scores = network.student(bad[:, i])[2].log_softmax(-1)
        rotation -= float(scores[torch.arange(6), turns[:, i]].mean()) / 2
    found = network.losses
    assert found["rotation"] == pytest.approx(rotation, rel=1e-5)
    parts = zip((0.3, -0.7, 1.1), (found["contrast"], found["reconstruction"], rotation), strict=True)
    assert loss.item() == pytest.approx(sum(math.exp(-s) * part + s for s, part in parts), rel=1e-5)
    loss.backward()
    # Where exp(s) is below a loss, s grows.
    wanted = [math.exp(s) < found[name] for s, name in zip((0.3, -0.7, 1.1), found, strict=True)]
    assert [bool(g < 0) for g in network.spread.grad] == wanted


def test_turns_are_learnt(tmp_path, digits) -> None:
    torch.manual_seed(0)
    # Brighter from row to row: a look tells how such an image is turned.
    ramp = torch.arange(0, 256, 32).view(8, 1) // 2 + torch.randint(128, (256, 1, 8, 8))
    images = replace(digits.train, inputs=(ramp.to(torch.uint8),), targets=digits.train.targets[:256], names=None)
    model = create_model("sit_tiny", **digits.spec, dim=32, depth=1, heads=2, patch=2, drop_path=0.0)
    init_by_width(model)
    settings = {"precision": "float32", "batch_size": 32, "lr": 3e-3}
    words = {"epochs": 8, "share": 0.25, "replaced": 0.1, "hidden": 64, "settings": settings}
    result = pretrain(model, replace(digits, train=images), tmp_path, rotations=True, **words)
    assert set(result["last"]) == {"contrast", "reconstruction", "rotation"}
    # By chance: log 4 = 1.39.
    assert result["first"]["rotation"] > 1.2
    assert result["last"]["rotation"] < 1.3
    assert result["last"]["reconstruction"] < result["first"]["reconstruction"]


# --- views ---


def test_views_are_drawn_by_the_generator_and_keep_their_range(digits) -> None:
    x = torch.rand(5, 3, 18, 14)
    one, two = (view_of(x, second=True, flip=True, generator=draw(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == x.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert not torch.equal(one, view_of(x, second=False, flip=True, generator=draw(4)))
    task = Views(digits.spec, digits.meta)
    (views, bad, changed), _ = task.batch(digits.train, torch.arange(6), train=True, generator=draw())
    assert views.shape == bad.shape == (6, 2, 1, 8, 8)
    assert torch.equal(views.masked_fill(changed, 0), bad.masked_fill(changed, 0))
    assert not torch.equal(views[:, 0], views[:, 1])
    (plain,), _ = task.batch(digits.train, torch.arange(6))
    torch.testing.assert_close(task.normalise_unit(digits.train.inputs[0][:6].float() / 255), plain)


def test_a_cut_shows_a_part_of_the_image_and_is_mirrored_only_where_allowed() -> None:
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    for flip in (False, True):
        y = cut_out(ramp, flip, draw())
        slope = (y[:, 0, 16, 20] - y[:, 0, 16, 10]) * 31 / 10
        # A cut of share s shows the ramp s ** 0.5 times as steep, or a little more or less by its shape.
        assert float(slope.abs().min()) > 0.2**0.5 * 0.8
        assert float(slope.abs().max()) < 1.05
        assert bool((slope < 0).any()) == flip


# --- the whole ---


def test_pretraining_lowers_its_losses_and_improves_the_features(tmp_path, digits) -> None:
    torch.manual_seed(0)
    model = create_model("sit_tiny", **digits.spec, dim=32, depth=2, heads=2, patch=2, drop_path=0.0)
    init_by_width(model)
    settings = {"precision": "float32", "batch_size": 32, "lr": 3e-3}
    digits = replace(digits, val=digits.test)  # more images to ask for neighbours
    result = pretrain(model, digits, tmp_path, epochs=5, share=0.25, replaced=0.1, hidden=128, settings=settings)
    assert result["steps"] == 5 * (len(digits.train) // 32)
    assert result["last"]["reconstruction"] < 0.8 * result["first"]["reconstruction"]
    assert result["last"]["contrast"] < result["first"]["contrast"]
    assert result["neighbours"]["after"] > result["neighbours"]["before"] + 0.03
    assert all(p.requires_grad for p in model.parameters())
    # The same call finds it done, and gives the same weights to a new model.
    torch.manual_seed(1)
    again = create_model("sit_tiny", **digits.spec, dim=32, depth=2, heads=2, patch=2)
    assert pretrain(again, digits, tmp_path, epochs=5) == result
    for name, value in again.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, model.state_dict()[name])


def test_a_run_cut_in_two_ends_as_one_that_was_not(tmp_path, digits, monkeypatch) -> None:
    import gossamer.train.pretrain as module

    class Stop(Exception):
        pass

    def stop(step: int, total: int, losses: dict[str, float]) -> None:
        if step == 9:
            raise Stop

    def run(out, **options):
        torch.manual_seed(0)
        model = create_model("sit_tiny", **digits.spec, **{**TINY, "patch": 2})
        settings = {"precision": "float32", "batch_size": 256}
        return model, pretrain(model, digits, out, epochs=3, hidden=16, settings=settings, **options)

    whole, _ = run(tmp_path / "whole")
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(Stop):
        run(tmp_path / "cut", note=stop)
    assert (tmp_path / "cut" / "last.pt").exists()
    cut, result = run(tmp_path / "cut")
    assert result["steps"] == 15
    assert not (tmp_path / "cut" / "last.pt").exists()
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_begins_with_what_was_learnt_without_labels(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "pretrain_model", partial(pretrain, hidden=16))
    args = dict(
        epochs=1,
        pretrain=1,
        settings={"precision": "float32", "batch_size": 128},
        model_options={"dim": 16, "depth": 1, "heads": 2, "patch": 4},
        quiet=True,
    )
    result = train_model("sit_tiny", "digits", out=tmp_path, **args)
    assert result["pretrain"].keys() == {"before", "after", "contrast", "reconstruction", "epochs"}
    assert (tmp_path / "pretrain" / "backbone.safetensors").exists()
    assert train_model("sit_tiny", "digits", out=tmp_path, **args) == result
    with pytest.raises(ValueError, match="another pretrain"):
        train_model("sit_tiny", "digits", out=tmp_path, **{**args, "pretrain": 2})


def test_what_cannot_be_pretrained_is_refused(tmp_path, digits) -> None:
    with pytest.raises(ValueError, match="class token"):
        pretrain(create_model("cct_2_3x2_32", **digits.spec), digits, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="reads images, not text-classification"):
        pretrain(nn.Identity(), read_dataset("toy-text"), tmp_path, epochs=1)


def test_the_nearest_neighbours_know_what_the_features_tell(digits) -> None:
    class Told(nn.Module):
        """Features that are the answer: the sum of the pixels picks a direction of its own for each image."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def encode(self, x):
            return (x.flatten(1) * self.scale)[:, None], None

    task = Views(digits.spec, digits.meta)
    assert neighbours_accuracy(Told(), task, digits) > 0.9


def test_the_command_hands_over_its_epochs(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("gossamer.train.train_model", lambda *words, **options: asked.append(options) or {})
    words = ["train", "sit_tiny", "digits", "--out", str(tmp_path), "--json"]
    for more in ([], ["--pretrain", "40"]):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
    assert [options["pretrain"] for options in asked] == [0, 40]
