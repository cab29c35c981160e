"""IA-RED^2: before each group of blocks an interpreter, trained by REINFORCE, drops the tokens that are not needed.

Source: Pan et al. 2021, "IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision Transformers". A
reconstruction: no code is public, and the paper's text could not be read whole. The parts are in
`gossamer.layers.interpreter`.

1. group by group, the model and earlier interpreters frozen: an action is drawn from the scores, bounded from 0 and
   1, and rewarded with `1 - (kept / all)^2` if the answer is right, `-0.5` if not, less what the greedy action earns
2. then the blocks of this group and behind it are trained on the task, on the tokens that are left

- groups of equal depth, three where the depth allows
- afterwards each interpreter keeps a fixed share t of what comes in, t solved so that the share `keep` of all tokens is
  worked on: `(t + t^2 + t^3) / 3 = keep`. `keep=None` is the paper's form, by threshold 0.5: as many tokens as each
  sample needs, masked, which is for looking at, not for speed; `kept_macs` says what gathering them would cost
- right is the true class; where answers are no class scores, an answer near the dense model's (cosine of at least 0.95)
- the interpreters' scores are a map of what the model looks at: `heat_map`
- epochs: one for each interpreter and one for each fine-tuning (the paper: 10, and 20 to 30), less if time is short
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers.interpreter import (
    InterpretedBlock,
    Interpreter,
    bounded,
    choose,
    interpreted,
    policy_loss,
    reward,
)
from gossamer.measure import macs
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.sequences import sequence_of, wrap

TAU = 0.5
# Answers that are no classes are right if they point where the dense model's do.
NEAR = 0.95
# Samples whose tokens are counted where each keeps as many as it needs.
REPORTED = 64


@register_pass("ia_red2", family="token reduction", paper="ia-red2", saves=("macs",), default={"keep": 0.6})
def ia_red2(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float | None = 0.6,
    groups: int | None = None,
    steps: int | None = None,
    lr: float = 1e-4,
    policy_lr: float = 1e-3,
) -> list[Step]:
    """Drops tokens before each group of blocks, as interpreters say, so that the share `keep` of all is worked on.

    Args:
        keep: None drops by threshold, as many as each sample can spare.
        groups: of blocks; None takes three, two or one, whichever divides the depth.
        steps: of each of the two trainings of each group, one epoch by default, never beyond the calibration's time.
        lr: learning rate of the blocks, `policy_lr` that of the interpreters.

    Raises:
        Unsupported: the tokens of the model cannot be dropped.
        ValueError: `keep` is not in (0, 1], `groups` does not divide the depth, or negative `steps`.
    """
    began = time.perf_counter()
    if keep is not None:
        check_share("keep", keep)
    check_steps(steps)
    found = sequence_of(model, calibration, "ia_red2")
    depth = len(found.blocks)
    if groups is None:
        groups = next(g for g in (3, 2, 1) if depth % g == 0)
    if groups < 1 or depth % groups:
        raise ValueError(f"groups must divide the depth, {depth} blocks; got {groups}")
    if keep == 1:
        return []
    dense = copy.deepcopy(model).eval()
    share = None if keep is None else solve(groups, keep)
    if share is not None and share * (found.tokens - found.protect) < 1:
        raise Unsupported(f"ia_red2: of {found.tokens - found.protect} tokens the share {share:.2f} is none")
    step: Step = {"step": "ia_red2", "groups": groups, "share": share, "protect": found.protect}
    # Judges that keep all: a group is judged only when those before it are done.
    apply(model, step)
    trunk: Any = model
    stages = interpreted(trunk)
    for block in stages:
        block.share = 1.0
    size = depth // groups
    for g, block in enumerate(stages):
        left = 2 * (groups - g)  # trainings to come, which share the time
        _only(model, [block.interpreter])
        policy = _Policy(model, dense, block, calibration)
        count = steps if steps is not None else max(1, len(calibration.data.train) // 32)
        recover(model, calibration, steps=count, lr=policy_lr, began=began, objective=policy, share=1 / left)
        block.share = share
        _only(model, [*trunk.blocks[g * size :], trunk.norm, trunk.head], without=[s.interpreter for s in stages])
        recover(model, calibration, steps=count, lr=lr, began=began, share=1 / (left - 1))
    for p in model.parameters():
        p.requires_grad_(True)
    if share is None:
        kept, spent = kept_macs(model.eval(), next(calibration.batches(REPORTED, batch_size=REPORTED, split="val"))[0])
        told = {"tokens": kept.double().mean(0).tolist(), "macs": float(spent.mean())}
        setattr(model, "shrink_report", {**getattr(model, "shrink_report", {}), "ia_red2": told})  # noqa: B010
    return [step]


@register_step("ia_red2")
def _interpret(model: Any, step: Step) -> None:
    size = len(model.blocks) // step["groups"]
    for g in range(step["groups"]):

        def make(block: Any) -> nn.Module:
            mixer = block.mixer
            judge = Interpreter(mixer.dim, mixer.heads if mixer.dim % mixer.heads == 0 else 1)
            return InterpretedBlock(block, judge, share=step["share"], protect=step["protect"])

        wrap(model, g * size, make)


@torch.no_grad()
def kept_macs(model: Any, inputs: tuple[Tensor, ...]) -> tuple[Int[Tensor, "b g"], Float[Tensor, " b"]]:
    """Tokens each sample keeps in each group, those in front included, and its multiply-adds if they were gathered.

    Samples come as long as the longest one to the first interpreter; padding leaves with what it drops.

    Raises:
        ValueError: the model has no interpreters, or they keep a share: then counting the model says it.
    """
    stages = interpreted(model)
    inputs = tuple(x.to(next(model.parameters()).device) for x in inputs)
    if not stages or any(block.share is not None for block in stages):
        raise ValueError("model must drop tokens by threshold (ia_red2 with keep=None)")
    counts: list[Tensor] = []
    sizes: list[int] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, Tensor, Any]) -> None:
        sizes.append(args[0].shape[1])
        counts.append(out[1].sum(1).cpu())

    hooks = [block.register_forward_hook(note) for block in stages]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    kept, n = torch.stack(counts, 1), sizes[0]
    spent = torch.full(kept.shape[:1], float(macs(model, tuple(x[:1] for x in inputs)).total), dtype=torch.float64)
    size = len(model.blocks) // len(stages)
    for g, stage in enumerate(stages):
        if g:  # its interpreter, one product a token
            spent -= (n - kept[:, g - 1]) * stage.interpreter.q.in_features**2
        for block in (stage.block, *model.blocks[g * size + 1 : (g + 1) * size]):
            one, two = (_count(block, length) for length in (n, 2 * n))
            pair = (two - 2 * one) / (2 * n * n)  # a n + b n^2: two counts give both
            spent -= (n - kept[:, g]) * (one / n - n * pair) + (n * n - kept[:, g] ** 2) * pair
    return kept, spent


def _count(block: Any, tokens: int) -> int:
    """Multiply-adds of a block of so many tokens."""
    return macs(copy.deepcopy(block).to("meta"), torch.empty(1, tokens, block.mixer.dim, device="meta")).total


def solve(groups: int, keep: float) -> float:
    """The share t with `(t + t^2 + … + t^groups) / groups = keep`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if sum(t**g for g in range(1, groups + 1)) <= keep * groups else (low, t)
    return round(low, 6)


