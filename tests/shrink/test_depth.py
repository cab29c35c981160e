"""Depth: what does nothing goes first, the budget is met, blocks leave whole, and what was not needed comes back."""

import copy
import itertools

import pytest
import torch
from tests.shrink.loading import same_after_loading
from tests.shrink.toys import digits, encoder, learned, texts, vision
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx
from gossamer.layers.absent import Absent
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.passes import depth as module
from gossamer.shrink.passes.axformer import branches_of
from gossamer.tasks import create_task


@pytest.fixture(scope="module")
def seeing():
    calibration = digits()
    return calibration, learned(vision(depth=4), calibration, steps=80, lr=5e-3)


def share(calibration, small, net):
    one = calibration.example()
    return macs(small, one).total / macs(net, one).total


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.4])
def test_the_budget_of_multiply_adds_is_met_and_nothing_of_it_wasted(seeing, keep):
    calibration, net = seeing
    small, steps = run_pass("depth", net, calibration, keep=keep, cost="macs", samples=128)
    assert steps
    assert share(calibration, small, net) <= keep + 1e-6
    assert small.shrink_report["depth"]["share"] == pytest.approx(share(calibration, small, net), abs=0.01)
    assert share(calibration, small, net) > keep - 0.12  # an MLP is less than that


def test_a_branch_and_a_block_that_do_nothing_go_first(seeing):
    calibration, net = seeing
    idle = copy.deepcopy(net)
    for part in (idle.blocks[1].mlp.fc2, idle.blocks[3].mixer.proj, idle.blocks[3].mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    calibration = Calibration(calibration.task, calibration.data)
    x = calibration.example(16)
    whole = macs(idle, calibration.example()).total
    small, steps = run_pass("depth", idle, calibration, keep=0.66, cost="macs", samples=64)
    assert [s["part"] for s in steps] == ["blocks.1.mlp", "blocks.3"]
    assert macs(small, calibration.example()).total <= 0.66 * whole
    assert len(small.blocks) == 3
    assert small.blocks[1].mlp is None
    with torch.no_grad():
        torch.testing.assert_close(small(*x), idle(*x), atol=1e-5, rtol=0)
    assert small.shrink_report["depth"]["distance"] < 1e-8


def test_of_single_elements_the_one_with_least_harm_for_its_cost_goes_as_brute_force_finds(seeing):
    calibration, net = seeing
    search = module._Search(
        copy.deepcopy(net).eval(),
        Calibration(calibration.task, calibration.data),
        {f"blocks.{i}": b for i, b in enumerate(net.blocks)},
        64,
        "macs",
    )
    one, (inputs, _) = calibration.example(), next(calibration.batches(64, batch_size=64))
    best = None
    with torch.no_grad():
        for i, leaf in itertools.product(range(4), ("mixer", "mlp", "")):
            cut = copy.deepcopy(net).eval()
            if leaf:
                setattr(cut.blocks[i], leaf, Absent())
            else:
                del cut.blocks[i]
            rise = float(calibration.task.teaching(cut(*inputs), net(*inputs)))
            price = rise / (1 - macs(cut, one).total / macs(net, one).total)
            best = min(best or (price, ""), (price, f"blocks.{i}.{leaf}".rstrip(".")))
    search.run(0.999)
    assert {e.part for e in search.gone} == {best[1]}


def test_by_latency_what_the_clock_says_decides(seeing, monkeypatch):
    calibration, net = seeing
    calibration = Calibration(calibration.task, calibration.data)

    def told(model, one, folder):
        """Attention is nearly all of the time, whatever the multiply-adds say."""

        def now():
            there = [leaf for block in model.blocks if hasattr(block, "mixer") for leaf in branches_of(block)]
            return (0.23 * there.count("mixer") + 0.02 * there.count("mlp")) / (4 * 0.25)

        return now

    monkeypatch.setattr(module, "_latency_share", told)
    small, _ = run_pass("depth", net, calibration, keep=0.7, samples=64)
    gone = [e for e in small.shrink_report["depth"]["gone"] if not e.endswith("mlp")]
    assert len(gone) == 2  # attentions, alone or with their blocks


def test_the_exported_file_is_what_is_timed(seeing):
    calibration, net = seeing
    small, steps = run_pass("depth", net, Calibration(calibration.task, calibration.data), keep=0.5, samples=64)
    assert steps
    assert small.shrink_report["depth"]["share"] <= 0.5


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("swin_t", {"patch": 4, "embed_dim": 8, "depths": (2, 2), "heads": (1, 2), "window": 2}),
        ("poolformer_s12", {"dims": (8, 16, 16, 16), "depths": (1, 2, 1, 1)}),
        ("convnext_t", {"dims": (8, 16, 16, 16), "depths": (1, 2, 1, 1)}),
    ],
)
def test_of_each_stage_of_a_pyramid_a_block_stays(name, sizes):
    spec = {"img_size": (32, 32), "in_chans": 3, "num_classes": 4}
    images = [Split((torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8),), torch.arange(8) % 4) for _ in "abc"]
    data = Dataset(
        "image-classification", *images, spec, {"classes": list("abcd"), "mean": [0.5] * 3, "std": [0.2] * 3}
    )
    calibration = Calibration(create_task(data.task, spec, data.meta), data)
    torch.manual_seed(0)
    net = create_model(name, **spec, **sizes).eval()
    lists = sorted({n.rpartition(".")[0] for n, _ in module.blocks_of(net)})
    small, steps = run_pass("depth", net, calibration, keep=0.05, cost="macs", samples=8)
    assert steps
    for held in lists:
        assert len(small.get_submodule(held)) >= 1
    assert small(*calibration.example(2)).shape == (2, 4)


