"""Plain window attention: attention inside windows that do not overlap, without positions and without shifts.

Source: Li et al. 2022, "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", section 3.5 (the
form for detection); Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection"; Xia et al.
2024, "ViT-CoMer" (the form that fills up products).

- the weights are those of global attention, so a trained model can be given windows afterwards
- cost grows linearly with tokens at a fixed window
- one, two or three grid axes, any size: the map is zero-padded at the end, and what fills it up is read, as the weights
  were trained: zero tokens, or zero queries, keys and values
- prunable: heads
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads


@register_mixer("plain_window", grids=(1, 2, 3))
class PlainWindowAttention(HeadMixer):
    """`y = W_o softmax(q k^T / sqrt(d)) v` inside windows.

    Args:
        dim: channels.
        heads: attention heads.
        window: window side in tokens, the same on every axis.
        fill: what is zero where the grid ends: `tokens` (whose products are the biases) or their `products`.

    Raises:
        ValueError: `heads` does not divide `dim`, `window` is below 1, or no such `fill`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 14,
        fill: Literal["tokens", "products"] = "tokens",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if fill not in ("tokens", "products"):
            raise ValueError(f"fill must be tokens or products, got {fill!r}")
        self.window = window
        self.fill = fill

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        shape = x.shape[1:-1]
        size = (self.window,) * len(shape)
        if self.fill == "tokens":
            x = g.pad_to_multiple(x, size)
        padded = g.pad_to_multiple(linear(self.qkv, x), size)
        qkv = g.windows(padded, size).unflatten(-1, (3, self.heads, self.head_dim)).transpose(1, 3)
        y = join_heads(attention(*qkv.unbind(2)))
        return g.crop(g.unwindows(linear(self.proj, y), size, padded.shape[1:-1]), shape)
