"""ProbSparse attention: only the few queries with the most peaked scores attend, the others take the mean value.

Source: Zhou et al. 2020, "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
section 3.2, equations 2-4 and algorithm 1.

- how peaked a query is, is judged on `factor * ceil(ln n)` keys drawn at random, one table for batch and heads
- `factor * ceil(ln n)` queries are kept for each sample and head, all of them in short sequences
- kept queries and scores cost O(n ln n); the kept ones are chosen without gradient
- the official code divides the sampled sum by all n keys, the paper by the sampled ones (`measure="mean"`)
- with `causal=True` the choice of queries itself looks at later tokens, so there is no decoding step by step
- `sampling="fixed"` keeps one seeded table, so that two passes agree and the network can be exported; it has no
  parameters, so weights trained with the other sampling fit
- prunable: heads
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.attention import attention, causal_mask, join_heads

# Up to this many tokens all scores in one product are cheaper than reading the sampled keys one by one.
DENSE_TOKENS = 1024
# Sampled keys are gathered for as many queries at once as make about this many numbers.
GATHERED = 2**24


@register_mixer("prob_sparse", grids=(1, 2, 3))
class ProbSparse(HeadMixer):
    """`y_i = softmax(q_i K^T / sqrt(d)) V` for the kept queries, `mean(V)` (causal: `sum_(j <= i) v_j`) for the others.

    Kept are the queries of largest `max_s(q_i . k_s) - sum_s(q_i . k_s) / n` over sampled keys s.

    Args:
        dim: channels.
        heads: attention heads.
        factor: sampled keys and kept queries in units of `ceil(ln n)`; None keeps every query: full attention.
        causal: attend only to earlier tokens and to itself.
        mix: join heads as the official decoder does, by reading `(heads, n, d)` as `(n, heads * d)`.
        measure: divisor of the sum, `official`: n, `mean`: the number of sampled keys.
        sampling: `random` draws the table at every pass, `fixed` once (needs `grid`).
        attn_drop: dropout on the weights of full attention; the sparse form has none.
        drop: dropout after the output product.
        grid: size of the token grid.

    Raises:
        ValueError: `heads` does not divide `dim`, `factor` is below 1, or `sampling` is fixed and `grid` is missing.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        factor: int | None = 5,
        causal: bool = False,
        mix: bool = False,
        measure: Literal["official", "mean"] = "official",
        sampling: Literal["random", "fixed"] = "random",
        attn_drop: float = 0.0,
        drop: float = 0.0,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(dim, heads)
        if factor is not None and factor < 1:
            raise ValueError(f"factor must be at least 1 or None, got {factor}")
        if measure not in ("official", "mean"):
            raise ValueError(f"measure must be official or mean, got {measure!r}")
        if sampling not in ("random", "fixed"):
            raise ValueError(f"sampling must be random or fixed, got {sampling!r}")
        if sampling == "fixed" and grid is None:
            raise ValueError("sampling='fixed' is bound to a token grid; give grid=(…)")
        self.factor = factor
        self.causal = causal
        self.mix = mix
        self.measure = measure
        self.attn_drop = attn_drop
        self.drop = nn.Dropout(drop) if drop else None
        self.table: Tensor | None
        self.register_buffer("table", None, persistent=False)
        if sampling == "fixed" and grid is not None:
            n = math.prod(grid)
            table = torch.randint(n, (n, self.kept(n)), generator=torch.Generator().manual_seed(0), device="cpu")
            self.table = table.to(torch.get_default_device())

    def kept(self, n: int) -> int:
        """How many of `n` queries attend; as many keys are sampled."""
        return n if self.factor is None else min(self.factor * max(math.ceil(math.log(n)), 1), n)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        tokens = x.flatten(1, -2)
        q, k, v = self.project(tokens)
        n = tokens.shape[1]
        if self.kept(n) == n:
            drop = self.attn_drop if self.training else 0.0
            y = attention(q, k, v, causal=self.causal, dropout=drop)
            y = y.reshape(tokens.shape) if self.mix else join_heads(y)
        else:
            y = self._sparse(q, k, v)
        y = self.proj(y)
        return (y if self.drop is None else self.drop(y)).view(x.shape)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`(b, n, h * d)`."""
        n = q.shape[2]
        index = self._peaked(q, k)
        rows = index[..., None].expand(-1, -1, -1, q.shape[-1])
        bias = None
        if self.causal:
            later = torch.arange(n, device=q.device) > index[..., None]
            bias = torch.where(later, float("-inf"), q.new_zeros(()))
        y = attention(q.gather(2, rows), k, v, bias=bias)
        if self.causal:
            # one product with a triangle of ones is the running sum, and its backward too
            others = causal_mask(n, n, v.device).to(v.dtype) @ v
        else:
            others = v.mean(2, keepdim=True).expand_as(v)
        if self.mix:
            return others.scatter(2, rows, y.to(others.dtype)).reshape(-1, n, self.heads * self.head_dim)
        others = others.transpose(1, 2)
        return others.scatter(1, rows.transpose(1, 2), y.to(others.dtype).transpose(1, 2)).flatten(2)

    @torch.no_grad()
    def _peaked(self, q: Tensor, k: Tensor) -> Int[Tensor, "b h u"]:
        n = q.shape[2]
        count = self.kept(n)
        table = self.table if self.table is not None else torch.randint(n, (n, count)).to(q.device)
        if len(table) != n:
            raise ValueError(f"the sampled keys are fixed for {len(table)} tokens; got {n}")
        scores = sampled_scores(q, k, table)
        peak = scores.amax(-1) - scores.sum(-1) / (n if self.measure == "official" else count)
        return peak.topk(count, sorted=False).indices


def sampled_scores(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], table: Int[Tensor, "n s"]
) -> Float[Tensor, "b h n s"]:
    """`S_is = q_i . k_table(i, s)`."""
    h, n = q.shape[1:3]
    if n <= DENSE_TOKENS:
        flat = (torch.arange(n, device=q.device)[:, None] * n + table).flatten()
        scores = (q @ k.transpose(-2, -1)).flatten(2).flatten(0, 1).index_select(1, flat)
        return scores.unflatten(1, (n, -1)).unflatten(0, (-1, h))
    step = max(1, GATHERED // (k[..., 0, :].numel() * table.shape[1]))
    parts = []
    for first in range(0, n, step):
        some = table[first : first + step]
        near = k[:, :, some.flatten()].unflatten(2, some.shape)
        parts.append((near @ q[:, :, first : first + step, :, None])[..., 0])
    return torch.cat(parts, 2)
