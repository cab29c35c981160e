"""Pruning by the parts' own rules, recipes that replay it, and the speed gate."""

import subprocess
import sys

import pytest
import torch

import gossamer
from gossamer.measure.timing import Latency
from gossamer.models import create_model
from gossamer.shrink import gate, recipe
from gossamer.shrink.passes.magnitude import magnitude, prunable

SMALL = {"img_size": 16, "patch": 4, "dim": 32, "depth": 2, "heads": 4, "num_classes": 3}


def model():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **SMALL).eval()


def test_pruning_what_does_nothing_changes_nothing():
    net = model()
    with torch.no_grad():
        for block in net.blocks:
            block.mlp.fc1.weight[64:] = 0
            block.mlp.fc1.bias[64:] = 0
            block.mixer.qkv.weight[2 * 32 + 16 :] = 0  # the values of heads 2 and 3
            block.mixer.qkv.bias[2 * 32 + 16 :] = 0
    x = torch.randn(2, 3, 16, 16)
    before = net(x)
    magnitude(net, keep=0.5)
    assert set(prunable(net).values()) == {2, 64}
    assert torch.allclose(net(x), before, atol=1e-6)


def test_pruning_keeps_hidden_widths_in_whole_vectors():
    net = model()
    magnitude(net, keep=0.55)
    assert all(width % 8 == 0 for (_, axis), width in prunable(net).items() if axis == "hidden")


def test_a_pruned_model_is_the_same_after_loading_in_a_fresh_process_without_pickle(tmp_path):
    net = model()
    magnitude(net, keep=0.5)
    x = torch.randn(2, 3, 16, 16)
    gossamer.save(net, tmp_path / "m")
    torch.save({"x": x, "y": net(x).detach()}, tmp_path / "io.pt")
    code = (
        "import pickle, sys, torch\n"
        "io = torch.load(sys.argv[1] + '/io.pt', weights_only=True)\n"
        "def refuse(*a, **k): raise RuntimeError('pickle')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        "import gossamer\n"
        "y = gossamer.load(sys.argv[1] + '/m')(io['x'])\n"
        "assert torch.equal(y, io['y']), (y - io['y']).abs().max()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"step": "melt"}, "step must be one of"),
        ({"step": "prune", "part": "norm", "axis": "hidden", "keep": [0]}, "states no pruning rule"),
        ({"step": "prune", "part": "blocks.0.mlp", "axis": "hidden", "keep": [999]}, "keep must hold members"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(step, message):
    with pytest.raises(ValueError, match=message):
        recipe.apply(model(), step)


def test_only_models_made_by_name_can_be_saved(tmp_path):
    with pytest.raises(ValueError, match="not made by create_model"):
        gossamer.save(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="no model folder"):
        gossamer.load(tmp_path / "none")


def timing(median, low, high):
    return Latency(median, low, high, high - low, low, high, 100, 10, True, 1)


@pytest.mark.parametrize(
    ("after", "passed", "word"),
    [
        (timing(0.5, 0.49, 0.51), True, "2.00 times faster"),
        (timing(0.99, 0.95, 1.03), False, "not distinguishable"),
        (timing(1.5, 1.45, 1.55), False, "slower"),
    ],
)
def test_the_gate_opens_only_for_what_is_faster_beyond_the_noise(monkeypatch, after, passed, word):
    before = timing(1.0, 0.98, 1.02)
    monkeypatch.setattr(gate, "latency", lambda forms, budget_s: {"before": before, "after": after})
    verdict = gate.speed_gate(lambda: None, lambda: None)
    assert verdict.passed == passed
    assert word in verdict.why


def test_the_gate_looks_longer_where_noise_may_hide_a_clear_gain(monkeypatch):
    before, hidden, shown = timing(1.0, 0.9, 1.1), timing(0.8, 0.7, 0.95), timing(0.8, 0.78, 0.82)
    budgets = []

    def look(forms, budget_s):
        budgets.append(budget_s)
        return {"before": before, "after": hidden if len(budgets) == 1 else shown}

    monkeypatch.setattr(gate, "latency", look)
    assert gate.speed_gate(lambda: None, lambda: None, seconds=1.0).passed
    assert budgets == [1.0, 4.0]
