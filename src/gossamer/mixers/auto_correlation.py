"""Auto-Correlation: a series reads copies of itself, delayed by the periods at which it resembles itself most.

Source: Wu et al. 2021, "Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting",
section 3.2, equations 5-7.

- delays are scored by circular correlation of queries and keys, meaned over heads and channels; the best
  `int(factor * ln n)` are read
- in training the delays are shared by the batch (those of its mean score) while each sample has its own weights; in
  eval mode each sample has its own delays
- as scores are meaned over channels, heads are only the units of pruning
- with a context, keys and values are cut to n steps, or continued by zeros
- prunable: heads
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.heads import HeadMixer
from gossamer.ops.series import aggregate_delays, delay_scores


@register_mixer("auto_correlation", grids=(1,))
class AutoCorrelation(HeadMixer):
    """`y_t = W_o sum_i w_i v_(t + tau_i mod n)`, `w = softmax_i(R(tau_i))`, `R(tau) = mean_c sum_t q_t k_(t - tau)`.

    Args:
        dim: channels.
        heads: groups of channels.
        factor: delays in units of `ln n`, rounded down.
        drop: dropout after the output product.

    Raises:
        ValueError: `heads` does not divide `dim`; in the forward pass, `int(factor * ln n)` is not in 1..n.
    """

    def __init__(self, dim: int, *, heads: int = 8, factor: float = 1, drop: float = 0.0) -> None:
        super().__init__(dim, heads)
        self.factor = factor
        self.drop = nn.Dropout(drop) if drop else None

    def delays(self, n: int) -> int:
        """How many delays a series of `n` steps reads.

        Raises:
            ValueError: it is not in 1..n.
        """
        count = int(self.factor * math.log(n))
        if not 1 <= count <= n:
            raise ValueError(f"int(factor * ln n) must be in 1..n; factor={self.factor}, n={n} give {count}")
        return count

    def forward(
        self, x: Float[Tensor, "b n c"], *, context: Float[Tensor, "b m c"] | None = None
    ) -> Float[Tensor, "b n c"]:
        n = x.shape[1]
        count = self.delays(n)
        q, k, v = self.qkv(x).chunk(3, -1) if context is None else self._cross(x, context)
        # a correlation is a sum over all steps: half precision would blur which delay is best
        scores = delay_scores(_wide(q), _wide(k))
        y = self.proj(aggregate_delays(v, scores, count, shared=self.training))
        return y if self.drop is None else self.drop(y)

    def _cross(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[1]
        inner = self.heads * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[:inner], bias[:inner])
        kv = F.linear(context[:, :n], weight[inner:], bias[inner:])
        if context.shape[1] < n:
            kv = F.pad(kv, (0, 0, 0, n - context.shape[1]))
        k, v = kv.chunk(2, -1)
        return q, k, v


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x
