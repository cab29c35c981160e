"""Local attention: a token attends only inside its own block of neighbours.

Source: Tay et al. 2020, "Long Range Arena", section 3.2 (local attention); Parmar et al. 2018, "Image Transformer".

- blocks are contiguous and do not overlap; the benchmark's released code attends over tokens equal modulo the number
  of blocks instead, which is not reproduced here
- cost grows linearly with tokens; any length (a shorter last block)
- prunable: heads
"""

from jaxtyping import Bool, Float
from torch import Tensor

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.patterns import local_attention


@register_mixer("local", grids=(1,))
class LocalAttention(SequenceMixer):
    """`y_i = sum_j softmax_j(q_i k_j / sqrt(d)) v_j` over `j` with `j // window == i // window`.

    Args:
        dim: channels.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        window: tokens of a block.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: `window` is below 1, or `heads` does not divide `dim` and no `head_dim` is given.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        window: int = 50,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        return local_attention(q, k, v, self.window, mask=mask)
