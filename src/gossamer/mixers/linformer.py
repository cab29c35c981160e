"""Linformer: keys and values are projected along the sequence to a few slots before attention.

Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity".

- one projection shared by keys, values and all heads (the form of Long Range Arena)
- the projection is bound to the longest sequence; shorter ones use its first columns
- tokens outside the mask are taken out before the projection, so padding changes nothing (the benchmark's code
  projects padding too)
- prunable: heads
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.attention import attention


@register_mixer("linformer", grids=(1, 2, 3))
class Linformer(SequenceMixer):
    """`y = softmax(q (E k)^T / sqrt(d)) (E v)`, `E` of shape `(rank, tokens)`.

    Args:
        dim: channels.
        grid: size of the token grid; its tokens are the longest sequence.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        rank: slots that keys and values are projected to.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given; in use, more tokens than the grid has.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, ...],
        heads: int = 8,
        head_dim: int | None = None,
        rank: int = 16,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        self.slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, math.prod(grid))))

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        n, longest = x.shape[1], self.slots.shape[1]
        if n > longest:
            raise ValueError(f"linformer is bound to {longest} tokens (grid), got {n}")
        slots = self.slots[:, :n]
        # Taken out once, from the projection: (rank, n) is smaller than keys and values.
        weights = slots if mask is None else (slots * mask[:, None].to(slots.dtype))[:, None]
        return attention(q, weights @ k, weights @ v)
