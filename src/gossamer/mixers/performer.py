"""Performer: attention by random positive features, linear in the number of tokens.

Source: Choromanski et al. 2021, "Rethinking Attention with Performers" (FAVOR+ and generalised attention).

- `relu` features are the generalised attention that Long Range Arena runs by default: no projection at all
- `softmax` features approximate softmax attention; the projection is drawn once and kept with the weights
- any number of grid axes; the causal form (ReLU features) decodes with a state of fixed size
- prunable: heads
"""

import math
from functools import partial

import torch
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.linear import LinearAttention
from gossamer.ops.linear_attention import FeatureMap, orthogonal_projection, relu_eps, softmax_features


@register_mixer("performer", grids=(1, 2, 3), causal=True)
class Performer(LinearAttention):
    """`y_i = phi(q_i)^T S / (phi(q_i)^T z + eps)`, `S = sum_j phi(k_j) v_j^T`, `z = sum_j phi(k_j)`.

    `phi(x) = max(x, 0) + 1e-3`, or `exp(w x - |x|^2 / 2)` for random orthogonal `w`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        kernel: kind of features, `relu` or `softmax`.
        features: number of random features of a head (`softmax` only), `head_dim * log(head_dim)` by default.
        causal: sums run only over earlier tokens and the token itself.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: unknown `kernel`, or `causal` with softmax features (their stabiliser looks at every key).
    """

    projection: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        kernel: str = "relu",
        features: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads=heads, head_dim=head_dim, causal=causal, qkv_bias=qkv_bias, out_bias=out_bias)
        if kernel not in ("relu", "softmax"):
            raise ValueError(f"kernel must be relu or softmax, got {kernel!r}")
        if causal and kernel == "softmax":
            raise ValueError("causal must be False for softmax features: their stabiliser looks at every key")
        rows = None
        if kernel == "softmax":
            d = self.head_dim
            with torch.device("cpu"):  # it is drawn there; a meta device has no numbers
                rows = orthogonal_projection(features or max(1, round(d * math.log(d))), d)
            rows = rows.to(torch.get_default_device())
        self.register_buffer("projection", rows)

    def features(self) -> tuple[FeatureMap, FeatureMap]:
        if self.projection is None:
            return relu_eps, relu_eps
        of = partial(softmax_features, projection=self.projection)
        return partial(of, is_query=True), partial(of, is_query=False)
