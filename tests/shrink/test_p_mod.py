"""Mixture of depths: the authors' layer, the ratio schedule, routing that does not look ahead, and the pass."""

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.layers import Block, Mlp
from gossamer.layers.depth import WINDOW, DepthBlock
from gossamer.layers.language import GatedMlp, RMSNorm
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.ops import tokens as ops
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.passes.p_mod import ratios, solve
from gossamer.tasks import create_task
from gossamer.train import Diverged
from official import golden, probe, seeded_input, seeded_state
from shrink.loading import same_after_loading
from shrink.toys import learned


def block(residual="pre", mixer="attention", dim=16, keep=0.5, protect=0, **options):
    torch.manual_seed(0)
    made = Block(dim, create_mixer(mixer, dim, heads=4, **options), Mlp(dim, 32), residual=residual, layer_scale=0.7)
    routed = DepthBlock(made, keep, protect=protect)
    for p in routed.parameters():
        nn.init.normal_(p, std=0.3)
    return routed.eval()


def by_masks(routed, x, kept, weighed):
    """The same layer with nobody gathered: all tokens worked on, keys of the others masked, the rest undone."""
    inner = routed.block
    weights = torch.where(weighed, 1 + 0.2 * torch.tanh(routed.router(x)[..., 0]), 1.0)[..., None]
    norm = inner.norm1 if inner.residual in ("pre", "stream") else nn.Identity()
    q, k, v = inner.mixer.project(norm(x))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = kept[:, None, None, :].expand(-1, -1, x.shape[1], -1)
    if inner.mixer.causal:
        seen = seen & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    attended = logits.masked_fill(~seen, -1e9).softmax(-1) @ v
    h = x + inner.scale1 * inner.mixer.proj(attended.transpose(1, 2).flatten(2))
    if inner.residual == "post":
        h = inner.norm1(h)
        y = inner.norm2(h + weights * inner.scale2 * inner.mlp(h))
    elif inner.residual == "stream":
        h = inner.norm2(h)
        y = h + weights * inner.scale2 * inner.mlp(h)
    else:
        y = h + weights * inner.scale2 * inner.mlp(inner.norm2(h))
    return torch.where(kept[..., None], y, weights * x)


@torch.no_grad()
def to_work_on(routed, x, weighed, keep):
    """The tokens worked on, sample by sample."""
    kept = ~weighed
    for i, logits in enumerate(routed.router(x)[..., 0]):
        places = weighed[i].nonzero().flatten().tolist()
        count = int(keep * len(places) + 1e-6)
        kept[i, sorted(places, key=lambda j: -float(logits[j]))[:count]] = True
    return kept


def llama_layer(state, dtype):
    norm = lambda dim: RMSNorm(dim, eps=1e-5)  # noqa: E731
    mixer = create_mixer("rotary_gqa", 16, heads=4, kv_heads=4, causal=True)
    routed = DepthBlock(Block(16, mixer, GatedMlp(16, 24), norm=norm), 0.6)
    inner = "decoder_layer."
    ours = {
        "block.mixer.qkv.weight": torch.cat([state[f"{inner}self_attn.{n}_proj.weight"] for n in "qkv"]),
        "block.mixer.proj.weight": state[f"{inner}self_attn.o_proj.weight"],
        "block.norm1.weight": state[f"{inner}input_layernorm.weight"],
        "block.norm2.weight": state[f"{inner}post_attention_layernorm.weight"],
        **{f"router.{n}": state[f"router.router.{n}"] for n in ("weight", "bias")},
        **{
            f"block.mlp.{o}.weight": state[f"{inner}mlp.{n}_proj.weight"]
            for o, n in (("gate", "gate"), ("fc1", "up"), ("fc2", "down"))
        },
        "threshold": torch.zeros(()),
    }
    routed.to(dtype).load_state_dict(ours)
    return routed.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_a_layer_equals_the_authors_with_text_around_vision_tokens_and_padding(dtype, tolerance):
    saved = golden("p_mod")
    routed = llama_layer(seeded_state(saved["shapes"], dtype), dtype)
    x = seeded_input("p_mod", (3, 15, 16)).to(dtype).requires_grad_()
    targets = torch.zeros(3, 15, dtype=torch.bool)
    for i, (first, last) in enumerate(((2, 12), (1, 6), (3, 14))):
        targets[i, first:last] = True
    mask = torch.ones(3, 15, dtype=torch.bool)
    mask[1, 9:] = False
    y, left, _ = routed(x, mask=mask, targets=targets)
    assert left is mask
    probe(y).backward()
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(routed.weights(routed.router(x)[..., 0]), saved["weights"].to(dtype), **near)
    torch.testing.assert_close(y, saved["output"].to(dtype), **near)
    torch.testing.assert_close(x.grad, saved["grad"].to(dtype), **near)
    torch.testing.assert_close(routed.router.weight.grad, saved["router"].to(dtype), **near)
    torch.testing.assert_close(routed.block.mlp.fc1.weight.grad, saved["up"].to(dtype), **near)


