"""Attention inside crops: windows side by side, with no position bias, no shift and no mask.

Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3 (window attention
without shifting); in the form of ViT-Adapter and ViT-CoMer (Xia et al. 2024), which crop the queries, keys and values.

- cost grows linearly with tokens at a fixed window
- weights are those of plain attention, so a ViT pre-trained with one runs with the other
- tokens that fill the grid up to whole windows are zero keys and values that take part, as the weights were trained
- prunable: heads
"""

from jaxtyping import Float
from torch import Tensor

from gossamer.layers.linear import linear
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads


@register_mixer("crops", grids=(1, 2, 3))
class Crops(HeadMixer):
    """`y = W_o softmax(q k^T / sqrt(d)) v` inside windows, `q, k, v = W_qkv x`, zero where there is no token.

    Args:
        dim: channels.
        heads: attention heads.
        window: window side in tokens, the same on every axis.
    """

    def __init__(self, dim: int, *, heads: int = 4, window: int = 14) -> None:
        super().__init__(dim, heads)
        self.window = window

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        shape = x.shape[1:-1]
        size = (self.window,) * len(shape)
        padded = g.pad_to_multiple(linear(self.qkv, x), size)
        qkv = g.windows(padded, size).unflatten(-1, (3, self.heads, self.head_dim)).transpose(1, 3)
        y = join_heads(attention(*qkv.unbind(2)))
        return linear(self.proj, g.crop(g.unwindows(y, size, padded.shape[1:-1]), shape))
