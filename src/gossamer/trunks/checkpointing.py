"""Gradient checkpointing: keep the tokens between runs of blocks, and make what lies within a run again when it is due.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.

- L blocks in about sqrt(L) runs: what is kept grows with sqrt(L), for one more forward pass
- dropout draws the same again, and batch norms count a batch once: gradients and statistics are those of training
  without it
- a trunk that can do it has the attribute `checkpointing`; nothing happens in eval mode or without gradients
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def set_checkpointing(model: nn.Module, on: bool = True) -> None:
    """Turns checkpointing on or off in all trunks of `model`.

    Raises:
        ValueError: it has no trunk that could.
    """
    trunks: list[Any] = [part for part in model.modules() if hasattr(part, "checkpointing")]
    if not trunks:
        raise ValueError(f"checkpointing needs a trunk of gossamer.trunks; {type(model).__name__} has none")
    for trunk in trunks:
        trunk.checkpointing = on


def through(trunk: nn.Module, run: Callable[..., Any], blocks: nn.Sequential | nn.ModuleList, *state: Any) -> Any:
    """`run(blocks, *state)`, in checkpointed runs of blocks where `trunk.checkpointing` says so.

    Args:
        run: takes some of the blocks and a state, and gives the next state (a tuple if it takes several values).
    """
    kept = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    if not (trunk.checkpointing and trunk.training and kept):
        return run(blocks, *state)
    ends = runs(len(blocks))
    for begin, end in ends:
        part = blocks[begin:end]
        if end == len(blocks):
            return run(part, *state)  # it is needed at once, so keeping it costs nothing
        again = partial(_contexts, part)
        found = checkpoint(run, part, *state, use_reentrant=False, context_fn=again)
        state = found if isinstance(found, tuple) else (found,)
    return run(blocks, *state)


def runs(depth: int) -> list[tuple[int, int]]:
    """First and last (exclusive) of about `sqrt(depth)` runs of even length."""
    count = round(sqrt(depth))
    edges = [depth * i // max(count, 1) for i in range(count + 1)]
    return list(pairwise(edges))


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    counted: Counted = []
    return counting([part], counted), as_counted(counted)


Counted = list[tuple[Tensor, Tensor]]
"""Buffers that a forward pass changed, each with what it was before."""


@contextmanager
def counting(parts: Iterable[nn.Module], counted: Counted) -> Iterator[None]:
    """Notes which buffers of `parts` change within the block: statistics of batches, counters of steps."""
    before = [(buffer, buffer.clone()) for part in parts if part.training for buffer in part.buffers()]
    yield
    counted += [pair for pair in before if not torch.equal(*pair)]


@contextmanager
def as_counted(counted: Counted) -> Iterator[None]:
    """Within the block these buffers are what they were, so that a pass made again is the same and counts once."""
    now = [(buffer, buffer.clone()) for buffer, _ in counted]
    # Written past the version counters: what autograd has saved of them is not read in training.
    for buffer, was in counted:
        buffer.data.copy_(was)
    try:
        yield
    finally:
        for buffer, was in now:
            buffer.data.copy_(was)