def _only(model: nn.Module, parts: list[Any], without: list[nn.Module] | None = None) -> None:
    """Lets gradients reach the parameters of `parts` alone."""
    fixed = {p for part in without or [] for p in part.parameters()}
    chosen = {p for part in parts if part is not None for p in part.parameters()} - fixed
    for p in model.parameters():
        p.requires_grad_(p in chosen)


class _Policy:
    """The loss of one interpreter; the rest of the model only answers."""

    def __init__(self, model: Any, dense: nn.Module, block: InterpretedBlock, calibration: Calibration) -> None:
        self.model = model
        self.dense = dense
        self.block = block
        self.task = calibration.task

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        block = self.block
        self.model.eval()
        with torch.no_grad():
            patches, real = self._read(inputs)
        scores = block.interpreter(patches)
        chances = bounded(scores)
        greedy = choose(scores.detach(), block.threshold, real)
        stays = torch.bernoulli(chances.detach()).bool()
        stays = stays if real is None else stays & real
        # Who would drop all keeps what the greedy one keeps.
        stays = torch.where(stays.any(1, keepdim=True), stays, greedy)
        with torch.no_grad():
            earned = [reward(u, self._right(u, inputs, target), real=real, tau=TAU) for u in (stays, greedy)]
        return policy_loss(chances, stays, earned[0] - earned[1], real)

    def _read(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """The tokens that come to the interpreter."""
        block = self.block
        x, mask = self.model.stem(*inputs)
        sizes = None
        for each in self.model.blocks:
            if each is block:
                break
            if getattr(each, "reduces", False):
                x, mask, sizes = each(x, mask=mask, sizes=sizes)
            else:
                x = each(x) if mask is None else each(x, mask=mask)
        return x[:, block.protect :], None if mask is None else mask[:, block.protect :]

    def _right(self, stays: Tensor, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        self.block.action = stays
        try:
            answer = self.model(*inputs).float()
        finally:
            self.block.action = None
        if target.ndim == 1 and not target.is_floating_point() and answer.ndim == 2 and len(answer) == len(target):
            return answer.argmax(1) == target
        wanted = self.dense(*inputs).float()
        return torch.cosine_similarity(answer.flatten(1), wanted.flatten(1)) >= NEAR
