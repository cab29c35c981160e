"""p-MoD: in most layers only the tokens that a router weighs most are worked on, fewer of them the deeper the layer.

Source: Zhang et al. 2024, "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay". The block is
`gossamer.layers.depth`.

`R(l) = cos(pi l / (L - 1)) / 2 + rho`; layers with `R > 0.85` stay as they are, the others work on the share
`max(R, 0.15)` of their tokens. The paper's `rho = 0.5` leaves 0.5375 of 32 layers; here `rho` is solved for `keep`.

- nobody leaves the sequence: tokens that one layer passes by are there for the next, so every position keeps an answer
  and language models can be shrunk too
- the paper routes the vision tokens of a prompt and lets text through. Our models have one kind: all real tokens but
  the class token are routed; a model with both gives its blocks `targets`
- the authors' schedule divides by 31 whatever the depth (`official=True` of `ratios`); the card's, and ours, by L - 1
- ranking is by logits, not by the tanh of them, which only differs where the tanh has saturated
- a layer that gives numbers that are not finite stops the authors' code; here the trainer stops (`Diverged`)
- trained on the task with the dense model for a teacher (the paper: the task alone, one epoch)
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from gossamer.layers.depth import DepthBlock
from gossamer.shrink.base import Calibration, Step, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.sequences import sequence_of, wrap

Decay = Literal["cosine", "linear", "fixed", "interleaved"]
MOST, LEAST = 0.85, 0.15
MIXERS = ("attention", "gqa", "rotary_gqa")


@register_pass("p_mod", family="token reduction", paper="p-mod", saves=("macs",), default={"keep": 0.55})
def p_mod(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.55,
    decay: Decay = "cosine",
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Works on the share `keep` of the tokens in the mean of all layers, on fewer the deeper the layer.

    Args:
        decay: how the share falls with depth; `fixed` and `interleaved` (every second layer) are the paper's baselines.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: the model is not one sequence of tokens with attention.
        ValueError: `keep` is not in (0, 1], no such decay, or negative `steps`.
    """
    began = time.perf_counter()
    check_share("keep", keep)
    check_steps(steps)
    if decay not in get_args(Decay):
        raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}; got {decay!r}")
    found = sequence_of(model, calibration, "p_mod", causal=True, mixers=MIXERS)
    shares = solve(len(found.blocks), keep, decay)
    if all(share == 1 for share in shares):
        return []
    teacher = copy.deepcopy(model).eval()
    step: Step = {"step": "p_mod", "keep": shares, "protect": found.protect}
    apply(model, step)
    recover(model, calibration, steps=steps, lr=lr, began=began, teacher=teacher)
    return [step]


@register_step("p_mod")
def _route(model: Any, step: Step) -> None:
    if len(step["keep"]) != len(model.blocks):
        raise ValueError(
            f"keep must have one share for each of the {len(model.blocks)} blocks, got {len(step['keep'])}"
        )
    for i, share in enumerate(step["keep"]):
        if share < 1:
            wrap(model, i, partial(DepthBlock, keep=share, protect=step["protect"]))


def ratios(
    depth: int, rho: float = 0.5, decay: Decay = "cosine", *, least: float = LEAST, official: bool = False
) -> list[float]:
    """The share of the tokens each layer works on, 1 for layers that stay as they are.

    Args:
        rho: about the mean share over all layers.
        least: the smallest share.
        official: divide by 31 whatever the depth, as the authors' code does.
    """
    if decay == "fixed":
        return [rho] * depth
    if decay == "interleaved":
        return [rho if i % 2 else 1.0 for i in range(depth)]
    shares = []
    for i in range(depth):
        place = i / (31 if official else max(depth - 1, 1))
        share = (math.cos(math.pi * place) / 2 if decay == "cosine" else 0.5 - place) + rho
        shares.append(1.0 if share > MOST else max(share, least))
    return shares


def solve(depth: int, keep: float, decay: Decay = "cosine") -> list[float]:
    """The shares of the layers whose mean is `keep`, or the next below it that the schedule has."""
    if keep == 1:
        return [1.0] * depth
    least = min(LEAST, keep)
    low, high = -1.0, 1.5
    for _ in range(60):
        middle = (low + high) / 2
        if sum(ratios(depth, middle, decay, least=least)) <= keep * depth + 1e-9:
            low = middle
        else:
            high = middle
    return [min(1.0, max(round(share, 6), least)) for share in ratios(depth, low, decay, least=least)]
