"""How soon each family learns from scratch: equal seconds of training on like data, one size each.

`python benchmarks/first_minutes.py [--seconds 15] [TASK …]` writes `benchmarks/results/first_minutes.json` and from it
the table that orders the candidates of a fit, `src/gossamer/fit/first_minutes.json`: for each task the mean lag of a
family behind the best one, in points of accuracy or in per cent of error. Tasks that are not named keep their figures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from gossamer.data import read_dataset
from gossamer.fit.candidates import enumerate_candidates
from gossamer.fit.race import DEFAULT_LR, base_settings, make_trainer, system_lr
from gossamer.io import read_json, write_json
from gossamer.measure import device_info
from gossamer.tasks import create_task

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))
SOURCES = {
    "image-classification": {"digits": "xs", "cifar10.tar.xz": "s"},
    "text-classification": {"sst2": "s"},
    "forecasting": {"ett/ETTh1.csv": "xs"},
}
RESULTS = ROOT / "benchmarks" / "results" / "first_minutes.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("tasks", nargs="*", choices=[[], *SOURCES], metavar="TASK")
    words = parser.parse_args()
    kept = read_json(RESULTS) if RESULTS.exists() else {"tasks": {}}
    for name in words.tasks or SOURCES:
        kept["tasks"][name] = measure(name, words.seconds)
        write_json(RESULTS, {"default_lr": DEFAULT_LR, "tasks": kept["tasks"]})
    table = {name: found["lags"] for name, found in kept["tasks"].items()}
    write_json(ROOT / "src" / "gossamer" / "fit" / "first_minutes.json", table)


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Trains every family on the task's data and gives the figures and the lags."""
    rows = []
    lags: dict[str, list[float]] = {}
    for source, size in SOURCES[name].items():
        data = read_dataset(source if source == "digits" else DATA / source)
        task = create_task(data.task, data.spec, data.meta)
        base = base_settings(data, 0)
        values = {}
        for candidate in enumerate_candidates(data):
            if not candidate.name.endswith(f"-{size}"):
                continue
            trainer = make_trainer(candidate, task, data, base, system_lr(candidate, data.task), base.strength)
            trainer.train(seconds=seconds)
            value = trainer.evaluate(data.val, limit=2000)[task.metric]
            values[candidate.system] = value
            row = {"data": source, "candidate": candidate.name, task.metric: value, "steps": trainer.steps}
            rows.append(row | {"precision": trainer.precision, "ms_a_step": 1e3 * seconds / max(trainer.steps, 1)})
            print(rows[-1], flush=True)
        best = (max if task.maximise else min)(values.values())
        for system, value in values.items():
            lag = 100 * (best - value) if task.maximise else 100 * (value / best - 1)
            lags.setdefault(system, []).append(lag)
    means = {system: round(sum(v) / len(v), 1) for system, v in lags.items()}
    return {"seconds": seconds, "device": device_info(), "rows": rows, "lags": means}


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
