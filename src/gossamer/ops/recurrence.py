"""Diagonal linear recurrences: `h_t = a_t h_(t-1) + b_t`, the core of state-space and gated linear layers.

Source: Blelloch 1990, "Prefix sums and their applications"; Martin & Cundy 2018, "Parallelizing Linear Recurrent
Neural Nets Over Sequence Length".

- blocked scan: about `2 sqrt(2 n)` vectorised steps and `4 n` multiply-adds, against `n` steps one by one
- its gradient is the same recurrence backwards, so nothing but `a` and `h` is kept
- real or complex, forward or reverse, any number of trailing axes; gradients of gradients too
"""

import math

import torch
from jaxtyping import Inexact
from torch import Tensor


def linear_recurrence(
    a: Inexact[Tensor, "#b #n *#rest"],
    b: Inexact[Tensor, "b n *rest"],
    h0: Inexact[Tensor, "b *rest"] | None = None,
    *,
    reverse: bool = False,
) -> Inexact[Tensor, "b n *rest"]:
    """`h_t = a_t h_(t-1) + b_t` for every t; reverse: `h_t = a_t h_(t+1) + b_t`.

    Args:
        a: factors, broadcast to `b`.
        b: inputs.
        h0: the state before the first step (reverse: after the last); None: 0.
        reverse: run from the last step to the first.
    """
    a, h = _ready(a, b, h0)
    return _Scan.apply(a, b, h, reverse)


def linear_recurrence_reference(
    a: Inexact[Tensor, "#b #n *#rest"],
    b: Inexact[Tensor, "b n *rest"],
    h0: Inexact[Tensor, "b *rest"] | None = None,
    *,
    reverse: bool = False,
) -> Inexact[Tensor, "b n *rest"]:
    """`linear_recurrence`, step by step."""
    a, h = _ready(a, b, h0)
    steps = range(b.shape[1])
    states = []
    for t in reversed(steps) if reverse else steps:
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, dim=1)


def _ready(a: Tensor, b: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    if a.dtype != b.dtype or (h0 is not None and h0.dtype != b.dtype):
        came = [str(t.dtype) for t in (a, b, h0) if t is not None]
        raise ValueError(f"a, b and h0 must have one dtype, got {', '.join(came)}")
    return a.expand_as(b), torch.zeros_like(b[:, 0]) if h0 is None else h0


def _scan(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """Three passes over blocks of c steps: each block from zero, the carries between blocks, each block again."""
    if reverse:
        return _scan(a.flip(1), b.flip(1), h0, False).flip(1)
    n, rest = b.shape[1], b.shape[2:]
    c = max(math.isqrt(n // 2), 1)  # 2c steps inside blocks and n/c between them: least at sqrt(n/2)
    if n <= 16:
        c = n
    blocks = -(-n // c)
    if blocks > 1:
        short = blocks * c - n
        if short:
            tail = b.new_zeros(b.shape[0], short, *rest)
            a, b = torch.cat([a, tail], 1), torch.cat([b, tail], 1)
        ab, bb = a.unflatten(1, (blocks, c)), b.unflatten(1, (blocks, c))
        end, gain = bb[:, :, 0], ab[:, :, 0]
        for j in range(1, c):
            end, gain = torch.addcmul(bb[:, :, j], ab[:, :, j], end), gain * ab[:, :, j]
        before = torch.empty_like(end)
        for i in range(blocks):
            before[:, i] = h0
            h0 = torch.addcmul(end[:, i], gain[:, i], h0)
    else:
        ab, bb, before = a[:, None], b[:, None], h0[:, None]
    out = torch.empty_like(bb, memory_format=torch.contiguous_format)
    for j in range(c):
        before = torch.addcmul(bb[:, :, j], ab[:, :, j], before)
        out[:, :, j] = before
    return out.flatten(1, 2)[:, :n]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, h0, reverse):
        h = _scan(a, b, h0, reverse)
        ctx.save_for_backward(a, h, h0)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx, grad):
        # with g_t = dL/dh_t + conj(a_(t+1)) g_(t+1):  dL/db_t = g_t,  dL/da_t = g_t conj(h_(t-1))
        a, h, h0 = ctx.saved_tensors
        ends = (h[:, 1:], h0[:, None]) if ctx.reverse else (h0[:, None], h[:, :-1])
        previous = torch.cat(ends, dim=1)
        one = torch.zeros_like(a[:, :1])
        following = torch.cat((one, a[:, :-1]) if ctx.reverse else (a[:, 1:], one), dim=1).conj()
        g = _Scan.apply(following, grad, torch.zeros_like(h0), not ctx.reverse)
        first = -1 if ctx.reverse else 0
        return g * previous.conj(), g, g[:, first] * a[:, first].conj(), None
