"""Token merging: in every block, the tokens most like another one go into it. Needs no training.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (ToMe), sections 3.1 to 3.4.

- between attention and MLP; alike are tokens whose keys, averaged over heads, point the same way
- even positions are matched to odd ones, and the best pairs merge into the mean of all the tokens they stand for
- attention adds `log s` to the logits of a token of size s, and heads that pool weigh by size, so that copies of a
  token may merge without any change of the answer
- `constant`: as many tokens go in each block (the first ones take the remainder); `decreasing`: linearly fewer, none
  in the last. The number is solved for the share of MACs
- text: padding goes first and is nobody's partner, so a text that leaves enough padding keeps all its words; a batch
  of another length loses the same share of its tokens
- the authors' code leaves tokens in order of similarity where there is no class token; here they keep theirs
- not for causal models, where a merged token would carry later words to earlier ones, nor for maps (pyramids,
  windows), where neighbours are read by place
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from gossamer.layers.reduce import MergingBlock
from gossamer.measure import macs
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.sequences import needs_sizes, sequence_of

SCHEDULES = ("constant", "decreasing")


@register_pass("merging", family="token reduction", saves=("macs",), default={"keep": 0.7})
def merging(model: nn.Module, calibration: Calibration, *, keep: float = 0.7, schedule: str = "constant") -> list[Step]:
    """Merges tokens that are alike, until the share `keep` of the blocks' MACs is left.

    Raises:
        Unsupported: the model has no sequence of tokens that may be merged, or too few of them.
        ValueError: `keep` is not in (0, 1], or no such schedule.
    """
    check_share("keep", keep)
    check_schedule(schedule)
    found = mergeable(model, calibration)
    if keep == 1:
        return []
    r = removals(found, keep, schedule)
    step: Step = {"step": "merging", "r": r, "tokens": found.tokens, "protect": found.protect}
    apply(model, step)
    return [step]


def check_schedule(schedule: str) -> None:
    """Raises a ValueError where there is no such schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, got {schedule!r}")


@register_step("merging")
def _merge(model: nn.Module, step: Step) -> None:
    wrap_blocks(model, step, MergingBlock)


def wrap_blocks(model: Any, step: Step, make: Callable[..., nn.Module]) -> None:
    """Puts `make(block, r, tokens=, protect=)` around each block of `model`; a block merges half of its tokens at most.

    Args:
        step: `r` (tokens to merge, one number a block), `tokens` (that come into the first block) and `protect`.

    Raises:
        ValueError: `r` has not one number for each block.
    """
    tokens, protect = step["tokens"], step["protect"]
    if len(step["r"]) != len(model.blocks):
        raise ValueError(f"r must have one number for each of the {len(model.blocks)} blocks, got {len(step['r'])}")
    for i, wanted in enumerate(step["r"]):
        r = max(0, min(wanted, (tokens - protect) // 2))
        model.blocks[i] = make(model.blocks[i], r, tokens=tokens, protect=protect)
        tokens -= r


class Mergeable(NamedTuple):
    """What a schedule is solved from.

    Args:
        tokens: that come into the first block, of which `protect` in front must stay.
        costs: of each block: MACs a token of the mixer, MACs a pair of tokens, MACs a token of the MLP, and width of
            the keys, on which tokens are compared.
    """

    tokens: int
    protect: int
    costs: list[tuple[float, float, float, int]]


def mergeable(model: Any, calibration: Calibration, what: str = "merging") -> Mergeable:
    """Tokens and costs of `model` for the user's data.

    Args:
        what: the pass, for the message.

    Raises:
        Unsupported: tokens cannot be merged in this model; the message names the module and the reason.
    """
    found = sequence_of(model, calibration, what)
    if not needs_sizes(model):
        raise Unsupported(f"{what}: head ({type(model.head).__name__}) does not weigh merged tokens by their sizes")
    # Blocks of the same shapes cost the same: one count does for all of them.
    kinds = [
        (block.mixer.head_dim, *((name, p.shape) for name, p in block.named_parameters())) for block in found.blocks
    ]
    costs = {kind: _costs(block, found.tokens) for kind, block in dict(zip(kinds, found.blocks, strict=True)).items()}
    return Mergeable(found.tokens, found.protect, [costs[kind] for kind in kinds])


def removals(found: Mergeable, keep: float, schedule: str = "constant") -> list[int]:
    """Tokens to merge in each block, the fewest with which the share `keep` of the blocks' MACs is left.

    Raises:
        Unsupported: not even merging all that can be leaves so little.
    """
    depth = len(found.costs)
    whole = total_macs(found, [0] * depth)
    least = 1.0
    for total in range(1, depth * found.tokens):
        r = _plan(found, total, schedule)
        share = total_macs(found, r) / whole
        least = min(least, share)
        if share <= keep:
            return r
    raise Unsupported(
        f"merging cannot leave the share {keep:g} of the MACs: with {found.tokens} tokens, {found.protect} of them "
        f"protected, in {depth} blocks the {schedule} schedule leaves {least:.2f} at least"
    )


def total_macs(found: Mergeable, r: Sequence[int]) -> float:
    """MACs of all blocks on one sample when block i merges `r[i]` tokens."""
    n, total = found.tokens, 0.0
    for (token, pair, mlp, width), gone in zip(found.costs, r, strict=True):
        compared = width * ((n + 1) // 2) * (n // 2) if gone else 0
        total += n * (token + n * pair) + compared + (n - gone) * mlp
        n -= gone
    return total


def _plan(found: Mergeable, total: int, schedule: str) -> list[int]:
    """`total` tokens spread over the blocks, as far as each can merge them."""
    depth = len(found.costs)
    if schedule == "constant":
        wanted = [total // depth + (i < total % depth) for i in range(depth)]
    else:
        weights = [depth - 1 - i for i in range(depth)] if depth > 1 else [1]
        marks = [0, *(round(total * w / sum(weights)) for w in accumulate(weights))]
        wanted = [after - before for before, after in pairwise(marks)]
    r, n = [], found.tokens
    for count in wanted:
        r.append(max(0, min(count, (n - found.protect) // 2)))
        n -= r[-1]
    return r


def _costs(block: Any, tokens: int) -> tuple[float, float, float, int]:
    def count(part: nn.Module, n: int) -> int:
        return macs(part, torch.empty(1, n, block.mixer.dim, device="meta")).total

    mixer, mlp = (copy.deepcopy(part).to("meta") for part in (block.mixer, block.mlp))
    # Attention costs a n + b n^2: two counts give both.
    one, two = count(mixer, tokens), count(mixer, 2 * tokens)
    pair = (two - 2 * one) / (2 * tokens**2)
    return one / tokens - tokens * pair, pair, count(mlp, tokens) / tokens, block.mixer.head_dim
