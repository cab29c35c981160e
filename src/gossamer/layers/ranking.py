"""The best tokens of each sample, as many as their number says, the same ones in PyTorch and in an exported file.

- of equal scores the token in front wins, as in ONNX; `torch.topk` promises nothing
- of a sample's m real tokens `count(m)` are kept, so that a padded batch keeps what each sample alone would
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A product such as 0.29 * 100 must not fall short of its whole number, nor 0.3 * 10 exceed it.
EPS = 1e-5


def highest(scores: Float[Tensor, "b n"], k: int) -> Int[Tensor, "b _k"]:
    """Places of the `k` highest scores, best first."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return scores.topk(k, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def best(
    scores: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, count: Callable[[Any], Any]
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"] | None]:
    """Places of the best tokens in their old order, and which of them are real (None where all are).

    Args:
        mask: real tokens; others are never real afterwards.
        count: how many of m tokens stay, for an int or a tensor of ints; at least one does.
    """
    k = max(1, int(count(scores.shape[1])))
    if mask is None:
        return highest(scores, k).sort(dim=1).values, None
    index, order = highest(scores.masked_fill(~mask, -float("inf")), k).sort(dim=1)
    real = torch.arange(k, device=index.device) < count(mask.sum(1)).clamp(min=1)[:, None]
    return index, real.gather(1, order) & mask.gather(1, index)


def share_down(share: float) -> Callable[[Any], Any]:
    """`m -> floor(share m)`."""
    return lambda m: (m * share + EPS).floor().long() if isinstance(m, Tensor) else int(m * share + EPS)


def share_up(share: float) -> Callable[[Any], Any]:
    """`m -> ceil(share m)`."""
    return lambda m: (m * share - EPS).ceil().long() if isinstance(m, Tensor) else -int(-(m * share - EPS) // 1)
