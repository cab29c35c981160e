"""UniFormer's light form: most blocks of the global stages attend to half of their tokens, the others are spoken for.

Source: Li et al. 2023, "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (its hourglass
form); the rule of the tokens is that of Xu et al. 2022, "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision
Transformer".

- a class token runs through the global stages; what it attends to, averaged over heads and followed from block to
  block, is the score of each place
- the places of highest score and one token that stands for all others, their mean weighted by score, go through the
  block; what it adds to that one token is added to each place it stood for, so no place is lost
- the first global block attends to all places: there is no score yet
- merging halves the map of scores by means, their sum kept
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Mlp
from gossamer.layers.linear import linear
from gossamer.layers.positions import ConvPositions
from gossamer.mixers.attention import Attention
from gossamer.ops.attention import attention, join_heads
from gossamer.ops.tokens import take

FOLLOW = 0.5
"""How far a score moves to what the class token attends to in a block."""


class LightBlock(Block):
    """`x = x + D x`; then attention and MLP on `[t; places of highest score; one for the rest]`.

    The one for the rest is `r = sum_j s_j x_j / sum_j s_j`. The rest take what it was given, `x_j = x_j + u_r + w_r`, u
    of the attention and w of the MLP. Scores become `(s + a) / 2`, a the class token's attention to the place.

    Args:
        keep: share of the places that go through.
    """

    mixer: Attention

    def __init__(self, dim: int, mixer: Attention, mlp: Mlp, *, keep: float, **options: Any) -> None:
        super().__init__(dim, mixer, mlp, **options)
        self.positions = ConvPositions(dim)
        self.keep = keep

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b h w c"], token: Float[Tensor, "b 1 c"], score: Float[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b 1 c"], Float[Tensor, "b n"]]:
        x = self.positions(x)
        places = x.flatten(1, 2)
        if score is None:
            y, seen, _ = self._through(torch.cat((token, places), 1))
            return y[:, 1:].view(x.shape), y[:, :1], seen[:, 1:]
        kept = int(places.shape[1] * self.keep)
        order = score.argsort(1, descending=True)
        places, score = take(places, order), score.gather(1, order)
        rest, share = places[:, kept:], score[:, kept:]
        mean = (share / share.sum(1, keepdim=True))[:, None] @ rest
        y, seen, given = self._through(torch.cat((token, places[:, :kept], mean), 1))
        places = torch.cat((y[:, 1:-1], rest + given[:, -1:]), 1)
        score = torch.cat((torch.lerp(score[:, :kept], seen[:, 1:-1], FOLLOW), share), 1)
        back = order.argsort(1)
        return take(places, back).view(x.shape), y[:, :1], score.gather(1, back)

    def _through(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens behind both branches, what the first of them attends to, and what was added to each."""
        q, k, v = self.mixer.project(self.norm1(x))
        seen = (q[:, :, :1] @ k.transpose(-2, -1) * self.mixer.head_dim**-0.5).softmax(-1).mean(1)[:, 0]
        u = linear(self.mixer.proj, join_heads(attention(q, k, v)))
        x = self._add(x, u, None)
        w = self.mlp(self.norm2(x))
        return self._add(x, w, None), seen, u + w


def in_turn(
    blocks: nn.Sequential, x: Tensor, token: Tensor, score: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The map, the class token and the scores behind a run of blocks."""
    for block in blocks:
        x, token, score = block(x, token, score)
    return x, token, score


def halved(score: Float[Tensor, "b n"], grid: tuple[int, int], *, ceil: bool) -> Float[Tensor, "b m"]:
    """The scores of a map of half the sides: means of 2x2, of the same sum. Odd sides are rounded up with `ceil`."""
    small = F.avg_pool2d(score.unflatten(1, (1, *grid)), 2, ceil_mode=ceil).flatten(1)
    return small * (score.sum(1, keepdim=True) / small.sum(1, keepdim=True))


class ClassToken(nn.Module):
    """The class token, its way into wider stages, and its own classifier, which learns along in training.

    Args:
        dims: channels of the global stages.
        num_classes: 0 for no classifier.
    """

    def __init__(self, dims: list[int], num_classes: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, dims[0]))
        self.widen = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.norm = nn.LayerNorm(dims[-1]) if num_classes else None
        self.fc = nn.Linear(dims[-1], num_classes) if num_classes else None

    def forward(self, token: Float[Tensor, "b 1 c"]) -> Float[Tensor, "b k"]:
        """The scores of the classes by the token alone."""
        assert self.norm is not None
        assert self.fc is not None
        return self.fc(self.norm(token[:, 0]))
