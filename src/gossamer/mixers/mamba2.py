"""Mamba-2: a gated state-space layer, with the sizes of its inputs given freely.

Source: Dao and Gu 2024, "Transformers are SSMs" (the layer); Li et al. 2025, "MaTVLM: Hybrid Mamba-Transformer for
Efficient Vision-Language Modeling" (its sizes are an attention's, so that attention's weights can start it).

- cost grows linearly with tokens, the decoding state does not grow
- no positions: order comes from a short convolution and from the decay
- heads of x, B and C may be fewer than `heads`, as keys and values are in grouped-query attention; with
  `x_heads = heads`, `b_heads = c_heads = 1` it is the layer of the Mamba-2 paper
- the gated norm has a group for each head of C, as both papers' code has it
- causal only; masked tokens leave the state as it is and are zeros to the convolution
- prunable: groups of heads that share nothing with the others
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_depthwise, slice_linear
from gossamer.mixers.base import Mixer, register_mixer
from gossamer.ops.ssd import spread, ssd, ssd_step

RATES = (1.0, 16.0)
STEPS = (1e-3, 1e-1)
EPS = 1e-5


class GatedNorm(nn.Module):
    """`y_g = w_g u_g / sqrt(mean(u_g^2) + eps)` for each group g of channels of `u = x silu(z)`."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*b c"], z: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        u = (x * F.silu(z)).unflatten(-1, (self.groups, -1))
        return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)).flatten(-2) * self.weight


