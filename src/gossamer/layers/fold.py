"""Batch norms folded into the product before them: the same function in eval mode, one pass over the map less.

`norm(W x + b) = (g W) x + g (b - mean) + beta`, `g = gamma / sqrt(var + eps)`, per output channel.

A part states what can be folded: `norm_pairs` names each product and the norm that follows it at once. The shared
parts are listed here; a part of a single system says it of itself, as a class attribute.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.layers.conv import ConvNorm
from gossamer.layers.embed import PatchEmbed
from gossamer.layers.mlp import Mlp

Pairs = tuple[tuple[str, str], ...]
Model = TypeVar("Model", bound=nn.Module)

_SHARED: dict[type[nn.Module], Pairs] = {
    ConvNorm: (("conv", "norm"),),
    Mlp: (("fc1", "norm1"), ("fc2", "norm2")),
    PatchEmbed: (("proj", "norm"),),
}


def fold_batch_norm(model: Model) -> Model:
    """Folds every batch norm that follows a linear layer or convolution at once; in place, and returned.

    Exact for eval mode. Training the result trains a network without these norms.
    """
    for part in model.modules():
        for product, norm in norm_pairs(part):
            if isinstance(getattr(part, norm), _BatchNorm):
                _fold(getattr(part, product), getattr(part, norm))
                setattr(part, norm, nn.Identity())
    return model


def norm_pairs(part: nn.Module) -> Pairs:
    """Names of the products of `part` and of the norms that follow them at once."""
    for kind, pairs in _SHARED.items():
        if isinstance(part, kind):
            return pairs
    return getattr(part, "norm_pairs", ())


@torch.no_grad()
def _fold(product: Any, norm: Any) -> None:
    if norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded; it normalises by each batch")
    gain = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight
    shift = -norm.running_mean * gain
    if norm.affine:
        shift = shift + norm.bias
    if product.bias is not None:
        shift = shift + product.bias * gain
    product.weight = nn.Parameter(product.weight * gain.view(-1, *[1] * (product.weight.ndim - 1)))
    product.bias = nn.Parameter(shift)
