"""Every vision family on CIFAR-10 with one common recipe, beside a plain ViT of the same cost.

`python benchmarks/vision_table.py [--size xs] [--epochs 10] [SYSTEM …]` writes `benchmarks/results/vision_table.json`:
for each system its tiny variant (what `gossamer fit` would build for the data), test accuracy, latency of one image in
PyTorch, parameters, MACs, seconds of training. A run that was stopped goes on with the systems not listed yet.

- the same seed, order, augmentation, learning rate, schedule and number of epochs for all; nothing is tuned for one
- the row `vit` is the plain baseline; latencies are taken interleaved with it
- the table is a result, not a claim: ten epochs say which mechanism learns soon, not which ends best
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from gossamer.data import Dataset, read_dataset
from gossamer.fit.candidates import Candidate, enumerate_candidates
from gossamer.io import read_json, write_json
from gossamer.layers.init import init_by_width
from gossamer.measure import device_info, latency, macs, parameters
from gossamer.tasks import create_task
from gossamer.train import Settings, Trainer
from gossamer.train.trainer import model_outputs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))
RECIPE = Settings(lr=2e-3, batch_size=128, strength=0.4, smoothing=0.1, warmup=200, ema=0.998, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="all vision systems if none is named")
    parser.add_argument("--size", choices=("xs", "s", "m", "l"), default="xs")
    parser.add_argument("--epochs", type=int, default=10)
    words = parser.parse_args()
    data = read_dataset(DATA / "cifar10.tar.xz")
    listed = {c.system: c for c in enumerate_candidates(data) if c.name.endswith(f"-{words.size}")}
    unknown = sorted(set(words.systems) - set(listed))
    if unknown:
        raise SystemExit(f"no vision system {unknown}; there are {sorted(listed)}")
    file = ROOT / "benchmarks" / "results" / "vision_table.json"
    asked = {"data": "CIFAR-10", "size": words.size, "epochs": words.epochs, "recipe": RECIPE.to_dict()}
    table = read_json(file) if file.exists() else {}
    if {k: table.get(k) for k in asked} != asked:
        table = {**asked, "device": device_info(), "rows": []}
    for system in words.systems or sorted(listed, key=lambda name: (name != "vit", name)):
        if any(row["system"] == system for row in table["rows"]):
            continue
        row = train(listed[system], listed["vit"], data, words.epochs)
        table["rows"] = sorted([*table["rows"], row], key=lambda r: -r["accuracy"])
        write_json(file, table)
        print(row, flush=True)


def train(candidate: Candidate, plain: Candidate, data: Dataset, epochs: int) -> dict[str, Any]:
    """Trains one candidate and gives its row of the table."""
    task = create_task(data.task, data.spec, data.meta)
    load = os.getloadavg()[0]
    torch.manual_seed(RECIPE.seed)
    model, reference = candidate.build(), plain.build().eval()
    init_by_width(model)
    trainer = Trainer(model, task, data, RECIPE)
    begun = time.perf_counter()
    trainer.train(steps=epochs * trainer.steps_per_epoch, schedule="linear")
    seconds = time.perf_counter() - begun
    with trainer.averaged():
        metrics = task.metrics(*model_outputs(model, task, data.test))
    model.eval()
    (image,), _ = task.batch(data.test, torch.arange(1), train=False)
    with torch.no_grad():
        timings = latency({"system": lambda: model(image), "vit": lambda: reference(image)}, budget_s=4)
    return {
        "system": candidate.system,
        "model": candidate.model,
        "options": {k: v for k, v in candidate.options.items() if k not in data.spec},
        "accuracy": metrics["accuracy"],
        "latency_ms": timings["system"].median_ms,
        "vit_latency_ms": timings["vit"].median_ms,
        "params": parameters(model),
        "macs": macs(model, (image,)).total,
        "precision": trainer.precision,
        "train_seconds": round(seconds, 1),
        "load_before": round(load, 2),
    }


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
