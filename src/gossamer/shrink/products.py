"""The products of any network: its linear layers and convolutions, and what a forward pass makes of them.

A pass that gives products another form leaves alone

- what is not called: its weight is read by somebody else (`nn.MultiheadAttention`, cross-attention of ours)
- a weight that two modules hold (a language model's head and its embedding): another form would untie them
- the layer that reads images or series themselves, and the one that gives the answer, unless they are asked for
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from gossamer.layers.low_rank import LowRankConv, LowRankLinear, groups_of, is_turned, matrices
from gossamer.shrink.base import Unsupported

# Exactly these: a class of its own may do more than the product.
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Product:
    """A linear layer or convolution.

    Args:
        name: in the model.
        layer: the module.
        places: places of the output it was computed for with the example, over all calls.
    """

    name: str
    layer: nn.Module
    places: int

    @property
    def macs(self) -> int:
        """Multiply-adds for the example."""
        return self.places * prod(matrices(self.layer).shape)


def is_product(layer: nn.Module) -> bool:
    """A linear layer or a convolution, of PyTorch, of `gossamer.layers.conv` or of transformers' GPT-2."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(layer).__module__ == "gossamer.layers.conv":
        return True
    return type(layer) in KINDS or is_turned(layer)


def product_layers(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_product) -> dict[str, nn.Module]:
    """The products within `model` by name; those that a low-rank layer is made of are not among them."""
    own = {
        id(part) for low in model.modules() if isinstance(low, LowRankLinear | LowRankConv) for part in low.children()
    }
    return {name: part for name, part in model.named_modules() if name and wanted(part) and id(part) not in own}


def products(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    within: Sequence[str] | None = None,
    wanted: Callable[[nn.Module], bool] = is_product,
) -> list[Product]:
    """The products of `model` that can be given another form, in order of their names' first mention.

    Args:
        inputs: an example; it is computed once.
        within: names of modules; only they and what is in them count, also where they read the input or give the
            answer. None: everything that does neither.
        wanted: which modules count as products.

    Raises:
        Unsupported: there are none.
        ValueError: a name in `within` is not a module of the model.
    """
    names = dict(model.named_modules())
    unknown = [name for name in within or () if name not in names]
    if unknown:
        raise ValueError(f"submodules must name modules of {type(model).__name__}, got {', '.join(unknown)}")
    held = Counter(id(p) for part in names.values() for p in part._parameters.values() if p is not None)
    places: Counter[nn.Module] = Counter()
    order: list[tuple[nn.Module, int]] = []
    found = {name: layer for name, layer in product_layers(model, wanted).items() if held[id(layer.weight)] == 1}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        channels = matrices(layer).shape[1] * groups_of(layer)
        places[layer] += output.numel() // channels
        order.append((layer, output.numel()))

    was_training = model.training
    with ExitStack() as hooks, torch.no_grad():
        for layer in found.values():
            hooks.callback(layer.register_forward_hook(note).remove)
        answer = model.eval()(*inputs)
    model.train(was_training)
    outer: set[nn.Module] = set()
    if within is None and order:
        if inputs[0].is_floating_point():
            outer.add(order[0][0])
        while not isinstance(answer, Tensor) and isinstance(answer, tuple | list):
            answer = answer[0]
        if isinstance(answer, Tensor) and order[-1][1] == answer.numel():
            outer.add(order[-1][0])
    chosen = [
        Product(name, layer, places[layer])
        for name, layer in found.items()
        if places[layer] and layer not in outer and (within is None or any(_inside(name, part) for part in within))
    ]
    if not chosen:
        raise Unsupported(f"{type(model).__name__} has no product of its own that could be given another form")
    return chosen


def _inside(name: str, part: str) -> bool:
    return part == "" or name == part or name.startswith(part + ".")
