"""Two processes against one: `accelerate launch` on the CPU with the same global batch, and a kill in between.

Run from the repository root: `python benchmarks/distributed.py` (a few minutes). Trains a small ViT on the digits
three times: in one process, in two, and in two that are killed after their first checkpoint and started again. Writes
`benchmarks/results/distributed.json`: the largest difference of the loss curves, the test figures, device, versions.
`--quick` trains two epochs and writes nothing.

- float32 throughout: which precision is faster would be chosen by the clock, and could differ between runs
- each process has one thread
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gossamer.io import write_json
from gossamer.measure import device_info
from gossamer.train import train_model

MODEL = "vit_tiny_patch16_224"
SIZES = {"dim": 64, "depth": 4, "heads": 4, "patch": 2}
SETTINGS = {"precision": "float32", "strength": 0.3, "warmup": 20}
SAME = 0.01  # largest relative difference of two losses that are called the same


def worker(out: str, processes: int, epochs: int) -> None:
    """What each launched process runs; it makes sure that it is one of as many as were asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) != processes:
        raise SystemExit(f"launched {os.environ.get('WORLD_SIZE', '1')} processes, not {processes}")
    train_model(
        MODEL,
        "digits",
        out=out,
        epochs=epochs,
        batch_size=64,
        lr=2e-3,
        settings=SETTINGS,
        model_options=SIZES,
        quiet=True,
    )


def launch(out: Path, processes: int, epochs: int) -> subprocess.Popen[bytes]:
    # `--cpu` starts one process whatever the number, unless there is an MPI; `--multi_gpu` starts as many as were
    # asked for, and without a GPU they talk by gloo.
    how = "--cpu" if processes == 1 else "--multi_gpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", how, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [__file__, "--worker", str(out), "--processes", str(processes), "--epochs", str(epochs)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def run(out: Path, processes: int, epochs: int, *, kill: bool = False) -> dict[str, Any]:
    """Trains, if asked with a kill after the first checkpoint, and gives curve, figures and seconds."""
    begun = time.perf_counter()
    if kill:
        process = launch(out, processes, epochs)
        while not (out / "checkpoints" / "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            raise SystemExit("the run to be killed ended before its first checkpoint")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code := launch(out, processes, epochs).wait():
        raise SystemExit(f"{processes} processes ended with code {code}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    return {
        "losses": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "val": {row["epoch"]: row["val"] for row in rows if "val" in row},
        "test": results["test"],
        "steps": results["steps"],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def difference(one: dict[int, float], other: dict[int, float]) -> dict[str, float]:
    """Largest absolute and relative difference of two curves of the same steps."""
    if one.keys() != other.keys():
        raise SystemExit("the two curves are not of the same steps")
    gaps = [(abs(one[step] - other[step]), one[step]) for step in one]
    return {"absolute": max(gap for gap, _ in gaps), "relative": max(gap / abs(loss) for gap, loss in gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two epochs, nothing is written")
    parser.add_argument("--worker", metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker, asked.processes, asked.epochs)
        return
    epochs = 2 if asked.quick else asked.epochs
    with tempfile.TemporaryDirectory() as folder:
        one = run(Path(folder) / "one", 1, epochs)
        two = run(Path(folder) / "two", 2, epochs)
        killed = run(Path(folder) / "killed", 2, epochs, kill=True)
    gaps = {"two processes": difference(one["losses"], two["losses"])}
    gaps["two processes, killed and resumed"] = difference(one["losses"], killed["losses"])
    for name, gap in gaps.items():
        print(f"{name}: largest difference {gap['absolute']:.2e}, relative {gap['relative']:.2e}")
    if not asked.quick:
        facts = {
            "device": device_info(),
            "model": MODEL,
            "sizes": SIZES,
            "epochs": epochs,
            "points": len(one["losses"]),
            "difference": gaps,
            "same": all(gap["relative"] <= SAME for gap in gaps.values()),
            "runs": {"one": one, "two": two, "killed": killed},
        }
        write_json(Path(__file__).parent / "results" / "distributed.json", facts)


if __name__ == "__main__":
    main()
