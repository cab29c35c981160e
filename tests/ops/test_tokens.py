import pytest
import torch

from gossamer.ops import patterns, tokens


def draw(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def test_select_keeps_the_highest_scores_in_their_order():
    x, scores = draw(3, 9, 2), torch.rand(3, 9)
    chosen, index = tokens.select(x, scores, 4)
    for sample in range(3):
        best = sorted(sorted(range(9), key=lambda i: -scores[sample, i])[:4])
        assert index[sample].tolist() == best
        assert torch.equal(chosen[sample], x[sample, best])


def test_selected_tokens_are_put_back_where_they_came_from():
    x = draw(2, 7, 3)
    chosen, index = tokens.select(x, torch.rand(2, 7), 3)
    back = tokens.put(x, index, chosen * 2)
    factor = torch.ones(2, 7, 1, dtype=torch.double).scatter(1, index[..., None], 2)
    assert torch.equal(back, x * factor)
    everything, order = tokens.select(x, torch.rand(2, 7), 7)
    assert torch.equal(everything, x)
    assert order.tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("n", [2, 7, 12])
@pytest.mark.parametrize("protect", [0, 1, 2])
@pytest.mark.parametrize("sized", [False, True])
def test_merging_equals_the_loop_in_value_and_gradient(n, protect, sized):
    x, metric = draw(2, n, 3), draw(2, n, 4)
    size = torch.rand(2, n, dtype=torch.double) + 0.5 if sized else None
    most = len(range(protect + protect % 2, n, 2)) if n > max(protect, 1) else 0
    for r in {0, most // 2, most}:
        fast = tokens.merge(x, r, metric=metric, size=size, protect=protect)
        slow = tokens.merge_reference(x, r, metric=metric, size=size, protect=protect)
        assert torch.equal(fast.source, slow.source)
        torch.testing.assert_close(fast.size, slow.size, atol=1e-12, rtol=0)
        torch.testing.assert_close(fast.x, slow.x, atol=1e-12, rtol=0)
        out = torch.randn_like(fast.x)
        one, two = (torch.autograd.grad(m.x, x, out)[0] for m in (fast, slow))
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_merging_none_is_the_identity():
    x = draw(2, 9, 4)
    kept = tokens.merge(x, 0)
    assert torch.equal(kept.x, x)
    assert torch.equal(tokens.unmerge(kept.x, kept.source), x)


def test_equal_tokens_merge_first_and_unmerging_gives_them_back():
    x = torch.randn(1, 8, 16)
    x[0, 5] = x[0, 2]  # an even and an odd token alike
    merged = tokens.merge(x, 1)
    assert merged.source[0, 2] == merged.source[0, 5]
    torch.testing.assert_close(tokens.unmerge(merged.x, merged.source), x)


def test_merging_twice_keeps_the_weighted_mean_and_the_way_back():
    x = draw(2, 16, 3)
    first = tokens.merge(x, 6, protect=1)
    second = tokens.merge(first.x, 4, size=first.size, source=first.source, protect=1)
    assert second.size.sum(1).tolist() == [16, 16]
    torch.testing.assert_close((second.x * second.size[..., None]).sum(1), x.sum(1))
    back = tokens.unmerge(second.x, second.source)
    for sample in range(2):
        for place in range(6):
            members = (second.source[sample] == place).nonzero()[:, 0]
            torch.testing.assert_close(back[sample, members[0]], x[sample, members].mean(0))
    assert torch.equal(second.x[:, 0], x[:, 0])  # the protected token


def test_packed_tokens_come_back_where_they_were():
    x, mask = draw(3, 8, 2), torch.rand(3, 8) < 0.5
    mask[1] = False  # a sample without a token
    packed = tokens.pack(x, mask)
    assert packed.offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    for sample in range(3):
        part = packed.values[packed.offsets[sample] : packed.offsets[sample + 1]]
        assert torch.equal(part, x[sample][mask[sample]])
    back = tokens.restore(packed, fill=7.0)
    assert torch.equal(back, torch.where(mask[..., None], x, torch.tensor(7.0, dtype=x.dtype)))
    (grad,) = torch.autograd.grad(tokens.restore(packed, packed.values * 3).sum(), x)
    assert torch.equal(grad, mask[..., None].expand_as(x) * 3.0)
    full = tokens.pack(x, torch.ones_like(mask))
    assert torch.equal(tokens.restore(full), x)


def test_masked_attention_equals_gathered_attention():
    x, mask = draw(3, 8, 4), torch.rand(3, 8) < 0.6
    mask[:, 0] = True
    heads = x[:, None]
    valid = patterns.dense_mask(patterns.valid_keys(mask), 8, 8)
    masked = patterns.pattern_reference(heads, heads, heads, valid)[:, 0]
    packed = tokens.pack(x, mask)
    row = packed.values[None, None]
    total = row.shape[2]
    apart = patterns.dense_mask(patterns.documents(tokens.documents(packed)[None]), total, total)
    gathered = tokens.restore(packed, patterns.pattern_reference(row, row, row, apart)[0, 0])
    torch.testing.assert_close(gathered, masked * mask[..., None], atol=1e-9, rtol=0)
    one, two = (torch.autograd.grad(y.square().sum(), x)[0] for y in (gathered, masked * mask[..., None]))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_impossible_numbers_of_tokens_are_refused():
    x = torch.randn(1, 5, 2)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5 \(tokens\), got 6"):
        tokens.select(x, torch.rand(1, 5), 6)
    with pytest.raises(ValueError, match=r"r must be in 0\.\.2 for n=5, protect=1, got 3"):
        tokens.merge(x, 3, protect=1)
