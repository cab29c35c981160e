"""Hyena on any number of axes: gates between long convolutions whose filters a small network writes.

Source: Zimerman and Wolf 2023, "Multi-Dimensional Hyena for Spatial Inductive Bias"; Poli et al. 2023, "Hyena
Hierarchy" (the operator on one axis, here with `causal=True`).

- no attention: cost `n log n` in the tokens n, by Fourier transform
- a filter is a network of sines over a place's coordinates, times a window that decays with distance
- a convolution looks back on every axis, into one orthant; `direction` says how the other orthants are reached. The
  short convolution of width 3 in front looks one token ahead as well (not with `causal=True`)
- the coordinates are a table as long as the longest axis of `grid`, one for all axes; smaller maps read its beginning
- the authors' 2-D code divides each long convolution by twice the side (`scale`); the clean form does not
- in their `parallel` form the four operators look the same way, and each reads a quarter of the input product: so here
- weights of the filter want a step of 1e-3 and no decay, `positions` one of 1e-5, in the authors' training
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Conv
from gossamer.layers.linear import linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.spectral import long_convolution

Direction = Literal["standard", "seq", "parallel", "4dir", "4dirp"]
Kind = Literal["product", "joint", "direct"]
Window = Literal["standard", "learn", "symmetric", "none"]

_SLOW, _FAST, _TARGET = 1.5, 0.3, -4.605170185988091  # the log of 0.01: what is left of a filter after so many lengths


def coordinates(length: int) -> Float[Tensor, "{length} 3"]:
    """`(t, cos(f w t), -sin(f w t))`, t from 0 to 1, one frequency f w next to zero."""
    turn = 1e-4 * 2 * torch.pi * torch.arange(length) / length
    return torch.stack((torch.linspace(0, 1, length), turn.cos(), -turn.sin()), -1)


class ImplicitFilter(nn.Module):
    """`k(i, j, …) = window(i, j, …) * net(z_i, z_j, …)`, `net = W_3 sin(f W_2 sin(f W_1 sin(f W_0 z)))`.

    Args:
        channels: of the filter.
        axes: grid axes.
        length: places of the longest axis.
        hidden: width of the network.
        joint: one network reads the coordinates of all axes; otherwise each axis has its own network and window, and
            the filter is their outer product, of rank one.
        window: `standard` (fixed, a decay for each channel), `learn` (decays and a floor are trained), `symmetric`
            (trained, one decay for all axes, distance in tokens; joint filters only) or `none`.
        sqrt_decay: the root of the decay; joint filters only.
    """

    t: Tensor

    def __init__(
        self,
        channels: int,
        axes: int,
        length: int,
        *,
        hidden: int = 64,
        joint: bool = False,
        window: Window = "standard",
        sqrt_decay: bool = False,
    ) -> None:
        super().__init__()
        if window not in ("standard", "learn", "symmetric", "none"):
            raise ValueError(f"window must be standard, learn, symmetric or none, got {window!r}")
        if not joint and (window == "symmetric" or sqrt_decay):
            raise ValueError("the symmetric window and sqrt_decay are for joint filters, got filter='product'")
        self.joint = joint
        self.window = window
        self.sqrt_decay = sqrt_decay
        self.bias = nn.Parameter(torch.randn(channels))
        self.positions = nn.Parameter(coordinates(length))
        self.freq = nn.Parameter(torch.ones(hidden))
        self.mlps = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.Linear(3 * axes if joint else 3, hidden),
                    nn.Linear(hidden, hidden),
                    nn.Linear(hidden, hidden),
                    nn.Linear(hidden, channels, bias=False),
                )
            )
            for _ in range(1 if joint else axes)
        )
        decays = torch.linspace(_TARGET / _SLOW, _TARGET / _FAST, channels)
        self.deltas: nn.Parameter | Tensor | None = None
        self.shift: nn.Parameter | None = None
        if window == "standard":
            del self.deltas
            self.register_buffer("deltas", decays.repeat(axes, 1), persistent=False)
        elif window != "none":
            self.deltas = nn.Parameter(decays.repeat(1 if window == "symmetric" else axes, 1))
            self.shift = nn.Parameter(torch.rand(1 if joint else axes, channels))
        self.register_buffer("t", torch.linspace(0, 1, length), persistent=False)

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "*grid c"]:
        places = [self.positions[:n] for n in grid]
        if not self.joint:
            return _outer([self._windowed(self._net(a, z), [a], z.shape[:1]) for a, z in enumerate(places)])
        here = [z.view(*(len(z) if b == a else 1 for b in range(len(grid))), 3) for a, z in enumerate(places)]
        seen = torch.cat([z.expand(*grid, 3) for z in here], -1)
        return self._windowed(self._net(0, seen), range(len(grid)), grid)

    def _net(self, index: int, z: Tensor) -> Tensor:
        mlp: Any = self.mlps[index]
        for layer in mlp[:-1]:
            z = torch.sin(self.freq * layer(z))
        return mlp[-1](z)

    def _windowed(self, k: Tensor, axes: Sequence[int], grid: Sequence[int]) -> Tensor:
        if self.deltas is None:
            return k
        decays = []
        for a, n in zip(axes, grid, strict=True):
            steps = torch.arange(n, device=k.device) if self.window == "symmetric" else self.t[:n]
            rate = self.deltas[0 if self.window == "symmetric" else a].abs()
            decays.append(torch.exp(-steps[:, None] * rate))
        decay = _outer(decays)
        if self.sqrt_decay:
            decay = decay.sqrt()
        return k * (decay if self.shift is None else decay + self.shift[0 if self.joint else axes[0]])


class DirectFilter(nn.Module):
    """A free number for each place of the grid: what the implicit filter is measured against.

    Args:
        channels: of one convolution.
        convs: convolutions.
        grid: size of the grid.
    """

    def __init__(self, channels: int, convs: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(convs, channels, *grid))
        self.bias = nn.Parameter(torch.randn(convs * channels))

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "*grid c"]:
        kernel = self.kernel.flatten(0, 1).movedim(0, -1)
        return kernel[tuple(slice(0, n) for n in grid)]


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """`(n, c), (m, c), … -> (n, m, …, c)`."""
    product = factors[0]
    for factor in factors[1:]:
        product = product.unsqueeze(-2) * factor
    return product


@register_mixer("hyena", grids=(1, 2, 3), causal=True)
class Hyena(Mixer):
    """`y = W_out(x_0 * v)`, `v <- k_i * (v x_i) + b_i v x_i` for i = o-1 … 1, `x_0, …, x_(o-1), v = S W_in x`.

    `S` is a depth-wise convolution of width 3, `k_i *` a convolution as long as the grid.

    Args:
        dim: channels.
        grid: size of the largest token grid.
        order: gates; there is one long convolution fewer.
        hidden: width of the filter's network.
        filter: `product`, `joint` or `direct`, see the filters above.
        direction: `standard` (looks back on every axis), `seq` (the first convolution looks ahead; for every second
            block), `parallel` (four operators with one filter, side by side), `4dir` and `4dirp` (one pass into each
            of the 2^axes orthants, weighted, or mixed over channels).
        window, sqrt_decay: of the filter.
        scale: factor of the long convolutions.
        drop: dropout between gate and convolution.
        causal: one axis on which the short convolution looks back as well.

    Raises:
        ValueError: `order` is below 2, a choice is none of those above, or `causal` on several axes.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Sequence[int],
        order: int = 2,
        hidden: int = 64,
        filter: Kind = "product",
        direction: Direction = "standard",
        window: Window = "standard",
        sqrt_decay: bool = False,
        scale: float = 1.0,
        drop: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim)
        axes = len(grid)
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if filter not in ("product", "joint", "direct"):
            raise ValueError(f"filter must be product, joint or direct, got {filter!r}")
        if direction not in ("standard", "seq", "parallel", "4dir", "4dirp"):
            raise ValueError(f"direction must be standard, seq, parallel, 4dir or 4dirp, got {direction!r}")
        if causal and (axes != 1 or direction != "standard"):
            raise ValueError(f"causal needs one grid axis and direction='standard'; got {axes} and {direction!r}")
        self.grid = tuple(grid)
        self.order = order
        self.direction = direction
        self.scale = scale
        self.causal = causal
        inner = dim * (order + 1)
        copies = 4 if direction == "parallel" else 1
        self.in_proj = nn.Linear(dim, inner)
        self.short = Conv(inner, copies * inner, 3, padding=2 if causal else 1, groups=inner, axes=axes)
        self.out_proj = nn.Linear(copies * dim, dim)
        self.turns = _orthants(axes) if direction in ("4dir", "4dirp") else [()]
        self.mix: nn.Linear | None = None
        if direction == "4dir":
            self.mix = nn.Linear(len(self.turns), 1)
        elif direction == "4dirp":
            self.mix = nn.Linear(len(self.turns) * dim, dim)
        self.filter: nn.Module
        if filter == "direct":
            self.filter = DirectFilter(dim, order - 1, grid)
        else:
            joint = filter == "joint"
            self.filter = ImplicitFilter(
                dim * (order - 1), axes, max(grid), hidden=hidden, joint=joint, window=window, sqrt_decay=sqrt_decay
            )
        self.drop = nn.Dropout(drop) if drop else None

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        grid = x.shape[1:-1]
        if len(grid) != len(self.grid) or any(n > m for n, m in zip(grid, self.grid, strict=True)):
            raise ValueError(f"the filter is for grids up to {self.grid}, got {tuple(grid)}; give grid=")
        u = self.short(linear(self.in_proj, x))
        if self.causal:
            u = u[:, : grid[0]]
        if self.direction == "parallel":
            u = torch.cat(u.chunk(4, -1))
        gates, v = self._split(u)
        kernel = self.filter(grid)
        if len(self.turns) > 1:
            v, gates = self._turned(v), [self._turned(gate) for gate in gates]
        for i, gate in enumerate(gates[:0:-1]):
            v = v * gate if self.drop is None else self.drop(v * gate)
            ahead = tuple(range(1, v.ndim - 1)) if self.direction == "seq" and i == 0 else ()
            far = long_convolution(v.flip(ahead) if ahead else v, self._part(kernel, i, self.scale))
            v = torch.addcmul(far.flip(ahead) if ahead else far, v, self._part(self.filter.bias, i))
        y = v * gates[0]
        if self.direction == "parallel":
            y = torch.cat(y.chunk(4), -1)
        elif self.mix is not None:
            y = self._gather(y, self.mix)
        return linear(self.out_proj, y)

    def _split(self, u: Tensor) -> tuple[list[Tensor], Tensor]:
        *gates, v = u.split(self.dim, -1)
        return gates, v

    def _part(self, t: Any, index: int, scale: float = 1.0) -> Tensor:
        part = t.narrow(-1, index * self.dim, self.dim)
        return part if scale == 1 else part * scale

    def _turned(self, t: Tensor) -> Tensor:
        return torch.cat([t.flip(axes) if axes else t for axes in self.turns])

    def _gather(self, y: Tensor, mix: nn.Linear) -> Tensor:
        """The passes, turned back, joined: weighted, or over all their channels."""
        passes = [t.flip(axes) if axes else t for axes, t in zip(self.turns, y.chunk(len(self.turns)), strict=True)]
        if self.direction == "4dirp":
            return mix(torch.stack(passes, -1).flatten(-2))
        y = mix.bias + passes[0] * mix.weight[0, 0]
        for i, t in enumerate(passes[1:], 1):
            y = torch.addcmul(y, t, mix.weight[0, i])
        return y

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """What the short convolution saw last, what each long one saw, and the filter."""
        if not self.causal:
            return super().initial_state(batch, device, dtype)
        seen = torch.zeros(batch, 2, self.in_proj.out_features, device=device, dtype=dtype)
        past = [torch.empty(batch, 0, self.dim, device=device, dtype=dtype) for _ in range(self.order - 1)]
        return seen, past, self.filter(self.grid)

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, list[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, list[Tensor], Tensor]]:
        seen, past, kernel = state
        t = past[0].shape[1] + 1
        if t > self.grid[0]:
            raise ValueError(f"the filter is for grids up to {self.grid}, got step {t}; give grid=")
        seen = torch.cat((seen, self.in_proj(x_t)[:, None]), 1)
        short: Any = self.short
        u = torch.einsum("btc,ct->bc", seen, short.weight[:, 0]) + short.bias
        gates, v = self._split(u)
        new = []
        for i, gate in enumerate(gates[:0:-1]):
            v = v * gate
            new.append(torch.cat((past[i], v[:, None]), 1))
            far = (new[i].flip(1) * self._part(kernel, i, self.scale)[:t]).sum(1)
            v = torch.addcmul(far, v, self._part(self.filter.bias, i))
        return self.out_proj(v * gates[0]), (seen[:, 1:], new, kernel)


def _orthants(axes: int) -> list[tuple[int, ...]]:
    """The axes to turn round for each orthant: none, all, and the rest from the last axis on."""
    every = tuple(range(1, axes + 1))
    rest = [c for size in range(1, axes) for c in combinations(reversed(every), size)]
    return [(), every, *(tuple(sorted(c)) for c in rest)]
