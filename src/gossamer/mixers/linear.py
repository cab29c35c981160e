"""Linear attention: the softmax replaced by a product of positive features, so that cost grows linearly with tokens.

Source: Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention".

- queries and keys are not scaled; the normaliser has 1e-6 added
- any number of grid axes: without positions the mechanism knows no order
- causal form decodes with a state whose size does not grow with the tokens
- prunable: heads
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.linear_attention import (
    FeatureMap,
    LinearState,
    causal_linear_attention,
    elu1,
    linear_attention,
    step,
)


@register_mixer("linear", grids=(1, 2, 3), causal=True)
class LinearAttention(SequenceMixer):
    """`y_i = phi(q_i)^T S / (phi(q_i)^T z + eps)`, `S = sum_j phi(k_j) v_j^T`, `z = sum_j phi(k_j)`, `phi = elu + 1`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        causal: sums run only over earlier tokens and the token itself.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        self.causal = causal

    def features(self) -> tuple[FeatureMap, FeatureMap]:
        """The feature maps of queries and keys."""
        return elu1, elu1

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.head_dim

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        keys = None if mask is None else mask[:, None]
        if self.causal:
            return causal_linear_attention(q, k, v, self.features(), mask=keys)[0]
        return linear_attention(q, k, v, self.features(), mask=keys)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LinearState:
        z = torch.zeros(batch, self.heads, self.width, device=device, dtype=dtype)
        return LinearState(z[..., None].repeat(1, 1, 1, self.head_dim), z)

    def step(self, x_t: Float[Tensor, "b c"], state: LinearState) -> tuple[Float[Tensor, "b c"], LinearState]:
        q, k, v = (t[:, :, 0] for t in self.project(x_t[:, None]))
        y, state = step(state, q, k, v, self.features())
        return self.proj(y.flatten(1)), state
