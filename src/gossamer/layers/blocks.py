"""The residual block: a token mixer, a channel MLP, and how they are added to the stream.

- `pre`:    `x = x + s1 * mixer(norm1(x))`, `x = x + s2 * mlp(norm2(x))`           (ViT, Swin, MetaFormer)
- `post`:   `x = norm1(x + s1 * mixer(x))`, `x = norm2(x + s2 * mlp(x))`           (Vaswani et al. 2017)
- `stream`: `x = norm2(x + s1 * mixer(norm1(x)))`, `x = x + s2 * mlp(x)`           (Compact Transformers)
- `single`: `x = x + s1 * mlp(norm1(mixer(x)))`                                    (ConvNeXt)

`s1`, `s2` are LayerScale vectors (Touvron et al. 2021) or absent; either sum may drop its branch for a sample
(stochastic depth, Huang et al. 2016). `norm=None` leaves the norms out.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Residual = Literal["pre", "post", "stream", "single"]


class DropPath(nn.Module):
    """Drops a whole residual branch for each sample with probability `rate`, and scales the others to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if not self.training or not self.rate:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Block(nn.Module):
    """One residual block; see the head of this file for the four residual styles.

    Args:
        dim: channels.
        mixer: token mixer on `(b, *grid, dim)`.
        mlp: channel mixer, or None for a block of one residual branch.
        norm: factory of a norm over `dim` channels, or None.
        residual: the style.
        layer_scale: initial value of the per-channel scales, None for no scales.
        drop_path: probability of dropping a branch for a sample.
    """

    mixer: Any
    mlp: Any
    norm2: Any

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module | None,
        *,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        residual: Residual = "pre",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if residual not in ("pre", "post", "stream", "single"):
            raise ValueError(f"residual must be pre, post, stream or single, got {residual!r}")
        two = mlp is not None and residual != "single"
        self.residual = residual
        self.norm1 = norm(dim) if norm else nn.Identity()
        self.mixer = mixer
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.norm2 = (norm(dim) if norm else nn.Identity()) if two else None
        self.mlp = mlp
        self.scale2 = None if layer_scale is None or not two else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path else None

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m e"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        given = {k: v for k, v in (("mask", mask), ("context", context)) if v is not None}
        if self.residual == "pre":
            x = self._add(x, self.mixer(self.norm1(x), **given), self.scale1)
            return x if self.norm2 is None else self._add(x, self.mlp(self.norm2(x)), self.scale2)
        if self.residual == "post":
            x = self.norm1(self._add(x, self.mixer(x, **given), self.scale1))
            return x if self.norm2 is None else self.norm2(self._add(x, self.mlp(x), self.scale2))
        if self.residual == "stream":
            x = self.norm2(self._add(x, self.mixer(self.norm1(x), **given), self.scale1))
            return self._add(x, self.mlp(x), self.scale2)
        return self._add(x, self.mlp(self.norm1(self.mixer(x, **given))), self.scale1)

    def _add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        if self.drop_path is not None:
            branch = self.drop_path(branch if scale is None else branch * scale)
            return x + branch
        return x + branch if scale is None else torch.addcmul(x, branch, scale)

    def initial_state(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        """The mixer's empty decoding state."""
        return self.mixer.initial_state(batch, device, dtype)

    def step(self, x_t: Float[Tensor, "b c"], state):
        """One position: equal to the full pass at that position when the mixer is causal and norms are per token."""
        x = x_t[:, None]
        if self.residual in ("pre", "stream"):
            y, state = self.mixer.step(self.norm1(x)[:, 0], state)
        else:
            y, state = self.mixer.step(x_t, state)
        y = y[:, None]
        if self.residual == "pre":
            x = self._add(x, y, self.scale1)
            x = x if self.norm2 is None else self._add(x, self.mlp(self.norm2(x)), self.scale2)
        elif self.residual == "post":
            x = self.norm1(self._add(x, y, self.scale1))
            x = x if self.norm2 is None else self.norm2(self._add(x, self.mlp(x), self.scale2))
        elif self.residual == "stream":
            x = self.norm2(self._add(x, y, self.scale1))
            x = self._add(x, self.mlp(x), self.scale2)
        else:
            x = self._add(x, self.mlp(self.norm1(y)), self.scale1)
        return x[:, 0], state


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The usual linear rule: 0 for the first of `depth` blocks, `rate` for the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
