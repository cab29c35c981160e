"""Magnitude pruning: hidden units and heads with the smallest weights go. The baseline of every pruning paper.

Source: Li et al. 2016, "Pruning Filters for Efficient ConvNets" (weight-norm scores); the scores are the parts' own
`importance`.

- the same share is kept of every part, so the shape of the network stays
- hidden widths stay multiples of 8: narrower steps are not faster in vector units
"""

from __future__ import annotations

from torch import nn

from gossamer.layers.prune import Prunable
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply

MULTIPLE = {"heads": 1, "groups": 1}


def prunable(model: nn.Module) -> dict[tuple[str, str], int]:
    """`(part, axis) -> width` of everything in `model` that states a pruning rule."""
    return {
        (name, axis): width
        for name, part in model.named_modules()
        if isinstance(part, Prunable)
        for axis, width in part.widths().items()
    }


@register_pass("magnitude", family="structured pruning", saves=("macs", "params", "size"), default={"keep": 0.6})
def magnitude(model: nn.Module, calibration: Calibration | None = None, *, keep: float = 0.6) -> list[Step]:
    """Keeps the share `keep` of every prunable width, those with the largest weights.

    Raises:
        Unsupported: nothing in the model states a pruning rule.
        ValueError: `keep` is not in (0, 1].
    """
    check_share("keep", keep)
    axes = prunable(model)
    if not axes:
        raise Unsupported(f"no part of {type(model).__name__} states a pruning rule")
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
