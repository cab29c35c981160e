"""AxFormer: what is planted is found, the loss never rises, and what is cut is what was masked."""

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers import Block, Mlp
from gossamer.layers.absent import Absent
from gossamer.measure import macs, parameters
from gossamer.mixers import create_mixer
from gossamer.mixers.hard_attention import HardAttention
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import run_pass
from gossamer.shrink.passes.axformer import axformer
from gossamer.tasks import create_task
from shrink.loading import same_after_loading
from shrink.refusals import refuses
from shrink.toys import digits, encoder, learned, texts, vision


@pytest.fixture(scope="module")
def trained():
    calibration = texts()
    return calibration, learned(encoder(), calibration, steps=45)


@pytest.fixture(scope="module")
def seeing():
    calibration = digits()
    return calibration, learned(vision(depth=3), calibration, steps=120, lr=5e-3)


def validation_loss(calibration, model):
    total = count = 0.0
    with torch.no_grad():
        for inputs, target in calibration.batches(2000, split="val"):
            total += calibration.loss(model.eval(), inputs, target).item() * len(target)
            count += len(target)
    return total / count


def test_a_planted_harmful_mlp_is_found_first_and_the_loss_returns(trained):
    calibration, model = trained
    planted = copy.deepcopy(model)
    want = validation_loss(calibration, model)
    torch.manual_seed(4)
    # Behind the last block, a block that only does harm: its attention gives nothing, its MLP noise.
    block = Block(32, create_mixer("attention", 32, heads=4), Mlp(32, 64), residual="pre")
    nn.init.zeros_(block.mixer.proj.weight)
    nn.init.zeros_(block.mixer.proj.bias)
    for p in block.mlp.parameters():
        nn.init.normal_(p, std=0.4)
    planted.blocks.append(block)
    harmed = validation_loss(calibration, planted)
    assert harmed > 1.5 * want
    steps = axformer(planted, calibration, levels=("branches",), top_k=(), epochs=0)
    assert steps[0]["step"] == "axformer.remove"
    assert steps[0]["part"] == "blocks.2.mlp"
    assert steps[0]["losses"] == pytest.approx([harmed, want], abs=1e-6)
    assert len(planted.blocks) == 2
    assert validation_loss(calibration, planted) <= want + 1e-6


@pytest.mark.parametrize("which", ["text", "image"])
def test_the_loss_never_rises_and_there_is_one_evaluation_an_element(which, trained, seeing):
    calibration, model = trained if which == "text" else seeing
    shrunk, steps = run_pass("axformer", model, calibration, epochs=0, top_k=(8, 4, 2), gamma=0.5)
    report = shrunk.shrink_report["axformer"]
    start, end = report["losses"]
    assert start == pytest.approx(validation_loss(calibration, model), abs=1e-6)
    assert end == pytest.approx(validation_loss(calibration, shrunk), abs=1e-5)
    assert end <= start
    assert report["evaluations"] == 1 + len(report["decisions"])
    names = [d["element"] for d in report["decisions"]]
    assert len(names) == len(set(names))
    assert steps, "nothing at all was found to take out"
    again, _ = run_pass("axformer", model, calibration, epochs=0, top_k=(8, 4, 2), gamma=0.5)
    assert again.recipe == shrunk.recipe
    assert macs(shrunk, calibration.example(1)).total < macs(model, calibration.example(1)).total


# A block of one branch goes by its MLP.
@pytest.mark.parametrize(
    ("residual", "leaf"),
    [(r, leaf) for r in ("pre", "post", "stream") for leaf in ("mixer", "mlp")] + [("single", "mlp")],
)
def test_a_branch_taken_out_is_a_branch_that_gives_zero(residual, leaf):
    torch.manual_seed(0)
    block = Block(
        16, create_mixer("attention", 16, heads=2), Mlp(16, 32), residual=residual, layer_scale=0.5, drop_path=0.3
    )
    holder = nn.ModuleDict({"b": block})
    for norm in (block.norm1, block.norm2):
        if norm is not None:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    x = torch.randn(4, 5, 16)
    silent = copy.deepcopy(block).eval()
    getattr(silent, leaf).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    recipe.apply(holder, {"step": "axformer.remove", "part": f"b.{leaf}"})
    torch.testing.assert_close(holder.eval()["b"](x), silent(x), atol=1e-6, rtol=1e-6)
    assert sum(p.numel() for p in block.parameters()) < sum(p.numel() for p in silent.parameters())
    assert holder.train()["b"](x).shape == x.shape


