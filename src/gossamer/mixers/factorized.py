"""Factorised self-attention: three groups of channels, each with few keys of another grain.

Source: Qin et al. 2023, "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
section 3.

- a small group attends to the whole map at a coarse grain: keys from a strided convolution, one head
- two larger groups attend to `window^2` keys, whatever the size of the map: the map is cut into tiles of as many taps,
  side by side or `reduction` apart, and each tap's key is a mean over all tiles; without a reduction there is one
- every query of a group sees the same keys, so their cost is linear in tokens
- the released code averages runs of neighbouring entries of (tiles, channels) laid end to end, which mixes channels
  with tiles (`pool="official"`, as its weights were trained); `pool="per_channel"` is the mean over tiles that is meant
- the coarse convolution leaves out what does not fill a whole step; a map smaller than a step is zero-padded to one
- maps are padded to whole tiles by reflection, as in that code, or by their border where a map is too small for that
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Conv, LayerNorm
from gossamer.layers.linear import linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.attention import attention, join_heads, split_heads


class CoarseKeys(nn.Module):
    """`k, v = W norm(conv(x))`, `v = v + D v`: keys and values of a map at a `reduction`-th of its resolution."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.conv = Conv(dim, dim, reduction, stride=reduction, padding=0)
        self.norm = LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.near = Conv(dim, dim, 3, groups=dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> tuple[Float[Tensor, "b 1 m c"], Float[Tensor, "b 1 m c"]]:
        missing = [max(self.reduction - side, 0) for side in x.shape[1:3]]
        if any(missing):
            x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
        k, v = self.kv(self.norm(self.conv(x))).chunk(2, -1)
        v = v + self.near(v)
        return k.flatten(1, 2)[:, None], v.flatten(1, 2)[:, None]


class TiledKeys(nn.Module):
    """`k, v = W2 W1 z_tap`, `z_tap` the mean over tiles of what lies at the tap; `v = v + D v` on the map of taps.

    Args:
        dim: channels of the group.
        heads: heads that share `W1` and `W2`.
        window: taps of a tile on each axis.
        dilation: how far apart they are.
        pool: which entries are averaged; see the head of this file.
    """

    def __init__(self, dim: int, heads: int, *, window: int, dilation: int, pool: str) -> None:
        super().__init__()
        width = dim // heads
        self.heads = heads
        self.window = window
        self.dilation = dilation
        self.pool = pool
        self.fc = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.near = Conv(dim, dim, 3, groups=dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> tuple[Float[Tensor, "b n m d"], Float[Tensor, "b n m d"]]:
        k, v = self.kv(self.fc(self.taps(x))).chunk(2, -1)
        # (b, heads, taps, d) as a map of taps, heads side by side.
        image = v.transpose(1, 2).flatten(2).unflatten(1, (self.window, self.window))
        return k, v + split_heads(self.near(image).flatten(1, 2), self.heads)

    def taps(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n m d"]:
        """The mean entry at each tap, `m = window^2`."""
        side = self.dilation * (self.window - 1) + 1
        pads = [-length % side for length in x.shape[1:3]]
        if any(pads):
            mirror = all(p < length for p, length in zip(pads, x.shape[1:3], strict=True))
            image = F.pad(x.movedim(-1, 1), (0, pads[1], 0, pads[0]), mode="reflect" if mirror else "replicate")
            x = image.movedim(1, -1)
        b, h, w, c = x.shape
        # Places of the taps in their tiles: (b, rows of tiles, taps, columns of tiles, taps, heads, d).
        tiles = x.unflatten(1, (h // side, side)).unflatten(3, (w // side, side))
        tiles = tiles[:, :, :: self.dilation, :, :: self.dilation].unflatten(-1, (self.heads, -1))
        if self.pool == "per_channel":
            mean = tiles.mean((1, 3))
            return mean.permute(0, 3, 1, 2, 4).flatten(2, 3)
        # Tiles before channels, end to end; each entry is the mean over a run as long as there are tiles.
        ends = tiles.permute(0, 5, 2, 4, 1, 3, 6).reshape(b, self.heads, self.window**2, c // self.heads, -1)
        return ends.mean(-1)


@register_mixer("factorized", grids=(2,))
class FactorizedAttention(Mixer):
    """`y = W_o [attend(q_0, coarse); attend(q_1, near); attend(q_2, far)]`, by groups of channels.

    Args:
        dim: channels: a multiple of 16, or of 8 without a reduction; the groups' shares are 2:7:7, or 1:7.
        heads: heads of the tiled groups.
        reduction: by how much the coarse group lowers the resolution, and how far apart the taps of the last group are.
        window: taps of a tile on each axis.
        pool: `official` or `per_channel`.

    Raises:
        ValueError: `dim` does not fall into the shares, `heads` does not divide a tiled group, `reduction` or `window`
            is below 1, `window` is even, or `pool` is neither of the two.
    """

    def __init__(
        self, dim: int, *, heads: int = 1, reduction: int = 1, window: int = 7, pool: str = "per_channel"
    ) -> None:
        super().__init__(dim)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if pool not in ("official", "per_channel"):
            raise ValueError(f"pool must be 'official' or 'per_channel', got {pool!r}")
        shares = (2, 7, 7) if reduction > 1 else (1, 7)
        if dim % sum(shares):
            raise ValueError(f"dim must be a multiple of {sum(shares)} with reduction={reduction}, got {dim}")
        self.split = [dim // sum(shares) * share for share in shares]
        if self.split[1] % heads:
            raise ValueError(f"heads must divide the {self.split[1]} channels of a tiled group, got {heads}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.coarse = CoarseKeys(self.split[0], reduction)
        local = dim - self.split[0]
        self.near = nn.Sequential(Conv(local, local, 3, groups=local), nn.Linear(local, local))
        self.tiled = nn.ModuleList(
            TiledKeys(c, heads, window=window, dilation=d, pool=pool)
            for c, d in zip(self.split[1:], (1, reduction), strict=False)
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        first = self.split[0]
        q = linear(self.q, x).flatten(1, 2)
        parts = [attention(q[:, None, :, :first], *self.coarse(x[..., :first]))]
        # Each head's queries fall into those of the groups.
        local = split_heads(q[..., first:], self.heads).chunk(len(self.tiled), -1)
        maps = self.near(x[..., first:]).chunk(len(self.tiled), -1)
        parts += [attention(p, *keys(m)) for p, keys, m in zip(local, self.tiled, maps, strict=True)]
        y = torch.cat([join_heads(part) for part in parts], -1)
        return linear(self.proj, y).unflatten(1, x.shape[1:3])
