"""Tensors that depend on sizes alone: made once, and constants of a compiled graph."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn


def of_sizes(make: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """`make` with its last results kept, as tensors that are not to be written to.

    A compiler traces through Python's caches and NumPy; here it takes the result as it is. The arguments must be plain
    numbers or tuples of them: `operator.index` of a size makes a graph with free sizes hold to this one.
    """
    # NumPy is kept, not torch: a tensor made under a meta device or a tracer would poison later calls.
    kept = lru_cache(maxsize=64)(make)

    @torch.compiler.assume_constant_result
    def constant(*sizes: object) -> Tensor:
        # A parameter, since a compiler takes the sizes of parameters as fixed.
        return nn.Parameter(torch.from_numpy(kept(*sizes)), requires_grad=False)

    return constant