def cut_by(model, steps):
    """Parameters each part loses, by hand: rows and columns of what was sliced, all of a branch that was taken out."""
    lost = {}
    for step in steps:
        part = model.get_submodule(step["part"])
        if step["step"] == "prune":
            gone = part.widths()[step["axis"]] - len(step["keep"])
            if step["axis"] == "hidden":  # a row of the first product and its bias, a column of the second
                lost[step["part"]] = gone * (part.fc1.in_features + 1 + part.fc2.out_features)
            else:  # of query, key and value rows and biases, and columns behind
                d = part.head_dim
                lost[step["part"]] = gone * (3 * d * (part.dim + 1) + d * part.dim)
        elif step["step"] == "axformer.remove":
            block = model.get_submodule(step["part"].rpartition(".")[0])
            leaf = step["part"].rpartition(".")[2]
            lost[step["part"]] = parameters(part)
            if block.residual == "pre":  # its norm goes with it; behind a sum it stays
                lost[step["part"]] += parameters(block.norm1 if leaf == "mixer" else block.norm2)
    return lost


@pytest.mark.parametrize("which", ["text", "image"])
def test_below_a_budget_the_cut_model_is_the_masked_one_saved_exported_and_within_it(
    which, trained, seeing, tmp_path, monkeypatch
):
    calibration, model = trained if which == "text" else seeing
    from gossamer.shrink.passes import axformer as file

    x = calibration.example(4)
    seen = []
    finish = file._Search.finish

    def look(search):
        with torch.no_grad(), file.masked(search.model, search.masks):
            seen.append(search.model(*x))
        return finish(search)

    monkeypatch.setattr(file._Search, "finish", look)
    shrunk, steps = run_pass("axformer", model, calibration, keep=0.5, epochs=0, top_k=())
    with torch.no_grad():
        torch.testing.assert_close(shrunk(*x), seen[0], atol=1e-5, rtol=1e-5)
    one = calibration.example(1)
    share = macs(shrunk, one).total / macs(model, one).total
    assert 0.3 < share <= 0.5
    assert shrunk.shrink_report["axformer"]["macs"] == pytest.approx(share, abs=0.02)
    assert {s["step"] for s in steps} <= {"axformer.remove", "axformer.drop", "prune"}
    assert parameters(model) - parameters(shrunk) == sum(cut_by(model, steps).values())
    same_after_loading(shrunk, x, tmp_path)
    certificate = export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"


def test_attention_becomes_hard_where_the_loss_allows_and_stays_so_when_saved(trained, tmp_path):
    calibration, model = trained
    shrunk, steps = run_pass(
        "axformer", model, calibration, delta=1.0, levels=(), epochs=0, top_k=(64, 3, 6)
    )  # with nothing else taken out
    hard = {name: m.top_k for name, m in shrunk.named_modules() if isinstance(m, HardAttention)}
    assert {s["step"] for s in steps} == {"axformer.hard"}
    assert {f"{s['part']}.mixer": s["top_k"] for s in steps} == hard
    assert set(hard.values()) <= {3, 6}
    tried = [d["element"] for d in shrunk.shrink_report["axformer"]["decisions"]]
    assert not any("64" in name for name in tried), "more keys than tokens are no change"
    x = calibration.example(4)
    assert not torch.equal(shrunk(*x), model(*x))
    same_after_loading(shrunk, x, tmp_path)
    assert export_onnx(shrunk, x, tmp_path / "m.onnx", exporter="fast").passed


def test_fine_tuning_is_kept_only_if_the_loss_falls(trained):
    calibration, model = trained
    good, _ = run_pass("axformer", model, calibration, keep=0.6, top_k=(), epochs=1.0, lr=1e-3)
    losses = good.shrink_report["axformer"]["losses"]
    assert losses[2] < losses[1]
    assert losses[2] == pytest.approx(validation_loss(calibration, good), abs=1e-5)
    bad, _ = run_pass("axformer", model, calibration, keep=0.6, top_k=(), epochs=0.2, lr=3.0)
    losses = bad.shrink_report["axformer"]["losses"]
    assert losses[2] == losses[1] == pytest.approx(validation_loss(calibration, bad), abs=1e-5)


