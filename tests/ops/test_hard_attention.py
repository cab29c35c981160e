"""Hard attention: both forms against a loop, the limits of `top_k`, and what the gathered form costs."""

import pytest
import torch

from gossamer.measure import macs
from gossamer.mixers.attention import Attention
from gossamer.mixers.hard_attention import HardAttention
from gossamer.ops.attention import attention
from gossamer.ops.hard_attention import hard_attention, hard_attention_masked

FORMS = [hard_attention, hard_attention_masked]


def heads(n=9, m=9, d=4, dtype=torch.float32):
    return [torch.randn(2, 3, length, d, dtype=dtype) for length in (n, m, m)]


def by_hand(q, k, v, top_k, mask):
    """Each query in turn: sort its keys, take the best that are allowed, weigh them."""
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = {j: float(q[b, h, i] @ k[b, h, j]) * q.shape[-1] ** -0.5 for j in range(k.shape[2])
                          if bool(mask[b, h, i, j])}  # fmt: skip
                best = sorted(scores, key=lambda j: -scores[j])[:top_k]
                if best:
                    weights = torch.tensor([scores[j] for j in best], dtype=q.dtype).softmax(0)
                    y[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, best, strict=True))
    return y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [1, 3, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_each_query_attends_its_best_allowed_keys(form, top_k, causal):
    q, k, v = heads(dtype=torch.double)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, :, :, 5:] = False  # fewer valid keys than top_k
    allowed = mask.expand(2, 3, 9, 9) & (torch.ones(9, 9).tril().bool() if causal else torch.ones(9, 9).bool())
    y = form(q, k, v, top_k, mask=mask, causal=causal)
    torch.testing.assert_close(y, by_hand(q, k, v, top_k, allowed), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_with_as_many_keys_as_there_are_it_is_soft(form):
    q, k, v = heads(7, 9)
    for top_k in (9, 50):
        torch.testing.assert_close(form(q, k, v, top_k), attention(q, k, v), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(form(q, k, v, 8), attention(q, k, v), atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_weights_sum_to_one_padding_is_never_chosen_and_a_row_without_keys_is_zero(form):
    q, k, _ = heads()
    mask = torch.rand(2, 3, 9, 9) < 0.5
    mask[0, 0, 0] = False
    mask[..., 1:, 0] = True
    weights = form(q, k, torch.eye(9).expand(2, 3, 9, 9), 3, mask=mask)
    torch.testing.assert_close(weights.sum(-1)[..., 1:], torch.ones(2, 3, 8))
    assert bool((weights[~mask] == 0).all())
    assert bool((weights[0, 0, 0] == 0).all())
    assert int((weights > 0).sum(-1).max()) == 3


def test_both_forms_have_the_same_gradients_through_the_chosen_keys_only():
    given = [t.double().requires_grad_() for t in heads()]
    mask = torch.rand(2, 1, 1, 9) < 0.8
    mask[..., 0] = True
    one, two = (torch.autograd.grad(f(*given, 3, mask=mask).sin().sum(), given) for f in FORMS)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert bool((one[2][..., 0].masked_select(~mask[:, 0, 0][:, None]) == 0).all())


def test_multiply_adds_of_the_values_fall_with_top_k():
    mixer = HardAttention(32, heads=4, top_k=1).eval()
    counts = {}
    for top_k in (1, 2, 4, 8):
        mixer.top_k = top_k
        counts[top_k] = macs(mixer, torch.randn(1, 20, 32)).total
    soft = macs(Attention(32, heads=4).eval(), torch.randn(1, 20, 32)).total
    for top_k, count in counts.items():
        assert soft - count == 20 * (20 - top_k) * 32


def test_the_mixer_is_the_same_in_training_and_eval_and_shares_the_weights_of_its_model():
    soft = Attention(32, heads=4, drop=0.0, qkv_bias=False)
    hard = HardAttention.of(soft, top_k=3)
    assert hard.qkv is soft.qkv
    assert hard.proj is soft.proj
    x, mask = torch.randn(2, 11, 32), torch.rand(2, 11) < 0.7
    mask[:, 0] = True
    y = hard.train()(x, mask=mask)
    torch.testing.assert_close(hard.eval()(x, mask=mask), y, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(soft(x, mask=mask), y, atol=1e-3)
    hard.top_k = 11
    torch.testing.assert_close(hard(x, mask=mask), soft(x, mask=mask), atol=1e-6, rtol=1e-6)


def test_no_key_at_all_is_refused():
    q, k, v = heads()
    for form in FORMS:
        with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
            form(q, k, v, 0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        HardAttention(8, heads=2, top_k=0)
