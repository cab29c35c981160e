"""Polyline-masked attention: a token fades with the learned length of the way to it, along its row, then a column.

Source: Zhao et al. 2025, "Polyline Path Masked Attention for Vision Transformer", sections 3.2-3.3.

- every token says by how much a step onto it along its row, and along its column, lowers the logit; Mamba-2's decay,
  on a grid of two axes
- the way that goes by the column first is the transpose of the other; both have the same weight
- full attention costs N^2; the separable form, attention along rows and along columns one after the other, N^1.5
- queries and keys are turned by the row-major number of their token; values go through a 5x5 depth-wise convolution too
- prunable: heads
"""

from math import log

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import Conv
from gossamer.layers.linear import linear
from gossamer.layers.prune import slice_depthwise
from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer


def line_mask(steps: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n n"]:
    """`M_ij = sum of steps over (j, i]`, or `(i, j]`: the way between two tokens of a line, for steps that are not > 0.

    With `s = cumsum(steps)`, which falls, that is `sign(i - j) (s_i - s_j)`.
    """
    total = steps.cumsum(-1)
    return _signs(steps.shape[-1], steps) * (total[..., :, None] - total[..., None, :])


def _signs(n: int, like: Tensor) -> Float[Tensor, "n n"]:
    """`sign(i - j)`: unlike an absolute value, the product with it keeps no n x n differences for its gradient."""
    place = torch.arange(n, device=like.device)
    return (place[:, None] - place).sign().to(like.dtype)


def polyline_mask(
    across: Float[Tensor, "*b h w"], down: Float[Tensor, "*b h w"], *, column_first: bool = False
) -> Float[Tensor, "*b n n"]:
    """`L_(i,k),(j,l) = M_row i(k, l) + M_column l(i, j)`: along row i to column l, then along that column to row j.

    Args:
        across, down: the steps onto each token along its row and along its column, not > 0.
        column_first: the way along column k to row j, then along that row: the transpose, which is quicker to write
            out than to read across.
    """
    rows = line_mask(across)  # (i, k, l)
    # Written out in the order (i, j, l), so that the sum lies as the logits do.
    total = down.cumsum(-2)
    columns = _signs(down.shape[-2], down)[..., None] * (total[..., :, None, :] - total[..., None, :, :])
    if column_first:
        both = rows.transpose(-3, -2)[..., None, :, :, :] + columns.transpose(-2, -1)[..., None]
    else:
        both = rows[..., :, :, None, :] + columns[..., :, None, :, :]
    return both.flatten(-4, -3).flatten(-2)


def polyline_product(
    across: Float[Tensor, "*b h w"], down: Float[Tensor, "*b h w"], x: Float[Tensor, "*b h w c"]
) -> Float[Tensor, "*b h w c"]:
    """`exp(L) x` without the N^2 entries of L: along the columns, then along the rows; N^1.5 products."""
    y = line_mask(down.transpose(-2, -1)).exp() @ x.transpose(-3, -2)
    return line_mask(across).exp() @ y.transpose(-3, -2)


@register_mixer("polyline", grids=(2,))
class PolylineAttention(HeadMixer):
    """`y = W_o (A v + D v)`, D a depth-wise convolution, S the logits of turned queries and keys.

    Full: `A = (softmax(S + L) + softmax(S + L^T)) / 2`.
    Separable: `A = (A_c A_r + A_r A_c) / 2`, `A_r = softmax(S + M_row)` inside rows, `A_c = softmax(S + M_column)`
    inside columns.

    Steps: `a = -exp(log_rate) softplus(w . x + step_bias)`, one w for rows and one for columns, the same for all heads.

    Args:
        dim: channels.
        heads: attention heads, of an even number of channels each.
        separable: rows and columns in turn, for large maps.

    Raises:
        ValueError: `heads` does not divide `dim`, or a head has an odd number of channels.
    """

    angle: Tensor
    origin: Tensor

    def __init__(self, dim: int, *, heads: int = 4, separable: bool = False) -> None:
        super().__init__(dim, heads)
        if self.head_dim % 2:
            raise ValueError(f"a head must have an even number of channels; got {self.head_dim} ({dim} / {heads})")
        self.separable = separable
        self.near = Conv(dim, dim, 5, groups=dim)
        self.step_weight = nn.Linear(self.head_dim, 2, bias=False)
        # Mamba-2's start: softplus(step_bias) log-uniform in [0.001, 0.1].
        first = (torch.rand(heads) * log(100) + log(0.001)).exp()
        self.step_bias = nn.Parameter(first + (-(-first).expm1()).log())
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 1.1).log())
        angle = 1 / 10000 ** torch.linspace(0, 1, self.head_dim // 2)
        self.register_buffer("angle", angle, persistent=False)
        # The slice of the input that each head's steps read: pruning leaves gaps.
        self.register_buffer("origin", torch.arange(heads), persistent=False)

    def steps(self, x: Float[Tensor, "b h w c"]) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b n h w"]]:
        """The logarithms of the decay along rows and along columns."""
        parts = x.unflatten(-1, (-1, self.head_dim))
        if parts.shape[-2] != self.heads:
            parts = parts[..., self.origin, :]
        rate = F.softplus(self.step_weight(parts) + self.step_bias[:, None])
        across, down = (-self.log_rate.exp()[:, None] * rate).permute(4, 0, 3, 1, 2).unbind(0)
        return across, down

    def turned(self, qk: Float[Tensor, "b h w 2 n d"]) -> tuple[Float[Tensor, "b h w n d"], Float[Tensor, "b h w n d"]]:
        """Queries and keys, each pair of channels turned by `angle * (row-major number)`, keys times `d ** -0.5`."""
        h, w = qk.shape[1:3]
        at = torch.arange(h * w, device=qk.device).to(self.angle)[:, None] * self.angle
        # (h, w, 2, 1, d / 2): the scale of the logits comes with the turn of the keys.
        scale = torch.tensor([1.0, self.head_dim**-0.5], dtype=at.dtype, device=at.device)[:, None, None]
        cos, sin = (t.view(h, w, 1, 1, -1) * scale for t in (at.cos(), at.sin()))
        one, two = qk.unflatten(-1, (-1, 2)).unbind(-1)
        q, k = torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2).unbind(3)
        return q, k

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        inner = self.heads * self.head_dim
        qkv = linear(self.qkv, x)
        # A copy, so that what is kept for gradients does not hold the queries and keys before their turn.
        v = qkv[..., 2 * inner :].contiguous()
        q, k = self.turned(qkv[..., : 2 * inner].unflatten(-1, (2, self.heads, self.head_dim)))
        mix = self._along_axes if self.separable else self._over_all
        y = mix(q, k, v.unflatten(-1, (self.heads, self.head_dim)), *self.steps(x))
        return linear(self.proj, torch.add(self.near(v), y.flatten(-2), alpha=0.5))

    def _over_all(self, q: Tensor, k: Tensor, v: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """Twice the answer, `(b, h, w, n, d)`."""
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(-2, -1)
        masks = (polyline_mask(across, down, column_first=first) for first in (False, True))
        by_row, by_column = ((logits + mask).softmax(-1) for mask in masks)
        weights = by_row + by_column
        return (weights @ v).transpose(1, 2).unflatten(1, across.shape[-2:])

    def _along_axes(self, q: Tensor, k: Tensor, v: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """Twice the answer, `(b, h, w, n, d)`."""
        # Rows: (b, h, n, w, d). Columns: (b, w, n, h, d).
        rows, columns = (0, 1, 3, 2, 4), (0, 2, 3, 1, 4)
        in_rows = q.permute(rows) @ k.permute(rows).transpose(-2, -1)
        in_rows = (in_rows + line_mask(across.transpose(1, 2))).softmax(-1)
        in_columns = q.permute(columns) @ k.permute(columns).transpose(-2, -1)
        in_columns = (in_columns + line_mask(down.permute(0, 3, 1, 2))).softmax(-1)
        # Back to (b, h, w, n, d) is (0, 1, 3, 2, 4) from rows and (0, 3, 1, 2, 4) from columns.
        by_row = (in_columns @ (in_rows @ v.permute(rows)).permute(0, 3, 2, 1, 4)).permute(0, 3, 1, 2, 4)
        by_column = (in_rows @ (in_columns @ v.permute(columns)).permute(0, 3, 2, 1, 4)).permute(0, 1, 3, 2, 4)
        return by_row + by_column

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        width = self.head_dim
        super().keep(axis, index)
        slice_depthwise(self.near, (index[:, None] * width + torch.arange(width, device=index.device)).flatten())
        self.step_bias = nn.Parameter(self.step_bias.detach()[index].clone())
        self.log_rate = nn.Parameter(self.log_rate.detach()[index].clone())
        self.origin = self.origin[index]
