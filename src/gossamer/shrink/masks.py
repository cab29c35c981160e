"""Heads and hidden units switched off without slicing: what pruning scores are measured with.

- a mask is one number a member; it multiplies what the member gives to the product behind it
- the masked model equals the model with these members sliced away, to rounding (a test holds it)
- masks may carry gradients
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.prune import Prunable
from gossamer.shrink.base import Unsupported

Member = tuple[str, str]
"""Name of a part and of one of its axes."""


def reader(part: Any, axis: str) -> nn.Linear:
    """The product that reads the members of `axis`.

    Raises:
        Unsupported: the part is not built that way.
    """
    layer = getattr(part, {"heads": "proj", "groups": "proj", "hidden": "fc2"}.get(axis, ""), None)
    if not isinstance(layer, nn.Linear):
        raise Unsupported(f"axis {axis!r} of {type(part).__name__} is not read by one linear layer")
    return layer


def members(model: nn.Module, axes: tuple[str, ...] = ("heads", "groups", "hidden")) -> dict[Member, int]:
    """`(part, axis) -> width` of everything in `model` that can be masked and then sliced, in order.

    Raises:
        Unsupported: there is nothing.
    """
    found: dict[Member, int] = {}
    for name, part in model.named_modules():
        if isinstance(part, Prunable):
            for axis, width in part.widths().items():
                if axis in axes:
                    reader(part, axis)
                    found[(name, axis)] = width
    if not found:
        raise Unsupported(f"no part of {type(model).__name__} states a pruning rule for {', '.join(axes)}")
    return found


@contextmanager
def masked(model: nn.Module, masks: Mapping[Member, Float[Tensor, " n"]]) -> Iterator[nn.Module]:
    """Within the block, each member gives its mask times what it gave.

    Raises:
        ValueError: a mask has not one number for each member.
    """
    with ExitStack() as hooks:
        for (name, axis), mask in masks.items():
            part = model.get_submodule(name)
            assert isinstance(part, Prunable)
            if mask.shape != (part.widths()[axis],):
                raise ValueError(
                    f"the mask of {name}.{axis} must have {part.widths()[axis]} entries, got {tuple(mask.shape)}"
                )
            layer = reader(part, axis)
            gate = mask.repeat_interleave(layer.in_features // len(mask))
            handle = layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate, *args[1:]))
            hooks.callback(handle.remove)
        yield model


def keep_members(model: nn.Module, masks: Mapping[Member, Float[Tensor, " n"]]) -> list[dict[str, object]]:
    """Slices `model` in place to the members whose mask is not zero, and gives the recipe steps.

    Raises:
        ValueError: a mask would take all members of a part.
    """
    from gossamer.shrink.recipe import apply

    steps = []
    for (name, axis), mask in masks.items():
        index = mask.nonzero().flatten()
        if not len(index):
            raise ValueError(f"the mask of {name}.{axis} takes all {len(mask)} members; one must stay")
        if len(index) < len(mask):
            step: dict[str, object] = {"step": "prune", "part": name, "axis": axis, "keep": index.tolist()}
            apply(model, step)
            steps.append(step)
    return steps
