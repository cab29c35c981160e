"""Every way of token reduction on one task, at equal MACs, after equally many steps of training.

Source: Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models" (a position paper with a
list of some 500 others; it reports no figures of its own), arXiv 2505.18227.

- its demand on software: one interface, so that every method runs under one benchmark, beside no reduction and beside
  a random one at the same budget; whatever passes are registered as token reduction take part
- a pass's own `keep` may mean tokens, blocks or MACs; it is solved for the MACs that are counted on the model
- its representative methods along its axes are in `gossamer.catalogue.token_reduction`; what it hopes for beyond
  efficiency is tried in `gossamer.shrink.beyond_efficiency`
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.reduce import MergingBlock, Seen, Tokens, Trail, note
from gossamer.measure import Latency, latency, macs
from gossamer.ops import tokens as ops
from gossamer.shrink.base import Calibration, Unsupported, check_share, find_pass, passes, run_pass
from gossamer.shrink.passes.merging import mergeable, removals, wrap_blocks
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.sequences import sequence_of
from gossamer.trunks import Isotropic

# A setting is looked for in so many halvings, or until the share of MACs is that near.
HALVINGS, NEAR = 7, 0.01


@dataclass(frozen=True)
class Row:
    """What one method did.

    Args:
        method: name of a pass, `dense` (no reduction) or `random`.
        keep: share of the dense model's MACs that was asked for.
        setting: the pass's own `keep` that gives it.
        share, macs: what is left, counted on one sample.
        tokens: that the MLP of each block worked on, counted likewise; None for models that are no sequence of blocks.
        score: the task's metric on the validation split.
        latency: of one sample, measured beside the others of the same `keep`; None where not asked for.
        why: why the method has no figures.
    """

    method: str
    keep: float
    setting: float | None = None
    share: float | None = None
    macs: int | None = None
    tokens: list[int] | None = None
    score: float | None = None
    latency: Latency | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_token_reduction(
    model: nn.Module,
    calibration: Calibration,
    keeps: Sequence[float] = (0.8, 0.6),
    *,
    steps: int = 100,
    lr: float | None = None,
    methods: Sequence[str] | None = None,
    latency_s: float = 2.0,
) -> list[Row]:
    """Runs every token-reduction pass on copies of `model`; `dense` comes first, then each `keep` in turn.

    Args:
        keeps: shares of the dense model's MACs.
        steps: of training, each pass by its own objective; plain merging and `random` are taught by the dense model.
        lr: for all; None leaves each pass its own.
        methods: passes, and `random`; all by default.
        latency_s: seconds of timing for each `keep`, 0 for none.

    Raises:
        ValueError: a share is not in (0, 1], no such pass, or negative `steps`.
    """
    for keep in keeps:
        check_share("keep", keep)
    check_steps(steps)
    names = list(methods) if methods is not None else [*token_passes(), "random"]
    for name in names:
        if name != "random" and find_pass(name).family != "token reduction":
            raise ValueError(f"method must be random or one of {', '.join(token_passes())}; got {name!r}")
    model = copy.deepcopy(model).eval()
    example = calibration.example()
    whole = macs(model, example).total
    rows = [Row("dense", 1.0, 1.0, 1.0, whole, token_counts(model, example), calibration.score(model))]
    for keep in keeps:
        made: dict[str, nn.Module] = {"dense": model}
        found = []
        for name in names:
            try:
                setting = solve_setting(name, model, calibration, keep)
                made[name] = _reduced(name, model, calibration, setting, steps, lr)
            except Unsupported as error:
                found.append(Row(name, keep, why=str(error)))
                continue
            net = made[name]
            left = macs(net, example).total
            tokens = token_counts(net, example)
            found.append(Row(name, keep, setting, left / whole, left, tokens, calibration.score(net)))
        timed: dict[str, Latency | None] = dict.fromkeys(made)
        if latency_s:
            with torch.inference_mode():
                timed |= latency({n: partial(net, *example) for n, net in made.items()}, budget_s=latency_s)
        if rows[0].latency is None:
            rows[0] = Row(**{**vars(rows[0]), "latency": timed["dense"]})
        rows += [Row(**{**vars(row), "latency": timed.get(row.method)}) for row in found]
    return rows


def token_passes() -> list[str]:
    """Names of the passes that reduce tokens."""
    return [name for name, entry in passes().items() if entry.family == "token reduction"]


def token_counts(model: Any, inputs: tuple[Tensor, ...]) -> list[int] | None:
    """Tokens of each sample that the MLP of each block works on; None where the model is no sequence of blocks."""
    if not isinstance(model, Isotropic):
        return None
    with torch.no_grad(), Trail(model) as trail:
        model(*inputs)
    return trail.counts


def solve_setting(name: str, model: nn.Module, calibration: Calibration, keep: float) -> float:
    """About the largest `keep` of the pass with which at most the share `keep` of the model's MACs is left.

    Raises:
        Unsupported: the pass cannot handle the model, or cannot leave so little.
    """
    whole = macs(model, calibration.example()).total
    if keep == 1:
        return 1.0
    low, high, best, why = 0.0, 1.0, None, "its settings are too coarse"
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            left = macs(_reduced(name, model, calibration, middle, 0, None), calibration.example()).total
        except Unsupported as error:
            low, why = middle, str(error)  # perhaps too little was asked for
            continue
        if left <= keep * whole:
            low = best = middle
            if left >= (keep - NEAR) * whole:
                break
        else:
            high = middle
    if best is None:
        raise Unsupported(f"{name} cannot leave {keep:g} of the MACs: {why}")
    return best


def table(rows: Sequence[Row], metric: str = "score") -> str:
    """The rows as a table in Markdown."""
    lines = [f"| method | MACs left | tokens | {metric} | latency |", "|---|---|---|---|---|"]
    for row in rows:
        if row.share is None:
            lines.append(f"| {row.method} | (asked: {row.keep:.0%}) | | {row.why} | |")
        else:
            tokens = " ".join(map(str, row.tokens or ()))
            lines.append(f"| {row.method} | {row.share:.1%} | {tokens} | {row.score:.4g} | {row.latency or ''} |")
    return "\n".join(lines)


class RandomBlock(MergingBlock):
    """As many tokens as `MergingBlock` merges are dropped unread, the same of every sample; padding first."""

    seed = 0

    def before(self, tokens: Tokens) -> Tokens:
        x, mask, _ = tokens
        n = int(x.shape[1])
        r = self.count(n)
        if r <= 0:
            return tokens
        lots = torch.Generator().manual_seed(n + 7919 * self.seed)
        score = torch.rand(n, generator=lots).to(x).expand(x.shape[0], -1)
        if mask is not None:
            score = score.masked_fill(~mask, -1.0)
        score = score.masked_fill(torch.arange(n, device=x.device) < self.protect, 2.0)
        left, index = ops.select(x, score, n - r)
        note(x, index)
        return Tokens(left, None if mask is None else mask.gather(1, index))

    def between(self, tokens: Tokens, seen: Seen) -> Tokens:
        return tokens

    def count(self, n: int) -> int:
        return min(self.r * n // self.tokens, n - self.protect - 1)


def random_like(model: nn.Module, reduced: nn.Module, calibration: Calibration, seed: int = 0) -> nn.Module:
    """A copy of `model` whose blocks work on as many tokens as those of `reduced`, the others dropped unread.

    Raises:
        Unsupported: the tokens of the model cannot be dropped.
    """
    net: Any = copy.deepcopy(model)
    found = sequence_of(net, calibration, "random")
    come = found.tokens
    for i, count in enumerate(token_counts(reduced, calibration.example()) or ()):
        if count < come:
            net.blocks[i] = RandomBlock(net.blocks[i], come - count, tokens=come, protect=found.protect)
            net.blocks[i].seed = seed
            come = count
    return net


def _reduced(
    name: str, model: nn.Module, calibration: Calibration, keep: float, steps: int, lr: float | None
) -> nn.Module:
    began = time.perf_counter()
    if name == "random":
        net = copy.deepcopy(model)
        found = mergeable(net, calibration, "random")
        if keep < 1:
            step = {"r": removals(found, keep), "tokens": found.tokens, "protect": found.protect}
            wrap_blocks(net, step, RandomBlock)
    else:
        known = find_pass(name).settings
        given = {k: v for k, v in (("steps", steps), ("lr", lr)) if k in known and v is not None}
        net, _ = run_pass(name, model, calibration, keep=keep, **given)
        if "steps" in known:
            return net
    recover(net, calibration, steps=steps, lr=lr or 1e-4, began=began, teacher=copy.deepcopy(model))
    return net.eval()
