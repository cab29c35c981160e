"""Structured pruning by the parts' own rules: hidden units and heads with the smallest weights go.

Source: Li et al. 2016, "Pruning Filters for Efficient ConvNets" (weight-norm scores, the baseline of every pruning
paper); the scores are the parts' own `importance`.

- the same share is kept of every part, so the shape of the network stays
- hidden widths stay multiples of 8: narrower steps are not faster in vector units
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gossamer.layers.prune import Prunable
from gossamer.shrink.recipe import apply

MULTIPLE = {"heads": 1}


def prunable(model: nn.Module) -> dict[tuple[str, str], int]:
    """`(part, axis) -> width` of everything in `model` that states a pruning rule."""
    return {
        (name, axis): width
        for name, part in model.named_modules()
        if isinstance(part, Prunable)
        for axis, width in part.widths().items()
    }


def prune(model: nn.Module, keep: float) -> list[dict[str, Any]]:
    """Keeps the share `keep` of every prunable width of `model`, in place; gives the recipe steps it took.

    Raises:
        ValueError: `keep` is not in (0, 1], or nothing in the model can be pruned.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    axes = prunable(model)
    if not axes:
        raise ValueError(f"no part of {type(model).__name__} states a pruning rule")
    steps = []
    for (name, axis), width in axes.items():
        multiple = MULTIPLE.get(axis, 8)
        kept = min(width, max(multiple, round(width * keep / multiple) * multiple))
        if kept == width:
            continue
        part = model.get_submodule(name)
        assert isinstance(part, Prunable)
        best = part.importance(axis).topk(kept).indices.sort().values
        step = {"step": "prune", "part": name, "axis": axis, "keep": best.tolist()}
        apply(model, step)
        steps.append(step)
    return steps
