"""HiLo: some heads attend inside small windows (what changes fast), the others to the windows' means (what does not).

Source: Pan et al. 2022, "Fast Vision Transformers with HiLo Attention", section 3.

- a share `alpha` of the heads is low-frequency; each kind has its own output product, the answers stand side by side
- windows of one token make it ordinary attention, all heads low-frequency
- one, two or three grid axes, any size: the map is zero-padded at the end, and the zeros count in windows and means
- no relative positions; the authors' arguments for dropout inside the layer do nothing and are not here
- prunable: heads of either kind (the answer keeps its channels)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops import grid as g
from gossamer.ops.attention import attention, join_heads, split_heads


class _Heads(nn.Module):
    """Heads of one kind: input products, named by `products` (values last), and `proj` onto `heads * head_dim`."""

    products: tuple[str, ...] = ()
    proj: nn.Linear

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        weight = self.get_parameter(f"{self.products[-1]}.weight").detach()
        values = weight.view(-1, self.heads, self.head_dim * weight.shape[1])[-1].norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        for name in self.products:
            product: nn.Linear = getattr(self, name)
            parts = range(0, product.out_features, self.heads * self.head_dim)
            slice_linear(product, torch.cat([channels + start for start in parts]), inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        self.heads = len(index)


class HighHeads(_Heads):
    """`y = W_o softmax(q k^T / sqrt(d)) v` inside windows of `size` tokens."""

    products = ("qkv",)

    def __init__(self, dim: int, heads: int, head_dim: int, *, qkv_bias: bool) -> None:
        super().__init__(heads, head_dim)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, heads * head_dim)

    def forward(self, x: Float[Tensor, "b *grid c"], size: tuple[int, ...]) -> Float[Tensor, "b *grid o"]:
        # Windows are cut from the products, which are narrower than the map.
        qkv = g.windows(linear(self.qkv, x), size)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        y = join_heads(attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
        return linear(self.proj, g.unwindows(y, size, x.shape[1:-1]))


class LowHeads(_Heads):
    """`y = W_o softmax(q k^T / sqrt(d)) v`, queries from every token, keys and values from means of `size` tokens."""

    products = ("q", "kv")

    def __init__(self, dim: int, heads: int, head_dim: int, *, qkv_bias: bool) -> None:
        super().__init__(heads, head_dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, heads * head_dim)

    def forward(
        self, x: Float[Tensor, "b *grid c"], padded: Float[Tensor, "b *padded c"], size: tuple[int, ...]
    ) -> Float[Tensor, "b *grid o"]:
        if max(size) > 1:
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
            padded = pool(padded.movedim(-1, 1), size).movedim(1, -1)
        q = split_heads(linear(self.q, x).flatten(1, -2), self.heads)
        k, v = linear(self.kv, padded).flatten(1, -2).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        y = join_heads(attention(q, k.transpose(1, 2), v.transpose(1, 2)))
        return linear(self.proj, y).unflatten(1, x.shape[1:-1])


@register_mixer("hilo", grids=(1, 2, 3))
class HiLo(Mixer):
    """`y = [high(x); low(x)]`, by channels.

    Args:
        dim: channels.
        heads: attention heads, `int(heads * alpha)` of them low-frequency.
        window: window side in tokens, the same on every axis; 1 makes all heads low-frequency.
        alpha: share of the low-frequency heads.

    Raises:
        ValueError: `heads` does not divide `dim`, `alpha` is outside [0, 1], or `window` is below 1.
    """

    def __init__(self, dim: int, *, heads: int = 8, window: int = 2, alpha: float = 0.9, qkv_bias: bool = True) -> None:
        super().__init__(dim)
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window
        low = heads if window == 1 else int(heads * alpha)
        width = dim // heads
        self.high = HighHeads(dim, heads - low, width, qkv_bias=qkv_bias) if low < heads else None
        self.low = LowHeads(dim, low, width, qkv_bias=qkv_bias) if low else None

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        shape = x.shape[1:-1]
        size = (self.window,) * len(shape)
        padded = g.pad_to_multiple(x, size)
        parts = []
        if self.high is not None:
            parts.append(g.crop(self.high(padded, size), shape))
        if self.low is not None:
            parts.append(self.low(x, padded, size))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
