"""What a shrink is asked for, and what it answers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.shrink.answer import RunResult, run_folder
from gossamer.shrink.budget import BUDGET_UNITS, check_budget, over_budget
from gossamer.shrink.recipe import check_recipe

MOST_NOTES = 3


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

    model: str | Path | nn.Module
    data: str | Path
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
        if not isinstance(self.model, str | Path | nn.Module):
            raise ValueError(f"model must be a folder, a name or a torch module, got a {type(self.model).__name__}")
        if not isinstance(self.data, str | Path):
            raise ValueError(f"data must be a file, a folder or a name, got a {type(self.data).__name__}")
        self.model = str(self.model) if isinstance(self.model, Path) else self.model
        self.data = str(self.data)
        check_budget(self.budget)
        check_budget(self.shares)
        for name, share in self.shares.items():
            if share > 1:
                raise ValueError(f"budget {name} must be at most 100 % of what the model has, got {share:.0%}")
            if name in self.budget:
                raise ValueError(f"budget gives {name} twice, as a figure and as a share")
        if not 20 <= self.seconds < math.inf:
            raise ValueError(f"time must be at least 20s, got {self.seconds:g}s")
        if self.recipe is not None:
            self.recipe = check_recipe(self.recipe)

    def identity(self) -> dict[str, Any]:
        """What makes two calls the same run."""
        return {
            "command": "shrink",
            "model": self.model if isinstance(self.model, str) else type(self.model).__name__,
            "model_weights": _digest(self.model),
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
        return run_folder(f"shrink-{Path(asked['model']).resolve().name or 'model'}", asked)


class ShrinkResult(RunResult):
    """What came of a shrink."""

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
        lines += [f"left out {line}" for line in r.get("left_out", ())]
        problems = r["data"]["problems"]
        lines += [f"note     {line}" for line in problems[:MOST_NOTES]]
        if len(problems) > MOST_NOTES:
            lines.append(f"note     {len(problems) - MOST_NOTES} more about the data are in the report")
        if not r["meets_budget"]:
            lines.append(f"budget   NOT met: {over_budget(winner['cost'], r['budget'])}")
        return "\n".join([*lines, *self.closing(f', gossamer.load("{self.folder}")')])


def _digest(model: str | Path | nn.Module) -> str:
    """A hash of the weights: a model trained further under the same name is another one."""
    found = hashlib.blake2b(digest_size=8)
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    else:
        files = [p for at in (Path(model), Path(model) / "model") if at.is_dir() for p in sorted(at.iterdir())]
        for path in files:
            if path.suffix in (".safetensors", ".bin"):
                with open(path, "rb") as file:
                    found.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


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
