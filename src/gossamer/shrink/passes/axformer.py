"""AxFormer: what the validation loss does not miss is taken out, coarse parts first; attention may become hard.

```
queue = attention and MLP branches, from the last block to the first;  best = loss(model);  limit = best * (1 + delta)
for e in queue:  l = loss(model without e)
    l <= limit:                  e is taken out, best = min(best, l), limit = best * (1 + delta)
    l <= limit * (1 + gamma):    its heads or groups of hidden units come next in the queue
```
Then, block by block, the smallest `top_k` of a list with which hard attention keeps the loss within the limit. Then
fine-tuning, which is kept if it lowers the loss.

Source: Nagarajan et al. 2020, "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more
Accurate NLP Models". A reconstruction: neither code nor full text was at hand. The order of the queue, the thresholds,
the sizes of groups and the list of `top_k` are our reading of it.

- `keep=1`: accuracy-driven, only what costs nothing goes. Below 1 (the paper's size-driven mode) delta rises until the
  share `keep` of the multiply-adds is left; elements are then taken by how little they were last seen to cost, and
  where the time is over without another look
- heads and groups are visited by the weight of their members, the lightest first; so there is never more than one
  evaluation an element and round, and one for the start
- hard attention saves multiply-adds, not time: choosing and gathering cost a CPU more than the products they spare. So
  `gossamer shrink` does not start with it; give `top_k` where accuracy is what you want of it
- every decision is in `model.shrink_report["axformer"]`, those that stand are in the recipe with their losses
- a branch taken out leaves a zero (`layers/absent.py`); a pre-norm block without branches leaves its trunk. Heads and
  units are sliced
- losses are of the validation split, which is thereby chosen on: only the test split can tell how well the result does
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers.absent import Absent
from gossamer.layers.blocks import Block
from gossamer.layers.prune import Prunable
from gossamer.measure import macs
from gossamer.mixers.attention import Attention
from gossamer.mixers.hard_attention import HardAttention
from gossamer.shrink.base import Batch, Calibration, Step, Unsupported, blocks_of, check_share, register_pass
from gossamer.shrink.costs import member_macs
from gossamer.shrink.masks import Member, keep_members, masked, reader
from gossamer.shrink.recipe import apply, register_step
from gossamer.train import Diverged

LEVELS = ("branches", "members")
# How far the loss may rise, round by round, while too many multiply-adds are left.
DELTAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Of the time, what the search may take; the rest is for fine-tuning.
SEARCH = 0.6


@register_pass(
    "axformer",
    family="structured pruning",
    paper="axformer",
    saves=("macs", "params", "size"),
    default={"keep": 0.6, "top_k": ()},
)
def axformer(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 1.0,
    delta: float = 0.0,
    gamma: float = 0.02,
    levels: Sequence[str] = LEVELS,
    groups: int = 16,
    top_k: Sequence[int] = (64, 32, 16, 8, 4),
    samples: int = 2000,
    epochs: float = 1.0,
    lr: float = 2e-5,
) -> list[Step]:
    """Takes out branches, heads and hidden units that the validation loss does not miss, and makes attention hard.

    Args:
        keep: share of the multiply-adds that may stay; 1: take only what costs no accuracy.
        delta: rise of the loss, as a share, that is accepted from the start.
        gamma: rise beyond it with which a branch is looked at part by part.
        levels: what may be taken out: whole `branches`, and their `members`.
        groups: parts that the hidden units of an MLP are tried in.
        top_k: keys a query may attend where attention becomes hard, in falling order; none: attention stays soft.
        samples: validation items the loss is measured on, fewer where the time is short.
        epochs: of fine-tuning; `lr` its learning rate.

    Raises:
        Unsupported: the model has no residual blocks of ours.
        ValueError: `keep` is not in (0, 1], a negative `delta`, `gamma` or `epochs`, an unknown level, `groups`,
            `samples` or a `top_k` below 1, or an empty validation split.
    """
    check_share("keep", keep)
    for name, value in (("delta", delta), ("gamma", gamma), ("epochs", epochs)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"levels must be among {', '.join(LEVELS)}; got {level!r}")
    for name, number in (("groups", groups), ("samples", samples), *(("top_k", k) for k in top_k)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not len(calibration.data.val):
        raise ValueError("the validation split is empty; the search needs one")
    blocks = {name: block for name, block in blocks_of(model) if type(block) is Block}
    if not blocks:
        name, block = blocks_of(model)[0]
        raise Unsupported(f"{name} ({type(block).__name__}) has a forward pass of its own; only plain blocks are cut")
    start = time.perf_counter()
    search = _Search(model.eval(), calibration, blocks, samples, groups, start)
    search.run(keep, delta, gamma, levels)
    taken = search.finish()
    taken += search.harden(sorted(set(top_k), reverse=True), delta)
    losses, evaluations = [search.first, search.now], search.evaluations
    left = calibration.seconds - (time.perf_counter() - start)
    if epochs:
        losses.append(_tune(model, calibration, search, epochs, lr, left))
    rows = [asdict(d) for d in search.decisions]
    report = {"losses": losses, "evaluations": evaluations, "macs": search.share, "decisions": rows}
    report = {**getattr(model, "shrink_report", {}), "axformer": report}
    setattr(model, "shrink_report", report)  # noqa: B010 (a plain attribute of a module)
    model.eval()
    return taken


@dataclass(frozen=True)
class Element:
    """What may be taken out: a branch of a block (`index` empty), or members of an axis of a part."""

    part: str
    axis: str = ""
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.axis:
            return self.part
        return f"{self.part} {self.axis} {', '.join(map(str, self.index))}"


@dataclass(frozen=True)
class Decision:
    """A line of the log: what was tried, the loss with it and without it, and what became of it."""

    element: str
    before: float
    after: float | None
    action: str


class _Search:
    """The greedy search on one model: branches leave it at once, members are masked until `finish`."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        blocks: dict[str, Block],
        samples: int,
        groups: int,
        start: float,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.blocks = blocks
        self.groups = groups
        self.device = next(model.parameters()).device
        self.over = start + SEARCH * calibration.seconds
        self.evaluations = 0
        self.decisions: list[Decision] = []
        self.taken: list[Step] = []
        self.masks: dict[Member, Tensor] = {}
        self.rises: dict[Element, float] = {}
        self.batches: list[Batch] = list(calibration.batches(samples, split="val"))
        self._fit_time()
        # Loss of the start, of the model as it is now, and the lowest that was met on the way.
        self.first = self.now = self.lowest = self.loss()
        self._count()

    # --- loss and cost ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def loss(self) -> float:
        """Mean validation loss of the model as it is, with its masks."""
        self.evaluations += 1
        total = count = 0.0
        with masked(self.model, self.masks):
            for inputs, target in self.batches:
                inputs = tuple(x.to(self.device) for x in inputs)
                total += float(self.calibration.loss(self.model, inputs, target.to(self.device))) * len(target)
                count += len(target)
        return total / count

    def _fit_time(self) -> None:
        """Fewer batches, evenly spaced, where all of them would not let every branch be tried within the time."""
        if math.isinf(self.calibration.seconds):
            return
        some, whole = self.batches[:1], self.batches
        self.batches = some
        self.loss()
        began = time.perf_counter()
        self.loss()
        once = time.perf_counter() - began
        self.evaluations = 0
        left = max(0.0, self.over - time.perf_counter())
        # Two branches a block, each with some of its parts.
        fitting = int(left / max(once, 1e-9) / (6 * len(self.blocks)))
        count = max(1, min(len(whole), fitting))
        self.batches = [whole[i * len(whole) // count] for i in range(count)]

    def _count(self) -> None:
        """Multiply-adds of the model, of its branches, and of the members within them."""
        inputs = tuple(x.to(self.device) for x in self.calibration.example(1))
        counted = macs(self.model, inputs, per_layer=True)
        self.whole = self.left = float(max(1, counted.total))
        self.cost = {}
        for e in self._branches():
            block = e.part.rpartition(".")[0]
            # A block of one branch goes as a whole.
            name = block if self.blocks[block].residual == "single" else e.part
            self.cost[e.part] = float(counted.by_module.get(name, 0))
        self.widths = {
            (name, axis): width for branch in self._branches() for name, axis, width in self._axes(branch.part)
        }
        self.member = member_macs(self.model, inputs, self.widths) if self.widths else {}

    @property
    def share(self) -> float:
        """Of the multiply-adds, what is left."""
        return self.left / self.whole

    def _saves(self, e: Element) -> float:
        if e.axis:
            return self.member[(e.part, e.axis)] * len(e.index)
        gone = sum(
            self.member[member] * float((mask == 0).sum())
            for member, mask in self.masks.items()
            if _within(member[0], e.part)
        )
        return max(0.0, self.cost[e.part] - gone)

    # --- elements ---------------------------------------------------------------------------------------------------

    def _branches(self) -> list[Element]:
        """Branches that are there, from the last block to the first; attention before the MLP of the block before."""
        return [
            Element(f"{name}.{leaf}") for name, block in reversed(self.blocks.items()) for leaf in branches_of(block)
        ]

    def _axes(self, branch: str) -> list[tuple[str, str, int]]:
        """`(part, axis, width)` of what can be masked and sliced within a branch."""
        found = []
        for name, part in self.model.get_submodule(branch).named_modules(prefix=branch):
            if not isinstance(part, Prunable):
                continue
            for axis, width in part.widths().items():
                try:
                    reader(part, axis)
                except Unsupported:
                    continue
                found.append((name, axis, width))
        return found

    def _children(self, branch: Element) -> list[Element]:
        """Heads, or runs of hidden units, lightest first."""
        found: list[Element] = []
        for name, axis, width in self._axes(branch.part):
            part = self.model.get_submodule(name)
            assert isinstance(part, Prunable)
            order = part.importance(axis).argsort(stable=True).tolist()
            size = max(1, width // self.groups) if axis == "hidden" else 1
            found += [Element(name, axis, tuple(sorted(order[i : i + size]))) for i in range(0, width, size)]
        return found

    def _there(self, e: Element) -> bool:
        """Whether an element can (still) be taken out; of each axis one run of members stays."""
        part = _find(self.model, e.part)
        if part is None or isinstance(part, Absent):
            return False
        if not e.axis:
            return True
        mask = self.masks.get((e.part, e.axis))
        if mask is None:
            return self.widths[(e.part, e.axis)] > len(e.index)
        return bool(mask[list(e.index)].any()) and int(mask.sum()) > len(e.index)

    # --- the search -------------------------------------------------------------------------------------------------

    def run(self, keep: float, delta: float, gamma: float, levels: Sequence[str]) -> None:
        """Takes out what costs no loss; then, while more than `keep` is left, what costs more and more."""
        first = self._branches()
        open_up = "members" in levels
        known = [*first] if "branches" in levels else []
        inner = [c for e in first for c in self._children(e)] if open_up else []
        target = keep if keep < 1 else 0.0
        self._round(known or inner, delta, gamma, open_up, target)
        if keep == 1:
            return
        known += inner
        for wider in DELTAS:
            if wider > delta and not self._done(keep):
                limit = self.lowest * (1 + wider)
                hopeful = [e for e in self._cheapest(known) if self.now + self.rises.get(e, 0.0) <= limit]
                self._round(hopeful, wider, 0.0, False, keep)
        # The time, or what was allowed, is over: the rest goes by what it was last seen to cost.
        for e in self._cheapest(known):
            if self.share <= keep:
                return
            if self._there(e):
                self._take(e, None)
                self.decisions.append(Decision(str(e), self.now, None, "taken unseen"))

    def _cheapest(self, elements: Sequence[Element]) -> list[Element]:
        """Elements by the loss they cost for each multiply-add saved; what was never tried comes after the cheap."""
        rises = list(self.rises.values())
        usual = sorted(rises)[len(rises) // 2] if rises else 0.0
        here = [e for e in elements if self._there(e)]

        def price(e: Element) -> float:
            # An untried member is taken to cost its share of what the usual element costs.
            rise = self.rises.get(e, usual)
            return max(rise, 0.0) / max(self._saves(e), 1.0)

        return sorted(here, key=price)

    def _done(self, keep: float) -> bool:
        return self.share <= keep or time.perf_counter() > self.over

    def _round(self, elements: Sequence[Element], delta: float, gamma: float, open_up: bool, keep: float) -> None:
        queue = list(elements)
        while queue and not self._done(keep):
            e = queue.pop(0)
            if not self._there(e):
                continue
            limit = self.lowest * (1 + delta)
            undo = self._without(e)
            before, after = self.now, self.loss()
            undo()
            self.rises[e] = after - before
            if after <= limit:
                self._take(e, [before, after])
                self.now, self.lowest = after, min(self.lowest, after)
                action = "taken out"
            elif open_up and not e.axis and after <= limit * (1 + gamma):
                queue = [*self._children(e), *queue]
                action = "opened"
            else:
                action = "kept"
            self.decisions.append(Decision(str(e), before, after, action))

    def _without(self, e: Element) -> Callable[[], None]:
        """Takes `e` out for a trial, and gives what brings it back."""
        if e.axis:
            member = (e.part, e.axis)
            old = self.masks.get(member)
            self.masks[member] = self._mask(e)

            def restore() -> None:
                if old is None:
                    del self.masks[member]
                else:
                    self.masks[member] = old

            return restore
        parent, leaf = e.part.rpartition(".")[::2]
        block: Any = self.model.get_submodule(parent)
        part = getattr(block, leaf)
        inside = {member: mask for member, mask in self.masks.items() if _within(member[0], e.part)}
        for member in inside:
            del self.masks[member]
        setattr(block, leaf, Absent())

        def put_back() -> None:
            setattr(block, leaf, part)
            self.masks.update(inside)

        return put_back

    def _mask(self, e: Element) -> Tensor:
        member = (e.part, e.axis)
        mask = self.masks.get(member)
        mask = torch.ones(self.widths[member], device=self.device) if mask is None else mask.clone()
        mask[list(e.index)] = 0
        return mask

    def _take(self, e: Element, losses: list[float] | None) -> None:
        self.left -= self._saves(e)
        if e.axis:
            self.masks[(e.part, e.axis)] = self._mask(e)
            return
        for member in [m for m in self.masks if _within(m[0], e.part)]:
            del self.masks[member]
        self._step({"step": "axformer.remove", "part": e.part, "losses": losses})

    def _step(self, step: Step) -> None:
        apply(self.model, step)
        self.taken.append(step)

    def finish(self) -> list[Step]:
        """Slices the masked members, and lets blocks without branches go."""
        self.taken += keep_members(self.model, self.masks)
        self.masks = {}
        for name, block in reversed(self.blocks.items()):
            parent = self.model.get_submodule(name.rpartition(".")[0])
            if _empty(block) and isinstance(parent, nn.ModuleList | nn.Sequential):
                self._step({"step": "axformer.drop", "part": name})
        return self.taken

    def harden(self, sizes: Sequence[int], delta: float) -> list[Step]:
        """Hard attention with the smallest size that keeps the loss within the limit, block by block."""
        found: list[Step] = []
        named = [(name, block) for name, block in self.model.named_modules() if isinstance(block, Block)]
        for name, block in reversed(named):
            part: Any = block
            soft = part.mixer
            if type(soft) is not Attention or not sizes:
                continue
            tokens = _tokens(self.model, soft, tuple(x.to(self.device) for x in self.batches[0][0]))
            chosen, before = None, self.now
            for size in sizes:
                if size >= tokens or time.perf_counter() > self.over:
                    continue
                part.mixer = HardAttention.of(soft, top_k=size).eval()
                after = self.loss()
                part.mixer = soft
                good = after <= self.lowest * (1 + delta)
                self.decisions.append(
                    Decision(f"{name}.mixer top {size}", before, after, "possible" if good else "kept")
                )
                if good:
                    chosen = (size, after)
            if chosen is not None:
                step = {"step": "axformer.hard", "part": name, "top_k": chosen[0], "losses": [before, chosen[1]]}
                apply(self.model, step)
                found.append(step)
                self.now, self.lowest = chosen[1], min(self.lowest, chosen[1])
        return found


def branches_of(block: Block) -> list[str]:
    """Names of the branches that are there, the last first."""
    # Where one branch holds both, the block is the identity without it.
    leaves = ["mlp"] if block.residual == "single" else ["mlp", "mixer"]
    there = [getattr(block, leaf) for leaf in leaves]
    return [leaf for leaf, part in zip(leaves, there, strict=True) if part is not None and not isinstance(part, Absent)]


def _within(part: str, branch: str) -> bool:
    return part == branch or part.startswith(f"{branch}.")


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # it, or what it was in, is gone
        return None


def _tokens(model: nn.Module, mixer: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Tokens a mixer is given."""
    seen: list[int] = []
    handle = mixer.register_forward_pre_hook(lambda _, args: seen.append(math.prod(args[0].shape[1:-1])))
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    return max(seen, default=0)


def _empty(block: Block) -> bool:
    """Whether a block is the identity."""
    if block.residual == "single":
        return isinstance(block.mlp, Absent)
    gone = block.mlp is None or isinstance(block.mlp, Absent)
    return block.residual == "pre" and gone and isinstance(block.mixer, Absent)


def _tune(
    model: nn.Module, calibration: Calibration, search: _Search, epochs: float, lr: float, seconds: float
) -> float:
    """Fine-tunes, and takes it back where the validation loss did not fall. Gives that loss."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trainer = calibration.trainer(model, lr=lr, ema=0.0)
    steps = max(1, round(epochs * trainer.steps_per_epoch))
    after = math.inf
    with suppress(Diverged):
        trainer.train(steps=steps, seconds=seconds, schedule="linear")
        model.eval()
        after = search.loss()
    if after < search.now:
        return after
    model.load_state_dict(before)
    return search.now


@register_step("axformer.remove")
def _remove(model: nn.Module, step: dict[str, Any]) -> None:
    parent, leaf = step["part"].rpartition(".")[::2]
    block: Any = model.get_submodule(parent)
    if not isinstance(block, Block) or leaf not in ("mixer", "mlp"):
        raise ValueError(f"part must be the mixer or the mlp of a block, got {step['part']!r}")
    gone = Absent()
    if leaf == "mixer":
        block.mixer, block.scale1 = gone, None
        if block.residual in ("pre", "stream"):
            block.norm1 = nn.Identity()
    elif block.residual == "pre":
        # A block without a second norm ends after its first sum.
        block.mlp = block.norm2 = block.scale2 = None
    elif block.residual == "single":
        block.mixer, block.norm1, block.mlp, block.scale1 = nn.Identity(), nn.Identity(), gone, None
    else:
        block.mlp, block.scale2 = gone, None


@register_step("axformer.drop")
def _drop(model: nn.Module, step: dict[str, Any]) -> None:
    parent, leaf = step["part"].rpartition(".")[::2]
    container = model.get_submodule(parent)
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        raise ValueError(f"part must be a member of a list of blocks, got {step['part']!r}")
    del container[int(leaf)]


@register_step("axformer.hard")
def _harden(model: nn.Module, step: dict[str, Any]) -> None:
    block: Any = model.get_submodule(step["part"])
    block.mixer = HardAttention.of(block.mixer, top_k=step["top_k"])
