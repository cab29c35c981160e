"""Cross feature attention: queries and keys of unit length meet channel by channel, at a cost linear in tokens.

Source: Zhao et al. 2022, "Lightweight Vision Transformer with Cross Feature Attention" (XFormer), a reconstruction;
El-Nouby et al. 2021, "XCiT: Cross-Covariance Image Transformers" (the `cross_covariance` form).

- a reconstruction: no code was published and no full text could be read. Sure is that there is no softmax over tokens,
  that vectors are normalised, and that the cost is linear
- queries and keys are normalised along the tokens, each channel by itself: their products need no softmax to stay
  bounded, `|y_c| <= d |v_c| / tau` (lengths over the tokens, before the output product)
- any number of grid axes: without positions the mechanism knows no order
- prunable: heads (but not in the `context_score` form, which has none)
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers import Conv
from gossamer.layers.linear import linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.attention import join_heads
from gossamer.ops.linear_attention import identity, linear_attention

EPS = 1e-6


def unit(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """Every channel divided by its length over the tokens; a channel of zeros stays one."""
    return x / x.norm(dim=2, keepdim=True).clamp_min(EPS)


@register_mixer("cross_feature", grids=(1, 2, 3))
class CrossFeature(HeadMixer):
    """`y = W_o concat_h(q_h (k_h^T v_h) / tau_h)`, `q_h, k_h` of unit length along the tokens.

    In the form `cross_covariance`: `y = W_o concat_h(v_h softmax(k_h^T q_h / tau_h))`, a softmax over the d channels
    of keys.

    Args:
        dim: channels.
        heads: attention heads.
        mode: `bilinear` or `cross_covariance`.
        qkv_bias: whether the input products add a bias.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        mode: Literal["bilinear", "cross_covariance"] = "bilinear",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        self.mode = mode
        # softplus^-1(1): the temperature starts at 1 and stays positive.
        self.log_tau = nn.Parameter(torch.full((heads,), 0.5413248546))

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        q, k, v = self.project(x.flatten(1, -2))
        if mask is not None:
            # Tokens that do not exist count in no length and in no sum.
            gone = ~mask.flatten(1)[:, None, :, None]
            q, k, v = (t.masked_fill(gone, 0.0) for t in (q, k, v))
        q = unit(q) / F.softplus(self.log_tau)[:, None, None]
        if self.mode == "bilinear":
            y = linear_attention(q, unit(k), v, identity, normalise=False)
        else:
            y = v @ (unit(k).transpose(-2, -1) @ q).softmax(-2)
        return linear(self.proj, join_heads(y)).view(x.shape)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        super().keep(axis, index)
        self.log_tau = nn.Parameter(self.log_tau.detach()[index].clone())


@register_mixer("context_score", grids=(1, 2, 3))
class ContextScore(Mixer):
    """`y_i = W_o (s_q(i) sum_n s_k(n) v_n / sum_n s_k(n))`, `s = sigmoid(mean_c(D W x))`: one context for all tokens.

    The cheapest form of cross feature attention: queries and keys are one number a token, read from their
    neighbourhood by depth-wise convolutions `D` of width 3. The division, ours, keeps its scale on maps of any size.

    Args:
        dim: channels.
        axes: number of grid axes, where `grid` does not say it.
        grid: size of the token grid, where it is known.
    """

    def __init__(self, dim: int, *, axes: int = 2, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.near = Conv(2 * dim, 2 * dim, 3, groups=2 * dim, axes=len(grid) if grid else axes)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        qk, v = linear(self.qkv, x).split((2 * self.dim, self.dim), -1)
        q, k = self.near(qk).unflatten(-1, (2, self.dim)).mean(-1).sigmoid().unbind(-1)
        weights = k.flatten(1)
        context = (weights[:, None] @ v.flatten(1, -2))[:, 0] / weights.sum(1, keepdim=True)
        context = context.view(x.shape[0], *[1] * (x.ndim - 2), self.dim)
        return linear(self.proj, q[..., None] * context)
