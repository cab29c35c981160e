"""A product exchanged for a cheaper form of itself: low rank, dense times sparse, packed integers.

A part that cuts its own heads or hidden units does so by slicing the weights of its products. Where one of them has
another form there is nothing to slice, so the part says that it has no width left to cut.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.layers.prune import Prunable


def exchange(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` wherever `model` has the module called `name`, in place.

    Raises:
        ValueError: there is no such module, or it is the model itself.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
    if old is model:
        raise ValueError("the model itself cannot be exchanged, only a module within it")
    for part in list(model.modules()):
        for key, child in part._modules.items():
            if child is old:
                part._modules[key] = new
    names = name.split(".")
    for depth in range(len(names)):
        part = model.get_submodule(".".join(names[:depth]))
        if isinstance(part, Prunable):
            setattr(part, "widths", _none)  # noqa: B010 (a method, shadowed for this part alone)


def exchange_linear(model: nn.Module, name: str, kind: Callable[..., nn.Module], **settings: Any) -> None:
    """Puts `kind(inputs, outputs, bias=…, **settings)`, not yet filled, where `model` has the linear layer `name`.

    Raises:
        ValueError: that is no linear layer.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} ({type(layer).__name__}) is no linear layer")
    new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, **settings)
    exchange(model, name, new.to(layer.weight).train(layer.training))


def _none() -> dict[str, int]:
    return {}
