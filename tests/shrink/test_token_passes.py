"""What every pass that reduces tokens must do alike: learn, load, export, count its tokens, give them back, refuse."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tests.shrink.loading import same_after_loading
from tests.shrink.refusals import refuses
from tests.shrink.toys import digits, encoder, learned, sentences, texts, vision
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers import Block, Mlp
from gossamer.layers.reduce import Trail
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.token_comparison import token_counts, token_passes

pictures = cache(digits)
sayings = cache(texts)
PASSES = ("bus", "eet", "ia_red2", "merging", "p_mod", "pyra")


@cache
def seeing(depth: int) -> nn.Module:
    """A model that has learned the digits."""
    return learned(vision(depth=depth), pictures(), steps=100)


@cache
def reading() -> nn.Module:
    """A model that has learned the texts."""
    return learned(encoder(), sayings(), steps=80)


def test_every_registered_token_reduction_is_tested_here():
    assert token_passes() == sorted(PASSES)


# ---- learns, loads, exports ------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A pass at work.

    Args:
        keep, settings: of the pass.
        spends: share of the MACs that it must stay below; `loses`: accuracy it may lose.
        step: what its step must say.
        model: in place of a trained one of `depth` blocks.
        learns: it must be better than without its training.
        fast: the fast exporter can do it.
    """

    name: str
    keep: float
    settings: dict[str, Any] = field(default_factory=dict)
    spends: float | None = None
    loses: float | None = None
    step: dict[str, Any] = field(default_factory=lambda: {"protect": 1})
    depth: int = 4
    model: Callable[[], nn.Module] | None = None
    learns: bool = False
    fast: bool = True


SEEN = {
    "bus": Case("bus", 0.6, {"steps": 60, "lr": 2e-3}, spends=0.72, loses=0.08),
    "bus with a decoder": Case("bus", 0.6, {"steps": 60, "lr": 2e-3, "decoder": 2}, loses=0.08),
    "eet": Case("eet", 0.6, {"hidden": 1, "steps": 80, "lr": 3e-3}, spends=0.68, loses=0.08),
    "p_mod": Case("p_mod", 0.5, {"steps": 80, "lr": 3e-3}, spends=0.68, loses=0.08, learns=True),
    "ia_red2": Case(
        "ia_red2", 0.7, {"steps": 25, "lr": 2e-3}, spends=0.85, loses=0.15, step={"groups": 3, "protect": 1}, depth=3
    ),
    "merging": Case("merging", 0.7, model=vision),
    "merging, distilled": Case("merging", 0.7, model=lambda: vision(distilled=True), step={"protect": 2}),
    "pyra": Case("pyra", 0.75, {"steps": 2}, model=vision),
}
READ = {
    "bus": Case("bus", 0.8, {"steps": 40, "lr": 1e-3}, loses=0.1, fast=False),
    "eet": Case("eet", 0.8, {"steps": 40, "lr": 1e-3}, loses=0.1),
    "p_mod": Case("p_mod", 0.6, {"steps": 60, "lr": 1e-3}, loses=0.1),
    "ia_red2": Case("ia_red2", 0.8, {"steps": 15, "lr": 1e-3}, loses=0.15, fast=False),
    "merging": Case("merging", 0.7, model=encoder),
    "pyra": Case("pyra", 0.75, {"steps": 2}, model=encoder),
}


def answers_the_same_from_disk_and_from_onnx(shrunk, x, tmp_path, fast=True):
    same_after_loading(shrunk, x, tmp_path)
    made = export_onnx(shrunk, x, tmp_path / "m.onnx", dynamic="batch", exporter="fast", real_inputs=x)
    assert (made.passed, made.held) == (True, "batch"), made.reason
    assert made.exporter == "fast" or not fast, made.reason


@pytest.mark.parametrize("case", SEEN.values(), ids=list(SEEN))
def test_a_vision_model_shrinks_and_answers_the_same_from_disk_and_from_onnx(case, tmp_path):
    calibration = pictures()
    net = case.model() if case.model else seeing(case.depth)
    shrunk, (step,) = run_pass(case.name, net, calibration, keep=case.keep, **case.settings)
    assert {key: step[key] for key in case.step} == case.step
    assert all(p.requires_grad for p in shrunk.parameters())
    x = calibration.example(5)
    if case.spends:
        assert macs(shrunk, x).total < case.spends * macs(net, x).total
    if case.loses:
        before, after = calibration.score(net), calibration.score(shrunk)
        assert before > 0.65
        assert after > before - case.loses
    if case.learns:
        untrained, _ = run_pass(case.name, net, calibration, keep=case.keep, **{**case.settings, "steps": 0})
        assert calibration.score(untrained) < after
    answers_the_same_from_disk_and_from_onnx(shrunk, x, tmp_path)