def test_a_text_encoder_keeps_its_norms_and_the_padding_its_silence(tmp_path):
    calibration = texts()
    net = encoder(depth=3).eval()
    small, steps = run_pass("depth", net, calibration, keep=0.5, cost="macs", samples=64)
    assert steps
    ids = calibration.example(8)[0]
    longer = nn.functional.pad(ids[:, :10].masked_fill(torch.arange(10) >= 6, 0), (0, 2))
    with torch.no_grad():
        torch.testing.assert_close(small(longer[:, :8]), small(longer), atol=1e-5, rtol=0)
    same_after_loading(small, ids, tmp_path)


def test_saved_loaded_exported_it_is_the_same(seeing, tmp_path):
    calibration, net = seeing
    small, _ = run_pass("depth", net, calibration, keep=0.5, cost="macs", samples=64)
    x = calibration.example(3)
    same_after_loading(small, x, tmp_path)
    certificate = export_onnx(small, x, tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"


def test_keeping_all_changes_nothing_and_what_it_cannot_take_is_left_as_it_was(seeing):
    calibration, net = seeing
    same, steps = run_pass("depth", net, calibration, keep=1.0)
    assert steps == []
    assert same.state_dict().keys() == net.state_dict().keys()
    bag = create_model("bag_of_words", vocab_size=24, max_len=12, num_classes=2)
    before = copy.deepcopy(bag.state_dict())
    with pytest.raises(Unsupported, match="no residual blocks"):
        run_pass("depth", bag, texts(), keep=0.5)
    assert all(torch.equal(v, before[k]) for k, v in bag.state_dict().items())
    for settings, message in (({"keep": 0}, "keep"), ({"samples": 0}, "samples")):
        with pytest.raises(ValueError, match=message):
            run_pass("depth", net, calibration, **settings)


def test_a_second_strength_times_nothing_again(seeing, monkeypatch):
    calibration, net = seeing
    calibration = Calibration(calibration.task, calibration.data)
    run_pass("depth", net, calibration, keep=0.8, cost="macs", samples=32)
    monkeypatch.setattr(module, "_macs_share", lambda *_: pytest.fail("measured again"))
    _small, steps = run_pass("depth", net, calibration, keep=0.5, cost="macs", samples=32)
    assert steps


def test_what_a_disturbed_clock_says_adds_up_to_no_more_than_the_model(seeing, monkeypatch):
    calibration, net = seeing
    monkeypatch.setattr(module, "_latency_share", lambda *_: lambda: 0.4)
    small, _ = run_pass("depth", net, Calibration(calibration.task, calibration.data), keep=0.5, samples=32)
    # Eight branches at 60 % each would be met by one; at an eighth each, half of them have to go.
    assert sum(len(branches_of(block)) for block in small.blocks) == 4
    assert small.shrink_report["depth"]["share"] == pytest.approx(0.5)
