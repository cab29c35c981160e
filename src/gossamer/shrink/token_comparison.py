"""Every way of token reduction on one task, at equal MACs, after equally many steps of training.

Source: Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models" (a position paper with a
list of some 500 others; it reports no figures of its own), arXiv 2505.18227.

- its demand on software: one interface, so that every method runs under one benchmark, beside no reduction and beside
  a random one at the same budget; whatever passes are registered as token reduction take part
- a pass's own `keep` may mean tokens, blocks or MACs; it is solved for the MACs that are counted on the model
- `METHODS` are its representative methods along its axes, and which of them are passes here; signal and stage are
  normalised, since the paper names them in several ways
- of its five claims, only robustness against tokens that mean nothing is made a test; opinions are not
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from gossamer.layers.reduce import MergingBlock, Seen, Tokens
from gossamer.measure import Latency, latency, macs
from gossamer.ops import tokens as ops
from gossamer.shrink.base import Calibration, Unsupported, check_share, find_pass, passes, run_pass
from gossamer.shrink.passes.merging import mergeable, removals, wrap_blocks
from gossamer.shrink.recovery import check_steps, recover

HALVINGS = 7


@dataclass(frozen=True)
class Row:
    """What one method did.

    Args:
        method: name of a pass, `dense` (no reduction) or `random`.
        keep: share of the dense model's MACs that was asked for.
        setting: the pass's own `keep` that gives it.
        share, macs: what is left, counted on one sample.
        score: the task's metric on the validation split.
        latency: of one sample, measured beside the others of the same `keep`; None where not asked for.
        why: why the method has no figures.
    """

    method: str
    keep: float
    setting: float | None = None
    share: float | None = None
    macs: int | None = None
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
    rows = [Row("dense", 1.0, 1.0, 1.0, whole, calibration.score(model))]
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
            left = macs(made[name], example).total
            found.append(Row(name, keep, setting, left / whole, left, calibration.score(made[name])))
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


def solve_setting(name: str, model: nn.Module, calibration: Calibration, keep: float) -> float:
    """The largest `keep` of the pass with which at most the share `keep` of the model's MACs is left.

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
        else:
            high = middle
    if best is None:
        raise Unsupported(f"{name} cannot leave {keep:g} of the MACs: {why}")
    return best


def table(rows: Sequence[Row], metric: str = "score") -> str:
    """The rows as a table in Markdown."""
    lines = [f"| method | MACs left | {metric} | latency |", "|---|---|---|---|"]
    for row in rows:
        if row.share is None:
            lines.append(f"| {row.method} | (asked: {row.keep:.0%}) | {row.why} | |")
        else:
            lines.append(f"| {row.method} | {row.share:.1%} | {row.score:.4g} | {row.latency or ''} |")
    return "\n".join(lines)


class RandomBlock(MergingBlock):
    """As many tokens as `MergingBlock` merges are dropped unread, the same of every sample; padding first."""

    def before(self, tokens: Tokens) -> Tokens:
        x, mask, _ = tokens
        n = int(x.shape[1])
        r = self.count(n)
        if r <= 0:
            return tokens
        score = torch.rand(n, generator=torch.Generator().manual_seed(n)).to(x).expand(x.shape[0], -1)
        if mask is not None:
            score = score.masked_fill(~mask, -1.0)
        score = score.masked_fill(torch.arange(n, device=x.device) < self.protect, 2.0)
        x, index = ops.select(x, score, n - r)
        return Tokens(x, None if mask is None else mask.gather(1, index))

    def between(self, tokens: Tokens, seen: Seen) -> Tokens:
        return tokens


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


class Method(NamedTuple):
    """A method of the literature along the axes of the position paper; `covered_by` is the pass that does it here."""

    name: str
    year: int
    modality: str
    operation: str
    signal: str
    stage: str
    training: str
    goal: str = "efficiency"
    covered_by: str | None = None


MODALITIES = ("vision", "language", "vision-language", "diffusion")
OPERATIONS = ("pruning", "merging", "clustering", "compression", "routing")
_INSIDE, _LLM = "inside encoder", "inside LLM"
_ATTENTION, _LEARNED, _ALIKE, _POLICY = "attention", "learned predictor", "similarity", "RL policy"

