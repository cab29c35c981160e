"""Modules that are not ours are pruned by dependency groups, or left alone with the reason."""

import copy

import pytest
import torch
from torch import nn

from gossamer.data import read_dataset
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.recipe import load
from gossamer.tasks import create_task

pytest.importorskip("torch_pruning", reason="torch-pruning is an extra")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.outer = nn.Conv2d(64, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.first(x)
        x = x + self.outer(self.inner(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def calibration():
    data = read_dataset("digits")
    return Calibration(create_task(data.task, data.spec, data.meta), data)


def test_channels_that_hang_together_go_together_and_the_answer_keeps_its_shape(calibration, tmp_path):
    torch.manual_seed(0)
    net = Residual().eval()
    x = calibration.example(4)
    whole = macs(net, calibration.example()).total
    small, steps = run_pass("dependency", net, calibration, keep=0.4)
    assert small.first.out_channels == small.outer.out_channels < 32  # both ends of the sum
    assert small.inner[1].num_features == small.inner[0].out_channels < 64
    assert small(*x).shape == (4, 10)
    assert macs(small, calibration.example()).total < 0.6 * whole
    assert [s["step"] for s in steps] == ["dependency"]
    save(small, tmp_path)
    again = load(tmp_path, Residual())
    assert torch.equal(again(*x), small(*x))
    with pytest.raises(ValueError, match="module of your own"):
        load(tmp_path)


def test_units_that_do_nothing_go_first(calibration):
    torch.manual_seed(0)
    net = Residual().eval()
    with torch.no_grad():
        for layer in (net.inner[0], net.inner[1]):
            layer.weight[32:] = 0
            layer.bias[32:] = 0
        net.outer.weight[:, 32:] = 0
    small, _ = run_pass("dependency", net, calibration, keep=0.7)
    assert (small.inner[0].weight.flatten(1).norm(dim=1) > 0).sum() == 32 < small.inner[0].out_channels < 64


def test_our_own_parts_and_what_cannot_be_traced_are_refused(calibration):
    ours = create_model("vit_tiny_patch16_224", patch=4, dim=16, depth=1, heads=2, **calibration.data.spec)
    with pytest.raises(Unsupported, match="built of our parts"):
        run_pass("dependency", ours, calibration)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("not today")
            return self.fc(x.flatten(1))

    odd = Odd()
    before = copy.deepcopy(odd.state_dict())
    with pytest.raises(Unsupported, match="cannot be traced"):
        run_pass("dependency", odd, calibration)
    assert all(torch.equal(v, before[k]) for k, v in odd.state_dict().items())
