"""The attention core: one function with the hooks the systems need.

`out = gate * N(temperature * scale * q k^T + bias, mask) [v; sinks]`, N = softmax unless another normaliser is given.

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; the hooks name their papers where they are used.

- plain calls go to PyTorch's fused attention; anything it cannot do, or does more slowly, is written out
- a temperature that does not depend on the key is folded into the queries, so it costs nothing
- grouped queries: fewer key/value heads than query heads, each shared by a run of neighbouring query heads
- a row that may attend to nothing gives zeros
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.ops.compiled import compiling

Normaliser = Callable[[Tensor], Tensor]

# Above this many query-key pairs a head, memory speaks for the fused kernel even where it is slower.
BF16_FUSED_PAIRS = 1024 * 1024
# Up to here a compiler's own softmax between two products is quicker than the fused kernel, unless there is a bias.
COMPILED_PAIRS = 128 * 128


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m dv"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    temperature: Float[Tensor, "..."] | None = None,
    sinks: tuple[Float[Tensor, "hk s d"], Float[Tensor, "hk s dv"]] | None = None,
    gate: Float[Tensor, "..."] | None = None,
    normaliser: Normaliser | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n dv"]:
    """Attention of `n` queries over `m` keys.

    Args:
        mask: True where a query may attend a key; broadcasts to `(b, h, n, m)`.
        bias: added to the scaled logits; broadcasts to `(b, h, n, m)`.
        causal: query i attends keys `0 .. i + m - n` (the last query sees every key).
        scale: multiplier of `q k^T`, `d ** -0.5` by default.
        temperature: further multiplier of the scaled logits, before the bias; broadcasts to `(b, h, n, m)`.
        sinks: key and value slots every query may attend, whatever the mask says; they take no bias.
        gate: multiplies the output; broadcasts to `(b, h, n, dv)`.
        normaliser: logits to weights over the last axis; masked logits are -inf.
        dropout: probability of dropping an attention weight.

    Raises:
        ValueError: `hk` does not divide `h`, or `causal` with fewer keys than queries.
    """
    q, k, v, mask, bias, scale = _fold(q, k, v, mask, bias, causal, scale, temperature, sinks)
    keyed = temperature is not None and temperature.shape[-1] != 1
    plain = bias is None and mask is None
    if normaliser is None and not keyed and _fusable(q, k, v, bias, dropout) and not (plain and _compiled_better(q, k)):
        out = F.scaled_dot_product_attention(q, k, v, _additive(mask, bias, q), dropout, scale=scale)
    else:
        weights = _weights(q, k, mask, bias, scale, temperature if keyed else None, sinks, normaliser)
        out = F.dropout(weights, dropout) @ v if dropout else weights @ v
    return out if gate is None else out * gate


def attention_maps(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m dv"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    temperature: Float[Tensor, "..."] | None = None,
    sinks: tuple[Float[Tensor, "hk s d"], Float[Tensor, "hk s dv"]] | None = None,
    gate: Float[Tensor, "..."] | None = None,
    normaliser: Normaliser | None = None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n m_s"], Float[Tensor, "b h n m_s"]]:
    """The same attention written out: `(output, weights, logits)`, sinks first among the keys.

    It is the reference that the fused path is tested against.
    """
    q, k, v, mask, bias, scale = _fold(q, k, v, mask, bias, causal, scale, temperature, sinks)
    keyed = temperature if temperature is not None and temperature.shape[-1] != 1 else None
    logits = _logits(q, k, mask, bias, scale, keyed, sinks)
    weights = (normaliser or _softmax)(logits)
    out = weights @ v
    return (out if gate is None else out * gate), weights, logits


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b h n d"]:
    """`(b, n, h * d) -> (b, h, n, d)`, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
    """`(b, h, n, d) -> (b, n, h * d)`."""
    return x.transpose(1, 2).flatten(2)


def causal_mask(n: int | Tensor, m: int | Tensor, device: torch.device | None = None) -> Bool[Tensor, "n m"]:
    """True where query i (of `n`) may attend key j (of `m`): `j <= i + m - n`. The tracer's sizes are tensors."""
    rows: Tensor = torch.arange(n, device=device)  # type: ignore[arg-type]
    return torch.arange(m, device=device) <= rows[:, None] + (m - n)  # type: ignore[arg-type]


def _fold(q, k, v, mask, bias, causal, scale, temperature, sinks):
    """Brings every hook that can be expressed by q, k, v, mask, bias and scale into them."""
    heads, groups = q.shape[1], k.shape[1]
    if heads % groups:
        raise ValueError(f"key heads must divide query heads; got {groups} key heads, {heads} query heads")
    if groups != heads:
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    if causal:
        if k.shape[2] < q.shape[2]:
            raise ValueError(f"causal attention needs keys >= queries; got {k.shape[2]} < {q.shape[2]}")
        triangle = causal_mask(q.shape[2], k.shape[2], q.device)
        mask = triangle if mask is None else mask & triangle
    if temperature is not None and temperature.shape[-1] == 1:
        q = q * temperature
    if sinks is not None:
        slots = sinks[0].shape[1]
        repeat = heads // sinks[0].shape[0]
        sink_k, sink_v = (s.repeat_interleave(repeat, 0).expand(q.shape[0], -1, -1, -1) for s in sinks)
        k, v = torch.cat((sink_k, k), 2), torch.cat((sink_v, v), 2)
        mask = None if mask is None else F.pad(mask, (slots, 0), value=True)
        bias = None if bias is None else F.pad(bias, (slots, 0))
    return q, k, v, mask, bias, q.shape[-1] ** -0.5 if scale is None else scale


def _fusable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> bool:
    # The fused kernels want equal head widths and give a learned bias no gradient; the one for CPUs has no dropout.
    # PyTorch would fall back to its own unfused form, which is slower than ours.
    if q.shape[-1] != v.shape[-1] or (bias is not None and bias.requires_grad):
        return False
    if q.device.type != "cpu":
        return True
    # In bfloat16 the backward of the CPU kernel is several times slower than the products written out.
    return not dropout and (q.dtype != torch.bfloat16 or q.shape[2] * k.shape[2] > BF16_FUSED_PAIRS)


def _compiled_better(q: Tensor, k: Tensor) -> bool:
    few = q.shape[2] * k.shape[2] <= COMPILED_PAIRS
    return few and q.device.type == "cpu" and compiling() and not torch.is_grad_enabled()


def _additive(mask: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None:
        return None if mask is None else mask.expand(*mask.shape[:-2], q.shape[2], mask.shape[-1])
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _logits(q, k, mask, bias, scale, temperature, sinks):
    logits = (q * scale) @ k.transpose(-2, -1)
    if temperature is not None:
        logits = logits * (temperature if sinks is None else F.pad(temperature, (sinks[0].shape[1], 0), value=1.0))
    if bias is not None:
        logits = logits + bias
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


def _weights(q, k, mask, bias, scale, temperature, sinks, normaliser):
    if mask is None and temperature is None and normaliser is None:
        logits = (q * scale) @ k.transpose(-2, -1)
        # In place: the product's backward does not need its own output.
        return torch.softmax(logits if bias is None else logits.add_(bias), -1)
    return (normaliser or _softmax)(_logits(q, k, mask, bias, scale, temperature, sinks))


def _softmax(logits: Tensor) -> Tensor:
    # A row of -inf only would give NaN; it attends to nothing, so its weights are zero.
    empty = logits.amax(-1, keepdim=True) == float("-inf")
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
