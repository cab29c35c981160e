"""Batch norms folded into the products around them: the same function in eval mode, one pass over the map less.

After a product:  `norm(W x + b) = diag(A) W x + A b + S`, per output channel.
Before a product: `W norm(x) + b = W diag(A) x + W S + b`, per input channel.
A batch norm is `norm(x) = A x + S`, `A = gamma / sqrt(var + eps)`, `S = beta - A mean`; RepBatchNorm adds its `alpha`
to `A`, but not to that of `S`.

A part states what can be folded: `norm_pairs` names each product and the norm that follows it at once, `norm_readers`
each norm and the product that alone reads it. The shared parts are listed here; a part of a single system says it of
itself, as a class attribute. A mixer or MLP whose input is read by linear layers alone, with nothing padded in between,
names them in `input_products`; norms in front of it are folded then.
"""

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.layers.blocks import Block
from gossamer.layers.conv import ConvNorm
from gossamer.layers.embed import PatchEmbed
from gossamer.layers.heads import Classifier
from gossamer.layers.language import WordHead
from gossamer.layers.mlp import ConvMlp, Mlp
from gossamer.layers.norms import ProgressiveRepBatchNorm, RepBatchNorm

Pairs = tuple[tuple[str, str], ...]
Model = TypeVar("Model", bound=nn.Module)

_SHARED: dict[type[nn.Module], Pairs] = {
    ConvNorm: (("conv", "norm"),),
    Mlp: (("fc1", "norm1"), ("fc2", "norm2")),
    PatchEmbed: (("proj", "norm"),),
}


def fold_batch_norm(model: Model) -> Model:
    """Folds every batch norm that stands right after or right before linear layers or convolutions; in place.

    Exact for the answer in eval mode; feature maps taken behind a norm that was folded are those before it. Training
    the result trains a network without these norms.

    Returns:
        The model itself.

    Raises:
        ValueError: a norm keeps no running statistics.
    """
    for part in model.modules():
        for product, name in norm_pairs(part):
            norm = settled(getattr(part, name))
            if norm is not None:
                _fold_after(getattr(part, product), norm)
                setattr(part, name, nn.Identity())
        for name, readers in norm_readers(part):
            norm = settled(getattr(part, name, None))
            if norm is not None and readers:
                for reader in readers:
                    _fold_before(reader, norm)
                setattr(part, name, nn.Identity())
    return model


def norm_pairs(part: nn.Module) -> Pairs:
    """Names of the products of `part` and of the norms that follow them at once."""
    for kind, pairs in _SHARED.items():
        if isinstance(part, kind):
            return pairs
    return getattr(part, "norm_pairs", ())


def norm_readers(part: nn.Module) -> list[tuple[str, list[nn.Linear]]]:
    """Names of the norms of `part`, each with the linear layers that read it, where nothing else does."""
    if isinstance(part, Block) and part.residual == "pre":
        found = [("norm1", [getattr(part.mixer, name) for name in getattr(part.mixer, "input_products", ())])]
        own = ("fc1",) if isinstance(part.mlp, Mlp | ConvMlp) else ()
        found.append(("norm2", [getattr(part.mlp, name) for name in getattr(part.mlp, "input_products", own)]))
        return found
    found = [(norm, [getattr(part, product)]) for norm, product in getattr(part, "norm_readers", ())]
    head = getattr(part, "head", None)
    if isinstance(head, Classifier) and head.kind in ("mean", "token") and head.norm is None and head.fc is not None:
        # A scale and a shift of every token are a scale and a shift of their mean.
        found.append(("norm", [head.fc]))
    elif isinstance(head, WordHead) and not head.tied:
        found.append(("norm", [head.fc]))
    return found


def settled(norm: Any) -> Any:
    """The batch norm that `norm` is in evaluation, or None if it is another kind."""
    if isinstance(norm, ProgressiveRepBatchNorm):
        norm = norm.rep
    return norm if isinstance(norm, _BatchNorm) else None


def affine_map(norm: Any) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """`A` and `S` of the head of this file.

    Raises:
        ValueError: the norm keeps no running statistics.
    """
    if norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded; it normalises by each batch")
    if isinstance(norm, RepBatchNorm):
        return norm.affine_map()
    gain = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight
    shift = -norm.running_mean * gain
    return gain, shift + norm.bias if norm.affine else shift


@torch.no_grad()
def _fold_after(product: Any, norm: Any) -> None:
    gain, shift = affine_map(norm)
    if product.bias is not None:
        shift = shift + product.bias * gain
    product.weight = nn.Parameter(product.weight * gain.view(-1, *[1] * (product.weight.ndim - 1)))
    product.bias = nn.Parameter(shift)


@torch.no_grad()
def _fold_before(product: nn.Linear, norm: Any) -> None:
    gain, shift = affine_map(norm)
    moved = product.weight @ shift
    product.bias = nn.Parameter(moved if product.bias is None else product.bias + moved)
    product.weight = nn.Parameter(product.weight * gain)
