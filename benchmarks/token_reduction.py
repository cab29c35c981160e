"""Token reduction at equal MACs: every pass that reduces tokens on one model, beside a random one and none.

`python benchmarks/token_reduction.py [SOURCE] [--steps 200] [--seconds 60] [--keeps 0.8 0.6]` trains a plain vision
transformer (or a text encoder) on SOURCE, `digits` by default, for SECONDS, compares the passes on it and writes
`benchmarks/results/token_reduction.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gossamer.data import read_dataset
from gossamer.io import write_json
from gossamer.measure import device_info
from gossamer.models import create_model
from gossamer.models.registry import system
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
    words = parser.parse_args()
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
    trainer = calibration.trainer(model, lr=1e-3, batch_size=64, warmup=50, ema=0.0, strength=0.3)
    trainer.train(seconds=words.seconds, schedule="linear")
    rows = compare_token_reduction(model.eval(), calibration, words.keeps, steps=words.steps)
    write_json(
        RESULTS,
        {
            "device": device_info(),
            "source": words.source,
            "model": model.config,
            "trained_steps": trainer.steps,
            "steps": words.steps,
            "metric": calibration.task.metric,
            "rows": [row.to_dict() for row in rows],
        },
    )
    print(table(rows, calibration.task.metric))


if __name__ == "__main__":
    main()
