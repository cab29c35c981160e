"""Depth: whole blocks, attention and MLP branches go where the answers miss them least for the time they take.

```
while more than keep * cost(model) is left:  take out  argmin_e  rise(e) / saved(e)
rise(e) = D(answers without e and what is gone already, answers of the whole model) - D(answers now, the same)
```
D is the task's distance of a student from its teacher, so labels are not asked. `saved` is what the exported file costs
less without an element of e's kind: its latency on this device, timed in turn with the whole model's, or multiply-adds.

Source: ours; dropping layers of a trained model is Fan et al. 2020, "Reducing Transformer Depth on Demand with
Structured Dropout" and Sajjad et al. 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models"; lazy
greedy selection is Minoux 1978.

- a model of many small operations waits for their number, not for its products: thinner parts do not help it, fewer do
- elements of the same shape and settings are timed once
- a rise that was measured before the last removal is only looked at again when it would be chosen
- what turns out not to be needed for the budget in the end is put back, the dearest first
- of each list of blocks one stays
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.layers.absent import Absent
from gossamer.layers.blocks import Block
from gossamer.measure import macs
from gossamer.shrink.artefacts import export_quickly, together
from gossamer.shrink.base import Calibration, Step, Unsupported, blocks_of, check_share, register_pass
from gossamer.shrink.passes.axformer import branches_of
from gossamer.shrink.recipe import apply

BATCH = 64


@dataclass(frozen=True)
class Element:
    """A block, or a branch of one (`leaf` is `mixer` or `mlp`, empty for the whole block)."""

    block: str
    leaf: str = ""

    @property
    def part(self) -> str:
        return f"{self.block}.{self.leaf}" if self.leaf else self.block


class _Skip(nn.Module):
    """Where a block was, while others are looked at."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


