"""Linear layers without gradients: product, bias and activation in one call of oneDNN, where PyTorch has it.

`y = act(W x + b)`; the general path calls the layer, then the activation. The fused one makes no tensor between them,
and is quicker than the general product on many CPUs.

- only for plain `nn.Linear` in single precision on a CPU, outside of training, tracing, counting and autocast
- a layer that hooks watch, or whose weight or class was exchanged (quantised, parametrised), is called as it is
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Multiply-adds below which the fused call's own overhead is not earned back.
LEAST = 2**23


def linear(layer: nn.Module, x: Float[Tensor, "*b c"], act: nn.Module | None = None) -> Float[Tensor, "*b o"]:
    """`act(layer(x))`."""
    name = _activation(act)
    if name is not None and _gains(layer, x):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, name, [], "none")
    y = layer(x)
    return y if act is None else act(y)


def _activation(act: nn.Module | None) -> str | None:
    """oneDNN's name of the activation, None for one it does not have."""
    if act is None:
        return "none"
    if type(act) is nn.GELU and act.approximate == "none":
        return None if _watched(act) else "gelu"
    return None


def _gains(layer: nn.Module, x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and type(layer) is nn.Linear
        and x.numel() * layer.out_features >= LEAST
        and type(x) is Tensor
        and type(layer.weight) is nn.Parameter
        and x.dtype == layer.weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not _watched(layer)
    )


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
