"""Linear layers by oneDNN, where PyTorch has it and it is quicker than the general product.

`y = act(W x + b)`. Without gradients, product, bias and activation are one call and make no tensor between them; with
gradients, the product and the gradient of its input take that way and the rest is PyTorch's own.

- only for plain `nn.Linear` in single precision on a CPU, outside of tracing, counting and autocast
- a layer that hooks watch, or whose weight or class was exchanged (quantised, parametrised), is called as it is
"""

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gossamer.measure.device import cpu_model
from gossamer.ops import compiled
from gossamer.ops.compiled import ONEDNN

# Multiply-adds below which the call's own overhead is not earned back.
LEAST = 2**23
# The general product is Intel's; on its own CPUs it is the quicker one, but for many rows of few channels.
INTEL = torch.backends.mkl.is_available() and "intel" in cpu_model().lower()
FEW, MANY = 128, 2048


def linear(layer: nn.Module, x: Float[Tensor, "*b c"], act: nn.Module | None = None) -> Float[Tensor, "*b o"]:
    """`act(layer(x))`."""
    # Asked first: within `_gains` a compiler would leave its graph, come back to real tensors and take the other way.
    if torch.compiler.is_compiling():
        if not _compiles(layer, x):
            y = layer(x)
        elif type(act) is nn.GELU and act.approximate == "none" and not _watched(act):
            return compiled.linear(x, layer.weight, layer.bias, "gelu")
        else:
            y = compiled.linear(x, layer.weight, layer.bias)
    elif not _gains(layer, x):
        y = layer(x)
    elif torch.is_grad_enabled():
        y = _Linear.apply(x, layer.weight, layer.bias)
    elif type(act) is nn.GELU and act.approximate == "none" and not _watched(act):
        return _product(x, layer.weight, layer.bias, "gelu")
    else:
        y = _product(x, layer.weight, layer.bias)
    return y if act is None else act(y)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none")


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        if for_x:
            # oneDNN's product has no gradient of its own, so a gradient of a gradient takes the general one.
            dx = dy @ weight if torch.is_grad_enabled() else _product(rows, weight.t(), None).view(x.shape)
        dw = rows.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None
        return dx, dw, rows.sum(0) if for_bias else None


def _compiles(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    return bool(
        type(layer) is nn.Linear
        and not torch.is_grad_enabled()
        and type(layer.weight) is nn.Parameter
        and not _watched(layer)
        and x.dtype == torch.float32
        and compiled.traced(x, layer.weight)
        and _quicker(layer, x)
    )


def _gains(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    return bool(
        type(x) is Tensor
        and type(layer) is nn.Linear
        and _quicker(layer, x)
        and type(layer.weight) is nn.Parameter
        and x.dtype == layer.weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not _watched(layer)
    )


def _quicker(layer: nn.Linear, x: Tensor) -> bool:
    i, o = layer.in_features, layer.out_features
    many = not INTEL or (i <= min(FEW, o) and x.numel() >= MANY * i)
    return ONEDNN and many and x.numel() * o >= LEAST


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
