"""Blocks that reduce tokens, merging, and the heads that read merged tokens."""

import pytest
import torch
from torch import nn

from gossamer.layers import Block, Classifier, Mlp, SequencePool, mean_pool, reduce
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.heads import SentenceVector
from gossamer.layers.reduce import MergingBlock, ReducingBlock, Tokens
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.ops import tokens


def block(residual="pre", dim=16, **options):
    torch.manual_seed(0)
    net = Block(dim, create_mixer("attention", dim, heads=4), Mlp(dim, 32), residual=residual, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


def naive_match(metric, r, protect, mask):
    """Lists of `(gone, partner or None)` and of the positions that stay, one token after the other."""
    n = len(metric)
    pairs = []
    for i in range(0, n, 2):
        partners = [j for j in range(1, n, 2) if j >= protect and mask[j]]
        if i >= protect and mask[i] and partners:
            cosines = {j: float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in partners}
            j = max(cosines, key=lambda key: cosines[key])
            pairs.append((cosines[j], i, j))
    padding = [(i, None) for i in reversed(range(protect, n)) if not mask[i]]
    gone = (padding + [(i, j) for _, i, j in sorted(pairs, reverse=True)])[:r]
    left = [i for i in range(n) if i not in dict(gone)]
    return gone, sorted(left, key=lambda i: (i >= protect, i % 2 if i >= protect else 0, i))


@pytest.mark.parametrize(("n", "protect"), [(8, 0), (9, 1), (12, 1), (12, 2), (7, 2), (2, 0)])
@pytest.mark.parametrize("padded", [0.0, 0.4, 0.9])
def test_matching_with_padding_equals_the_loop(n, protect, padded):
    torch.manual_seed(n)
    metric, x = torch.randn(3, n, 5).double(), torch.randn(3, n, 4).double()
    size = torch.rand(3, n).double() + 0.5
    mask = torch.ones(3, n, dtype=torch.bool)
    if padded:
        mask = torch.rand(3, n) > padded
        mask[:, : max(protect, 1)] = True
    for r in range((n - protect) // 2 + 1):
        found = tokens.match(metric, r, protect=protect, mask=mask if padded else None)
        merged, heavy = tokens.combine(x, size, found)
        for b in range(3):
            gone, stay = naive_match(metric[b], r, protect, mask[b])
            assert found.stay[b].tolist() == stay
            for place, i in enumerate(stay):
                group = [i, *(g for g, j in gone if j == i)]
                mass = size[b, group].sum()
                torch.testing.assert_close(heavy[b, place], mass)
                mean = (x[b, group] * size[b, group, None]).sum(0) / mass
                torch.testing.assert_close(merged[b, place], mean)


@pytest.mark.parametrize("residual", ["pre", "post", "stream"])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_a_block_that_reduces_nothing_is_the_block(residual, layer_scale):
    net = block(residual, layer_scale=layer_scale)
    x, mask = torch.randn(2, 9, 16), torch.rand(2, 9) < 0.7
    mask[:, 0] = True
    for given in (None, mask):
        y, left, sizes = MergingBlock(net, 0, tokens=9)(x, mask=given)
        assert torch.equal(y, net(x, mask=given))
        assert left is given
        assert sizes is None


def test_merging_copies_of_a_token_changes_nothing():
    """Sizes in attention and in the mean make a merged token count as its members, in every following block."""
    torch.manual_seed(1)
    first, second = block("pre"), block("pre")
    x = torch.randn(2, 9, 16)
    x[:, 3], x[:, 4] = x[:, 6], x[:, 7]  # even and odd positions alike; 0 is protected
    whole = second(first(x))
    merged, _, sizes = MergingBlock(first, 2, tokens=9, protect=1)(x)
    assert merged.shape[1] == 7
    assert sizes.sum(1).tolist() == [9, 9]
    merged, _, sizes = MergingBlock(second, 0, tokens=7, protect=1)(merged, sizes=sizes)
    torch.testing.assert_close(merged[:, 0], whole[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean_pool(merged, sizes=sizes), whole.mean(1), atol=1e-5, rtol=1e-5)
    blind, *_ = MergingBlock(second, 0, tokens=7, protect=1)(merged)
    assert not torch.allclose(blind[:, 0], whole[:, 0], atol=1e-3)


def test_padding_goes_first_and_is_never_read():
    net = MergingBlock(block("post"), 4, tokens=12, protect=1)
    x, mask = torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool)
    mask[0, 8:] = False  # as much padding as goes
    mask[1, 10:] = False
    y, left, sizes = net(x, mask=mask)
    assert left.sum(1).tolist() == [8, 8]
    assert (sizes * left).sum(1).tolist() == [8, 10]
    whole = net.block(x, mask=mask)[0, :8]
    kept = y[0][left[0]]
    torch.testing.assert_close(kept[kept[:, 0].argsort()], whole[whole[:, 0].argsort()], atol=1e-5, rtol=1e-5)
    other, *_ = net(torch.where(mask[..., None], x, 100 * torch.randn_like(x)), mask=mask)
    torch.testing.assert_close(other[left], y[left], atol=1e-5, rtol=1e-5)


def test_protected_tokens_stay_in_front_and_alone():
    net = MergingBlock(block(), 5, tokens=12, protect=2)
    x = torch.randn(3, 12, 16)
    x[:, 2:4] = x[:, :2]  # most alike, and still not merged
    y, _, sizes = net(x)
    assert y.shape[1] == 7
    assert sizes[:, :2].tolist() == [[1, 1]] * 3
    torch.testing.assert_close(y[:, :2], net.block(x)[:, :2], atol=1e-6, rtol=1e-5)


def test_other_lengths_lose_the_same_share_and_at_most_half():
    net = MergingBlock(block(), 4, tokens=16, protect=1)
    assert [net(torch.randn(1, n, 16))[0].shape[1] for n in (32, 16, 9, 3, 1)] == [24, 12, 7, 3, 1]
    many = MergingBlock(block(), 16, tokens=16, protect=1)
    assert many(torch.randn(1, 16, 16))[0].shape[1] == 9


class Looks(ReducingBlock):
    """Keeps the half of the tokens that the first one attends most; drops one before, one after."""

    wants = frozenset({"keys", "weights"})

    def before(self, tokens):
        return Tokens(tokens.x[:, :-1])

    def between(self, tokens, seen):
        self.seen = seen
        x, _ = reduce.ops.select(tokens.x, seen.weights.mean(1)[:, 0], tokens.x.shape[1] // 2)
        return Tokens(x)

    def after(self, tokens, seen):
        return Tokens(tokens.x[:, 1:])


def test_hooks_see_what_the_one_attention_computed(monkeypatch):
    net = block()
    x = torch.randn(2, 9, 16)
    looks = Looks(net)
    calls = []
    product = net.mixer.qkv.forward
    monkeypatch.setattr(net.mixer.qkv, "forward", lambda *a: calls.append(1) or product(*a))
    y, *_ = looks(x)
    assert y.shape == (2, 3, 16)
    assert len(calls) == 1
    q, k, _ = net.mixer.project(net.norm1(x[:, :-1]))
    assert torch.equal(looks.seen.keys, k)
    weights = (q @ k.mT * 4**-0.5).softmax(-1)
    torch.testing.assert_close(looks.seen.weights, weights)
    best = weights.mean(1)[:, 0].topk(4).indices.sort().values
    whole = net(x[:, :-1])
    want = torch.stack([whole[b, best[b, 1:]] for b in range(2)])
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


def test_blocks_that_cannot_be_asked_are_refused():
    with pytest.raises(ValueError, match="does not show keys"):
        MergingBlock(Block(16, create_mixer("pool", 16), Mlp(16, 32)), 1, tokens=9)
    with pytest.raises(ValueError, match="one residual branch"):
        ReducingBlock(Block(16, create_mixer("attention", 16, heads=4), None))
    with pytest.raises(ValueError, match="r must be at least 0"):
        MergingBlock(block(), -1, tokens=9)
    pooling = ReducingBlock(Block(16, create_mixer("pool", 16), Mlp(16, 32)))
    with pytest.raises(ValueError, match="sizes of tokens"):
        pooling(torch.randn(1, 4, 16), sizes=torch.ones(1, 4))


def test_heads_weigh_tokens_by_size():
    torch.manual_seed(0)
    x, sizes = torch.randn(2, 4, 8), torch.tensor([[1.0, 2, 1, 3], [2, 2, 2, 1]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])
    many = torch.stack([t.repeat_interleave(s.long(), 0) for t, s in zip(x, sizes, strict=True)])
    real = torch.stack([t.repeat_interleave(s.long(), 0) for t, s in zip(mask, sizes, strict=True)])
    for head in (
        mean_pool,
        SequencePool(8),
        Classifier(8, 3),
        Classifier(8, 3, pool="sequence"),
        SentenceVector("mean"),
        SentenceVector("max"),
        DistilledClassifier(8, 3).eval(),
    ):
        torch.testing.assert_close(head(x, mask, sizes=sizes), head(many, real), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(head(x, None, sizes=sizes), head(many, None), atol=1e-6, rtol=1e-5)


def test_the_trunk_hands_sizes_on_to_its_head():
    torch.manual_seed(0)
    net = create_model("vit_tiny_patch16_224", img_size=16, patch=4, dim=16, depth=2, heads=2, num_classes=3).eval()
    net.head = Classifier(16, 3)
    net.blocks[0] = MergingBlock(net.blocks[0], 6, tokens=17, protect=1)
    net.blocks[1] = MergingBlock(net.blocks[1], 4, tokens=11, protect=1)
    x = torch.randn(2, 3, 16, 16)
    tokens, mask = net.encode(x)
    assert tokens.shape[1] == 7
    assert mask is None
    given = []
    net.head.register_forward_hook(lambda *a: given.append(a[2]["sizes"]), with_kwargs=True)
    net(x)
    assert given[0].sum(1).tolist() == [17, 17]
    with pytest.raises(ValueError, match="tokens were reduced to 7; there is no 4x4 map"):
        net.features(x)
