import pytest
import torch

from gossamer.ops import online_softmax as s


def tensors(n_q=5, n_k=23, lead=(2, 3)):
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double, requires_grad=True)

    q, k, v = draw(*lead, n_q, 4), draw(*lead, n_k, 4), draw(*lead, n_k, 6)
    bias = draw(lead[-1], n_q, n_k)
    mask = torch.rand(lead[0], 1, n_q, n_k, generator=g) < 0.5
    mask[0, :, 2] = False  # a query that sees nothing
    mask[1, :, 0, :14] = False  # a query that sees nothing for its first chunks
    return q, k, v, bias, mask


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_attention_equals_dense_attention(chunk, masked):
    q, k, v, bias, mask = tensors()
    mask = mask if masked else None
    state = s.chunked_attention(q, k, v, chunk, bias=bias, mask=mask, scale=0.7)
    out, lse = s.attention_reference(q, k, v, bias=bias, mask=mask, scale=0.7)
    torch.testing.assert_close(s.finish(state), out, atol=1e-9, rtol=0)
    torch.testing.assert_close(s.logsumexp(state), lse, atol=1e-9, rtol=0)
    if masked:
        assert (s.finish(state)[0, :, 2] == 0).all()
        assert (s.logsumexp(state)[0, :, 2] == float("-inf")).all()
    seen = torch.isfinite(lse)
    weight = torch.randn_like(out)
    inputs = (q, k, v, bias)
    fast = torch.autograd.grad((s.finish(state) * weight).sum() + s.logsumexp(state)[seen].sum(), inputs)
    slow = torch.autograd.grad((out * weight).sum() + lse[seen].sum(), inputs)
    for one, two in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_merge_is_associative_and_commutative_and_empty_is_its_identity():
    q, k, v, _, mask = tensors()
    a, b, c = (
        s.attend_chunk(q, k[..., i, :], v[..., i, :], mask=mask[..., i])
        for i in (slice(0, 9), slice(9, 14), slice(14, 23))
    )
    whole, lse = s.attention_reference(q, k, v, mask=mask)
    nothing = s.empty(q, 6)
    for state in (
        s.merge(s.merge(a, b), c),
        s.merge(a, s.merge(b, c)),
        s.merge(c, s.merge(b, a)),
        s.merge(s.merge(nothing, s.merge(a, c)), s.merge(b, nothing)),
    ):
        torch.testing.assert_close(s.finish(state), whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(s.logsumexp(state), lse, atol=1e-12, rtol=0)
    for mine, kept in zip(s.merge(a, nothing), a, strict=True):
        assert torch.equal(mine, kept)
    assert (s.finish(s.merge(nothing, nothing)) == 0).all()


def test_logits_far_beyond_the_range_of_exp_are_merged_without_overflow():
    q, k, v, _, _ = tensors()
    out, _ = s.attention_reference(q, k, v, scale=1e4)
    state = s.chunked_attention(q, k, v, 4, scale=1e4)
    assert torch.isfinite(s.finish(state)).all()
    torch.testing.assert_close(s.finish(state), out, atol=1e-9, rtol=0)


def test_training_keeps_no_more_logits_than_a_chunk():
    q = torch.randn(64, 4, requires_grad=True)
    k, v = torch.randn(4096, 4), torch.randn(4096, 4)
    largest = 0

    def note(t):
        nonlocal largest
        largest = max(largest, t.numel() if t.shape[-1] not in (4,) else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        s.finish(s.chunked_attention(q, k, v, 256))
    assert largest < 64 * 256


def test_a_chunk_below_one_is_refused():
    q, k, v, _, _ = tensors()
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        s.chunked_attention(q, k, v, 0)
