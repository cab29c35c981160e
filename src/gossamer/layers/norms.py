"""Normalisation over channels-last tensors.

- `LayerNorm`: per token, over channels (Ba et al. 2016); `torch.nn`'s own, it is channels last already
- `BatchNorm`: per channel, over batch and grid (Ioffe and Szegedy 2015)
- `GroupNorm1`: per sample, over grid and channels, the affine part per channel (Wu and He 2018, one group)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LayerNorm = nn.LayerNorm


class BatchNorm(nn.BatchNorm1d):
    """`(x - mean_c) / std_c * weight + bias`, statistics per channel over everything else."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm wants (batch, channels, *grid), got shape {tuple(input.shape)}")

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class GroupNorm1(nn.Module):
    """`(x - mean) / std * weight + bias`, one mean and deviation per sample, weight and bias per channel."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return F.group_norm(x.movedim(-1, 1), 1, self.weight, self.bias, self.eps).movedim(1, -1)
