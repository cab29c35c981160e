"""The attention core: fused equals written out, each hook does what the mathematics says."""

import pytest
import torch

from gossamer.ops.attention import attention, attention_maps, causal_mask, join_heads, split_heads

B, H, N, M, D = 2, 4, 5, 7, 6


def qkv(heads: int = H, keys: int = M, width: int = D) -> list[torch.Tensor]:
    shapes = ((B, H, N, D), (B, heads, keys, D), (B, heads, keys, width))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def mask() -> torch.Tensor:
    allowed = torch.rand(B, 1, N, M) < 0.6
    allowed[..., 0] = True
    return allowed


HOOKS = {
    "plain": {},
    "mask": {"mask": mask},
    "key mask": {"mask": lambda: mask()[:, :, :1]},
    "bias": {"bias": lambda: torch.randn(1, H, N, M, dtype=torch.float64)},
    "learned bias": {"bias": lambda: torch.randn(1, H, N, M, dtype=torch.float64, requires_grad=True)},
    "bias and mask": {"bias": lambda: torch.randn(H, N, M, dtype=torch.float64), "mask": mask},
    "causal": {"causal": lambda: True},
    "causal and mask": {"causal": lambda: True, "mask": mask},
    "scale": {"scale": lambda: 0.3},
    "temperature of a head": {"temperature": lambda: torch.rand(1, H, 1, 1, dtype=torch.float64)},
    "temperature of a query": {"temperature": lambda: torch.rand(B, H, N, 1, dtype=torch.float64)},
    "temperature of a key": {"temperature": lambda: torch.rand(1, 1, N, M, dtype=torch.float64)},
    "sinks": {"sinks": lambda: tuple(torch.randn(H, 2, D, dtype=torch.float64, requires_grad=True) for _ in "kv")},
    "sinks, mask and bias": {
        "sinks": lambda: tuple(torch.randn(H, 2, D, dtype=torch.float64) for _ in "kv"),
        "mask": mask,
        "bias": lambda: torch.randn(1, H, N, M, dtype=torch.float64),
        "temperature": lambda: torch.rand(1, 1, N, M, dtype=torch.float64),
    },
    "gate": {"gate": lambda: torch.rand(1, H, 1, 1, dtype=torch.float64, requires_grad=True)},
    "normaliser": {"normaliser": lambda: lambda logits: torch.softmax(logits, -1) ** 2},
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_fast_forms_equal_attention_written_out_with_gradients(name: str) -> None:
    hooks = {key: make() for key, make in HOOKS[name].items()}
    q, k, v = qkv()
    fast = attention(q, k, v, **hooks)
    slow, _, _ = attention_maps(q, k, v, **hooks)
    torch.testing.assert_close(fast, slow)
    learned = [q, k, v]
    for hook in hooks.values():
        learned += [t for t in (hook if isinstance(hook, tuple) else [hook]) if getattr(t, "requires_grad", False)]
    mix = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad((fast * mix).sum(), learned), torch.autograd.grad((slow * mix).sum(), learned), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_written_out_attention_is_the_formula() -> None:
    q, k, v = (t.detach() for t in qkv(width=3))
    bias, allowed = torch.randn(1, H, N, M, dtype=torch.float64), mask()
    temperature, gate = torch.rand(1, 1, N, M, dtype=torch.float64), torch.rand(1, H, N, 3, dtype=torch.float64)
    sink_k, sink_v = torch.randn(H, 1, D, dtype=torch.float64), torch.randn(H, 1, 3, dtype=torch.float64)
    out, weights, _ = attention_maps(
        q, k, v, mask=allowed, bias=bias, temperature=temperature, gate=gate, sinks=(sink_k, sink_v)
    )
    for b in range(B):
        for h in range(H):
            for i in range(N):
                scores = [q[b, h, i] @ sink_k[h, 0] * D**-0.5]
                values = [sink_v[h, 0]]
                for j in range(M):
                    if allowed[b, 0, i, j]:
                        score = q[b, h, i] @ k[b, h, j] * D**-0.5 * temperature[0, 0, i, j] + bias[0, h, i, j]
                        scores.append(score)
                        values.append(v[b, h, j])
                e = torch.stack(scores).exp()
                want = sum(w * x for w, x in zip(e / e.sum(), values, strict=True)) * gate[0, h, i]
                torch.testing.assert_close(out[b, h, i], want)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))


def test_a_row_that_may_attend_to_nothing_gives_zeros() -> None:
    q, k, v = qkv()
    allowed = torch.ones(B, 1, N, M, dtype=torch.bool)
    allowed[:, :, 2] = False
    for out in (attention(q, k, v, mask=allowed), attention_maps(q, k, v, mask=allowed)[0]):
        assert bool((out[:, :, 2] == 0).all())
        assert bool(out.isfinite().all())
        (grad,) = torch.autograd.grad(out.sum(), v)
        assert bool(grad.isfinite().all())


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    q, k, v = qkv(heads=2)
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, k, v), attention(q, *repeated))
    with pytest.raises(ValueError, match="4 query heads"):
        attention(q, *(t.expand(-1, 3, -1, -1) for t in (k[:, :1], v[:, :1])))


def test_causal_attention_lets_the_last_query_see_every_key_and_no_query_the_future() -> None:
    q, k, v = qkv()
    _, weights, _ = attention_maps(q, k, v, causal=True)
    seen = weights[0, 0] > 0
    assert torch.equal(seen, causal_mask(N, M))
    assert bool(seen[-1].all())
    assert seen[0].tolist() == [True] * 3 + [False] * 4
    with pytest.raises(ValueError, match="keys >= queries"):
        attention(q, *qkv(keys=3)[1:], causal=True)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k, v = (t.detach() for t in qkv())
    runs = torch.stack([attention(q, k, v, dropout=0.5, normaliser=lambda x: x.softmax(-1)) for _ in range(400)])
    assert runs.std(0).min() > 0
    torch.testing.assert_close(runs.mean(0), attention(q, k, v), atol=0.3, rtol=0)


def test_heads_split_and_join_without_loss() -> None:
    x = torch.randn(2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(split_heads(x, 3)[:, 1, :, 0], x[:, :, 4])
    assert torch.equal(join_heads(split_heads(x, 3)), x)
