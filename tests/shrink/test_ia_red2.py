"""Interpreters: what they score, how they learn, and that tokens which left are gone."""

import copy
import itertools

import pytest
import torch
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.layers import Block, Mlp
from gossamer.layers.interpreter import (
    InterpretedBlock,
    Interpreter,
    bounded,
    choose,
    heat_map,
    interpreted,
    policy_loss,
    reward,
)
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.passes.ia_red2 import _Policy, kept_macs, solve
from gossamer.tasks import create_task
from shrink.loading import same_after_loading
from shrink.toys import digits, learned, vision


def judged(share=None, threshold=0.5, **settings):
    """A small ViT of three groups with interpreters that have opinions."""
    net = vision(depth=3, **settings)
    recipe.apply(net, {"step": "ia_red2", "groups": 3, "share": share, "protect": 1})
    for block in interpreted(net):
        block.threshold = threshold
        nn.init.normal_(block.interpreter.policy)
        nn.init.normal_(block.interpreter.q.weight, std=0.3)
    return net.eval()


def test_scores_are_the_mean_over_heads_of_what_the_policy_token_says():
    judge, x = Interpreter(12, 3), torch.randn(2, 5, 12)
    p = judge.k.weight @ judge.policy + judge.k.bias
    for b, i in itertools.product(range(2), range(5)):
        q = judge.q.weight @ x[b, i] + judge.q.bias
        heads = [torch.sigmoid(q[h : h + 4] @ p[h : h + 4] / 2) for h in (0, 4, 8)]
        torch.testing.assert_close(judge(x)[b, i], torch.stack(heads).mean())
    with pytest.raises(ValueError, match="heads must divide dim"):
        Interpreter(10, 3)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_masking_what_leaves_equals_gathering_the_rest(residual):
    made = Block(16, create_mixer("attention", 16, heads=4), Mlp(16, 32), residual=residual)
    judge = Interpreter(16, 4)
    nn.init.normal_(judge.policy)
    masking, gathering = (InterpretedBlock(made, judge, share=s).eval() for s in (None, 0.5))
    x = torch.randn(3, 11, 16)
    with torch.no_grad():
        scores = judge(x[:, 1:])
        masking.action = torch.zeros(3, 10, dtype=torch.bool).scatter(1, scores.topk(5).indices, True)
        y, mask, _ = masking(x)
        z, none, _ = gathering(x)
        assert none is None
        torch.testing.assert_close(y[mask].view_as(z), z, atol=1e-5, rtol=1e-5)


def test_a_model_that_masks_answers_as_one_that_leaves_the_tokens_out():
    net = judged()
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        y = net(x)
        kept = []
        for i in range(6):
            tokens = net.stem(x[i : i + 1])[0]
            for block in net.blocks:
                stays = choose(block.interpreter(tokens[:, 1:]), 0.5)[0]
                tokens = block.block(tokens[:, [0, *(1 + stays.nonzero().flatten()).tolist()]])
            kept.append(tokens.shape[1])
            torch.testing.assert_close(net.head(net.norm(tokens))[0], y[i], atol=1e-5, rtol=1e-5)
    assert min(kept) < 17
    assert len(set(kept)) > 1


