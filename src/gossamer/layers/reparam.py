"""Re-parameterised convolutions: several branches while training, one plain convolution afterwards, the same function.

Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", section 3.3; Tan et al. 2023, "FMViT: A
multiple-frequency mixing Vision Transformer" (several group counts side by side).

`y = sum_b norm_b(K_b * x)` is linear in x in eval mode, so its branches add up to one kernel and one bias:

- `K'_b = g_b K_b`, `bias = sum_b (beta_b - g_b mean_b)`, `g_b = gamma_b / sqrt(var_b + eps)`, per output channel
- grouped kernels become blocks on the diagonal of less grouped ones; smaller kernels are zero-padded to larger ones;
  the identity is a kernel of ones at its centre
- the sum keeps the group count that all branches share
- `merge(model)` does it for a whole model and folds the batch norms that are left
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import gcd
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.layers.conv import Conv, ConvNorm
from gossamer.layers.fold import affine_map, fold_batch_norm
from gossamer.layers.mlp import Mlp
from gossamer.layers.norms import BatchNorm

Model = TypeVar("Model", bound=nn.Module)


class MultiBranchConv(nn.Module):
    """`y = sum_g norm_g(K_g * x) + norm(K_1x1 x) + norm(x)`, on maps; of kernel 1 on any number of grid axes.

    Args:
        dim, out: channels in and out.
        kernel: side of the kernels, odd.
        stride: step.
        groups: one branch of full kernel size for each count.
        pointwise: a branch of kernel 1, grouped by what all `groups` have in common.
        identity: a branch that is a norm alone.

    Raises:
        ValueError: `kernel` is even, a group count does not divide the channels, there is no branch, or `identity`
            where the output has another shape.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: Sequence[int] = (1,),
        pointwise: bool = False,
        identity: bool = False,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        if not groups or any(g < 1 or dim % g or out % g for g in groups):
            raise ValueError(f"groups must divide the channels {dim} and {out}, got {tuple(groups)}")
        if identity and (dim != out or stride != 1):
            raise ValueError(f"identity needs equal channels and stride 1; got {dim}, {out} and stride {stride}")
        self.dim, self.out, self.kernel, self.stride = dim, out, kernel, stride
        self.groups = gcd(*groups)
        counts = [(kernel, g) for g in groups] + ([(1, self.groups)] if pointwise else [])
        self.branches = nn.ModuleList(ConvNorm(dim, out, k, stride=stride, groups=g, bias=False) for k, g in counts)
        self.norm = BatchNorm(out) if identity else None

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *_grid o"]:
        flat = self.kernel == self.stride == 1
        # Kernel 1 knows no neighbours: the grid is read as one row.
        rows = x.flatten(1, -2)[:, None] if flat else x
        y = self.branches[0](rows)
        for branch in self.branches[1:]:
            y = y + branch(rows)
        if self.norm is not None:
            y = y + self.norm(rows)
        # The batch is left open, so that an exporter cannot take it for a constant.
        return y.view(-1, *x.shape[1:-1], self.out) if flat else y

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """One convolution, or linear layer where the kernel is 1, with the same answer in eval mode.

        Raises:
            ValueError: the module is in training mode, where norms look at the batch.
        """
        if self.training:
            raise ValueError("merging is exact in eval mode only; call eval() first")
        kernel: Any = 0
        bias: Any = 0
        for branch in self.branches:
            conv: Any = fold_batch_norm(deepcopy(branch)).conv
            weight = expand_groups(conv.weight, conv.groups, self.groups)
            kernel = kernel + F.pad(weight, [(self.kernel - conv.kernel_size[0]) // 2] * 4)
            bias = bias + conv.bias
        if self.norm is not None:
            gain, shift = affine_map(self.norm)
            bias = bias + shift
            channel = torch.arange(self.out)
            centre = self.kernel // 2
            kernel[channel, channel % (self.dim // self.groups), centre, centre] += gain
        plain: Any
        if self.kernel == self.stride == self.groups == 1:
            plain = nn.Linear(self.dim, self.out)
            kernel = kernel.flatten(1)
        else:
            plain = Conv(self.dim, self.out, self.kernel, stride=self.stride, groups=self.groups)
        plain.weight, plain.bias = nn.Parameter(kernel), nn.Parameter(bias)
        return plain.eval()


class MultiBranchMlp(Mlp):
    """An `Mlp` whose products have a dense and grouped branches, each with its norm; merged, a plain one.

    Args:
        dim, hidden: channels in and out, and between.
        groups: a branch for each count.
        act: activation factory.

    Raises:
        ValueError: a group count does not divide the channels.
    """

    def __init__(
        self, dim: int, hidden: int, *, groups: Sequence[int] = (1, 2), act: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__(dim, hidden, act=act)
        self.fc1 = MultiBranchConv(dim, hidden, 1, groups=groups)  # type: ignore[assignment]
        self.fc2 = MultiBranchConv(hidden, dim, 1, groups=groups)  # type: ignore[assignment]

    @property
    def input_products(self) -> tuple[str, ...]:
        """What reads the input, where a norm in front may be folded into it."""
        return ("fc1",) if isinstance(self.fc1, nn.Linear) else ()

    def widths(self) -> dict[str, int]:
        """Hidden units, once the branches are merged; before that they belong to groups."""
        return super().widths() if isinstance(self.fc1, nn.Linear) else {}


def merge(model: Model) -> Model:
    """Merges every multi-branch part of `model`, and folds every batch norm that stands beside a product.

    In place, and returned (a part by itself is returned merged). A merged model is left as it is.

    Raises:
        ValueError: the model is in training mode.
    """
    if any(part.training for part in model.modules() if isinstance(part, MultiBranchConv | _BatchNorm)):
        raise ValueError("merging is exact in eval mode only; call eval() first")
    if isinstance(model, MultiBranchConv):
        return cast(Model, model.merged())
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, MultiBranchConv):
                setattr(part, name, child.merged())
    # Inner parts first: a norm can pass a product only when no other norm is left between them.
    for part in reversed(list(model.modules())):
        fold_batch_norm(part)
    return model


def expand_groups(weight: Float[Tensor, "o i *kernel"], groups: int, into: int = 1) -> Float[Tensor, "o j *kernel"]:
    """The kernel of a convolution in `groups` groups as one in `into` groups, zero where it did not look.

    Raises:
        ValueError: `into` does not divide `groups`, or `groups` the output channels.
    """
    out, inside, *kernel = weight.shape
    if groups % into or out % groups:
        raise ValueError(f"into must divide groups, and groups {out} channels; got into={into}, groups={groups}")
    ratio = groups // into
    blocks = weight.new_zeros(into, ratio, out // groups, ratio, inside, *kernel)
    each = torch.arange(ratio)
    # Indexing two axes at once brings theirs to the front.
    blocks[:, each, :, each] = weight.reshape(into, ratio, out // groups, inside, *kernel).transpose(0, 1)
    return blocks.reshape(out, ratio * inside, *kernel)
