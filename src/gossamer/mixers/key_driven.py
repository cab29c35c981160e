"""Key-driven grouped queries: a key head is read by more query heads the larger, or the more changed, its keys are.

Source: Khan et al. 2024, "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention".

- `kdgqa`: shares by the norms of the keys, anew in each pass; `dgqa`: by how norms change over windows of training
  steps; `pgqa`: equal groups, less noise of each head's own mean and deviation
- query heads go to groups in order; a group without any is not read, and gets no gradient
- the authors sum norms over the batch, so that samples decide for each other. Here `kdgqa` decides for each sample
  unless `over="batch"`, and `dgqa` keeps in eval mode what training ended with unless `freeze_allocation=False`, which
  decides from the batch at hand and remembers its norms
- equal norms give equal shares, where the authors divide 0 by 0
- noise as in the authors' code: uniform, zero on the diagonal of a heads x (tokens * head width) matrix, standardised
  by row. Their paper says Gaussian; their cache divides by the window's length, which is kept
- one, two or three grid axes: the grid is read as one sequence
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.grouped_query import GroupedMixer, check_groups
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.constants import drawn

# Share of the present norms in the moving average.
EMA = 0.9


def head_groups(allocation: Int[Tensor, "b g"], heads: int) -> Int[Tensor, "b h"]:
    """The group of each query head: the first `a_0` heads read group 0, the next `a_1` group 1, and so on."""
    ends = allocation.cumsum(1)
    return (torch.arange(heads, device=allocation.device)[None, :, None] >= ends[:, None]).sum(-1)


def key_allocation(norms: Float[Tensor, "b g"], heads: int) -> Int[Tensor, "b g"]:
    """Query heads for each group: `round(heads * n / sum n)`, `n` the norms less the least, made to add up to `heads`.

    What is too many is taken from the largest share, one by one; what is missing is given to the smallest.
    """
    least, most = norms.amin(1, keepdim=True), norms.amax(1, keepdim=True)
    weight = torch.where(most > least, (norms - least) / (most - least), torch.ones_like(norms))
    shares = (weight / weight.sum(1, keepdim=True) * heads).round().long()
    groups = torch.arange(norms.shape[1], device=norms.device)
    # Each rounding errs by at most one half.
    for _ in range(norms.shape[1] // 2):
        excess = shares.sum(1, keepdim=True) - heads
        largest = groups == shares.argmax(1, keepdim=True)
        smallest = groups == shares.argmin(1, keepdim=True)
        shares = shares - (largest & (excess > 0)).long() + (smallest & (excess < 0)).long()
    return shares


def change_allocation(change: Float[Tensor, " g"], heads: int) -> Int[Tensor, " g"]:
    """Query heads for each group: `round(heads * r / sum r)`, made to add up to `heads` at random groups."""
    total = change.sum()
    weight = change / total if total > 0 else torch.full_like(change, 1 / len(change))
    shares = (weight * heads).round().long()
    while shares.sum() > heads:
        place = int(torch.randint(0, len(shares), (1,)))
        shares[place] -= int(shares[place] > 0)
    while shares.sum() < heads:
        shares[int(torch.randint(0, len(shares), (1,)))] += 1
    return shares


class KeyDrivenMixer(GroupedMixer):
    """Base of the mixers of this file.

    Args:
        dim: channels.
        heads: query heads.
        kv_heads: key and value heads, half of `heads` by default.
    """

    def __init__(self, dim: int, *, heads: int = 8, kv_heads: int | None = None, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads, kv_heads, qkv_bias=qkv_bias)


class AllocatedMixer(KeyDrivenMixer):
    """Grouped attention with a share of query heads for each group, by an explicit map or the mechanism's own rule."""

    def allocate(self, k: Float[Tensor, "b g n d"], valid: Bool[Tensor, "b n"] | None) -> Int[Tensor, "_ g"]:
        """Query heads of each group, one row for all samples or one each."""
        raise ValueError(f"mixer {self.name!r} has no rule of allocation")

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        valid = None if mask is None else mask.flatten(1)
        q, k, v = self.project(x.flatten(1, -2))
        y = self.attend(q, k, v, self.allocate(k, valid), valid)
        return linear(self.proj, join_heads(y)).view(x.shape)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n d"],
        allocation: Int[Tensor, "_ g"],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Attention where group `i` is read by `allocation[i]` query heads."""
        groups = head_groups(allocation, self.heads)
        if groups.shape[0] == 1:
            k, v = k.index_select(1, groups[0]), v.index_select(1, groups[0])
        else:
            place = groups[:, :, None, None].expand(-1, -1, *k.shape[2:])
            k, v = k.gather(1, place), v.gather(1, place)
        return attention(q, k, v, mask=None if valid is None else valid[:, None, None])


def key_norms(k: Float[Tensor, "b g n d"], valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b g"]:
    """Frobenius norm of each group's keys, over tokens and channels."""
    k = k.detach().float()
    if valid is not None:
        k = k * valid[:, None, :, None]
    return k.flatten(2).norm(dim=2)


