"""Small parts that are trained in place of the model they are put into: parameter-efficient fine-tuning.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", and Pfeiffer et al. 2020, "AdapterFusion"
(adapters); Hu et al. 2021, "LoRA"; Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".

- a new part changes nothing: what it adds starts at zero (prompts excepted, which no token can be)
- LoRA is folded into the weight it stands beside, exactly; adapters and prompts stay in the model
- prefixes, learned keys and values, are a mixer: `gossamer.mixers.prefix`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn


class Adapted(nn.Module):
    """`y = z + W_up act(W_down z)`, `z = inner(x)`: a bottleneck behind a part.

    Args:
        inner: the part.
        dim: channels of what it gives.
        width: channels of the bottleneck.
        act: activation factory.
    """

    def __init__(self, inner: nn.Module, dim: int, width: int, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.inner = inner
        self.down = nn.Linear(dim, width)
        self.act = act()
        self.up = nn.Linear(width, dim)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        z = self.inner(x)
        return z + self.up(self.act(self.down(z)))


class LoraLinear(nn.Linear):
    """`y = W x + b + (alpha / rank) B drop(A x)`, with an A and a B for each chosen run of output rows.

    Args:
        linear: the layer it takes the place of; its weight and bias are shared, not copied.
        rank: rows of each A.
        alpha: weight of the sum, in ranks.
        rows: `(first, last)` of the output rows that are adapted, all by default.
        drop: dropout probability before A.

    Raises:
        ValueError: `rank` below 1, or rows that the layer does not have.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        rows: Sequence[tuple[int, int]] | None = None,
        drop: float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows = [(0, self.out_features)] if rows is None else [(int(i), int(j)) for i, j in rows]
        ends = [end for run in self.rows for end in run]
        if not ends or ends != sorted(ends) or ends[0] < 0 or ends[-1] > self.out_features:
            raise ValueError(f"rows must be rising runs within 0..{self.out_features}, got {self.rows}")
        self.scale = alpha / rank
        bound = self.in_features**-0.5
        # Made of the weight, so that device and type are its own.
        self.a = nn.Parameter(linear.weight.new_empty(len(self.rows), rank, self.in_features).uniform_(-bound, bound))
        self.b = nn.ParameterList(linear.weight.new_zeros(j - i, rank) for i, j in self.rows)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = F.linear(x, self.weight, self.bias)
        low = F.linear(self.drop(x), self.a.flatten(0, 1)).unflatten(-1, self.a.shape[:2])
        for k, ((i, j), b) in enumerate(zip(self.rows, self.b, strict=True)):
            y = y + F.pad(self.scale * F.linear(low[..., k, :], b), (i, self.out_features - j))
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same answers: `W + (alpha / rank) B A`."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight.detach().clone()
        for (i, j), a, b in zip(self.rows, self.a, self.b, strict=True):
            weight[i:j] += self.scale * b @ a
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


class PromptStem(nn.Module):
    """Learned tokens in front of those that a stem gives; every token may read them.

    Args:
        inner: input to `(tokens (b, n, dim), mask or None)`.
        count: learned tokens.
    """

    def __init__(self, inner: nn.Module, dim: int, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.inner = inner
        self.prompts = nn.Parameter(0.02 * torch.randn(1, count, dim))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)  # what a stem says of itself (grid, pad_id, …)

    def forward(self, x: Shaped[Tensor, "b ..."]) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None]:
        tokens, mask = self.inner(x)
        tokens = torch.cat((self.prompts.expand(tokens.shape[0], -1, -1), tokens), 1)
        if mask is not None:
            mask = torch.cat((torch.ones_like(mask[:, :1]).expand(-1, self.prompts.shape[1]), mask), 1)
        return tokens, mask


class PromptHead(nn.Module):
    """`inner(tokens, mask)` without the first `count` tokens, so that a head finds its tokens where they were."""

    def __init__(self, inner: nn.Module, count: int) -> None:
        super().__init__()
        self.inner = inner
        self.count = count

    def forward(
        self, x: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b ..."] | tuple[Float[Tensor, "b ..."], ...]:
        return self.inner(x[:, self.count :], None if mask is None else mask[:, self.count :])
