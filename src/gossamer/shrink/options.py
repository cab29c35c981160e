"""What a shrink is asked for, and what it answers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.shrink.budget import BUDGET_UNITS, check_budget, over_budget
from gossamer.shrink.recipe import check_recipe


@dataclass
class ShrinkOptions:
    """The arguments of `gossamer shrink`.

    Args:
        model: a run folder, a folder of Hugging Face transformers, a name (with `weights`), or a module.
        data: anything `read_dataset` takes.
        budget: most of each cost the exported file may have, in base units (`latency` ms, `memory` MiB, `size` MB,
            `params`, `macs`).
        shares: the same as shares of what the model has now, in (0, 1].
        task: the task's name, recognised from the data if None.
        seconds: wall-clock time for everything.
        recipe: passes in order, `[{"pass": name, **settings}, …]` or what else `check_recipe` takes; None lets the
            search choose.
        weights: the authors' checkpoint, for a model given by name.
        out: folder; by default one under `runs/` named after the arguments, so that the same call goes on with it.
        seed: splits, calibration samples, order.
        options: keywords of `read_dataset`.
        quiet: show no progress.
    """

    model: str | nn.Module
    data: str
    budget: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    seconds: float = 1200.0
    recipe: Any = None
    weights: str | None = None
    out: Path | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_budget(self.shares)
        for name, share in self.shares.items():
            if share > 1:
                raise ValueError(f"budget {name} must be at most 100 % of what the model has, got {share:.0%}")
            if name in self.budget:
                raise ValueError(f"budget gives {name} twice, as a figure and as a share")
        if self.seconds < 20:
            raise ValueError(f"time must be at least 20s, got {self.seconds:g}s")
        if self.recipe is not None:
            self.recipe = check_recipe(self.recipe)

    def identity(self) -> dict[str, Any]:
        """What makes two calls the same run."""
        return {
            "command": "shrink",
            "model": self.model if isinstance(self.model, str) else type(self.model).__name__,
            "data": self.data,
            "task": self.task,
            "budget": self.budget,
            "shares": self.shares,
            "seconds": self.seconds,
            "recipe": self.recipe,
            "weights": self.weights,
            "seed": self.seed,
            "options": self.options,
        }

    def folder(self) -> Path:
        if self.out is not None:
            return Path(self.out)
        asked = self.identity()
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(asked["model"]).resolve().name) or "model"
        return Path("runs") / f"shrink-{stem}-{digest}"


@dataclass
class ShrinkResult:
    """What came of a shrink; `results.json` in a class."""

    results: dict[str, Any]
    folder: Path

    @property
    def meets_budget(self) -> bool:
        return bool(self.results["meets_budget"])

    def to_dict(self) -> dict[str, Any]:
        return {**self.results, "folder": str(self.folder)}

    def summary(self) -> str:
        """A few lines for a terminal."""
        r = self.results
        before, winner, metric = r["before"], r["winner"], r["metric"]
        lines = [_line("before", before, before["test"][metric], metric)]
        if winner is None:
            return "\n".join([*lines, "nothing better was found", f"report   {self.folder / 'report.html'}"])
        lines.append(_line("after", winner, winner["test"][metric], metric))
        passes = ", ".join(_words(entry) for entry in winner["recipe"]) or "none"
        cost = {k: v for k, v in winner["cost"].items() if v and before["cost"].get(k)}
        shares = ", ".join(f"{k} {cost[k] / before['cost'][k]:.0%}" for k in cost)
        lines += [f"left     {shares}", f"passes   {passes} ({winner['form']})"]
        if not r["meets_budget"]:
            lines.append(f"budget   NOT met: {over_budget(winner['cost'], r['budget'])}")
        lines += [
            f"time     {r['seconds']:.0f} s of {r['asked_seconds']:.0f} s",
            f"report   {self.folder / 'report.html'}",
            f'use it   gossamer predict {self.folder} INPUT…, gossamer.load("{self.folder}")',
        ]
        return "\n".join(lines)


def _line(word: str, point: dict[str, Any], test: float, metric: str) -> str:
    cost = point["cost"]
    return (
        f"{word:8} {metric} {test:.4f} test, {point['val']:.4f} validation; {cost['latency']:.3f} "
        f"{BUDGET_UNITS['latency']}, {cost['size']:.2f} MB, {cost['params']:,} parameters, "
        f"{cost['macs'] / 1e6:.1f} MMACs"
    )


def _words(entry: dict[str, Any]) -> str:
    settings = ", ".join(
        f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items() if k != "pass"
    )
    return f"{entry['pass']}({settings})"
