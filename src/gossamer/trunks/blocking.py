"""Cache blocking: a stage takes a large batch a few samples at a time, so that what it makes stays in the caches.

On a CPU, tensors of tens of MiB are fetched from memory page by page every time they are made; the wide first stages of
a pyramid then spend more time on that than on their products. Samples do not depend on each other, so nothing changes
but the time.

- left alone: other devices, small tensors, batch norm in training (it does look across samples), stages that are being
  watched by hooks, compiled and exported models
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# In elements of the stage's input; hidden tensors are about four times that.
LARGE = 2_500_000
PART = 650_000


def by_parts(stage: nn.Module, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *_grid _c"]:
    """`stage(x)`, a few samples at a time where the batch is large."""
    if not _pays(stage, x):
        return stage(x)
    samples = max(1, PART // (x.numel() // x.shape[0]))
    return torch.cat([stage(part) for part in x.split(samples)])


def _pays(stage: nn.Module, x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.numel() < LARGE or x.shape[0] < 2:
        return False
    for module in stage.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return False
    return True
