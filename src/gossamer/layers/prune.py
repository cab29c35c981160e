"""How a part states what can be taken out of it.

A part with an inner width (hidden units of an MLP, heads of an attention) lists it, scores its members, and keeps a
chosen few by slicing its own tensors in place. Structural pruning of our own models then needs no tracing.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class Prunable(Protocol):
    """A module whose inner widths can be cut."""

    def widths(self) -> dict[str, int]:
        """The axes that can be cut and how many members each has."""
        ...

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        """How much each member of `axis` matters: the norm of the weights that touch it."""
        ...

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        """Cuts `axis` down to the members `index`, in place."""
        ...


def slice_linear(linear: nn.Linear, index: Int[Tensor, " k"], *, inputs: bool) -> None:
    """Keeps the rows (outputs) or columns (inputs) `index` of a linear layer, in place."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(1 if inputs else 0, index).clone())
    if inputs:
        linear.in_features = len(index)
    else:
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[index].clone())


def slice_depthwise(conv: Any, index: Int[Tensor, " k"]) -> None:
    """Keeps the channels `index` of a depth-wise convolution, in place."""
    conv.weight = nn.Parameter(conv.weight.detach()[index].clone())
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[index].clone())
    conv.in_channels = conv.out_channels = conv.groups = len(index)


def slice_norm(norm: Any, index: Int[Tensor, " k"]) -> None:
    """Keeps the channels `index` of a normalisation layer, in place."""
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is not None:
            setattr(norm, name, nn.Parameter(value.detach()[index].clone()))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name, None)
        if value is not None:
            setattr(norm, name, value[index].clone())
    if hasattr(norm, "num_features"):
        norm.num_features = len(index)


def check_axis(part: Prunable, axis: str) -> None:
    """Raises a ValueError that names the axes `part` has."""
    if axis not in part.widths():
        raise ValueError(f"axis must be one of {sorted(part.widths())}, got {axis!r}")


def expand_heads(index: Int[Tensor, " k"], width: int) -> Int[Tensor, " kw"]:
    """Channel indices of the heads `index`, each `width` channels wide."""
    return (index[:, None] * width + torch.arange(width, device=index.device)).flatten()