@register_pass("depth", family="depth", saves=("macs", "params", "size"), default={"keep": 0.6})
def depth(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    cost: Literal["latency", "macs"] = "latency",
    samples: int = 256,
) -> list[Step]:
    """Takes out whole blocks and branches, those whose absence changes the answers least for what it saves.

    Args:
        keep: share of the cost that is left.
        cost: what an element is worth taking out for: `latency` of the exported file, or `macs`.
        samples: training items the answers are compared on, fewer where the time is short.

    Raises:
        Unsupported: the model has no plain residual blocks of ours in a list.
        ValueError: `keep` is not in (0, 1], an unknown cost, or `samples` below 1.
    """
    check_share("keep", keep)
    if cost not in ("latency", "macs"):
        raise ValueError(f"cost must be latency or macs, got {cost!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    found = blocks_of(model)
    blocks = {name: block for name, block in found if type(block) is Block and _listed(model, name)}
    if not blocks:
        name, block = found[0]
        raise Unsupported(f"{name} ({type(block).__name__}) is no plain block of a list; only such are taken out")
    if keep == 1:
        return []
    search = _Search(model.eval(), calibration, blocks, samples, cost)
    search.run(keep)
    return search.finish()


class _Search:
    """Blocks and branches that are gone are replaced at once; `finish` makes the steps."""

    def __init__(
        self, model: nn.Module, calibration: Calibration, blocks: dict[str, Block], samples: int, cost: str
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.blocks = blocks
        self.over = time.perf_counter() + 0.8 * calibration.seconds
        self.gone: dict[Element, Callable[[], None]] = {}
        branches = [Element(name, leaf) for name, block in blocks.items() for leaf in branches_of(block)]
        self.elements = [*branches, *(Element(name) for name in blocks)]
        cache: dict[str, Any] = calibration.cache.setdefault(f"depth, {cost}, {samples}", {})
        self.saved: dict[Element, float] = cache.get("saved") or self._shares(cost)
        self.batches = [inputs for inputs, _ in calibration.batches(samples, batch_size=BATCH)]
        begun = time.perf_counter()
        self.answers = self._answers()
        once = time.perf_counter() - begun
        # Each element is looked at once at least, and some again.
        affordable = (self.over - time.perf_counter()) / max(once / len(self.batches), 1e-9) / (2 * len(self.elements))
        count = max(1, min(len(self.batches), int(min(affordable, len(self.batches)))))
        self.batches, self.answers = self.batches[:count], self.answers[:count]
        self.now = 0.0
        first = cache.get("rises") or {e: self._rise(e) for e in self.elements if self._possible(e)}
        cache.update(saved=self.saved, rises=first)
        self.rises: dict[Element, float] = dict(first)

    # --- what an element costs and is worth -------------------------------------------------------------------------

    def _shares(self, cost: str) -> dict[Element, float]:
        """The share of the model's cost that each element's absence saves; each kind is looked at once."""
        one = self.calibration.example()
        found: dict[Any, float] = {}
        saved = {}
        with tempfile.TemporaryDirectory() as folder:
            share = _macs_share(self.model, one) if cost == "macs" else _latency_share(self.model, one, Path(folder))
            for e in self.elements:
                kind = (e.leaf, _kind(self.model.get_submodule(e.part)))
                if kind not in found:
                    put_back = self._without(e)
                    found[kind] = max(0.0, 1 - share())
                    put_back()
                saved[e] = found[kind]
        # All branches together are no more than the model, nor are all blocks: what a disturbed clock said of one kind
        # must not count for each of them.
        for whole in (False, True):
            alike = [e for e in saved if bool(e.leaf) != whole]
            total = sum(saved[e] for e in alike)
            if total > 1:
                saved |= {e: saved[e] / total for e in alike}
        return saved

    @torch.no_grad()
    def _answers(self) -> list[Tensor]:
        return [self.model(*inputs) for inputs in self.batches]

    def _distance(self) -> float:
        total = 0.0
        with torch.no_grad():
            for inputs, answer in zip(self.batches, self.answers, strict=True):
                total += float(self.calibration.task.teaching(self.model(*inputs), answer)) * len(answer)
        return total / sum(map(len, self.answers))

    def _without(self, e: Element) -> Callable[[], None]:
        """Takes an element out, and gives what brings it back."""
        name, leaf = (e.block, e.leaf) if e.leaf else e.block.rpartition(".")[::2]
        parent: Any = self.model.get_submodule(name)
        if e.leaf:
            old = getattr(parent, leaf)
            setattr(parent, leaf, Absent())
            return lambda: setattr(parent, leaf, old)
        old = parent[int(leaf)]
        parent[int(leaf)] = _Skip()
        return lambda: parent.__setitem__(int(leaf), old)

    # --- the search -------------------------------------------------------------------------------------------------

    def run(self, keep: float) -> None:
        """Takes out elements until the share `keep` is left, then puts back what was not needed for it."""
        rises = self.rises
        fresh = set(rises)
        while self.left > keep:
            ranked = sorted((e for e in rises if self._possible(e)), key=lambda e: rises[e] / self._gain(e))
            if not ranked:
                break
            e = ranked[0]
            if e not in fresh and time.perf_counter() < self.over:
                rises[e] = self._rise(e)
                fresh.add(e)
                continue
            self.now += rises[e]
            self._take(e)
            fresh.clear()
        # Of what went first, some may be more than the last step left to ask for.
        for e in sorted(self.gone, key=lambda e: rises[e], reverse=True):
            whole = Element(e.block)
            empty = e == whole and not branches_of(self.blocks[e.block])
            if not empty and (e == whole or whole not in self.gone) and self.left + self._gain(e) <= keep:
                self.gone.pop(e)()

    @property
    def left(self) -> float:
        """The share of the cost that is left."""
        return 1 - sum(map(self._gain, self.gone))

    def _gain(self, e: Element) -> float:
        """What an element saves, its block's branches that are gone already not counted twice."""
        inside = () if e.leaf else [other for other in self.gone if other.leaf and other.block == e.block]
        return max(self.saved[e] - sum(self.saved[other] for other in inside), 1e-9)

    def _possible(self, e: Element) -> bool:
        if e in self.gone or Element(e.block) in self.gone:
            return False
        return bool(e.leaf) or self._alone(e.block) > 1

    def _alone(self, name: str) -> int:
        """Blocks still there in the list that holds one."""
        container: Any = self.model.get_submodule(name.rpartition(".")[0])
        return sum(not isinstance(block, _Skip) for block in container)

    def _rise(self, e: Element) -> float:
        put_back = self._without(e)
        rise = self._distance() - self.now
        put_back()
        return max(rise, 0.0)

    def _take(self, e: Element) -> None:
        self.gone[e] = self._without(e)
        # Without branches a block is the identity, unless a norm stands behind its sum.
        block, whole = self.blocks[e.block], Element(e.block)
        bare = e.leaf and not branches_of(block) and block.residual in ("pre", "single")
        if bare and self._possible(whole):
            self._take(whole)

    def finish(self) -> list[Step]:
        """Puts everything back, and takes it out again by the recipe's steps."""
        chosen = [*self.gone]
        for put_back in reversed([*self.gone.values()]):
            put_back()
        dropped = {e.block for e in chosen if not e.leaf}
        steps: list[Step] = [
            {"step": "axformer.remove", "part": e.part, "losses": None}
            for e in chosen
            if e.leaf and e.block not in dropped
        ]
        order = [name for name in self.blocks if name in dropped]
        steps += [{"step": "axformer.drop", "part": name} for name in reversed(order)]
        for step in steps:
            apply(self.model, step)
        report = {"share": self.left, "distance": self.now, "gone": [e.part for e in chosen]}
        report = {**getattr(self.model, "shrink_report", {}), "depth": report}
        setattr(self.model, "shrink_report", report)  # noqa: B010 (a plain attribute of a module)
        return steps


def _listed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)


def _kind(part: nn.Module) -> Any:
    """What two parts of the same cost have in common: shapes and plain settings of all that is in them."""
    plain = (int, float, str, tuple)
    settings = [
        (type(m), tuple((k, v) for k, v in sorted(vars(m).items()) if isinstance(v, plain))) for m in part.modules()
    ]
    return (*settings, *(tuple(p.shape) for p in part.parameters()))


def _macs_share(model: nn.Module, one: tuple[Tensor, ...]) -> Callable[[], float]:
    whole = max(1, macs(model, one).total)
    return lambda: macs(model, one).total / whole


def _latency_share(model: nn.Module, one: tuple[Tensor, ...], folder: Path) -> Callable[[], float]:
    """Tells the latency of the model's file at each call, as a share of its latency now."""
    first, later = folder / "whole.onnx", folder / "without.onnx"
    export_quickly(model, one, first)

    def share() -> float:
        export_quickly(model, one, later)
        then, now = together([first, later], one, seconds=1.0)
        return now.p10_ms / then.p10_ms

    return share
