"""The loop: schedules, averages, teaching, and a run that is cut in two."""

import math

import pytest
import torch
from torch import nn

from gossamer.data import read_dataset
from gossamer.models import create_model
from gossamer.tasks import create_task
from gossamer.train import Diverged, Settings, Trainer
from gossamer.train.ema import MovingAverage
from gossamer.train.settings import build_optimiser, schedule_factor


@pytest.fixture(scope="module")
def digits():
    data = read_dataset("digits")
    return data, create_task(data.task, data.spec, data.meta)


def tiny(data, **options):
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16_224", **data.spec, patch=2, dim=16, depth=2, heads=2, drop=0.1, drop_path=0.2, **options
    )


def trainer(digits, **settings):
    data, task = digits
    return Trainer(tiny(data), task, data, Settings(batch_size=32, **{"precision": "float32", **settings}))


def test_a_run_cut_in_two_equals_a_run_in_one(digits, tmp_path):
    whole = trainer(digits)
    losses = []
    whole.train(steps=8, schedule="cosine", on_step=losses.append)
    first, second = trainer(digits), trainer(digits)
    parts = []
    first.train(steps=8, schedule="cosine", on_step=parts.append, stop=lambda: first.steps == 5)
    first.save(tmp_path / "state.pt", note="half")
    assert second.load(tmp_path / "state.pt") == {"note": "half"}
    second.train(steps=8, schedule="cosine", on_step=parts.append)
    assert parts == losses
    for a, b in zip(whole.ema.average, second.ema.average, strict=True):
        assert torch.equal(a, b)


def test_training_learns_digits(digits):
    data, task = digits
    torch.manual_seed(0)
    model = create_model("cct_2_3x2_32", **data.spec, dim=32, convs=1)
    run = Trainer(model, task, data, Settings(batch_size=32, lr=5e-3, warmup=5, strength=0.0, precision="float32"))
    first = run.train(steps=5)
    run.begin_phase()
    assert run.train(steps=90) < 0.8 * first
    assert run.evaluate(data.val)["accuracy"] > 0.6


def test_the_automatic_precision_takes_turns_and_then_keeps_one(digits):
    run = trainer(digits, precision="auto")
    run.train(steps=20)
    assert run.chosen
    assert run.precision in ("float32", "bfloat16")
    assert all(len(times) == 7 for times in run._tried.values())


def test_a_loss_that_is_no_number_ends_the_run(digits):
    run = trainer(digits)
    with torch.no_grad():
        run.model.head.fc.weight.fill_(math.nan)
    with pytest.raises(Diverged, match="step 0"):
        run.train(steps=3)


def test_evaluation_uses_the_average_and_leaves_the_weights_alone(digits):
    run = trainer(digits)
    run.train(steps=3)
    before = [p.clone() for p in run.model.parameters()]
    with run.averaged():
        held = [p.clone() for p in run.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_the_average_follows_its_formula():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average = MovingAverage(layer, 0.5)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    average.update()  # d = min(0.5, 2/11)
    expected = 2 / 11 * 1 + 9 / 11 * 2
    assert average.average[0].item() == pytest.approx(expected)
    average.update()  # d = min(0.5, 3/12)
    assert average.average[0].item() == pytest.approx(0.25 * expected + 0.75 * 2)


@pytest.mark.parametrize(
    ("schedule", "progress", "epoch", "factor"),
    [
        ("stable", 0.7, 3, 1.0),
        ("linear", 0.25, 0, 0.75),
        ("linear", 1.5, 0, 0.0),
        ("cosine", 0.5, 0, 0.5),
        ("halve", 0.9, 0, 1.0),
        ("halve", 0.9, 1, 1.0),  # the official code halves after the second epoch first
        ("halve", 0.1, 3, 0.25),
    ],
)
def test_schedules_have_their_textbook_values(schedule, progress, epoch, factor):
    assert schedule_factor(schedule, progress, epoch) == pytest.approx(factor)


def test_weight_decay_is_for_matrices_only(digits):
    model = tiny(digits[0])
    decayed, free = build_optimiser(model, Settings()).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert {"stem.positions", "stem.tokens", "norm.weight", "head.fc.bias"} <= {names[id(p)] for p in free["params"]}


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="lr must be positive"):
        Settings(lr=0)
    with pytest.raises(ValueError, match="strength must be in"):
        Settings(strength=1.5)
