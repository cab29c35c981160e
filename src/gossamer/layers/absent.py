"""A residual branch that was taken out of its block."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Absent(nn.Module):
    """`y = 0`, one number a sample, which broadcasts: stands where a mixer or an MLP was."""

    def forward(self, x: Float[Tensor, "b *grid c"], **_: Any) -> Float[Tensor, "b *ones"]:
        return x.new_zeros((x.shape[0],) + (1,) * (x.ndim - 1))

    def initial_state(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        return ()

    def step(self, x_t: Float[Tensor, "b c"], state: Any) -> tuple[Float[Tensor, "b c"], Any]:
        return torch.zeros_like(x_t), state
