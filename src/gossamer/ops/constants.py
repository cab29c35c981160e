"""Tensors that depend on sizes alone: made once and kept, also where a compiler looks on.

- a compiler follows NumPy's arithmetic but no cache of Python: it takes that arithmetic into its graph
- it does not follow NumPy's random numbers: they are an operator of the graph
- results are not to be written to
"""

from collections.abc import Callable
from functools import lru_cache
from operator import index

import numpy as np
import torch
from torch import Tensor


# NumPy is kept, not torch: a tensor made under a meta device or a tracer would poison later calls.
def of_sizes(make: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """`make` as a tensor, its last results kept; its arguments are numbers or tuples of them."""
    kept = lru_cache(maxsize=64)(make)

    def constant(*sizes: object) -> Tensor:
        return torch.from_numpy((make if torch.compiler.is_dynamo_compiling() else kept)(*sizes))

    return constant


def drawn(make: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """`make` as a tensor, its last results kept; it draws from a generator of its own, and its arguments are sizes.

    A graph with free sizes is held to the ones it met first.
    """
    kept = lru_cache(maxsize=64)(make)
    # What an operator gives belongs to the graph, which may write to it.
    operator = torch.library.custom_op(
        f"gossamer::{make.__name__}",
        lambda sizes: torch.from_numpy(kept(*sizes)).clone(),
        mutates_args=(),
        schema="(int[] sizes) -> Tensor",
    )
    operator.register_fake(lambda sizes: torch.empty_like(torch.from_numpy(make(*sizes))))

    def constant(*sizes: int) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return operator([index(n) for n in sizes])
        return torch.from_numpy(kept(*(index(n) for n in sizes)))

    return constant
