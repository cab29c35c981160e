"""The pass that suits a model: the one that loses least for what it saves."""

import copy
import math

import pytest
from tests.shrink.toys import digits, learned, texts, vision
from torch import nn

from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.shrink import ways
from gossamer.shrink.base import Calibration, run_pass


@pytest.fixture(scope="module")
def seeing():
    calibration = digits()
    return calibration, learned(vision(depth=4), calibration, steps=80, lr=5e-3)


@pytest.fixture(autouse=True)
def two(monkeypatch):
    monkeypatch.setattr(ways, "TRIED", ("magnitude", "depth"))
    monkeypatch.setattr(ways, "SETTINGS", {"depth": {"cost": "macs"}})


def test_idle_blocks_go_where_there_are_some(seeing):
    calibration, net = seeing
    idle = copy.deepcopy(net)
    for i in (1, 2):
        for part in (idle.blocks[i].mixer.proj, idle.blocks[i].mlp.fc2):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    calibration = Calibration(calibration.task, calibration.data)
    model, entry = ways.kindest(idle, calibration, keep=0.55, enough=lambda: False)
    assert entry == {"pass": "depth", "keep": 0.55, "cost": "macs"}
    assert len(model.blocks) == 2


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_the_price_decides(seeing, keep):
    calibration, net = seeing
    one, before = calibration.example(), calibration.score(net)
    prices = {}
    for name, settings in (("magnitude", {}), ("depth", {"cost": "macs"})):
        small, _ = run_pass(name, net, Calibration(calibration.task, calibration.data), keep=keep, **settings)
        loss = max(0.0, before - calibration.score(small)) / before
        prices[name] = (loss + 0.002) / -math.log(macs(small, one).total / macs(net, one).total)
    fresh = Calibration(calibration.task, calibration.data)
    _, entry = ways.kindest(net, fresh, keep=keep, enough=lambda: False)
    assert entry["pass"] == min(prices, key=prices.get)


def test_one_pass_is_tried_however_short_the_time(seeing):
    calibration, net = seeing
    model, entry = ways.kindest(net, Calibration(calibration.task, calibration.data), keep=0.6, enough=lambda: True)
    assert entry == {"pass": "magnitude", "keep": 0.6}
    assert model is not net


def test_a_model_no_pass_can_handle_gives_nothing():
    bag = create_model("bag_of_words", vocab_size=24, max_len=12, num_classes=2)
    assert ways.kindest(bag, texts(), keep=0.6, enough=lambda: False) is None
