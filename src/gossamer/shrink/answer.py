"""What a run with a budget and a time answers, shared by `fit` and `shrink`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer import __version__
from gossamer.data.base import Dataset
from gossamer.measure import device_info
from gossamer.shrink.artefacts import Point
from gossamer.tasks.base import Task
from gossamer.train.clock import Clock


@dataclass
class RunResult:
    """What came of a run; `results.json` in a class."""

    results: dict[str, Any]
    folder: Path

    @property
    def meets_budget(self) -> bool:
        return bool(self.results["meets_budget"])

    def to_dict(self) -> dict[str, Any]:
        return {**self.results, "folder": str(self.folder)}

    def closing(self, inputs: str = "") -> list[str]:
        """The last lines of a summary: what it took, and where to find and how to use what came of it."""
        r = self.results
        return [
            f"time     {r['seconds']:.0f} s of {r['asked_seconds']:.0f} s",
            f"report   {self.folder / 'report.html'}",
            f"use it   gossamer predict {self.folder} INPUT…{inputs}",
        ]


def run_folder(stem: str, asked: dict[str, Any]) -> Path:
    """A folder under `runs/` named after what was asked, so that the same call goes on with it."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return Path("runs") / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', stem)}-{digest}"


def common_results(
    source: object, data: Dataset, task: Task, clock: Clock, *, budget: dict[str, float], seed: int
) -> dict[str, Any]:
    """What the results of every run say of its data, task, device and time."""
    return {
        "gossamer": __version__,
        "data": {
            "source": str(source),
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
            "spec": data.spec,
            "problems": data.problems,
        },
        "task": data.task,
        "metric": task.metric,
        "maximise": task.maximise,
        "budget": budget,
        "asked_seconds": clock.total,
        "seed": seed,
        "interrupted": clock.interrupted,
        "device": device_info(),
    }


def keep_winner(point: Point, folder: Path) -> None:
    """Copies the file and the weights of `point` to where a run's user finds them."""
    shutil.copyfile(point.file, folder / "model.onnx.tmp")
    (folder / "model.onnx.tmp").replace(folder / "model.onnx")
    shutil.copytree(point.model, folder / "model", dirs_exist_ok=True)
