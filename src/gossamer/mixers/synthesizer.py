"""Synthesizer: learned attention logits, by position or from the token alone, added to the dot products.

Source: Tay et al. 2021, "Synthesizer: Rethinking Self-Attention for Transformer Models"; the mixtures with dot
products (its R+V and D+V), which Long Range Arena runs.

- `random`: one learned logit for each head, query place and key place; `factorized`: their low-rank form; `dense`: two
  layers turn each token into its row of logits
- tables are bound to the longest sequence; shorter ones use their first rows and columns
- cost grows with the square of the tokens, and so do the parameters of `random`
- prunable: heads
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.mixers.base import register_mixer
from gossamer.mixers.sequence import SequenceMixer
from gossamer.ops.attention import attention


@register_mixer("synthesizer", grids=(1, 2, 3))
class Synthesizer(SequenceMixer):
    """`y = softmax(q k^T / sqrt(d) + R) v`, `R` of shape `(heads, tokens, tokens)`.

    `R` is learned (`random`), `A B` (`factorized`), or `W_2 relu(W_1 x + b_1) + b_2` (`dense`).

    Args:
        dim: channels.
        grid: size of the token grid; its tokens are the longest sequence.
        heads: attention heads.
        head_dim: channels of a head, `dim / heads` by default.
        mode: where the logits come from: `random`, `factorized` or `dense`.
        rank: inner width of the factorized logits.
        qkv_bias: whether the input products add a bias.
        out_bias: whether the output product adds one.

    Raises:
        ValueError: unknown `mode`, or `heads` does not divide `dim` and no `head_dim` is given; in use, more tokens
            than the grid has.
    """

    logits: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter
    inner_weight: nn.Parameter
    inner_bias: nn.Parameter
    row_weight: nn.Parameter
    row_bias: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, ...],
        heads: int = 8,
        head_dim: int | None = None,
        mode: str = "random",
        rank: int = 32,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias)
        self.mode, self.longest = mode, math.prod(grid)
        n, d = self.longest, self.head_dim
        shapes: dict[str, tuple[int, ...]]
        if mode == "random":
            shapes = {"logits": (n, n)}
        elif mode == "factorized":
            shapes = {"left": (n, rank), "right": (rank, n)}
        elif mode == "dense":
            shapes = {"inner_weight": (d, dim), "inner_bias": (d,), "row_weight": (n, d), "row_bias": (n,)}
        else:
            raise ValueError(f"mode must be random, factorized or dense, got {mode!r}")
        for name, shape in shapes.items():
            table = torch.zeros(heads, *shape)
            if len(shape) == 2:
                bound = (6 / sum(shape)) ** 0.5
                table.uniform_(-bound, bound)
            self.register_parameter(name, nn.Parameter(table))
        self.head_tables = tuple(shapes)

    def mix(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        mask: Bool[Tensor, "b n"] | None,
        x: Float[Tensor, "b n c"],
    ) -> Float[Tensor, "b h n e"]:
        n = x.shape[1]
        if n > self.longest:
            raise ValueError(f"synthesizer is bound to {self.longest} tokens (grid), got {n}")
        if self.mode == "random":
            bias = self.logits[:, :n, :n]
        elif self.mode == "factorized":
            bias = self.left[:, :n] @ self.right[:, :, :n]
        else:
            hidden = (x[:, None] @ self.inner_weight.mT + self.inner_bias[:, None]).relu()
            bias = hidden @ self.row_weight[:, :n].mT + self.row_bias[:, None, :n]
        return attention(q, k, v, bias=bias, mask=None if mask is None else mask[:, None, None])
