"""Bytes of activations: the most that live at once in a forward pass, and all that are written.

- counted on the tensors themselves as PyTorch makes and frees them: the same figure in every run, on any device
- parameters, buffers and inputs are not in it; what an operation needs within itself is not seen
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Activations:
    """Bytes: `peak` live at once, `written` in all."""

    peak: int
    written: int


def activations(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> Activations:
    """What `model(*inputs)` holds and writes beside its weights, in evaluation mode and without gradients."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    training = {module: module.training for module in model.modules()}
    model.eval()
    watch = _Watch([*model.parameters(), *model.buffers(), *(x for x in args if isinstance(x, Tensor))])
    try:
        with torch.no_grad(), watch:
            model(*args)
    finally:
        for module, flag in training.items():
            module.training = flag
    return Activations(watch.peak, watch.written)


class _Watch(TorchDispatchMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.kept = [t.untyped_storage() for t in known]
        self.seen: dict[int, Any] = {id(storage): storage for storage in self.kept}
        self.live = self.peak = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = id(storage)
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.written += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.live -= size
