"""What a fit is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.shrink.answer import RunResult, run_folder
from gossamer.shrink.budget import check_budget, over_budget


@dataclass
class FitOptions:
    """The arguments of `gossamer fit`.

    Args:
        data: anything `read_dataset` takes; None with `join`.
        task: the task's name, recognised from the data if None.
        budget: most of each cost the exported model may have: `latency` (ms, one sample), `memory` (MiB), `size` (MB),
            `params`, `macs`.
        seconds: wall-clock time for everything.
        out: run folder; by default one under `runs/` named after the arguments, so that the same call goes on with it.
        seed: splits, initialisation, order.
        storage: URL of a database for the study, so that other machines can join.
        join: run folder (or one like it on another machine) whose study this process works on.
        options: keywords of `read_dataset`.
        quiet: show no progress.
    """

    data: str | None = None
    task: str | None = None
    budget: dict[str, float] = field(default_factory=dict)
    seconds: float = 600.0
    out: Path | None = None
    seed: int = 0
    storage: str | None = None
    join: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.seconds < 20:
            raise ValueError(f"time must be at least 20s, got {self.seconds:g}s")

    def identity(self) -> dict[str, Any]:
        """What makes two calls the same run."""
        return {
            "command": "fit",
            "data": self.data,
            "task": self.task,
            "budget": self.budget,
            "seconds": self.seconds,
            "seed": self.seed,
            "storage": self.storage,
            "options": self.options,
        }

    def folder(self) -> Path:
        if self.out is not None:
            return Path(self.out)
        return run_folder(Path(self.data or "").name.split(".")[0] or "data", self.identity())


class FitResult(RunResult):
    """What came of a fit."""

    def summary(self) -> str:
        """A few lines for a terminal."""
        r = self.results
        if "joined" in r:
            return f"worked on the study of {r['joined']}; its best so far: {r['best']}"
        winner = r["winner"]
        if winner is None:
            closest = r["closest"]
            cost = over_budget(closest["cost"], r["budget"]) if closest else "no candidate could be measured"
            name = f"the closest is {closest['name']}: " if closest else ""
            missed = sum(c["status"] == "not measured" for c in r["candidates"])
            rest = f"; {missed} candidates were not measured in the time given" if missed else ""
            return f"nothing meets the budget; {name}{cost}{rest}\nreport: {self.folder / 'report.html'}"
        cost, score = winner["cost"], winner["test"][r["metric"]]
        lines = [
            f"winner   {winner['name']} ({winner['form']})",
            f"test     {r['metric']} {score:.4f}  (validation {winner['val']:.4f})",
            f"cost     {cost['latency']:.3f} ms, {cost['size']:.2f} MB, {cost['params']:,} parameters, "
            f"{cost['macs'] / 1e6:.1f} MMACs",
        ]
        if not r["meets_budget"]:
            lines.append(f"budget   NOT met: {over_budget(cost, r['budget'])}")
        return "\n".join([*lines, *self.closing()])
