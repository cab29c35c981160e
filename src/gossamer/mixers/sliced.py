"""Sliced attention: tokens are cut into groups, and attention stays inside a group.

Source: Shen et al. 2021, "Sliced Recursive Transformer", section 3.3.

- the products of queries with keys and of weights with values cost a `groups`-th of global attention's
- groups are runs of neighbouring tokens, or of tokens in a drawn order (`shuffled`), which lets information spread
- a drawn order is fresh at every call in training; in eval mode the authors draw it anew as well, here one fixed order
  for each number of tokens stands in for it unless `fresh=True`
- tokens that do not divide into groups leave the last group shorter, or are refused
- the grid is read as one sequence, so any number of axes works
- prunable: heads
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.constants import drawn


@register_mixer("sliced", grids=(1, 2, 3))
class SlicedAttention(HeadMixer):
    """`y_i = W_o sum_j softmax_j(q_i k_j / sqrt(d)) v_j`, `j` in the group of `i`.

    Args:
        dim: channels.
        heads: attention heads.
        groups: groups the tokens are cut into; 1 is global attention.
        shuffled: cut a drawn order of the tokens, not their own.
        fresh: draw that order anew in eval mode too.
        pad: take any number of tokens; False refuses those that `groups` does not divide.

    Raises:
        ValueError: `heads` does not divide `dim`, `groups` is below 1, or it does not divide the tokens and `pad` is
            False.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        groups: int = 4,
        shuffled: bool = False,
        fresh: bool = False,
        pad: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.groups = groups
        self.shuffled = shuffled
        self.fresh = fresh
        self.pad = pad

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        return self.attend(x, self.groups, self.shuffled, mask)

    def attend(
        self,
        x: Float[Tensor, "b *grid c"],
        groups: int,
        shuffled: bool,
        mask: Bool[Tensor, "b *grid"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        """The same weights with other groups."""
        flat, seen = x.flatten(1, -2), None if mask is None else mask.flatten(1)
        b, n, c = flat.shape
        if n % groups and not self.pad:
            raise ValueError(f"groups must divide the tokens; got groups={groups}, tokens={n}; or give pad=True")
        drawn = self._order(n, x.device) if shuffled and groups > 1 else None
        if drawn is not None:
            flat = flat.index_select(1, drawn)
            seen = None if seen is None else seen.index_select(1, drawn)
        missing = -n % groups
        if missing:
            flat = F.pad(flat, (0, 0, 0, missing))
            real = torch.ones(b, n, dtype=torch.bool, device=x.device) if seen is None else seen
            seen = F.pad(real, (0, missing))
        size = (n + missing) // groups
        keys = None if seen is None else seen.reshape(b * groups, 1, 1, size)
        y = join_heads(attention(*self.project(flat.reshape(b * groups, size, c)), mask=keys))
        y = y.reshape(b, groups * size, -1)[:, :n]
        if drawn is not None:
            y = y.index_select(1, drawn.argsort())
        return linear(self.proj, y).view(x.shape)

    def _order(self, n: int, device: torch.device) -> Tensor:
        if self.training or self.fresh:
            return torch.randperm(n, device=device)
        return fixed_order(n).to(device)


@drawn
def fixed_order(n: int) -> np.ndarray:
    """The order of `n` tokens that stands for a drawn one in eval mode."""
    return np.random.default_rng(0).permutation(n)
