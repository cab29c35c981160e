"""Deformable attention: each token reads a few places of several maps, and chooses itself where and how much.

Source: Zhu et al. 2020, "Deformable DETR", section 4.1, equations 2-3.

- cost grows linearly with tokens: `heads * levels * points` reads each, whatever the maps' size
- places are `(row, column)`; checkpoints of the authors have `(column, row)`, which `swap_offsets` turns
- at the start every token reads the mean over its points, which lie on rays around it, one ray a head
- tokens of several maps lie one map after the other, `split_maps` and `join_maps` go there and back
- prunable: heads
"""

from collections.abc import Sequence
from math import pi

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.ops.deform import multi_scale_deform

Sizes = Sequence[tuple[int, int]]


class DeformableAttention(nn.Module):
    """`y_n = W_o concat_h(sum_{l, p} a_{nhlp} (W_v z_l)_h(r_n + d_{nhlp}))`, `a = softmax_{l, p}(W_a x)`, `d = W_d x`.

    `r` is the token's reference point, `d` counts in pixels of map l, reads are bilinear and zero outside a map.

    Args:
        dim: channels.
        heads: attention heads.
        levels: maps that are read.
        points: places read in each map by each head.
        value_ratio: width of the values relative to `dim`.

    Raises:
        ValueError: `heads` does not divide the values' width.
    """

    def __init__(self, dim: int, *, heads: int = 8, levels: int = 4, points: int = 4, value_ratio: float = 1.0) -> None:
        super().__init__()
        inner = int(dim * value_ratio)
        if inner % heads:
            raise ValueError(
                f"heads must divide dim * value_ratio; got heads={heads}, {dim} * {value_ratio:g} = {inner}"
            )
        self.heads = heads
        self.levels = levels
        self.points = points
        self.head_dim = inner // heads
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, inner)
        self.proj = nn.Linear(inner, dim)
        self.reset()

    def reset(self) -> None:
        """First weights: point p of head h lies `p + 1` pixels (in the maximum norm) along ray h; all count alike."""
        angles = torch.arange(self.heads, dtype=torch.float64) * (2 * pi / self.heads)
        rays = torch.stack((angles.sin(), angles.cos()), -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float64)
        start = (rays[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        values: Float[Tensor, "b m c"],
        sizes: Sizes,
        reference: Float[Tensor, "#b n #levels r"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """What the tokens `x` read of the maps `values`.

        Args:
            values: tokens of the maps, one map after the other.
            sizes: rows and columns of each map.
            reference: `(row, column)` of each token as fractions of a map's sides, or a box `(row, column, height,
                width)`: offsets then count in halves of the box over `points`.
            mask: True for valid tokens of the maps; the others read as zeros.

        Raises:
            ValueError: the maps are not `levels`, or hold other numbers of tokens than `sizes` says.
        """
        if len(sizes) != self.levels:
            raise ValueError(f"sizes must be of {self.levels} maps (levels), got {len(sizes)}")
        shape = (self.heads, self.levels, self.points)
        offsets = linear(self.offsets, x).unflatten(-1, (*shape, 2))
        weights = linear(self.weights, x).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 4:
            offsets = offsets * (reference[:, :, None, :, None, 2:] * (0.5 / self.points))
        else:
            scale = torch.tensor(sizes, dtype=offsets.dtype, device=offsets.device).reciprocal()
            offsets = offsets * scale[:, None]
        z = linear(self.value, values)
        if mask is not None:
            z = z * mask[..., None].to(z.dtype)
        return linear(self.proj, multi_scale_deform(split_maps(z, sizes), centre + offsets, weights))

    def widths(self) -> dict[str, int]:
        return {"heads": self.heads}

    def importance(self, axis: str) -> Float[Tensor, " h"]:
        check_axis(self, axis)
        values = self.value.weight.detach().view(self.heads, -1).norm(dim=1)
        return values * self.proj.weight.detach().view(-1, self.heads, self.head_dim).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        channels = expand_heads(index, self.head_dim)
        reads = self.levels * self.points
        slice_linear(self.offsets, expand_heads(index, reads * 2), inputs=False)
        slice_linear(self.weights, expand_heads(index, reads), inputs=False)
        slice_linear(self.value, channels, inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        self.heads = len(index)


def centres(
    sizes: Sizes, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "1 n 1 2"]:
    """`(row, column)` of the centre of each token of the maps, as fractions of its map's sides."""
    points = []
    for h, w in sizes:
        rows = (torch.arange(h, device=device, dtype=dtype or torch.float32) + 0.5) / h
        columns = (torch.arange(w, device=device, dtype=dtype or torch.float32) + 0.5) / w
        points.append(torch.stack((rows[:, None].expand(h, w), columns.expand(h, w)), -1).flatten(0, 1))
    return torch.cat(points)[None, :, None]


def split_maps(tokens: Float[Tensor, "b n c"], sizes: Sizes) -> list[Float[Tensor, "b _h _w c"]]:
    """The maps whose tokens lie one map after the other; views.

    Raises:
        ValueError: the maps of `sizes` have not as many tokens together.
    """
    counts = [h * w for h, w in sizes]
    if sum(counts) != tokens.shape[1]:
        raise ValueError(f"maps of {list(sizes)} have {sum(counts)} tokens together, got {tokens.shape[1]}")
    return [part.unflatten(1, size) for part, size in zip(tokens.split(counts, 1), sizes, strict=True)]


def join_maps(maps: Sequence[Float[Tensor, "b _h _w c"]]) -> Float[Tensor, "b n c"]:
    """The tokens of the maps, one map after the other."""
    return torch.cat([m.flatten(1, 2) for m in maps], 1)


def swap_offsets(offsets: Float[Tensor, "n *i"]) -> Float[Tensor, "n *i"]:
    """Rows of the offsets' weight or bias, from `(column, row)` pairs to `(row, column)` pairs and back."""
    return offsets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