@pytest.mark.parametrize("case", READ.values(), ids=list(READ))
def test_a_text_encoder_with_padding_shrinks_and_answers_the_same_from_disk_and_from_onnx(case, tmp_path):
    calibration = sayings()
    net = case.model() if case.model else reading()
    shrunk, _ = run_pass(case.name, net, calibration, keep=case.keep, **case.settings)
    if case.loses:
        assert calibration.score(shrunk) > calibration.score(net) - case.loses
    answers_the_same_from_disk_and_from_onnx(shrunk, (sentences(4, 5)[0],), tmp_path, case.fast)


# ---- keeps all, or refuses -------------------------------------------------------------------------------------------

# Steps that leave every token in the sequence, by the blocks that could take some away.
ALL = {
    "bus": {"layer": 1, "alpha": 1.0},
    "eet": {"keep": [1 - 1e-7, 1.0]},
    "ia_red2": {"groups": 2, "share": 1.0},
    "merging": {"r": [0, 0], "tokens": 17},
    "p_mod": {"keep": [1 - 1e-7, 1 - 1e-7]},
    "pyra": {"r": [0, 0], "tokens": 17},
}


@pytest.mark.parametrize("name", PASSES)
def test_keeping_all_is_the_dense_model(name):
    for net, calibration in ((vision().eval(), pictures()), (encoder().eval(), sayings())):
        x = calibration.example(4)
        before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            shrunk, steps = run_pass(name, net, calibration, keep=1.0)
            assert steps == []
            assert torch.equal(shrunk(*x), net(*x))
            assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
            blocks = copy.deepcopy(net)
            recipe.apply(blocks, {"step": name, "protect": 1, **ALL[name]})
            assert any(getattr(block, "reduces", False) for block in blocks.blocks)
            wide = [t.double() if t.is_floating_point() else t for t in x]
            torch.testing.assert_close(blocks.eval().double()(*wide), net.double()(*wide), atol=1e-6, rtol=1e-6)


