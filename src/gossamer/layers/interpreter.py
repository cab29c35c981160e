"""Interpreters: small judges of which tokens matter, who learn by trial (REINFORCE) what may go.

Source: Pan et al. 2021, "IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision Transformers". A
reconstruction: no code is public; the dot product with a policy token, the scale and the bound on exploration are from
memory of the paper and its kin.

- before a block, tokens leave for good: by `threshold` as many as are found wanting (masked), or by `share` always
  the same number (gathered), which is what exports
- if all would leave, the best one stays
- `policy_loss` is the self-critical one: what a sampled action earns more than the greedy one
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.class_attention import keep_best
from gossamer.layers.ranking import share_up
from gossamer.layers.reduce import ReducingBlock, Tokens


class Interpreter(nn.Module):
    """`I_i = mean_h sigmoid(q_ih . p_h / sqrt(d))`, `q_i = F_q(x_i)`, `p = F_k(policy token)`: keep token i?

    Args:
        dim: channels; `heads` must divide them.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim; got heads={heads}, dim={dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.policy = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.02))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        p = self.k(self.policy).view(self.heads, -1)
        return ((q * p).sum(-1) * p.shape[-1] ** -0.5).sigmoid().mean(-1)


class InterpretedBlock(ReducingBlock):
    """A block before which its interpreter drops tokens.

    Args:
        block: the block whose work is done.
        interpreter: scores the tokens behind the first `protect`.
        share: of the tokens that stay, rounded up; None: those that score at least `threshold`. While an `action` is
            set, `(b, n)` of the tokens that stay, it is done instead.

    Raises:
        ValueError: `share` is not in (0, 1].
    """

    def __init__(
        self,
        block: Block,
        interpreter: Interpreter,
        *,
        share: float | None = None,
        threshold: float = 0.5,
        protect: int = 1,
    ) -> None:
        super().__init__(block, protect=protect)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        self.interpreter = interpreter
        self.share = share
        self.threshold = threshold
        self.action: Tensor | None = None

    def before(self, tokens: Tokens) -> Tokens:
        x, mask, _ = tokens
        patches = x[:, self.protect :]
        real = None if mask is None else mask[:, self.protect :]
        if self.action is not None:
            return self._masked(tokens, self.action)
        if self.share == 1:
            return tokens
        scores = self.interpreter(patches)
        if self.share is not None:
            return keep_best(tokens, scores, self.protect, share_up(self.share))
        return self._masked(tokens, choose(scores, self.threshold, real))

    def _masked(self, tokens: Tokens, stays: Tensor) -> Tokens:
        x, mask, sizes = tokens
        front = stays.new_ones(len(x), self.protect) if mask is None else mask[:, : self.protect]
        return Tokens(x, torch.cat((front, stays), 1), sizes)

    def extra_repr(self) -> str:
        how = f"threshold={self.threshold:g}" if self.share is None else f"share={self.share:g}"
        return f"{how}, protect={self.protect}"


def choose(
    scores: Float[Tensor, "b n"], threshold: float, real: Bool[Tensor, "b n"] | None = None
) -> Bool[Tensor, "b n"]:
    """The tokens that score at least `threshold`, or the best one where none does."""
    if real is not None:
        scores = scores.masked_fill(~real, -1.0)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), True)
    kept = (scores >= threshold) | best
    return kept if real is None else kept & real


def bounded(scores: Float[Tensor, "b n"], alpha: float = 0.8) -> Float[Tensor, "b n"]:
    """`alpha I + (1 - alpha)(1 - I)`: a chance for every token to stay, and to go."""
    return alpha * scores + (1 - alpha) * (1 - scores)


def reward(
    stays: Bool[Tensor, "b n"],
    right: Bool[Tensor, " b"],
    *,
    real: Bool[Tensor, "b n"] | None = None,
    tau: float = 0.5,
) -> Float[Tensor, " b"]:
    """`1 - (kept / all)^2` where the answer is right, `-tau` where it is not."""
    everything = stays.shape[1] if real is None else real.sum(1).clamp(min=1)
    return torch.where(right, 1 - (stays.sum(1) / everything) ** 2, -tau)


def policy_loss(
    chances: Float[Tensor, "b n"],
    stays: Bool[Tensor, "b n"],
    advantage: Float[Tensor, " b"],
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """`-A sum_i log P(u_i)`, the mean over samples; its gradient is that of minus the expected reward.

    Args:
        chances: of each token to stay, those the action `stays` was drawn from.
        advantage: reward of the action less that of the greedy one.
    """
    log = torch.where(stays, chances, 1 - chances).clamp(min=1e-6).log()
    if real is not None:
        log = log * real
    return -(advantage * log.sum(1)).mean()


def heat_map(
    scores: Float[Tensor, "b n"], grid: tuple[int, int], size: tuple[int, int] | None = None
) -> Float[Tensor, "b _h _w"]:
    """Scores as a map of the grid, or of an image of `size` (bilinear).

    Raises:
        ValueError: there is not one score for each place of the grid.
    """
    if scores.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"a {grid[0]}x{grid[1]} map needs {grid[0] * grid[1]} scores, got {scores.shape[1]}")
    map_ = scores.unflatten(1, grid)
    if size is None:
        return map_
    return nn.functional.interpolate(map_[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def interpreted(model: Any) -> list[InterpretedBlock]:
    """The blocks of `model` that have an interpreter."""
    return [block for block in model.blocks if isinstance(block, InterpretedBlock)]
