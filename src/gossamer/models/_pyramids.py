"""What image pyramids share: a backbone from a classifier's weights, and small sizes for the data at hand."""

from collections.abc import Sequence
from math import isqrt, log2
from typing import Any

from torch import nn

from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.embed import pair
from gossamer.models.registry import State

BUDGETS = {"xs": 5e6, "s": 30e6, "m": 100e6, "l": 320e6}
"""MACs that the four sizes of a scaled model are made for."""

_DEPTHS: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"xs": (3,), "s": (5,), "m": (8,), "l": (12,)},
    2: {"xs": (1, 2), "s": (2, 3), "m": (2, 6), "l": (3, 9)},
    3: {"xs": (1, 2, 1), "s": (1, 3, 2), "m": (2, 4, 2), "l": (2, 8, 2)},
    4: {"xs": (1, 1, 2, 1), "s": (1, 1, 3, 1), "m": (1, 2, 4, 1), "l": (2, 2, 6, 2)},
}


def keep_backbone(model: nn.Module, state: State, *classifier: str) -> State:
    """Weights of a classifier for a model built with `dense=True`.

    Keys that start with one of `classifier` are left out; the norms of the feature maps stay as they were made.
    """
    norms = getattr(model, "out_norms", None)
    if norms is None or any(key.startswith("out_norms.") for key in state):
        return state
    own = {f"out_norms.{key}": value for key, value in norms.state_dict().items()}
    return {**{key: value for key, value in state.items() if not key.startswith(classifier)}, **own}


def small_pyramid(spec: dict[str, Any], size: str, *, block: int, step: int, least_patch: int = 1) -> dict[str, Any]:
    """Patch, widths and depths of a pyramid that costs about `BUDGETS[size]` MACs on images of `spec["img_size"]`.

    A block of width c on n tokens costs `block * n * c^2`; halving the grid and doubling the width keeps that cost.
    Widths of the first stage are multiples of `step`; patches are at least `least_patch` wide where the image allows.
    """
    height, width = pair(spec["img_size"])
    patch = min(least_patch, max(1, min(height, width) // 3))
    while patch < 8 + 8 * (min(height, width) >= 320) and min(height, width) // (2 * patch) >= 14:
        patch *= 2
    while isqrt((height // patch) * (width // patch)) > 40:
        patch *= 2
    patch = min(patch, height, width)
    rows, columns = height // patch, width // patch
    stages = max(1 + (min(rows, columns) >= 4), min(4, 1 + int(log2(max(1, min(rows, columns) / 3.5)))))
    depths = _DEPTHS[stages][size]
    budget = BUDGETS[size]
    dim = max(step, round((budget / (block * rows * columns * sum(depths))) ** 0.5 / step) * step)
    dim = min(dim, {"xs": 96, "s": 128, "m": 192, "l": 256}[size] // step * step)
    return {"patch": patch, "dims": tuple(dim * 2**i for i in range(stages)), "depths": depths}


def token_grid(size: int | tuple[int, int], patch: int, stages: int, *, up: bool) -> list[tuple[int, int]]:
    """Rows and columns of each stage's map; `up` where odd maps are padded before they are halved."""
    h, w = (-(-s // patch) if up else s // patch for s in pair(size))
    grids = []
    for _ in range(stages):
        grids.append((h, w))
        h, w = (-(-h // 2), -(-w // 2)) if up else (h // 2, w // 2)
    return grids


def stage_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop-path rates of each stage's blocks, growing linearly over all of them."""
    rates = drop_path_rates(rate, sum(depths))
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[s : s + d] for s, d in zip(starts, depths, strict=True)]