SETTINGS = [
    *((name, {"keep": keep}, r"keep must be in \(0, 1\]") for name in PASSES for keep in (0.0, -0.5, 1.01, 2.0)),
    *((name, {"steps": -1}, "steps must be at least 0") for name in ("bus", "eet", "ia_red2", "p_mod", "pyra")),
    ("bus", {"beta": 0.0}, "beta must be in"),
    ("bus", {"layer": 2}, r"layer must be in 1\.\.1"),
    ("bus", {"decoder": -1}, "decoder must be at least 0"),
    ("eet", {"hidden": 17}, r"hidden must be in 0\.\.16"),
    ("ia_red2", {"groups": 3}, "groups must divide"),
    ("merging", {"schedule": "rising"}, "schedule must be constant or"),
    ("pyra", {"schedule": "rising"}, "schedule must be constant or"),
    ("pyra", {"rank": 0}, "rank must be at least 1"),
    ("pyra", {"drop": 1.0}, r"drop must be in \[0, 1\)"),
    ("pyra", {"r": [1, 1, 1]}, r"r must be 2 numbers \(blocks\) from 0 up, got \[1, 1, 1\]"),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_settings_that_make_no_sense_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_pass(name, vision(), pictures(), **settings)
    assert not isinstance(caught.value, Unsupported)


def changed(**parts: Any) -> nn.Module:
    """A small ViT with other parts."""
    net = vision()
    for path, part in parts.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        setattr(net.get_submodule(owner), name, part)
    return net


class Mean(nn.Module):
    """A head that knows nothing of merged tokens."""

    def forward(self, x, mask=None):
        return x.mean(1)


def pyramid() -> nn.Module:
    return create_model("swin_t", img_size=32, embed_dim=16, depths=(2, 2), heads=(2, 4), patch=2, window=4)


def compact() -> nn.Module:
    return create_model("cct_2_3x2_32", img_size=8, in_chans=1, num_classes=10)


def single() -> nn.Module:
    return changed(blocks__0=Block(32, create_mixer("attention", 32, heads=4), Mlp(32, 64), residual="single"))


def decoder() -> nn.Module:
    return create_model("gpt2", dim=16, depth=1, heads=2, vocab_size=20, max_len=8)


def pooled() -> nn.Module:
    return changed(blocks__1__mixer=create_mixer("pool", 32))


CANNOT = [
    *((name, pyramid, 0.6, "Pyramid is not one sequence") for name in PASSES),
    *((name, pooled, 0.6, r"blocks\.1\.mixer \(Pool\) does not attend") for name in PASSES),
    *((name, compact, 0.6, "map of tokens") for name in PASSES),
    *((name, single, 0.6, r"blocks\.0 \(Block\) has not the two") for name in PASSES),
    *((name, lambda: changed(blocks__1__mixer__causal=True), 0.7, r"blocks\.1\.mixer \(Attention\) is causal")
      for name in PASSES if name != "p_mod"),
    ("merging", decoder, 0.7, r"blocks\.0\.mixer .* is causal"),
    ("merging", lambda: changed(head=Mean()), 0.7, r"head \(Mean\) does not weigh"),
    ("pyra", lambda: changed(head=Mean()), 0.7, r"head \(Mean\) does not weigh"),
    ("merging", vision, 0.05, r"cannot leave the share 0\.05"),
    ("bus", vision, 0.4, r"keep must exceed 0\.50"),
    ("bus", lambda: vision(depth=1), 0.6, "after block 1 of 1"),
    ("eet", vision, 0.3, r"keep must exceed 0\.50"),
    ("eet", lambda: vision(depth=1), 0.6, "no place between"),
    ("pyra", lambda: changed(blocks__1__mixer__qkv=nn.Sequential(nn.Linear(32, 96))), 0.7,
     r"blocks\.1\.mixer\.qkv \(Sequential\) is no plain linear"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "keep", "message"), CANNOT)
def test_what_cannot_lose_tokens_is_named_and_left_as_it_was(name, make, keep, message):
    net, calibration = make(), sayings() if make is decoder else pictures()
    inputs = {pyramid: (torch.randn(2, 3, 32, 32),), decoder: (torch.ones(2, 8, dtype=torch.long),)}.get(make)
    refuses(name, net, calibration, message, inputs, keep=keep)


@pytest.mark.parametrize("name", PASSES)
def test_tokens_are_reduced_once(name):
    net = vision(depth=4)
    recipe.apply(net, {"step": "merging", "r": [1, 1, 1, 1], "tokens": 17, "protect": 1})
    refuses(name, net, pictures(), r"blocks\.0 \(MergingBlock\) reduces tokens already", keep=0.8)


# ---- counts its tokens, and gives them back --------------------------------------------------------------------------


def stated(step: dict[str, Any], tokens: int, depth: int) -> list[int]:
    """Tokens the MLP of each block works on, by what the step says."""
    front, counts = step["protect"], []
    n = tokens - front
    for i in range(depth):
        if step["step"] in ("merging", "pyra"):
            n -= step["r"][i]
        elif step["step"] == "ia_red2" and i % (depth // step["groups"]) == 0:
            n = math.ceil(n * step["share"])
        counts.append(front + (int(n * step["keep"][i]) if step["step"] == "p_mod" else n))
        if step["step"] == "eet" and step["keep"][i] < 1:
            n = int(n * step["keep"][i])
        elif step["step"] == "bus" and i + 1 == step["layer"]:
            n = math.ceil(n * step["alpha"]) + 1
    return counts


def passing(net: nn.Module) -> nn.Module:
    """`net` with blocks that attend and judge as ever but leave each token what it is."""
    for block in net.blocks:
        for part in (block.mixer.proj, block.mlp.fc2):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    if net.norm is not None:
        net.norm = nn.Identity()
    return net.eval()


@pytest.mark.parametrize("name", PASSES)
def test_the_tokens_stated_are_those_worked_on_and_all_come_back_in_their_old_places(name):
    net = passing(vision(depth=4))
    given = {} if name == "merging" else {"steps": 0}
    shrunk, (step,) = run_pass(name, net, pictures(), keep=0.6, **given)
    x = pictures().example(5)
    sizes: list[Any] = []
    hook = shrunk.head.register_forward_pre_hook(lambda _, a, k: sizes.append(k.get("sizes")), with_kwargs=True)
    with torch.no_grad(), Trail(shrunk) as trail:
        shrunk(*x)
    hook.remove()
    assert trail.counts == stated(step, 17, 4) == token_counts(shrunk, x)
    assert sum(trail.counts) < 0.8 * 4 * 17
    if name in ("eet", "p_mod"):  # others count patches of a group, or MACs
        assert sum(trail.counts) / (4 * 17) == pytest.approx(0.6, abs=0.06)
    come = net.stem(*x)[0].detach()
    back = trail.restore(fill=-7.0)
    left = trail.tokens.shape[1]
    assert back.shape == come.shape
    torch.testing.assert_close(back[:, 0], come[:, 0])
    for row, old, source in zip(back, come, trail.source, strict=True):
        assert sorted(set(source.tolist()) - {-1}) == list(range(left))
        for i, place in enumerate(source.tolist()):
            members = old[source == place]
            if place < 0:
                assert bool((row[i] == -7).all())
            elif len(members) == 1:
                torch.testing.assert_close(row[i], old[i], atol=1e-5, rtol=1e-5)
            elif name == "bus":
                assert bool((members.amin(0) - 1e-5 <= row[i]).all() and (row[i] <= members.amax(0) + 1e-5).all())
            else:
                torch.testing.assert_close(row[i], members.mean(0), atol=1e-5, rtol=1e-5)
        lost = int((source < 0).sum())
        assert lost == (17 - left if name in ("eet", "ia_red2") else 0)
    if name in ("merging", "pyra"):
        members = torch.zeros(5, left).scatter_add(1, trail.source, torch.ones(5, 17))
        assert torch.equal(members, sizes[0])
    else:
        assert sizes == [None]


@pytest.mark.parametrize("name", PASSES)
def test_padding_does_not_come_back_and_most_passes_reduce_a_padded_text_as_if_alone(name):
    net = encoder(depth=3)
    given = {} if name == "merging" else {"steps": 0}
    shrunk, _ = run_pass(name, net, sayings(), keep=0.75, **given)
    ids = sentences(6, 3)[0]
    with torch.no_grad(), Trail(shrunk) as trail:
        together = shrunk(ids)
    back = trail.restore()
    assert back.shape == (6, 12, 32)
    assert bool((back[ids == 0] == 0).all())
    for source, mask in zip(trail.source, trail.mask, strict=True):
        assert set(source.tolist()) - {-1} == set(mask.nonzero().flatten().tolist())
    if name not in ("merging", "pyra"):  # which drop padding in place of words
        with torch.no_grad():
            for row, y in zip(ids, together, strict=True):
                torch.testing.assert_close(shrunk(row[row != 0][None])[0], y, atol=1e-5, rtol=1e-5)


def test_what_a_decoder_only_reads_does_not_come_back():
    net = passing(vision(depth=4))
    shrunk, _ = run_pass("bus", net, pictures(), keep=0.6, decoder=1, steps=0)
    x = pictures().example(5)
    with torch.no_grad(), Trail(shrunk) as trail:
        shrunk(*x)
    there = trail.source >= 0
    assert there.sum(1).tolist() == [trail.tokens.shape[1]] * 5
    assert trail.tokens.shape[1] < trail.counts[-1] < 17
    torch.testing.assert_close(trail.restore()[there], net.stem(*x)[0].detach()[there], atol=1e-5, rtol=1e-5)


def test_nobody_is_followed_outside_of_a_trail():
    net = vision()
    recipe.apply(net, {"step": "merging", "r": [4, 2], "tokens": 17, "protect": 1})
    with torch.no_grad(), Trail(net) as trail:
        net(torch.randn(2, 1, 8, 8))
        net(torch.randn(3, 1, 8, 8))  # the last one counts
    kept = trail.source.clone()
    assert (len(kept), trail.counts) == (3, [13, 11])
    net(torch.randn(4, 1, 8, 8))
    assert torch.equal(trail.source, kept)
    assert not any(part._forward_pre_hooks for part in net.modules())