@register_mixer("mamba2", grids=(1,), causal=True)
class Mamba2(Mixer):
    """`y_t = W_o norm((H_t c_t + D x_t) silu(z_t))`, `H_t = exp(-exp(A) dt_t) H_(t-1) + dt_t x_t b_t^T`.

    `z, u, dt = W_i input`, `x, b, c = silu(conv(u))` with a causal depth-wise convolution, `dt = softplus(dt + bias)`.

    Args:
        dim: channels.
        heads: of the state; each has one rate `A`, one skip `D` and one step `dt` a token.
        head_dim: channels of a head, `dim / heads` by default.
        state: columns of a head's state, `head_dim` by default.
        x_heads, b_heads, c_heads: heads of the three inputs, each `heads` by default.
        conv: tokens the convolution reads.
        bias: whether the products into and out of the layer add one.
        spread_first: repeat shared heads before the convolution, which then has channels for each.
        chunk: tokens that are worked on together.
        causal: taken for the sake of the common interface; there is no other form.

    Raises:
        ValueError: `heads` does not divide `dim` and no `head_dim` is given, heads of an input do not divide `heads`,
            or `causal` is False.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        state: int | None = None,
        x_heads: int | None = None,
        b_heads: int | None = None,
        c_heads: int | None = None,
        conv: int = 4,
        bias: bool = False,
        spread_first: bool = False,
        chunk: int = 64,
        causal: bool = True,
    ) -> None:
        super().__init__(dim)
        if not causal:
            raise ValueError("causal must be True: the state of mamba2 holds what came before, got False")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        counts = [heads if n is None else n for n in (x_heads, b_heads, c_heads)]
        for name, n in zip(("x_heads", "b_heads", "c_heads"), counts, strict=True):
            if n < 1 or heads % n:
                raise ValueError(f"{name} must divide heads; got {name}={n}, heads={heads}")
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.state = state or self.head_dim
        self.counts = counts
        self.spread_first = spread_first
        self.chunk = chunk
        self.causal = causal
        inner = heads * self.head_dim
        self.in_proj = nn.Linear(dim, sum(self._rows()), bias)
        channels = sum(self._convolved())
        self.conv = nn.Conv1d(channels, channels, conv, groups=channels)
        # Steps spread evenly over the orders of magnitude, by the inverse of softplus.
        dt = torch.exp(torch.rand(heads) * math.log(STEPS[1] / STEPS[0]) + math.log(STEPS[0]))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.rate = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(inner, counts[2])
        self.proj = nn.Linear(inner, dim, bias)

    def _widths(self) -> tuple[int, int, int]:
        return self.head_dim, self.state, self.state

    def _inputs(self) -> list[int]:
        """Channels of x, b and c as they leave the first product."""
        return [n * width for n, width in zip(self.counts, self._widths(), strict=True)]

    def _convolved(self) -> list[int]:
        return [self.heads * width for width in self._widths()] if self.spread_first else self._inputs()

    def _rows(self) -> list[int]:
        """Rows of the first product: z, x, b, c, dt."""
        return [self.heads * self.head_dim, *self._inputs(), self.heads]

    def _project(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        inner, *inputs, heads = self._rows()
        z, u, dt = linear(self.in_proj, x).split((inner, sum(inputs), heads), -1)
        dt = F.softplus(dt + self.dt_bias)
        if mask is not None:
            u, dt = u * mask[..., None], dt * mask[..., None]
        if self.spread_first:
            u = torch.cat([spread(t, self.heads).flatten(-2) for t in self._split(u)], -1)
        return z, u, dt

    def _split(self, u: Tensor, *, heads: bool = False) -> list[Tensor]:
        """x, b and c, each `(*b, its heads, its width)`."""
        sizes = self._convolved() if heads else self._inputs()
        parts = zip(u.split(sizes, -1), self._widths(), strict=True)
        return [t.unflatten(-1, (-1, width)) for t, width in parts]

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        z, u, dt = self._project(x, mask)
        n, size = x.shape[1], self.conv.kernel_size[0]
        past = F.pad(u, (0, 0, size - 1, 0))
        taps = self.conv.weight[:, 0].t()
        mixed = self._bias().expand_as(u)
        for i in range(size):
            mixed = torch.addcmul(mixed, past[:, i : i + n], taps[i])
        values, b, c = self._split(F.silu(mixed), heads=True)
        y = ssd(values, dt, -self.rate.exp(), b, c, chunk=self.chunk)
        return linear(self.proj, self.norm(self._skip(y, values).flatten(-2), z))

    def _bias(self) -> Tensor:
        assert self.conv.bias is not None
        return self.conv.bias

    def _skip(self, y: Tensor, values: Tensor) -> Tensor:
        return torch.addcmul(y, spread(values, self.heads), self.skip[:, None])

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        like = {"device": device, "dtype": dtype}
        window = torch.zeros(batch, self.conv.kernel_size[0] - 1, self.conv.in_channels, **like)  # type: ignore[arg-type]
        return window, torch.zeros(batch, self.heads, self.head_dim, self.state, **like)  # type: ignore[arg-type]

    def step(
        self, x_t: Float[Tensor, "b c"], state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b c"], tuple[Tensor, Tensor]]:
        z, u, dt = self._project(x_t)
        window = torch.cat((state[0], u[:, None]), 1)
        mixed = (window * self.conv.weight[:, 0].t()).sum(1)
        values, b, c = self._split(F.silu(mixed + self._bias()), heads=True)
        y, memory = ssd_step(values, dt, -self.rate.exp(), b, c, state[1])
        y = self.norm(self._skip(y, values).flatten(-2), z)
        return linear(self.proj, y), (window[:, 1:], memory)

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def widths(self) -> dict[str, int]:
        return {"groups": math.gcd(*self.counts)}

    def importance(self, axis: str) -> Float[Tensor, " g"]:
        check_axis(self, axis)
        groups, inner = self.widths()[axis], self.heads * self.head_dim
        rows = self.in_proj.weight.detach()[inner : inner + self._inputs()[0]]
        read = self.proj.weight.detach().view(self.dim, groups, -1).norm(dim=(0, 2))
        return rows.reshape(groups, -1).norm(dim=1) * read

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        groups = self.widths()[axis]

        def chosen(widths: list[int]) -> Tensor:
            """Members of the groups `index` in parts of these widths, one behind the other."""
            starts = [sum(widths[:i]) for i in range(len(widths))]
            parts = zip(starts, widths, strict=True)
            return torch.cat([start + expand_heads(index, width // groups) for start, width in parts])

        heads, channels = chosen([self.heads]), chosen([self.heads * self.head_dim])
        slice_linear(self.in_proj, chosen(self._rows()), inputs=False)
        slice_linear(self.proj, channels, inputs=True)
        slice_depthwise(self.conv, chosen(self._convolved()))
        for name in ("dt_bias", "rate", "skip"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[heads].clone()))
        self.norm.weight = nn.Parameter(self.norm.weight.detach()[channels].clone())
        self.counts = [n // groups * len(index) for n in self.counts]
        self.heads = self.heads // groups * len(index)
        self.norm.groups = self.counts[2]
