"""Every vision family on CIFAR-10 with one common recipe, beside a plain ViT of the same cost.

`python benchmarks/vision_table.py [--size xs] [--epochs 10] [--workers N] [SYSTEM …]` writes
`benchmarks/results/vision_table.json`: for each system its tiny variant (what `gossamer fit` would build for the data),
test accuracy, latency of one image in PyTorch, parameters, MACs, seconds of training.

- the same seed, order, augmentation, learning rate, schedule and number of epochs for all; nothing is tuned for one
- as many are trained at once as there are cores, each in a process of one thread; a run that was stopped goes on with
  the last whole epoch of each
- latencies are measured when all are trained, in turn with the row `deit`, the plain ViT
- the table is a result, not a claim: ten epochs say which mechanism learns soon, not which ends best
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
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

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))
RECIPE = Settings(lr=2e-3, batch_size=128, strength=0.4, smoothing=0.1, warmup=200, ema=0.998, seed=0)
PLAIN = "deit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="all vision systems if none is named")
    parser.add_argument("--size", choices=("xs", "s", "m", "l"), default="xs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks" / "vision_table")
    given = parser.parse_args()
    data = read_dataset(DATA / "cifar10.tar.xz")
    listed = {c.system: c for c in enumerate_candidates(data) if c.name.endswith(f"-{given.size}")}
    unknown = sorted(set(given.systems) - set(listed))
    if unknown:
        raise SystemExit(f"no vision system {unknown}; there are {sorted(listed)}")
    runs = given.runs / f"{given.size}-{given.epochs}"
    names = given.systems or sorted(listed, key=lambda name: (name != PLAIN, name))
    left = [name for name in names if not (runs / f"{name}.json").exists()]
    with ProcessPoolExecutor(given.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(train, name, given.size, given.epochs, runs) for name in left]):
            print(done.result(), flush=True)
    rows = [read_json(runs / f"{name}.json") for name in listed if (runs / f"{name}.json").exists()]
    table = {
        "data": "CIFAR-10",
        "size": given.size,
        "epochs": given.epochs,
        "recipe": RECIPE.to_dict(),
        "device": device_info(),
        "load_before": round(os.getloadavg()[0], 2),
        "rows": [{**row, **timed(listed[row["system"]], listed[PLAIN], data)} for row in rows],
    }
    table["rows"].sort(key=lambda row: -row["accuracy"])
    write_json(ROOT / "benchmarks" / "results" / "vision_table.json", table)
    for row in table["rows"]:
        print("{system:22} {accuracy:.4f} {latency_ms:8.3f} ms {params:9,} parameters".format(**row))


def train(name: str, size: str, epochs: int, runs: Path) -> dict[str, Any]:
    """Trains the candidate `<name>-<size>` and gives its row of the table, kept in `runs`."""
    torch.set_num_threads(1)
    data = read_dataset(DATA / "cifar10.tar.xz")
    (candidate,) = (c for c in enumerate_candidates(data) if c.name == f"{name}-{size}")
    task = create_task(data.task, data.spec, data.meta)
    torch.manual_seed(RECIPE.seed)
    model = candidate.build()
    init_by_width(model)
    trainer = Trainer(model, task, data, RECIPE)
    state = runs / f"{name}.pt"
    if state.exists():
        trainer.load(state)
    steps = epochs * trainer.steps_per_epoch

    def keep(_: float) -> None:
        if trainer.steps % trainer.steps_per_epoch == 0:
            trainer.save(state)

    trainer.train(steps=steps, schedule="linear", on_step=keep)
    (image,), _ = task.batch(data.test, torch.arange(1), train=False)
    row = {
        "system": candidate.system,
        "model": candidate.model,
        "options": {k: v for k, v in candidate.options.items() if k not in data.spec},
        "accuracy": trainer.evaluate(data.test)["accuracy"],
        "params": parameters(model),
        "macs": macs(model, (image,)).total,
        "precision": trainer.precision,
        "train_seconds": round(trainer.phase_seconds, 1),
    }
    write_json(runs / f"{name}.json", row)
    state.unlink(missing_ok=True)
    return row


@torch.no_grad()
def timed(candidate: Candidate, plain: Candidate, data: Dataset) -> dict[str, float]:
    """Median milliseconds for one image, in turn with the plain baseline; what has been learnt does not change them."""
    (image,), _ = create_task(data.task, data.spec, data.meta).batch(data.test, torch.arange(1), train=False)
    model, beside = candidate.build().eval(), plain.build().eval()
    found = latency({"model": partial(model, image), "beside": partial(beside, image)}, budget_s=4)
    return {"latency_ms": found["model"].median_ms, "vit_latency_ms": found["beside"].median_ms}


if __name__ == "__main__":
    main()
