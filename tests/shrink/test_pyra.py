"""PYRA as a pass: equal to the authors' code, only the small parts learn, LoRA folds away."""

import copy

import pytest
import torch
from tests.official import golden, probe, seeded_input, seeded_state
from tests.shrink.toys import digits, learned, vision
from torch import nn

from gossamer.layers import DropPath, reduce
from gossamer.layers.pyra import PyraBlock
from gossamer.layers.reduce import MergingBlock, Trail
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.models.registry import rename, system
from gossamer.shrink import recipe
from gossamer.shrink.base import run_pass
from gossamer.shrink.passes import pyra

TINY = {"img_size": (20, 16), "patch": 4, "dim": 24, "depth": 3, "heads": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def pictures():
    return digits()


def authors(want):
    """The tiny network of the golden file, with its weights, LoRA not folded."""
    net = create_model("vit_tiny_patch16_224", **TINY).double().eval()
    recipe.apply(net, {"step": "pyra", "r": want["r"].tolist(), "tokens": 21, "protect": 1})
    pyra.add_lora(net, rank=4)
    rules = [
        (r"^(blocks\.\d+)\.pyra_(a|b)$", r"\1.\2"),
        (r"^(blocks\.\d+)\.pyra_norm\.", r"\1.norm."),
        (r"\.attn\.LoRA_a\.weight$", ".attn.qkv.a"),
        (r"\.attn\.LoRA_b\.weight$", ".attn.qkv.b.0"),
        (r"^(blocks\.\d+)\.(norm[12]|attn|mlp)\.", r"\1.block.\2."),
    ]
    state = rename(seeded_state(want["shapes"], torch.double), [*rules, *system("deit").rules])
    state["stem.tokens"] = state.pop("stem.cls_token")
    for i in range(3):
        state[f"blocks.{i}.block.mixer.qkv.a"] = state[f"blocks.{i}.block.mixer.qkv.a"][None]
    net.load_state_dict(state)
    return net


def test_modulated_and_merged_tokens_equal_the_authors():
    want = golden("pyra")
    net = authors(want)
    x = seeded_input("pyra", (2, 3, 20, 16)).double().requires_grad_()
    given = []
    net.blocks[-1].register_forward_hook(lambda *a: given.append(a[-1]))
    y = net(x)
    first = net.blocks[0]
    wrt = (x, first.block.mixer.qkv.b[0], first.a, first.b, first.norm.weight)
    gradients = torch.autograd.grad(probe(y), wrt)
    ours = (y, given[0][0], given[0][2], *gradients)
    for value, key in zip(ours, ("y", "tokens", "sizes", "gx", "glora", "ga", "gb", "gnorm"), strict=True):
        torch.testing.assert_close(value.float(), want[key], atol=1e-4, rtol=1e-4)
    pyra.fold_lora(net)
    assert type(first.block.mixer.qkv) is nn.Linear
    torch.testing.assert_close(net(x), y, atol=1e-10, rtol=1e-10)


def test_a_new_block_merges_as_plain_merging_does_and_its_weights_can_learn():
    net = vision(depth=3).train()
    step = {"r": [4, 3, 2], "tokens": 17, "protect": 1}
    plain, ours, none = (copy.deepcopy(net) for _ in range(3))
    recipe.apply(plain, {"step": "merging", **step})
    recipe.apply(ours, {"step": "pyra", **step})
    recipe.apply(none, {"step": "pyra", "r": [0, 0, 0], "tokens": 17, "protect": 1})
    for each in (net, plain, ours, none):  # all with the same LoRA, one that does something
        bare = each(torch.ones(1, 1, 8, 8))
        pyra.add_lora(each, rank=2)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, mixer in pyra._mixers(each):
                for p in (mixer.qkv.a, *mixer.qkv.b):
                    p.copy_(0.3 * torch.randn(p.shape, generator=draw))
        assert not torch.allclose(each(torch.ones(1, 1, 8, 8)), bare, atol=1e-3)
    x = torch.randn(2, 1, 8, 8)
    y = ours(x)
    torch.testing.assert_close(y, plain(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(none(x), net(x), atol=1e-6, rtol=1e-6)
    probe(y).backward()
    for block in ours.blocks[:-1]:  # behind the last attention nothing reaches the class token any more
        assert block.b.grad.abs().max() > 0
        assert block.a.grad.abs().max() == 0  # while b is zero
    with torch.no_grad():
        ours.blocks[0].b.normal_()
    assert not torch.allclose(ours(x), y, atol=1e-4)


def block(r=4, tokens=12, protect=1):
    torch.manual_seed(0)
    net = PyraBlock(vision().blocks[0], r, tokens=tokens, protect=protect)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_the_rescaling_is_that_of_the_paper_token_by_token():
    net = block()
    x, sizes = torch.randn(2, 12, 32), torch.rand(2, 12) + 0.5
    found = reduce.ops.match(torch.randn(2, 12, 8), 4, protect=1)
    moved = net.moved(x, sizes, found)
    for s in range(2):
        gone = [sizes[s, i] * x[s, i] for i in found.gone[s]]
        into = [sizes[s, i] * x[s, i] for i in found.stay[s][found.into[s]]]
        z = [net.norm(g + t) for g, t in zip(gone, into, strict=True)]
        channels = 2 * torch.sigmoid(sum(a * row for a, row in zip(net.a, z, strict=True)))
        for k in range(4):
            token = 2 * torch.sigmoid((z[k] * net.b[0]).sum()) - 1
            torch.testing.assert_close(moved[s, k], gone[k] + gone[k] * channels * token, atol=1e-5, rtol=1e-5)
    # The protected token neither goes nor is gone into.
    assert 0 not in found.gone
    assert 0 not in found.into


def test_padding_has_no_part_in_the_rescaling():
    net = block()
    x, mask = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    y, left, _ = net(x, mask=mask)
    other, *_ = net(torch.where(mask[..., None], x, torch.randn_like(x)), mask=mask)
    torch.testing.assert_close(other[left], y[left], atol=1e-5, rtol=1e-5)


def test_a_block_merges_as_many_as_it_can_and_never_more_than_it_has_rows_for():
    assert [block(r=4)(torch.randn(1, n, 32))[0].shape[1] for n in (24, 12, 5, 2, 1)] == [20, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("variant", "macs_g", "after"),
    [("vit_base_low", 8.77, 11), ("vit_base_high", 5.07, 5), ("vit_large_low", 30.96, 7), ("vit_large_high", 17.91, 5),
     ("deit_base_distilled_low", None, 42), ("deit_base_distilled_high", None, 6)],
)  # fmt: skip
def test_published_schedules_leave_the_published_tokens_and_macs(variant, macs_g, after):
    kind = variant.rpartition("_")[0].split("_")
    name = f"{kind[0]}_{kind[1]}_{'distilled_' if 'distilled' in kind else ''}patch16_224"
    protect = 1 + ("distilled" in kind)
    with torch.device("meta"):
        net = create_model(name, num_classes=100)
    r = pyra.PUBLISHED[variant]
    recipe.apply(net, {"step": "pyra", "r": r, "tokens": 196 + protect, "protect": protect})
    tokens = 196 + protect
    for part, gone in zip(net.blocks, r, strict=True):
        assert (part.tokens, part.r) == (tokens, gone)
        tokens -= gone
    assert tokens == after
    if macs_g is not None:
        assert macs(net, torch.empty(1, 3, 224, 224, device="meta")).total == pytest.approx(macs_g * 1e9, rel=0.01)


@pytest.mark.parametrize("variant", ["vit_base_low", "vit_base_high"])
def test_tokens_after_each_block_are_those_of_the_table_and_stand_for_all_197(variant):
    torch.manual_seed(0)
    sizes = {"img_size": (14, 14), "in_chans": 1, "num_classes": 10, "patch": 1, "dim": 16, "depth": 12, "heads": 2}
    net = create_model("vit_tiny_patch16_224", **sizes).eval()
    recipe.apply(net, {"step": "pyra", "r": pyra.PUBLISHED[variant], "tokens": 197, "protect": 1})
    counts, totals, sources = [], [], []

    def look(_, __, out):
        counts.append(out[0].shape[1])
        totals.append(out[2].sum(1))
        sources.append(trail.source)

    for block in net.blocks:
        block.register_forward_hook(look)
    with torch.no_grad():
        for block in net.blocks:
            block.b.normal_()
        with Trail(net) as trail:
            net(torch.rand(3, 1, 14, 14))
        for p in net.stem.parameters():  # all tokens alike: nothing but its protection keeps the class token out
            p.zero_()
        with Trail(net) as trail:
            net(torch.rand(3, 1, 14, 14))
    wanted = [197 - sum(pyra.PUBLISHED[variant][: i + 1]) for i in range(12)]
    assert counts == 2 * wanted
    assert wanted[-1] == {"vit_base_low": 11, "vit_base_high": 5}[variant]
    torch.testing.assert_close(torch.stack(totals), torch.full((24, 3), 197.0))
    for source in sources:  # the class token stands at the front, for itself alone
        assert ((source == 0) == (torch.arange(197) == 0)).all()


def test_only_adapters_rescaling_and_head_learn(pictures):
    net = vision(depth=3)
    before = copy.deepcopy(net.state_dict())
    shrunk, (step,) = run_pass("pyra", net, pictures, r=[4, 3, 0], steps=3, rank=2)
    assert step["r"] == [4, 3, 0]
    assert [type(b).__name__ for b in shrunk.blocks] == ["PyraBlock", "PyraBlock", "MergingBlock"]
    moved = {
        name.replace(".block.", ".")
        for name, value in shrunk.state_dict().items()
        if not torch.equal(value, before.get(name.replace(".block.", "."), torch.zeros(())))
    }
    learnt = {f"blocks.{i}.mixer.qkv.weight" for i in range(3)} | {"head.fc.weight", "head.fc.bias"}
    new = {f"blocks.{i}.{part}" for i in range(2) for part in ("a", "b", "norm.weight", "norm.bias")}
    assert moved == learnt | new
    for i in range(3):
        change = shrunk.blocks[i].block.mixer.qkv.weight - before[f"blocks.{i}.mixer.qkv.weight"]
        assert torch.linalg.matrix_rank(change, atol=1e-6) <= 2
    assert all(p.requires_grad for p in shrunk.parameters())


def test_frozen_parts_go_without_dropout_while_learning(pictures):
    net = vision(depth=2, drop=0.5, drop_path=0.5)
    recipe.apply(net, {"step": "pyra", "r": [2, 2], "tokens": 17, "protect": 1})
    pyra.add_lora(net, rank=2, drop=0.5)
    pyra.still(net)
    dropping = {name for name, part in net.named_modules() if part.training and isinstance(part, nn.Dropout | DropPath)}
    assert dropping == {f"blocks.{i}.block.mixer.qkv.drop" for i in range(2)} | {"head.drop"}


def test_rescaling_learns_what_merging_loses(pictures, monkeypatch):
    """At high compression, with adapters in both: validation loss, the mean over three seeds."""
    net = learned(vision(depth=3), pictures, 120, lr=5e-3)
    means = {}
    for kind in ("pyra", "merging"):
        if kind == "merging":
            monkeypatch.setattr(PyraBlock, "moved", MergingBlock.moved)
        losses = []
        for seed in range(3):
            pictures.seed = seed
            shrunk, _ = run_pass("pyra", net, pictures, r=[8, 4, 2], steps=40, rank=2, lr=3e-3)
            with torch.no_grad():
                (batch,) = pictures.batches(143, split="val", batch_size=143)
                losses.append(float(pictures.loss(shrunk, *batch)))
        means[kind] = sum(losses) / 3
    pictures.seed = 0
    assert means["pyra"] < means["merging"]
    recipe.apply(net, {"step": "merging", "r": [8, 4, 2], "tokens": 17, "protect": 1})
    with torch.no_grad():
        assert means["pyra"] < float(pictures.loss(net, *batch))


def test_no_time_is_no_training(pictures):
    net = vision().eval()
    x = pictures.example(4)[0]
    pictures.seconds = 0.0
    shrunk, _ = run_pass("pyra", net, pictures, r=[3, 3], steps=50)
    pictures.seconds = float("inf")
    merged = copy.deepcopy(net)
    recipe.apply(merged, {"step": "merging", "r": [3, 3], "tokens": 17, "protect": 1})
    torch.testing.assert_close(shrunk(x), merged(x), atol=1e-6, rtol=1e-6)
