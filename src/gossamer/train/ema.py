"""A moving average of the weights, which is what is evaluated and kept.

`average = d * average + (1 - d) * weights`, `d = min(decay, (1 + t) / (10 + t))`: short at first, so that an early
evaluation does not see the initial weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """The moving average of `model`'s parameters and floating-point buffers.

    Args:
        decay: its largest value.
        into: a copy of `model` whose tensors hold the average, for one that has to answer as well (a teacher).
    """

    def __init__(self, model: nn.Module, decay: float, *, into: nn.Module | None = None) -> None:
        self.decay = decay
        self.steps = 0
        self._live = [t for t in _tensors(model) if t.is_floating_point()]
        if into is None:
            self.average = [t.detach().clone() for t in self._live]
        else:
            self.average = [t.detach() for t in _tensors(into) if t.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """One step of the average, with the `d` of the rule above or the one given."""
        self.steps += 1
        if decay is None:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [t.detach() for t in self._live], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the average; after it, its own weights again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the model's weights and their average."""
        for live, average in zip(self._live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for own, saved in zip(self.average, state["average"], strict=True):
            own.copy_(saved)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
