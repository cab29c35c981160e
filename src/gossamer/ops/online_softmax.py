"""Online softmax: attention over parts of the keys, merged exactly.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention";
Sanovar et al. 2024, "Lean Attention" (the merge as a reduction).

- a state `(m, l, o)` = (largest logit, sum of exp(logit - m), sum of exp(logit - m) v) of one part of the keys
- `merge` is associative and commutative; `empty` is its identity, so parts may come in any order and grouping
- a query that sees no key gives 0, never NaN, in value and gradient
- `m` only keeps the exponentials in range and carries no gradient; `finish` and `logsumexp` are exact
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class State(NamedTuple):
    """What is known of a softmax average after some of its keys."""

    m: Float[Tensor, "*b n_q"]
    l: Float[Tensor, "*b n_q"]
    o: Float[Tensor, "*b n_q e"]


def empty(q: Float[Tensor, "*b n_q d"], width: int) -> State:
    """The state of no keys at all: `(-inf, 0, 0)`, with values of `width` channels."""
    l = q.new_zeros(q.shape[:-1])
    return State(torch.full_like(l, float("-inf")), l, q.new_zeros(*q.shape[:-1], width))


def attend_chunk(
    q: Float[Tensor, "*b n_q d"],
    k: Float[Tensor, "*b n_k d"],
    v: Float[Tensor, "*b n_k e"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "*#b #n_q #n_k"] | None = None,
    mask: Bool[Tensor, "*#b #n_q #n_k"] | None = None,
) -> State:
    """The state of these keys: logits `scale q k^T + bias`, only where `mask` is True.

    Args:
        scale: of the logits; None: `d ** -0.5`.
        bias: added to the logits.
        mask: True where the query sees the key.
    """
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    m = logits.detach().amax(-1)
    weights = (logits - _finite(m)[..., None]).exp()
    return State(m, weights.sum(-1), weights @ v)


def _finite(m: Tensor) -> Tensor:
    """-inf (no key yet) becomes 0, so that `-inf - m` stays -inf and its exponential 0."""
    return m.masked_fill(m == float("-inf"), 0.0)


def merge(a: State, b: State) -> State:
    """The state of both parts: `m = max(m_a, m_b)`, `l = e^(m_a - m) l_a + e^(m_b - m) l_b`, `o` likewise."""
    m = torch.maximum(a.m, b.m)
    top = _finite(m)
    wa, wb = (a.m - top).exp(), (b.m - top).exp()
    return State(m, wa * a.l + wb * b.l, wa[..., None] * a.o + wb[..., None] * b.o)


def finish(state: State) -> Float[Tensor, "*b n_q e"]:
    """`o / l`, and 0 where no key was seen."""
    none = state.l == 0
    return state.o / state.l.masked_fill(none, 1.0)[..., None]


def logsumexp(state: State) -> Float[Tensor, "*b n_q"]:
    """`log sum exp(logit)` over the keys seen, -inf where there were none."""
    none = state.l == 0
    return (state.m + state.l.masked_fill(none, 1.0).log()).masked_fill(none, float("-inf"))


def chunked_attention(
    q: Float[Tensor, "*b n_q d"],
    k: Float[Tensor, "*b n_k d"],
    v: Float[Tensor, "*b n_k e"],
    chunk: int = 512,
    *,
    scale: float | None = None,
    bias: Float[Tensor, "*#b #n_q n_k"] | None = None,
    mask: Bool[Tensor, "*#b #n_q n_k"] | None = None,
) -> State:
    """Softmax attention that never holds more than `n_q * chunk` logits; `finish` gives the output.

    For gradients the logits of each chunk are computed again, so the bound holds in training too.

    Args:
        chunk: keys at a time.
        scale: of the logits; None: `d ** -0.5`.
        bias: added to the logits.
        mask: True where the query sees the key.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    def part(state: State, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> State:
        return merge(state, attend_chunk(q, k, v, scale=scale, bias=bias, mask=mask))

    again = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    state = empty(q, v.shape[-1])
    for start in range(0, k.shape[-2], chunk):
        here = slice(start, start + chunk)
        inputs = (
            state,
            q,
            k[..., here, :],
            v[..., here, :],
            None if bias is None else bias[..., here],
            None if mask is None else mask[..., here],
        )
        state = checkpoint(part, *inputs, use_reentrant=False) if again else part(*inputs)
    return state


def attention_reference(
    q: Float[Tensor, "*b n_q d"],
    k: Float[Tensor, "*b n_k d"],
    v: Float[Tensor, "*b n_k e"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "*#b #n_q #n_k"] | None = None,
    mask: Bool[Tensor, "*#b #n_q #n_k"] | None = None,
) -> tuple[Float[Tensor, "*b n_q e"], Float[Tensor, "*b n_q"]]:
    """The dense form: output, and log-sum-exp of the logits."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if mask is None:
        return logits.softmax(-1) @ v, logits.logsumexp(-1)
    logits = logits.masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(blind, 0.0) @ v, logits.logsumexp(-1)