def test_the_ratios_are_the_papers_and_leave_0_5375_of_32_layers():
    shares = ratios(32)
    assert shares.index(next(s for s in shares if s < 1)) == 8
    assert [round(s, 3) for s in shares[8:24]] == [
        *(0.844, 0.806, 0.764, 0.720, 0.674, 0.625, 0.576, 0.525),
        *(0.475, 0.424, 0.375, 0.326, 0.280, 0.236, 0.194, 0.156),
    ]
    assert shares[24:] == [0.15] * 8
    assert sum(shares) / 32 == pytest.approx(0.5375, abs=5e-4)
    saved = golden("p_mod")
    for kind in ("cosine", "linear"):
        for row, depth in zip(saved["schedule_cos" if kind == "cosine" else "schedule_linear"], (32, 40), strict=True):
            assert torch.allclose(torch.tensor(ratios(depth, decay=kind, official=True)).double(), row[:depth])


@pytest.mark.parametrize("decay", ["cosine", "linear", "fixed"])
@pytest.mark.parametrize(("depth", "keep"), [(12, 0.55), (6, 0.4), (4, 0.8), (2, 0.5), (1, 0.5), (12, 0.1)])
def test_the_schedule_is_solved_for_the_share_that_stays(depth, keep, decay):
    shares = solve(depth, keep, decay)
    assert sum(shares) / depth <= keep + 1e-5
    assert sum(shares) / depth > keep - 0.15 / depth - 0.01
    assert shares == sorted(shares, reverse=True)
    assert solve(depth, 1.0, decay) == [1.0] * depth


