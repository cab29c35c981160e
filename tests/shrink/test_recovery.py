"""Recovery in rounds: what a round spoils is taken back, the best is held, and a kill costs one round."""

import copy
import math
from functools import partial

import pytest
import torch

from gossamer.data import read_dataset
from gossamer.io import read_json
from gossamer.models import create_model
from gossamer.shrink import recovery
from gossamer.shrink.base import Calibration
from gossamer.shrink.recovery import recover_in_rounds
from gossamer.tasks import create_task


@pytest.fixture
def calibration():
    data = read_dataset("digits")
    return Calibration(create_task(data.task, data.spec, data.meta), data)


@pytest.fixture
def model():
    torch.manual_seed(0)
    spec = read_dataset("digits").spec
    return create_model("vit_tiny_patch16_224", patch=4, dim=16, depth=1, heads=1, **spec)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def score(calibration, model):
    return -float(next(calibration.loss(model.eval(), *batch) for batch in calibration.batches(100, batch_size=100)))


def test_the_model_learns_and_holds_the_best_it_has_been(calibration, model, tmp_path):
    before = score(calibration, model)
    steps = recover_in_rounds(model, tmp_path, seconds=4, make=calibration.trainer, score=partial(score, calibration))
    found = read_json(tmp_path / "rounds.json")
    assert found["score"] == pytest.approx(score(calibration, model))
    assert found["score"] > before
    assert found["score"] == max(r["score"] for r in found["rounds"])
    assert steps == sum(r["steps"] for r in found["rounds"])
    assert [r["rate"] for r in found["rounds"][:3]] == list(recovery.RATES)
    assert 3 < len(found["rounds"]) <= 3 + found["planned"] <= 3 + recovery.ROUNDS
    again = copy.deepcopy(model)
    recover_in_rounds(again, tmp_path, seconds=4, make=calibration.trainer, score=partial(score, calibration))
    assert torch.equal(weights(again), weights(model))


def test_a_round_that_spoils_is_taken_back_and_the_next_is_slower(calibration, model, tmp_path):
    start = weights(model)

    def worse_than_at_first(m):
        return -float((weights(m) - start).abs().sum())

    recover_in_rounds(model, tmp_path, seconds=3, make=calibration.trainer, score=worse_than_at_first)
    assert torch.equal(weights(model), start)
    rates = [r["rate"] for r in read_json(tmp_path / "rounds.json")["rounds"][3:]]
    assert rates[0] == recovery.RATES[0]
    assert rates == pytest.approx([rates[0] / recovery.SLOWER**i for i in range(len(rates))])


def test_weights_that_are_no_numbers_are_not_kept(calibration, model, tmp_path):
    def make(m, **settings):
        wild = {"lr": 1e6, "warmup": 0, "clip": 0.0} if settings["seed"] else {}
        return calibration.trainer(m, **{**settings, **wild})

    start = weights(model)
    recover_in_rounds(model, tmp_path, seconds=2, make=make, score=lambda m: 0.0 if m is model else math.nan)
    assert torch.equal(weights(model), start)


def test_a_killed_recovery_goes_on_with_the_round_it_was_in(calibration, model, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "SAVED_S", 0.0)
    made = []

    def make(m, **settings):
        trainer = calibration.trainer(m, **settings)
        made.append(trainer)
        return trainer

    class Killed(BaseException):
        pass

    def kill_in_the_second():
        noted = tmp_path / "rounds.json"
        if noted.exists() and made[-1].steps >= 3:
            raise Killed
        return False

    copied = {k: v.clone() for k, v in model.state_dict().items()}
    call = partial(recover_in_rounds, model, tmp_path, seconds=5, make=make, score=partial(score, calibration))
    with pytest.raises(Killed):
        call(stop=kill_in_the_second)
    first = read_json(tmp_path / "rounds.json")["rounds"]
    assert len(first) == 1
    model.load_state_dict(copied)
    made.clear()
    # A run that goes on gives what is left of its time: that the first call used some of it is not counted twice.
    call(seconds=2.5)
    found = read_json(tmp_path / "rounds.json")
    assert found["rounds"][:1] == first
    assert made[0].steps > 3
    assert sum(r["seconds"] for r in found["rounds"][1:]) > 1
    assert found["score"] == pytest.approx(score(calibration, model))