METHODS = (
    Method("DynamicViT", 2021, "vision", "pruning", _LEARNED, _INSIDE, "fine-tuned"),
    Method("IA-RED2", 2021, "vision", "pruning", _POLICY, _INSIDE, "fine-tuned", covered_by="ia_red2"),
    Method("EViT", 2022, "vision", "pruning", _ATTENTION, _INSIDE, "fine-tuned"),
    Method("A-ViT", 2022, "vision", "pruning", _LEARNED, _INSIDE, "fine-tuned"),
    Method("ATS", 2022, "vision", "pruning", _ATTENTION, _INSIDE, "none"),
    Method("SPViT", 2022, "vision", "pruning", _LEARNED, _INSIDE, "fine-tuned"),
    Method("Evo-ViT", 2022, "vision", "pruning", _ATTENTION, _INSIDE, "from scratch"),
    Method("Zero-TPrune", 2024, "vision", "pruning", _ATTENTION, _INSIDE, "none"),
    Method("EET", 2025, "vision", "pruning", _ATTENTION, _INSIDE, "fine-tuned", covered_by="eet"),
    Method("ToMe", 2023, "vision", "merging", _ALIKE, _INSIDE, "none", covered_by="merging"),
    Method("PYRA", 2024, "vision", "merging", _ALIKE, _INSIDE, "adapters", covered_by="pyra"),
    Method("PiToMe", 2024, "vision", "merging", _ALIKE, _INSIDE, "none"),
    Method("vid-TLDR", 2024, "vision", "merging", _ATTENTION, _INSIDE, "none"),
    Method("Token Pooling", 2021, "vision", "clustering", _ALIKE, _INSIDE, "fine-tuned"),
    Method("ATC", 2024, "vision", "clustering", _ALIKE, _INSIDE, "none"),
    Method("LookupViT", 2024, "vision", "compression", _LEARNED, _INSIDE, "from scratch"),
    Method("ToMeSD", 2023, "diffusion", "merging", _ALIKE, "inside denoiser", "none"),
    Method("PoWER-BERT", 2020, "language", "pruning", _ATTENTION, _INSIDE, "fine-tuned"),
    Method("TR-BERT", 2021, "language", "pruning", _POLICY, _INSIDE, "fine-tuned"),
    Method("Length-Adaptive Transformer", 2021, "language", "pruning", _ATTENTION, _INSIDE, "fine-tuned"),
    Method("Magic Pyramid", 2021, "language", "pruning", _ATTENTION, _INSIDE, "fine-tuned"),
    Method("LTP", 2022, "language", "pruning", _ATTENTION, _INSIDE, "fine-tuned"),
    Method("AdapLeR", 2022, "language", "pruning", "saliency", _INSIDE, "fine-tuned"),
    Method("Pyramid-BERT", 2022, "language", "clustering", _ALIKE, _INSIDE, "fine-tuned"),
    Method("LLMLingua", 2023, "language", "pruning", "entropy", "before LLM", "none", "long context"),
    Method("LazyLLM", 2024, "language", "pruning", _ATTENTION, _LLM, "none", "long context"),
    Method("Gist tokens", 2023, "language", "compression", _LEARNED, _LLM, "fine-tuned", "long context"),
    Method("AutoCompressor", 2023, "language", "compression", _LEARNED, _LLM, "fine-tuned", "long context"),
    Method("ICAE", 2023, "language", "compression", _LEARNED, "before LLM", "fine-tuned", "long context"),
    Method("Mixture-of-Depths", 2024, "language", "routing", _LEARNED, _LLM, "from scratch"),
    Method("TRIPS", 2022, "vision-language", "pruning", "text-conditioned", _INSIDE, "fine-tuned", "alignment"),
    Method("BUS", 2023, "vision-language", "pruning", "text-conditioned", _INSIDE, "fine-tuned", "alignment", "bus"),
    Method("PuMer", 2023, "vision-language", "merging", "text-conditioned", _INSIDE, "fine-tuned", "alignment"),
    Method("FastV", 2024, "vision-language", "pruning", _ATTENTION, _LLM, "none"),
    Method("TokenPacker", 2024, "vision-language", "compression", _LEARNED, "between encoder and LLM", "fine-tuned"),
    Method("p-MoD", 2024, "vision-language", "routing", _LEARNED, _LLM, "fine-tuned", covered_by="p_mod"),
)


def methods(*, modality: str | None = None, operation: str | None = None, covered: bool | None = None) -> list[Method]:
    """The methods that match all that is given, by name.

    Raises:
        ValueError: no such modality or operation.
    """
    for axis, value, known in (("modality", modality, MODALITIES), ("operation", operation, OPERATIONS)):
        if value is not None and value not in known:
            raise ValueError(f"{axis} must be one of {', '.join(known)}; got {value!r}")
    return sorted(
        m
        for m in METHODS
        if modality in (None, m.modality)
        and operation in (None, m.operation)
        and covered in (None, m.covered_by is not None)
    )
