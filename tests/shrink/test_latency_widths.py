"""Widths on the steps of a (faked) latency, chosen as brute force would."""

import itertools
import math

import pytest
import torch
from tests.shrink.loading import same_after_loading
from tests.shrink.toys import digits, encoder, texts, vision

from gossamer.io import export_onnx
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.costs import Staircase
from gossamer.shrink.masks import members
from gossamer.shrink.passes.latency_widths import latency_widths

HEADS = Staircase((1, 2, 3, 4), (0.9, 1.0, 1.9, 2.0))
HIDDEN = Staircase((16, 24, 32, 40, 48, 56, 64), (1.0, 1.6, 1.5, 2.4, 2.2, 3.1, 3.0))


@pytest.fixture
def faked(monkeypatch):
    """All parts cost the same, by tables: no clock is read."""

    def stairs(model, inputs, widths, **_):
        return {m: HEADS if m[1] == "heads" else HIDDEN for m in widths}

    monkeypatch.setattr("gossamer.shrink.passes.latency_widths.staircases", stairs)
    return stairs


def cost(net, axes=None):
    return sum((HEADS if axis == "heads" else HIDDEN)(n) for (_, axis), n in members(net).items())


@pytest.mark.parametrize("scores", ["magnitude", "optin"])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.45])
def test_widths_land_on_steps_within_the_budget(faked, scores, keep):
    net, calibration = encoder().eval(), texts()
    small, steps = run_pass("latency_widths", net, calibration, keep=keep, scores=scores, samples=16)
    assert steps
    assert cost(small) <= keep * cost(net)
    for (_, axis), width in members(small).items():
        assert width in [w for w, _ in (HEADS if axis == "heads" else HIDDEN).steps()]
    assert small.shrink_report["latency_widths"]["latency_share"] == pytest.approx(cost(small) / cost(net))


def test_the_choice_equals_brute_force_and_never_falls_with_the_budget(faked):
    net, calibration = encoder().eval(), texts()
    with torch.no_grad():  # parts that differ in how much of them matters
        net.blocks[0].mlp.fc2.weight[:, 10:] *= 0.05
        net.blocks[1].mixer.proj.weight[:, :16] *= 0.1
    sizes = members(net)
    energy = {m: net.get_submodule(m[0]).importance(m[1]).square().sort(descending=True).values for m in sizes}

    def worth(m, width):
        full = (HEADS if m[1] == "heads" else HIDDEN)(sizes[m])
        return full * math.log(float(energy[m][:width].sum() / energy[m].sum()))

    kept = []
    for keep in (0.4, 0.5, 0.65, 0.8):
        small, _ = run_pass("latency_widths", net, calibration, keep=keep, reconstruct=False)
        chosen = members(small)
        every = []
        for pick in itertools.product(
            *[range(1, n + 1) if m[1] == "heads" else range(8, n + 1, 8) for m, n in sizes.items()]
        ):
            spent = sum((HEADS if m[1] == "heads" else HIDDEN)(w) for m, w in zip(sizes, pick, strict=True))
            if spent <= keep * cost(net):
                every.append(sum(worth(m, w) for m, w in zip(sizes, pick, strict=True)))
        kept.append(sum(worth(m, chosen[m]) for m in sizes))
        # Widths between steps can be worth more only where they cost no more, within the noise of a step.
        assert kept[-1] == pytest.approx(max(every), rel=0.05)
    assert kept == sorted(kept)


def test_units_that_do_nothing_go_first(faked):
    net, calibration = vision().eval(), digits()
    with torch.no_grad():
        for block in net.blocks:
            block.mlp.fc2.weight[:, 5:100] = 0
    monkey = Staircase((32, 64, 128), (1.0, 2.0, 4.0))
    calls = []

    def stairs(model, inputs, widths, **_):
        calls.append(len(inputs[0]))
        return {m: HEADS if m[1] == "heads" else monkey for m in widths}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gossamer.shrink.passes.latency_widths.staircases", stairs)
        small, _ = run_pass("latency_widths", net, calibration, keep=0.7, reconstruct=False)
    assert calls == [1]
    x = calibration.example(4)
    with torch.no_grad():
        widths = members(small)
        assert [n for m, n in widths.items() if m[1] == "hidden"] == [64, 64]
        if all(n == 4 for m, n in widths.items() if m[1] == "heads"):
            torch.testing.assert_close(small(*x), net(*x), atol=1e-5, rtol=1e-5)


def test_a_pruned_model_is_saved_and_exported(faked, tmp_path):
    net, calibration = encoder().eval(), texts()
    small, _ = run_pass("latency_widths", net, calibration, keep=0.6, samples=32)
    export_onnx(small, calibration.example(2), tmp_path / "m.onnx", exporter="fast")
    same_after_loading(small, calibration.example(2), tmp_path)


def test_keeping_all_changes_nothing(faked):
    net, calibration = encoder().eval(), texts()
    same, steps = run_pass("latency_widths", net, calibration, keep=1.0)
    assert steps == []
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), same.state_dict().values(), strict=True))


def test_what_cannot_be_met_is_said_and_nothing_is_changed(faked):
    net, calibration = encoder().eval(), texts()
    with pytest.raises(
        ValueError, match=r"keep must be at least 0\.3\d\d, the narrowest parts' share of latency; got 0.1"
    ):
        latency_widths(net, calibration, keep=0.1)
    with pytest.raises(ValueError, match="keep must be in"):
        latency_widths(net, calibration, keep=0.0)
    pooling = create_model("poolformer_s12", num_classes=3)
    del pooling.stages
    with pytest.raises(Unsupported, match="states a pruning rule"):
        latency_widths(pooling, calibration)
    assert not getattr(net, "recipe", [])
    assert set(members(net).values()) == {4, 64}
