"""Normalisation over channels-last tensors.

- `LayerNorm`: per token, over channels (Ba et al. 2016); `torch.nn`'s own, it is channels last already
- `BatchNorm`: per channel, over batch and grid (Ioffe and Szegedy 2015)
- `GroupNorm1`: per sample, over grid and channels, the affine part per channel (Wu and He 2018, one group)
- `RepBatchNorm`, `ProgressiveRepBatchNorm`: a batch norm beside a scaled copy of its input, and a layer norm that fades
  into one while training (Guo et al. 2024); `gossamer.layers.fold` makes them part of the products around them
"""

from collections.abc import Callable

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
        if torch.compiler.is_dynamo_compiling():
            # A compiler keeps the order of what it is given, and channels first would be written to memory.
            return super().forward(x.flatten(0, -2)).view(x.shape)
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class RepBatchNorm(BatchNorm):
    """`y = BN(x) + alpha x`, `alpha` one learned number that starts at 1.

    Source: Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization", section 3.2.

    In evaluation it is one scale and one shift a channel.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(dim, eps, momentum)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        if not self.training:
            gain, shift = self.affine_map()
            return torch.addcmul(shift, x, gain)
        if x.numel() == x.shape[-1]:
            raise ValueError(f"batch norm needs more than one token to train on, got input {tuple(x.shape)}")
        # A second grid axis of length 1 makes a sequence a map, which batch norm has a fast form for.
        y = super().forward(x[:, :, None])[:, :, 0] if x.ndim == 3 else super().forward(x)
        return torch.addcmul(y, x, self.alpha)

    def affine_map(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Scale `A = g / sqrt(var + eps) + alpha` and shift `S = b - g mean / sqrt(var + eps)` of evaluation."""
        assert self.running_var is not None
        assert self.running_mean is not None
        gain = self.weight * (self.running_var + self.eps).rsqrt()
        return gain + self.alpha, self.bias - gain * self.running_mean


class ProgressiveRepBatchNorm(nn.Module):
    """`y = s LN(x) + (1 - s) RepBN(x)`, `s` falling from `start` to 0 over the first training steps; then RepBN.

    Source: Guo et al. 2024, "SLAB", section 3.2, equation 6.

    In evaluation it is RepBN from the start, whose statistics and weights are poor until the fading has ended.

    Args:
        dim: channels.
        steps: training steps until the layer norm is gone.
        warm: training steps of layer norm alone before that.
        start: its share at the first of the fading steps.
        layer: factory of the layer norm.

    Raises:
        ValueError: `steps` is below 1.
    """

    warm: Tensor
    left: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        *,
        steps: int = 300_000,
        warm: int = 0,
        start: float = 1.0,
        layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.layer = layer(dim)
        self.rep = RepBatchNorm(dim)
        self.start = start
        # Saved with the weights: a run that is taken up again fades on from where it was.
        self.register_buffer("warm", torch.tensor(warm))
        self.register_buffer("left", torch.tensor(steps))
        self.register_buffer("steps", torch.tensor(steps))

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        if not self.training:
            return self.rep(x)
        if self.warm > 0:
            self.warm -= 1
            return self.layer(x)
        share = self.share()
        if not share:
            return self.rep(x)
        self.left -= 1
        return torch.lerp(self.rep(x), self.layer(x), share)

    def share(self) -> float:
        """The layer norm's share of the next training step."""
        return self.start * float(self.left) / float(self.steps)


class GroupNorm1(nn.Module):
    """`(x - mean) / std * weight + bias`, one mean and deviation per sample, weight and bias per channel."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return F.group_norm(x.movedim(-1, 1), 1, self.weight, self.bias, self.eps).movedim(1, -1)