def test_a_short_time_still_reaches_the_budget(trained):
    calibration, model = trained
    short = copy.copy(calibration)
    short.seconds = 0.01
    shrunk, _ = run_pass("axformer", model, short, keep=0.5, top_k=())
    one = calibration.example(1)
    assert macs(shrunk, one).total <= 0.5 * macs(model, one).total
    assert any(d["action"] == "taken unseen" for d in shrunk.shrink_report["axformer"]["decisions"])
    assert all(math.isfinite(v) for v in shrunk(*calibration.example(3)).flatten().tolist())


def test_pyramids_and_decoders_are_cut_too():
    calibration = digits()
    torch.manual_seed(0)
    sizes = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10}
    swin = create_model("swin_t", **sizes, embed_dim=16, depths=(1, 2), heads=(2, 4), patch=1, window=4)
    # Blocks of one branch; their model wants larger images.
    large = copy.copy(calibration)
    large.data = copy.copy(calibration.data)
    for name in ("train", "val"):
        part = getattr(calibration.data, name).take(torch.arange(48))
        part.inputs = (part.inputs[0].repeat_interleave(4, 2).repeat_interleave(4, 3),)
        setattr(large.data, name, part)
    sizes["img_size"] = (32, 32)
    large.task = create_task(large.data.task, sizes, large.data.meta)
    convnext = create_model("convnext_tiny", **{**sizes, "dims": (8, 16, 16, 16), "depths": (2, 1, 1, 1)})
    for model, found in ((swin, calibration), (convnext, large)):
        one = found.example(1)
        whole = macs(model, one).total
        shrunk, _ = run_pass("axformer", model, found, keep=0.7, samples=64, epochs=0)
        assert macs(shrunk, one).total <= 0.72 * whole
        assert shrunk(*found.example(2)).shape == (2, 10)


def test_a_decoder_without_a_branch_still_decodes():
    block = Block(16, create_mixer("attention", 16, heads=2, causal=True), Mlp(16, 32))
    holder = nn.ModuleDict({"b": block}).eval()
    recipe.apply(holder, {"step": "axformer.remove", "part": "b.mixer"})
    x = torch.randn(2, 5, 16)
    state = block.initial_state(2)
    for t in range(5):
        y, state = block.step(x[:, t], state)
        torch.testing.assert_close(y, block(x)[:, t], atol=1e-6, rtol=1e-6)
    assert isinstance(block.mixer, Absent)


def test_a_model_without_blocks_or_with_blocks_of_its_own_is_refused_untouched():
    calibration = texts()
    foreign = nn.Sequential(nn.Linear(4, 4))
    refuses("axformer", foreign, calibration, "Sequential has no residual blocks of ours", (torch.randn(2, 4),))

    class Twice(Block):
        def forward(self, x, **given):
            return super().forward(super().forward(x, **given), **given)

    model = encoder().eval()
    for i in range(2):
        model.blocks[i].__class__ = Twice
    refuses("axformer", model, calibration, r"blocks\.0 \(Twice\) has a forward pass of its own")


def test_what_makes_no_sense_is_refused(trained):
    calibration, model = trained
    for settings, message in (
        ({"top_k": (0,)}, "top_k must be at least 1, got 0"),
        ({"levels": ("layers",)}, "levels must be among branches, members; got 'layers'"),
        ({"delta": -0.1}, "delta must be at least 0"),
        ({"keep": 0.0}, "keep must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pass("axformer", model, calibration, **settings)
    empty = copy.copy(calibration)
    empty.data = copy.copy(calibration.data)
    empty.data.val = calibration.data.val.take(torch.arange(0))
    with pytest.raises(ValueError, match="validation split is empty"):
        run_pass("axformer", model, empty)
    for step, message in (
        ({"step": "axformer.remove", "part": "head.fc"}, "the mixer or the mlp of a block"),
        ({"step": "axformer.drop", "part": "head.fc"}, "a member of a list of blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.apply(copy.deepcopy(model), step)
