"""Parameters and bytes of a module, each stored number counted once.

- tied weights (one tensor under two names) count once
- views of one storage count once each, since each is trained as its own parameter
- works on meta tensors: nothing is read but shapes
"""

from __future__ import annotations

from torch import Tensor, nn


def parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters of `model`; a shared tensor counts once.

    Args:
        model: any module, on any device, meta included.
        trainable: count only the parameters that ask for a gradient.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def parameter_table(model: nn.Module) -> dict[str, int]:
    """Parameters below each named module; `""` is the whole model.

    A tensor shared by two modules counts in both rows, and once in every module that holds both.
    """
    return {name: parameters(module) for name, module in model.named_modules()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared tensors once: what a weight file holds."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    total = 0
    for tensor in _stored(model):
        # Meta tensors all sit at address 0, so there identity is the only key.
        where = tensor.data_ptr() if not tensor.is_meta and tensor.numel() else id(tensor)
        key = (where, tensor.numel(), tuple(tensor.stride()))
        if key not in seen:
            seen.add(key)
            total += tensor.numel() * tensor.element_size()
    return total


def _stored(model: nn.Module) -> list[Tensor]:
    """The tensors of the state dict, as the objects the modules hold (a state dict makes new ones)."""
    return [t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)]