@pytest.mark.parametrize("protect", [0, 2])
@pytest.mark.parametrize("residual", ["pre", "post", "stream"])
def test_gathering_equals_masking(residual, protect):
    routed = block(residual, keep=0.6, protect=protect)
    x = torch.randn(3, 11, 16, requires_grad=True)
    weighed = (torch.arange(11) >= protect).expand(3, 11)
    kept = to_work_on(routed, x, weighed, 0.6)
    y = routed(x)[0]
    want = by_masks(routed, x, kept, weighed)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(probe(t), [x, routed.router.weight]) for t in (y, want)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_a_padded_batch_equals_each_sample_alone():
    routed = block("post", keep=0.6, protect=1)
    x = torch.randn(3, 12, 16)
    lengths = (12, 7, 3)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    together = routed(x, mask=mask)[0]
    for i, n in enumerate(lengths):
        torch.testing.assert_close(together[i, :n], routed(x[i : i + 1, :n])[0][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(together[~mask], x[~mask])


def test_samples_with_different_numbers_of_targets_equal_each_alone():
    routed = block(mixer="rotary_gqa", causal=True)
    x = torch.randn(2, 14, 16)
    targets = torch.zeros(2, 14, dtype=torch.bool)
    targets[0, 1:11] = targets[1, 4:9] = True
    together = routed(x, targets=targets)[0]
    for i in range(2):
        alone = routed(x[i : i + 1], targets=targets[i : i + 1])[0][0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)


def test_tokens_passed_by_change_by_their_weight_only_and_protected_ones_see_none_of_them():
    routed = block(keep=0.5, protect=1)
    x = torch.randn(1, 9, 16)
    y = routed(x)[0]
    weighed = torch.arange(9)[None] >= 1
    kept = to_work_on(routed, x, weighed, 0.5)[0]
    weights = 1 + 0.2 * torch.tanh(routed.router(x)[0])
    assert int(kept.sum()) == 1 + 4
    torch.testing.assert_close(y[0, ~kept], (weights * x[0])[~kept])
    other = x.clone()
    # Along a direction the router does not see, so that it chooses the same.
    r = routed.router.weight[0]
    noise = torch.randn(int((~kept).sum()), 16)
    other[0, ~kept] += noise - (noise @ r / (r @ r))[:, None] * r
    torch.testing.assert_close(routed(other)[0][0, kept], y[0, kept], atol=1e-5, rtol=1e-5)


def test_a_new_router_that_keeps_all_is_the_plain_block():
    for mixer, causal in (("attention", False), ("attention", True), ("rotary_gqa", True)):
        plain = Block(16, create_mixer(mixer, 16, heads=4, causal=causal), Mlp(16, 32)).eval()
        x = torch.randn(2, 10, 16)
        assert torch.equal(DepthBlock(plain, 1.0, protect=0)(x)[0], plain(x))
        routed = DepthBlock(plain, 0.5).eval()
        assert torch.equal(routed.weights(routed.router(x)[..., 0]), torch.ones(2, 10))


# ---- decoders --------------------------------------------------------------------------------------------------------


def naive_online(logits, threshold, places):
    kept = []
    for t, logit in enumerate(logits):
        j = t % WINDOW
        taken = sum(kept[t - j : t])
        kept.append(taken < places and (logit >= threshold or places - taken >= WINDOW - j))
    return kept


@pytest.mark.parametrize("mixer", ["attention", "gqa", "rotary_gqa"])
@pytest.mark.parametrize("n", [2 * WINDOW, WINDOW + 5])
def test_a_causal_model_routes_without_looking_ahead_and_decodes_as_it_reads(mixer, n):
    routed = block(mixer=mixer, keep=0.4, causal=True)
    routed.threshold.fill_(0.3)
    x = torch.randn(3, n, 16)
    y = routed(x)[0]
    kept = torch.tensor([naive_online(row.tolist(), 0.3, routed.places) for row in routed.router(x)[..., 0]])
    assert kept[:, :WINDOW].sum(1).tolist() == [routed.places] * 3
    torch.testing.assert_close(y, by_masks(routed, x, kept, torch.ones_like(kept)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routed(x[:, : n - 3])[0], y[:, : n - 3], atol=1e-5, rtol=1e-5)
    state = routed.initial_state(1)
    for t in range(n):
        out, state = routed.step(x[:1, t], state)
        torch.testing.assert_close(out, y[:1, t], atol=1e-4, rtol=1e-4)
    assert state.keys.shape[2] == int(kept[0].sum())
    state = routed.initial_state(3)
    for t in range(n):
        out, state = routed.step(x[:, t], state)
        torch.testing.assert_close(out, y[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["attention", "gqa", "rotary_gqa"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_words_behind_a_prompt_are_decoded_as_they_are_read_from_a_cache_of_text_and_kept_vision(mixer, keep):
    routed = block(mixer=mixer, keep=keep, causal=True)
    x = torch.randn(2, 18, 16)
    targets = torch.zeros(2, 18, dtype=torch.bool)
    targets[0, 1:12] = targets[1, 3:8] = True
    whole = routed(x, targets=targets)[0]
    y, state = routed.prefill(x[:, :13], targets[:, :13])
    torch.testing.assert_close(y, whole[:, :13], atol=1e-5, rtol=1e-5)
    # Of 11 and 5 vision tokens the share, rounded down, and the 2 and 8 of text.
    assert state.real.sum(1).tolist() == ([2 + 5, 8 + 2] if keep == 0.5 else [13, 13])
    assert state.keys.shape[2] == int(state.real.sum(1).max())
    for t in range(13, 18):
        out, state = routed.step(x[:, t], state)
        torch.testing.assert_close(out, whole[:, t], atol=1e-4, rtol=1e-4)
    assert state.real.sum(1).tolist() == ([7 + 5, 10 + 5] if keep == 0.5 else [18, 18])


def test_training_moves_the_threshold_to_the_share_that_is_wanted():
    routed = block(keep=0.25, causal=True).train()
    x = torch.randn(8, 64, 16)
    for _ in range(150):
        routed(x)
    assert (routed.router(x) >= routed.threshold).float().mean() == pytest.approx(0.25, abs=0.02)


def sayings(seconds=float("inf")):
    """Texts in which each word is followed by the next one."""
    splits = []
    for count in (256, 64, 64):
        ids = (torch.randint(0, 12, (count, 1)) + torch.arange(21)) % 12 + 1
        splits.append(Split((ids[:, :20],), ids[:, 1:]))
    spec = {"vocab_size": 16, "max_len": 20}
    data = Dataset("language-modelling", *splits, spec, {})
    task = create_task("text-classification", {**spec, "num_classes": 2, "pad_id": 0}, {"classes": ["a", "b"]})
    task.batch = lambda split, index, **_: ((split.inputs[0][index],), split.targets[index])
    task.loss = lambda y, target, smoothing=0.0: nn.functional.cross_entropy(y.flatten(0, 1), target.flatten())
    task.teaching = lambda y, t: nn.functional.mse_loss(y, t)
    task.metrics = lambda y, target: {task.metric: float((y.argmax(-1) == target).float().mean())}
    return Calibration(task, data, seconds)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_is_shrunk_and_every_position_keeps_an_answer(name, tmp_path):
    calibration = sayings()
    sizes = {"dim": 16, "depth": 3, "heads": 2, "hidden": 32, "vocab_size": 16, "max_len": 40}
    net = create_model(name, **sizes, **({"drop": 0.0} if name == "gpt2" else {})).eval()
    learned(net, calibration, steps=80, lr=1e-2)
    shrunk, _ = run_pass("p_mod", net, calibration, keep=0.5, steps=80, lr=5e-3)
    assert calibration.score(shrunk) > calibration.score(net) - 0.1 > 0.5
    ids = torch.randint(1, 12, (2, 35))
    with torch.no_grad():
        y = shrunk(ids)
        assert y.shape == (2, 35, 16)
        changed = torch.cat((ids[:, :30], 13 - ids[:, 30:]), 1)
        torch.testing.assert_close(shrunk(changed)[:, :30], y[:, :30], atol=1e-5, rtol=1e-5)
    assert macs(shrunk, (ids,)).total < macs(net, (ids,)).total
    same_after_loading(shrunk, ids, tmp_path)


# ---- a question about a picture --------------------------------------------------------------------------------------

CELLS, THINGS, COLOURS = 14, 5, 5
VISION = THINGS * COLOURS + 10  # words of things in colours, and of cells that show nothing of interest


def asked(count, seed):
    """Cells of a picture, three of which show a thing in a colour, the name of one of them, and its colour."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(THINGS * COLOURS, VISION, (count, CELLS + 1), generator=draw)
    things = torch.rand(count, THINGS, generator=draw).argsort(1)[:, :3]
    colours = torch.randint(0, COLOURS, (count, 3), generator=draw)
    places = torch.rand(count, CELLS, generator=draw).argsort(1)[:, :3]
    ids.scatter_(1, places, things * COLOURS + colours)
    ids[:, -1] = VISION + things[:, 0]
    return ids, colours[:, 0]


class Answers(nn.Module):
    """A small decoder that answers behind the question; its routed blocks may pass cells by."""

    def __init__(self, dim=32, depth=4):
        super().__init__()
        self.words = nn.Embedding(VISION + THINGS, dim)
        self.places = nn.Parameter(torch.randn(CELLS + 1, dim) / 4)
        mixers = [create_mixer("attention", dim, heads=4, causal=True) for _ in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, mixer, Mlp(dim, 2 * dim)) for mixer in mixers)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, COLOURS))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)

    def forward(self, ids):
        x, seen = self.words(ids) + self.places, ids < VISION
        for block in self.blocks:
            x = block(x, targets=seen)[0] if isinstance(block, DepthBlock) else block(x)
        return self.head(x[:, -1])

    def study(self, steps, seed, lr=3e-3):
        optimiser = torch.optim.AdamW(self.parameters(), lr=lr)
        for step in range(steps):
            ids, colour = asked(32, 10_000 * (seed + 1) + step)
            optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
            optimiser.zero_grad()
            nn.functional.cross_entropy(self(ids), colour).backward()
            optimiser.step()
        return self

    @torch.no_grad()
    def right(self):
        ids, colour = asked(500, 1)
        return float((self(ids).argmax(1) == colour).float().mean())


class SoftmaxDepth(DepthBlock):
    """Mixture of depths as it was before: what a block adds is weighed by a softmax over the cells."""

    def forward(self, x, *, targets):
        logits = self.router(x)[..., 0]
        index, real = self._ranked(logits, None, targets, free=False)
        own = ops.take(x, index)
        y = self._second(self._first(own, index, real, None), torch.ones_like(own[..., 0]))
        weights = torch.where(targets, logits.masked_fill(~targets, -1e9).softmax(1), 1.0).gather(1, index)
        y = torch.where(real[..., None], own + weights[..., None] * (y - own), own)
        return ops.put(x, index, y), None, None


def test_in_most_trainings_questions_are_answered_as_by_the_dense_model_and_better_than_by_fixed_softmax_routing():
    right = []
    for seed in range(3):
        torch.manual_seed(seed)
        base = Answers().study(150, seed)
        found = [copy.deepcopy(base).study(100, seed + 50).right()]
        for kind, shares in ((DepthBlock, solve(4, 0.55)), (SoftmaxDepth, solve(4, 0.55, "fixed"))):
            net = copy.deepcopy(base)
            net.blocks = nn.ModuleList(
                kind(block, share) if share < 1 else block for block, share in zip(net.blocks, shares, strict=True)
            )
            assert macs(net, asked(1, 0)[:1]).total < 0.62 * macs(base, asked(1, 0)[:1]).total
            found.append(net.study(100, seed + 50).right())
        right.append(found)
    assert min(dense for dense, _, _ in right) > 0.95
    assert sum(routed >= dense - 0.02 for dense, routed, _ in right) >= 2
    assert sum(routed > fixed for _, routed, fixed in right) >= 2


def test_numbers_that_are_not_finite_stop_the_training():
    calibration = sayings()
    net = create_model("gpt2", dim=16, depth=2, heads=2, hidden=32, vocab_size=16, max_len=40, drop=0.0)
    with torch.no_grad():
        net.blocks[1].mlp.fc2.bias[0] = float("inf")
    with pytest.raises(Diverged, match="loss is nan at step 0"):
        run_pass("p_mod", net, calibration, keep=0.5, steps=2)


def test_a_block_refuses_targets_of_another_shape_and_shares_outside_of_0_to_1():
    with pytest.raises(ValueError, match="targets must be"):
        block()(torch.randn(2, 5, 16), targets=torch.ones(2, 4) > 0)
    for keep in (0.0, 1.2):
        with pytest.raises(ValueError, match="keep must be in"):
            block(keep=keep)
