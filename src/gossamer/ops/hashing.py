"""Hashing: codes of classes learned by discrete alternation, Hamming distance, and how well codes retrieve.

Source: EET (2025), "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval" (the codes' objective);
Shen et al. 2015, "Supervised Discrete Hashing".

- codes are ±1; a tie of a sign is +1
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """Codes of all samples, ±1, and the objective after each iteration."""

    codes: Float[Tensor, "n k"]
    losses: list[float]


def signs(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """±1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def discrete_codes(
    labels: Int[Tensor, " n"],
    classes: int,
    bits: int,
    *,
    nu: float = 1e-4,
    iterations: int = 15,
    generator: torch.Generator | None = None,
) -> Codes:
    """Minimises `|Y - U V|^2 + nu |B - R V|^2` over codes B (±1), maps U, vectors V and rotations R, in turn.

    Args:
        labels: class of each sample; Y is one-hot, `(classes, n)`.
        bits: of a code.

    Raises:
        ValueError: `bits` or `iterations` below 1.
    """
    if bits < 1 or iterations < 1:
        raise ValueError(f"bits and iterations must be at least 1, got bits={bits}, iterations={iterations}")
    y = torch.nn.functional.one_hot(labels, classes).T.double()
    v = torch.randn(bits, len(labels), generator=generator, dtype=torch.float64)
    b = signs(torch.randn(bits, len(labels), generator=generator, dtype=torch.float64))
    r = _rotation(b, v)
    losses = []
    for _ in range(iterations):
        b = signs(r @ v)
        u = y @ v.T @ torch.linalg.pinv(v @ v.T)
        v = torch.linalg.pinv(u.T @ u + nu * r.T @ r) @ (u.T @ y + nu * r.T @ b)
        r = _rotation(b, v)
        losses.append(float((y - u @ v).square().sum() + nu * (b - r @ v).square().sum()))
    return Codes(b.T.float(), losses)


def _rotation(b: Tensor, v: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(b @ v.T)
    return left @ right


def hamming(queries: Float[Tensor, "q k"], base: Float[Tensor, "n k"]) -> Float[Tensor, "q n"]:
    """Bits in which two codes differ: `(k - q . b) / 2`."""
    return (queries.shape[1] - queries @ base.T) / 2


def mean_average_precision(distances: Float[Tensor, "q n"], relevant: Bool[Tensor, "q n"]) -> float:
    """Mean over the queries of the mean precision at each relevant item of the whole ranking; queries without are left
    out."""
    order = distances.argsort(dim=1, stable=True)
    hit = relevant.gather(1, order).double()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    found = hit.sum(1)
    return float(((precision * hit).sum(1) / found.clamp(min=1))[found > 0].mean())