@register_mixer("kdgqa", grids=(1, 2, 3))
class KeyDrivenAttention(AllocatedMixer):
    """Grouped attention, query heads shared out by the norms of the keys: `n_g = |k_g|`, largest norm most heads.

    Args:
        dim: channels.
        shared: keywords of `KeyDrivenMixer`.
        over: decide for each `sample`, or by norms summed over the `batch`, as the authors do.

    Raises:
        ValueError: `heads` does not divide `dim`, `kv_heads` is not in 1..heads, or `over` is neither.
    """

    def __init__(
        self,
        dim: int,
        *,
        over: Literal["sample", "batch"] = "sample",
        **shared: Any,
    ) -> None:
        super().__init__(dim, **shared)
        if over not in ("sample", "batch"):
            raise ValueError(f"over must be sample or batch, got {over!r}")
        self.over = over

    def allocate(self, k: Float[Tensor, "b g n d"], valid: Bool[Tensor, "b n"] | None) -> Int[Tensor, "_ g"]:
        norms = key_norms(k, valid)
        return key_allocation(norms.sum(0, keepdim=True) if self.over == "batch" else norms, self.heads)


@register_mixer("dgqa", grids=(1, 2, 3))
class DynamicAttention(AllocatedMixer):
    """Grouped attention, query heads shared out anew every `window` training steps, by norms `m` and their cache `c`.

    `r = |c - m|` (`diff`: groups that change most) or `0.9 m + 0.1 c` (`ema`), then `c = (c + m) / window`.

    Args:
        dim: channels.
        shared: keywords of `KeyDrivenMixer`.
        kind: `diff` or `ema`.
        window: training steps between two decisions; the first step decides.
        freeze_allocation: keep the last decision in eval mode; False decides from the batch at hand.

    Raises:
        ValueError: `heads` does not divide `dim`, `kv_heads` does not divide `heads`, or `window` is below 1.
    """

    cache: Tensor
    allocation: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["diff", "ema"] = "ema",
        window: int = 10,
        freeze_allocation: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(dim, **shared)
        check_groups(self.heads, self.kv_heads)
        if kind not in ("diff", "ema"):
            raise ValueError(f"kind must be diff or ema, got {kind!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.kind = kind
        self.window = window
        self.freeze_allocation = freeze_allocation
        self.register_buffer("cache", torch.zeros(self.kv_heads))
        self.register_buffer("allocation", torch.full((1, self.kv_heads), self.heads // self.kv_heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def allocate(self, k: Float[Tensor, "b g n d"], valid: Bool[Tensor, "b n"] | None) -> Int[Tensor, "_ g"]:
        if self.training:
            if int(self.steps) % self.window == 0:
                norms = self._decide(k, valid)
                self.cache.add_(norms).div_(self.window)
            self.steps += 1
        elif not self.freeze_allocation:
            self.cache.copy_(self._decide(k, valid))
        # Later decisions must not change what this step's backward pass reads.
        return self.allocation.clone()

    def _decide(self, k: Tensor, valid: Tensor | None) -> Tensor:
        norms = key_norms(k, valid).sum(0).to(self.cache)
        change = (self.cache - norms).abs() if self.kind == "diff" else EMA * norms + (1 - EMA) * self.cache
        self.allocation.copy_(change_allocation(change, self.heads)[None])
        return norms


@register_mixer("pgqa", grids=(1, 2, 3))
class PerturbedAttention(KeyDrivenMixer):
    """`y = W_o concat_h(a_h - mean(a_h) - std(a_h) u_h)`, `a` grouped attention, `u_h` noise of mean 0 and deviation 1.

    Args:
        dim: channels.
        shared: keywords of `KeyDrivenMixer`.
        sampling: draw the noise anew in each pass (`random`, also in eval mode, as the authors do), or once for each
            shape (`fixed`).

    Raises:
        ValueError: `heads` does not divide `dim`, `kv_heads` does not divide `heads`, or `sampling` is neither.
    """

    def __init__(
        self,
        dim: int,
        *,
        sampling: Literal["random", "fixed"] = "random",
        **shared: Any,
    ) -> None:
        super().__init__(dim, **shared)
        check_groups(self.heads, self.kv_heads)
        if sampling not in ("random", "fixed"):
            raise ValueError(f"sampling must be random or fixed, got {sampling!r}")
        self.sampling = sampling

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        y = attention(*self.project(x.flatten(1, -2)))
        rows = y.flatten(2)
        noise = self.noise(rows)
        y = (rows - rows.mean(-1, keepdim=True) - rows.std(-1, keepdim=True) * noise).view(y.shape)
        return linear(self.proj, join_heads(y)).view(x.shape)

    def noise(self, rows: Float[Tensor, "b h m"]) -> Float[Tensor, "h m"]:
        """Standardised uniform noise, one matrix for each group; sample by sample the same."""
        shape = (self.kv_heads, self.heads // self.kv_heads, rows.shape[2])
        if self.sampling == "random":
            u = torch.rand(shape, dtype=rows.dtype, device=rows.device)
        else:
            u = fixed_noise(*shape).to(rows)
        u = u * (1 - torch.eye(*shape[1:], dtype=rows.dtype, device=rows.device))
        return ((u - u.mean(-1, keepdim=True)) / u.std(-1, keepdim=True)).flatten(0, 1)


@drawn
def fixed_noise(*shape: int) -> np.ndarray:
    """The uniform noise that stands for drawn noise."""
    return np.random.default_rng(0).random(shape)
