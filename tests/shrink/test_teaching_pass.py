"""Teaching as a pass: evenly spaced blocks of the teacher stay, learn, and are all that has to be saved."""

import copy

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes import teaching as file
from gossamer.train.teaching import SIGNALS, Teaching
from shrink.loading import same_after_loading
from shrink.toys import digits, encoder, learned, texts, vision
from train.test_teaching import KINDS, built, data_for


@pytest.fixture(scope="module")
def reading():
    calibration = texts()
    return calibration, learned(encoder(depth=4), calibration, steps=80)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_its_teacher_with_blocks_passed_over(kind, tmp_path):
    calibration = data_for(kind)
    net = built(kind, depth=6)
    shrunk, steps = run_pass("teaching", net, calibration, keep=0.5, epochs=0)
    stage = "stages.0" if kind == "swin" else "blocks"
    # Windows shift in turn still; elsewhere first and last stay.
    gone = [5, 2, 1] if kind == "swin" else [4, 2, 1]
    want = [{"step": "axformer.drop", "part": f"{stage}.{i}"} for i in gone]
    assert steps == ([{"step": "axformer.drop", "part": "stages.1.1"}, *want] if kind == "swin" else want)
    x = calibration.example(3)
    passed_over = copy.deepcopy(net)
    for step in steps:
        block = passed_over.get_submodule(step["part"])
        block.forward = lambda x, **_: x
    with torch.no_grad():
        torch.testing.assert_close(shrunk(*x), passed_over(*x), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(shrunk(*x), net(*x), atol=1e-2)
    fresh = create_model(**net.config)
    recipe.replay(fresh, steps)
    fresh.load_state_dict(shrunk.state_dict())
    assert macs(shrunk, calibration.example(1)).total < 0.6 * macs(net, calibration.example(1)).total
    if kind in ("swin", "llama"):
        same_after_loading(shrunk, x, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_taught_by_every_signal(kind, tmp_path):
    calibration = data_for(kind)
    net = built(kind)
    shrunk, _ = run_pass("teaching", net, calibration, keep=0.5, signals=SIGNALS, epochs=0.01)
    untaught, _ = run_pass("teaching", net, calibration, keep=0.5, epochs=0)
    assert shrunk.state_dict().keys() == untaught.state_dict().keys()
    moved = [k for k, v in shrunk.state_dict().items() if not torch.equal(v, untaught.state_dict()[k])]
    assert any(".mixer.qkv.weight" in k for k in moved)
    x = calibration.example(2)
    assert export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast").passed


def test_teaching_brings_back_what_the_dropped_blocks_did(tmp_path):
    calibration = digits()
    net = learned(vision(depth=4), calibration, steps=150, lr=5e-3)
    untaught, _ = run_pass("teaching", net, calibration, keep=0.5, epochs=0)
    shrunk, steps = run_pass("teaching", net, calibration, keep=0.5, signals=SIGNALS, epochs=1.5, lr=2e-3)
    assert len(steps) == len(untaught.blocks) == len(shrunk.blocks) == 2
    inputs, _ = next(calibration.batches(64, batch_size=64, split="val"))
    far = []
    for student in (untaught, shrunk):
        parts = Teaching(["features", "relations"], student, net, calibration.task).compare(student, inputs)
        with torch.no_grad():
            far.append([float(x) for x in (calibration.task.teaching(student(*inputs), net(*inputs)), *parts.values())])
    assert all(after < 0.8 * before for before, after in zip(*far, strict=True)), far
    assert calibration.score(shrunk) > calibration.score(untaught) + 0.1
    x = calibration.example(5)
    same_after_loading(shrunk, x, tmp_path)
    certificate = export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"


def test_a_model_whose_time_is_over_is_cut_but_not_taught(reading):
    calibration, net = reading
    short = copy.copy(calibration)
    short.seconds = 0.0
    shrunk, _ = run_pass("teaching", net, short, keep=0.5)
    untaught, _ = run_pass("teaching", net, calibration, keep=0.5, epochs=0)
    for key, value in untaught.state_dict().items():
        assert torch.equal(value, shrunk.state_dict()[key])


def test_keeping_all_changes_nothing(reading):
    calibration, net = reading
    same, steps = run_pass("teaching", net, calibration, keep=1.0)
    assert steps == []
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("count", "stay", "want"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (6, 3, [0, 3, 5]), (6, 1, [0]), (4, 4, [0, 1, 2, 3]), (12, 2, [0, 11])],
)
def test_blocks_that_stay_are_evenly_spaced(count, stay, want):
    """For 12 to 6 they are the layers the DistilBERT authors start from."""
    assert file.spaced([None] * count, stay) == want
    turns = [i % 2 == 1 for i in range(count)]
    chosen = file.spaced(turns, stay)
    assert [turns[i] for i in chosen] == turns[:stay]
    assert chosen == sorted(set(chosen))


def refused(net, calibration, message, **settings):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Unsupported, match=message):
        file.teaching(net, calibration, **settings)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not getattr(net, "recipe", [])


def test_what_cannot_be_taught_is_refused_and_left_as_it_was():
    calibration = digits()
    refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), calibration, "Sequential has no residual blocks")
    refused(vision(depth=1), calibration, "keep=0.5 takes no block of Isotropic: its stages have 1")
    sizes = {"img_size": (32, 32), "in_chans": 1, "num_classes": 10}
    convnext = create_model("convnext_tiny", **{**sizes, "dims": (8, 16, 16, 16), "depths": (2, 1, 1, 2)})
    large = copy.copy(calibration)
    large.example = lambda count: (torch.randn(count, 1, 32, 32),)
    refused(convnext, large, "show no queries, keys and values", signals=["relations"])

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = vision(depth=2)
            self.blocks = self.net.blocks

        def forward(self, x):
            x, _ = self.net.stem(x)
            for i in range(2):
                x = self.blocks[i](x)
            return self.net.head(x, None)

    refused(Counting(), calibration, r"Counting does not run without net.blocks.1")
    merged, _ = run_pass("merging", vision(depth=4), calibration, keep=0.7)
    before = list(merged.recipe)
    with pytest.raises(Unsupported, match="changes how many tokens there are"):
        file.teaching(merged, calibration, signals=["gram"])
    assert merged.recipe == before
    assert len(merged.blocks) == 4
    taught, _ = run_pass("teaching", merged, calibration, epochs=0.02)
    assert len(taught.blocks) == 2


def test_an_objective_for_recovery_is_tried_before_it_is_used(reading):
    calibration, net = reading
    student, _ = run_pass("magnitude", net, calibration, keep=0.6)
    inputs = calibration.example(3)
    loss = file.objective(["logits", "features", "relations"], student, net, calibration.task, inputs=inputs)
    calibration.trainer(copy.deepcopy(student), objective=loss, ema=0.98).train(steps=2)
    with pytest.raises(Unsupported, match=r"attention: blocks.\d has \d heads, blocks.\d of the teacher 4"):
        file.objective(["attention"], student, net, calibration.task, inputs=inputs)
    with pytest.raises(ValueError, match="signals must be among"):
        file.objective(["answers"], student, net, calibration.task)


def test_settings_that_make_no_sense_are_refused(reading):
    calibration, net = reading
    for settings, message in (
        ({"keep": 0.0}, "keep must be in"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"signals": ["answers"]}, "signals must be among"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pass("teaching", net, calibration, **settings)
