"""Hard attention: each query attends the keys with the largest logits only.

`out_i = sum_{j in T_i} softmax_{T_i}(q_i . k / sqrt(d))_j v_j`,  `T_i` the `top_k` keys of largest `q_i . k_j`

Source: Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention"; used per layer by Nagarajan et al. 2020,
"AxFormer".

- the gathered form multiplies `n * top_k * d` for the values of a head, the masked form `n * m * d`; the logits are
  `n * m * d` in both, and gathering moves more memory, so fewer multiply-adds need not be less time
- of equal logits it is not said which is taken
- a row that may attend to nothing gives zeros
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.ops.attention import causal_mask


def hard_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    top_k: int,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    causal: bool = False,
) -> Float[Tensor, "b h n dv"]:
    """Hard attention that multiplies the chosen values only.

    Args:
        top_k: keys a query attends; all of them where there are no more.
        mask: True where a query may attend a key; broadcasts to `(b, h, n, m)`.
        causal: query i attends keys `0 .. i + m - n`.

    Raises:
        ValueError: `top_k` is below 1.
    """
    top = _logits(q, k, mask, causal).topk(_count(top_k, k), dim=-1)
    b, h, m = v.shape[:3]
    # Values of all heads as rows of one table.
    first = torch.arange(b * h, device=v.device).view(b, h, 1, 1) * m
    chosen = F.embedding(first + top.indices, v.flatten(0, 2))
    return (_softmax(top.values)[..., None, :] @ chosen)[..., 0, :]


def hard_attention_masked(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    top_k: int,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n dv"]:
    """The same by weights that are zero where a key is not chosen: for training, where gathering costs more.

    Args:
        dropout: probability of dropping an attention weight; the others as of `hard_attention`.
    """
    logits = _logits(q, k, mask, causal)
    top = logits.topk(_count(top_k, k), dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, top.indices, _softmax(top.values))
    return F.dropout(weights, dropout) @ v


def _count(top_k: int, k: Tensor) -> int:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return min(top_k, int(k.shape[2]))


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        triangle = causal_mask(q.shape[2], k.shape[2], q.device)
        mask = triangle if mask is None else mask & triangle
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


def _softmax(logits: Tensor) -> Tensor:
    # The first is the largest; where it is -inf the row attends to nothing.
    empty = logits[..., :1] == float("-inf")
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
