"""Plain window attention: attention inside windows that do not overlap, without positions and without shifts.

Source: Li et al. 2022, "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", section 3.5 (the
form for detection); Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection".

- the weights are those of global attention, so a trained model can be given windows afterwards
- cost grows linearly with tokens at a fixed window
- one, two or three grid axes, any size: the map is zero-padded at the end, and the zeros are read, as by the authors
- prunable: heads
"""

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

    Raises:
        ValueError: `heads` does not divide `dim`, or `window` is below 1.
    """

    def __init__(self, dim: int, *, heads: int = 8, window: int = 14, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        shape = x.shape[1:-1]
        size = (self.window,) * len(shape)
        padded = g.pad_to_multiple(x, size)
        y = join_heads(attention(*self.project(g.windows(padded, size))))
        return g.crop(g.unwindows(linear(self.proj, y), size, padded.shape[1:-1]), shape)
