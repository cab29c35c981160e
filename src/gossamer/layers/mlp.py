"""The channel MLP: each token by itself, or (`ConvMlp`) with a look at its neighbours between the two products.

`y = W2 act(W1 x)`, with an optional norm after each product (the BatchNorm form of EfficientFormer).

- linear layers on channels-last tensors are the 1x1 convolutions of channels-first code
- prunable: hidden units
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.conv import Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, slice_depthwise, slice_linear, slice_norm


class Mlp(nn.Module):
    """Two linear layers with an activation between.

    Args:
        dim: channels in and out.
        hidden: channels between.
        act: activation factory.
        drop: dropout probability after each product.
        bias: whether the products add one.
        norm: factory of a norm over channels after each product, or None.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.norm1 = norm(hidden) if norm else None
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias)
        self.norm2 = norm(dim) if norm else None
        self.drop = nn.Dropout(drop) if drop else None

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        x = linear(self.fc1, x, self.act) if self.norm1 is None else self.act(self.norm1(linear(self.fc1, x)))
        if self.drop is not None:
            x = self.drop(x)
        x = linear(self.fc2, x)
        if self.norm2 is not None:
            x = self.norm2(x)
        return x if self.drop is None else self.drop(x)

    def widths(self) -> dict[str, int]:
        return {"hidden": self.fc1.out_features}

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        check_axis(self, axis)
        score = self.fc1.weight.detach().norm(dim=1) * self.fc2.weight.detach().norm(dim=0)
        if isinstance(self.norm1, nn.BatchNorm1d):
            # A batch norm undoes the scale of the weights before it and sets its own.
            score = self.norm1.weight.detach().abs() * self.fc2.weight.detach().norm(dim=0)
        return score

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        with torch.no_grad():
            slice_linear(self.fc1, index, inputs=False)
            slice_linear(self.fc2, index, inputs=True)
            if self.norm1 is not None:
                slice_norm(self.norm1, index)


class ConvMlp(nn.Module):
    """`y = W2 act(D before(W1 x))`, D a depth-wise convolution: the MLP that also says where a token is.

    Source: Wang et al. 2021, "PVTv2: Improved Baselines with Pyramid Vision Transformer", section 3.2.

    Args:
        dim: channels in and out.
        hidden: channels between.
        kernel: side of the depth-wise kernel, odd.
        before: activation factory ahead of the convolution, or None.
        act: activation factory after it.
        residual: add the convolution's input to its answer.
        drop: dropout probability ahead of and after the second product.
    """

    dw: Any

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        kernel: int = 3,
        before: Callable[[], nn.Module] | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        residual: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.before = before() if before else None
        self.dw = Conv(hidden, hidden, kernel, groups=hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.residual = residual
        self.drop = nn.Dropout(drop) if drop else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = linear(self.fc1, x, self.before)
        near = self.dw(x)
        x = self.act(x + near if self.residual else near)
        if self.drop is not None:
            x = self.drop(x)
        x = linear(self.fc2, x)
        return x if self.drop is None else self.drop(x)

    def widths(self) -> dict[str, int]:
        return {"hidden": self.fc1.out_features}

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        check_axis(self, axis)
        inner = self.fc1.weight.detach().norm(dim=1) * self.dw.weight.detach().flatten(1).norm(dim=1)
        return inner * self.fc2.weight.detach().norm(dim=0)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        with torch.no_grad():
            slice_linear(self.fc1, index, inputs=False)
            slice_depthwise(self.dw, index)
            slice_linear(self.fc2, index, inputs=True)
