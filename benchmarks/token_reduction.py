"""Token reduction at equal MACs, and what it brings beside speed.

`python benchmarks/token_reduction.py [SOURCE] [--steps 200] [--seconds 60] [--keeps 0.8 0.6] [--quick]` trains a plain
vision transformer (or a text encoder) on SOURCE, `digits` by default, for SECONDS, and compares on it every pass that
reduces tokens, beside a random reduction and none. Then come the five tests of `gossamer.shrink.beyond_efficiency`, on
generated data. It writes `benchmarks/results/token_reduction.json`; `--quick` does less of everything, in about six
minutes of one core, and says so in the results.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gossamer.catalogue.token_reduction import count_cells, reductions
from gossamer.data import read_dataset
from gossamer.io import write_json
from gossamer.layers.init import init_by_width
from gossamer.measure import device_info
from gossamer.models import create_model
from gossamer.models.registry import system
from gossamer.shrink import beyond_efficiency as beyond
from gossamer.shrink.base import Calibration
from gossamer.shrink.token_comparison import compare_token_reduction, table
from gossamer.tasks import create_task

RESULTS = Path(__file__).parent / "results" / "token_reduction.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default="digits")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    if words.quick:
        words.steps, words.keeps = 50, [0.6]
    load = os.getloadavg()[0]
    data = read_dataset(words.source)
    calibration = Calibration(create_task(data.task, data.spec, data.meta), data)
    torch.manual_seed(0)
    if data.task == "image-classification":
        scale = system("deit").scale
        assert scale is not None
        name, settings = scale(data.spec, "s") or ("", {})
    else:
        name, settings = "bert_base", {"dim": 128, "depth": 4, "heads": 4, **data.spec}
    model = create_model(name, **settings)
    init_by_width(model)
    trainer = calibration.trainer(model, lr=1e-3, batch_size=64, warmup=50, ema=0.0, strength=0.3)
    trainer.train(seconds=words.seconds, schedule="linear")
    rows = compare_token_reduction(model.eval(), calibration, words.keeps, steps=words.steps, latency_s=1.0)
    print(table(rows, calibration.task.metric))

    seeds, lengths, learn = ((0, 1), (16, 32, 64), 1000) if words.quick else ((0, 1, 2), (16, 32, 64, 128), 3000)
    effort = beyond.Effort(seeds=seeds, steps=60 if words.quick else 100, lr=3e-3)
    trials, seconds = [], {}
    for test, run in {
        "alignment, distraction": lambda: beyond.distraction(effort=effort),
        "retrieval": lambda: beyond.retrieval(lengths, effort=replace(effort, seeds=seeds[:1])),
        "stability": lambda: beyond.stability(effort=effort),
        "overthinking": lambda: beyond.overthinking(replace(effort, learn=learn)),
    }.items():
        began = time.perf_counter()
        trials += run()
        seconds[test] = round(time.perf_counter() - began, 1)
    print(beyond.table(trials))
    cells = count_cells(reductions())
    print("\n".join(f"{m}, {o}: {n} methods, {c} here" for m, o, n, c in cells))
    write_json(
        RESULTS,
        {
            "device": device_info(),
            "load_before": round(load, 2),
            "quick": words.quick,
            "source": words.source,
            "model": model.config,
            "trained_steps": trainer.steps,
            "steps": words.steps,
            "metric": calibration.task.metric,
            "rows": [row.to_dict() for row in rows],
            "beyond": {"effort": asdict(effort), "seconds": seconds, "trials": [t.to_dict() for t in trials]},
        },
    )


if __name__ == "__main__":
    main()
