"""Optimal transport between two sets of equal weights: which member of one goes where in the other.

`P = argmin sum P_ij C_ij` over plans with row sums `1 / n` and column sums `1 / m`

- exact plans of equal sizes are assignments (scipy); of unequal sizes they take POT (`pip install pot`)
- Sinkhorn's plans are soft: `reg` times their negative entropy is added to the cost (Cuturi 2013)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def exact_plan(cost: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The plan of least cost.

    Raises:
        ValueError: `n` and `m` differ, and POT is not installed.
    """
    n, m = cost.shape
    if n == m:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        plan = torch.zeros_like(cost)
        plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / n
        return plan
    try:
        import ot
    except ImportError:
        raise ValueError(
            f"exact transport between {n} and {m} units needs POT: pip install pot; or use Sinkhorn's"
        ) from None
    found = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost.double().cpu().numpy())
    return torch.from_numpy(np.asarray(found)).to(cost)


def sinkhorn_plan(
    cost: Float[Tensor, "n m"], reg: float, *, most: int = 1000, tolerance: float = 1e-9
) -> Float[Tensor, "n m"]:
    """The plan of least cost less `reg` times its entropy, by turns of scaling rows and columns, in logarithms.

    Args:
        most: turns; fewer where the row sums are within `tolerance` of what they should be.

    Raises:
        ValueError: `reg` is not positive.
    """
    if reg <= 0:
        raise ValueError(f"reg must be positive, got {reg}")
    n, m = cost.shape
    logits = -cost.double() / reg
    u, v = logits.new_zeros(n), logits.new_zeros(m)
    for turn in range(most):
        u = -torch.logsumexp(logits + v, 1) - np.log(n)
        v = -torch.logsumexp(logits + u[:, None], 0) - np.log(m)
        if turn % 10 == 9:
            rows = torch.exp(torch.logsumexp(logits + v, 1) + u)
            if float((rows - 1 / n).norm()) < tolerance:
                break
    return torch.exp(logits + u[:, None] + v).to(cost.dtype)