def test_threshold_0_is_the_dense_model_and_one_above_1_leaves_a_single_patch():
    x = torch.randn(3, 1, 8, 8)
    dense = vision(depth=3).eval()
    with torch.no_grad():
        torch.testing.assert_close(judged(threshold=0.0)(x), dense(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(judged(share=1.0)(x), dense(x), atol=0, rtol=0)
    kept, _ = kept_macs(judged(threshold=1.1), (x,))
    assert (kept == 2).all()
    scores = torch.rand(4, 9)
    only = choose(scores, 1.1)
    assert torch.equal(only.sum(1), torch.ones(4).long())
    assert torch.equal(only.float().argmax(1), scores.argmax(1))
    real = torch.arange(9) < torch.tensor([[9], [4], [2], [1]])
    assert not (choose(scores, 0.2, real) & ~real).any()


def test_macs_follow_the_formula_and_fall_with_the_share():
    counts = []
    for share in (1.0, 0.8, 0.5):
        net = create_model("vit_small_patch16_224").to("meta")
        recipe.apply(net, {"step": "ia_red2", "groups": 3, "share": share, "protect": 1})
        counted = macs(net.to("meta"), torch.empty(1, 3, 224, 224, device="meta")).total
        patches, formula = 196, 196 * 768 * 384 + 384 * 1000
        for _ in range(3):
            judged_ = patches
            patches = -int(-(patches * share - 1e-5) // 1)
            n = patches + 1
            formula += 4 * (12 * n * 384**2 + 2 * n * n * 384) + (judged_ * 384**2 if share < 1 else 0)
        assert counted == pytest.approx(formula, rel=0.01)
        counts.append(counted)
    assert counts == sorted(counts, reverse=True)


def test_macs_by_threshold_are_those_of_the_tokens_each_sample_kept_and_fall_as_it_rises():
    x, net, spent = torch.randn(2, 1, 8, 8), vision(depth=4).eval(), []
    recipe.apply(net, {"step": "ia_red2", "groups": 2, "share": None, "protect": 1})
    for block in interpreted(net):
        nn.init.normal_(block.interpreter.policy)
        nn.init.normal_(block.interpreter.q.weight, std=0.3)
    scores = net.blocks[0].interpreter(net.stem(x)[0][:, 1:]).detach()
    for threshold in (0.0, *scores.quantile(torch.tensor([0.2, 0.6])).tolist(), 1.1):
        for block in interpreted(net):
            block.threshold = threshold
        kept, macs_ = kept_macs(net, (x,))
        spent.append(float(macs_.mean()))
        outside = macs(net.stem, x[:1]).total + macs(net.head, torch.randn(1, 1, 32)).total
        for i in range(2):
            tokens, want = net.stem(x[i : i + 1])[0].detach(), outside
            for j, block in enumerate(net.blocks):
                if j % 2 == 0:
                    patches = tokens[:, 1:]
                    want += macs(block.interpreter, patches).total
                    stays = choose(block.interpreter(patches), threshold)[0]
                    tokens = tokens[:, [0, *(1 + stays.nonzero().flatten()).tolist()]]
                    assert kept[i, j // 2] == tokens.shape[1]
                inner = getattr(block, "block", block)
                want += macs(inner, tokens).total
                tokens = inner(tokens).detach()
            assert float(macs_[i]) == pytest.approx(want, rel=1e-6)
    assert kept.tolist() == [[2] * 2] * 2
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) == 4
    with pytest.raises(ValueError, match="must drop tokens by threshold"):
        kept_macs(judged(share=0.5), (x,))


@pytest.mark.parametrize(("groups", "keep"), [(3, 0.6), (2, 0.6), (1, 0.4), (3, 0.2)])
def test_the_share_is_solved_for_the_mean_over_groups(groups, keep):
    t = solve(groups, keep)
    assert sum(t**g for g in range(1, groups + 1)) / groups == pytest.approx(keep, abs=1e-4)


def test_the_gradient_of_the_loss_is_that_of_the_expected_reward():
    logits = torch.tensor([0.3, -0.8, 1.1], requires_grad=True)
    value = {u: 1 - (sum(u) / 3) ** 2 if u[1] else -0.5 for u in itertools.product((0, 1), repeat=3)}

    def chances():
        return bounded(logits.sigmoid()[None])

    expected = sum(r * torch.stack([c if a else 1 - c for a, c in zip(u, chances()[0], strict=True)]).prod()
                   for u, r in value.items())  # fmt: skip
    (exact,) = torch.autograd.grad(expected, logits)
    # All eight actions, each as often as it is drawn: what the Monte-Carlo mean goes to.
    total = torch.zeros(3)
    for u, r in value.items():
        odds = torch.stack([c if a else 1 - c for a, c in zip(u, chances()[0].detach(), strict=True)]).prod()
        loss = policy_loss(chances(), torch.tensor([u]).bool(), torch.tensor([r - 0.2]))
        total -= odds * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(total, exact, atol=1e-6, rtol=1e-5)
    drawn = torch.bernoulli(chances().detach().expand(40000, -1)).bool()
    earned = torch.tensor([value[tuple(int(a) for a in u)] for u in drawn])
    (sampled,) = torch.autograd.grad(policy_loss(chances().expand(40000, -1), drawn, earned - 0.2), logits)
    torch.testing.assert_close(-sampled, exact, atol=0.01, rtol=0.05)


def test_rewards_weigh_what_was_kept_against_being_right():
    stays = torch.tensor([[True, True, False, False], [True, False, False, False], [True, False, False, False]])
    earned = reward(stays, torch.tensor([True, True, False]), tau=0.5)
    assert earned.tolist() == [0.75, 1 - 1 / 16, -0.5]
    real = torch.tensor([[True, True, False, False]] * 3)
    assert reward(stays, torch.tensor([True] * 3), real=real)[1] == 0.75


def test_an_action_that_is_the_greedy_one_earns_nothing_more(monkeypatch):
    calibration, net = digits(), judged()
    block = interpreted(net)[0]
    policy = _Policy(net, copy.deepcopy(net), block, calibration)
    inputs, target = next(calibration.batches(8))
    monkeypatch.setattr(torch, "bernoulli", lambda c: (c >= 0.5).float())
    assert float(policy(net, inputs, target)) == 0
    assert block.action is None


def test_heat_maps_have_the_grid_or_the_image_and_lie_within_0_and_1():
    scores = Interpreter(12, 3)(torch.randn(2, 20, 12))
    assert torch.equal(heat_map(scores, (4, 5))[1, 2], scores[1, 10:15])
    large = heat_map(scores, (4, 5), (32, 40))
    assert large.shape == (2, 32, 40)
    assert 0 <= float(large.min()) <= float(large.max()) <= 1
    with pytest.raises(ValueError, match="4x4 map needs 16"):
        heat_map(scores, (4, 4))


# ---- the pass --------------------------------------------------------------------------------------------------------


def quadrants(count, seed):
    """One of two textures in one quadrant of 12x12 pixels, faint noise elsewhere; class, and the quadrant's patches."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(110, 146, (count, 1, 12, 12), generator=generator)
    target = torch.randint(0, 2, (count,), generator=generator)
    corner = torch.randint(0, 2, (count, 2), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    textures = 255 - 120 * torch.stack((rows % 2, columns % 2))
    where = torch.zeros(count, 4, 4, dtype=torch.bool)
    for i in range(count):
        y, x = (6 * corner[i]).tolist()
        images[i, 0, y : y + 6, x : x + 6] = textures[target[i]]
        where[i, y // 3 : y // 3 + 2, x // 3 : x // 3 + 2] = True
    return Split((images.to(torch.uint8),), target), where.flatten(1)


def test_an_interpreter_learns_where_the_object_is():
    (train, _), (val, where) = quadrants(512, 0), quadrants(128, 1)
    spec = {"img_size": (12, 12), "in_chans": 1, "num_classes": 2}
    data = Dataset("image-classification", train, val, val, spec, {"classes": ["a", "b"], "mean": [0.5], "std": [0.5]})
    calibration = Calibration(create_task(data.task, spec, data.meta), data)
    net = learned(vision(img_size=(12, 12), patch=3, num_classes=2), calibration, steps=150)
    before = calibration.score(net)
    assert before > 0.9
    shrunk, _ = run_pass("ia_red2", net, calibration, keep=0.25, groups=1, steps=150, lr=1e-3, policy_lr=1e-2)
    (inputs,), target = calibration.task.batch(val, torch.arange(128))
    block = interpreted(shrunk)[0]
    with torch.no_grad():
        kept = choose(block.interpreter(shrunk.stem(inputs)[0][:, 1:]), 0.5)
        assert float((kept & where).sum() / kept.sum()) > 0.8
        assert calibration.score(shrunk) > before - 0.02
        # The same number of tokens, drawn by lot.
        by_lot = []
        for action in (kept, torch.zeros_like(kept).scatter(1, torch.rand(128, 16).topk(2).indices, True)):
            block.action = action
            by_lot.append(float((shrunk(inputs).argmax(1) == target).float().mean()))
    assert by_lot[0] > by_lot[1] + 0.1


def test_without_a_share_each_sample_keeps_what_it_needs(tmp_path):
    calibration = digits()
    shrunk, (step,) = run_pass("ia_red2", vision(), calibration, keep=None, steps=1)
    assert step["share"] is None
    assert all(block.share is None for block in interpreted(shrunk))
    told = shrunk.shrink_report["ia_red2"]
    assert 2 <= min(told["tokens"]) <= max(told["tokens"]) <= 17
    assert told["macs"] <= macs(shrunk, calibration.example()).total
    same_after_loading(shrunk, calibration.example(3), tmp_path)
