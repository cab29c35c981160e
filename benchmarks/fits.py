"""The main job on real data: `gossamer fit` as a user calls it, each with the figure it has to reach.

Run from the repository root: `python benchmarks/fits.py [digits] [cifar10] [etth1] [sst2]`; all four take about 30
minutes. The data are looked for in `GOSSAMER_DATA` (default `../shared/data` beside the checkout); digits needs none.
Writes `benchmarks/results/fit_<name>.json`: target, what was reached, the winner with its costs, seconds, device.

- the figure is the one of the exported file on the test split, as the run's `results.json` has it
- for CIFAR-10 the int8 file is also timed against the same network eager in float32, interleaved, one image at a time,
  and its accuracy on the test split is set beside that of the float32 file
- runs lie in `runs/benchmarks/` (`--out`); each starts anew, its predecessor is removed
- `--quick` gives each 30 s, only to see that it works: nothing is written
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Proof:
    """One run and what it has to show.

    Args:
        data: a built-in, or a path below the data folder.
        words: arguments of `gossamer fit`.
        target: least accuracy, or largest mean squared error.
    """

    data: str
    words: tuple[str, ...]
    target: float
    int8: bool = False


PROOFS = {
    "digits": Proof("digits", ("--budget", "latency=1ms", "--time", "3m"), 0.98),
    "cifar10": Proof("cifar10.tar.xz", ("--budget", "latency=10ms", "--time", "20m"), 0.75, int8=True),
    "etth1": Proof("ett/ETTh1.csv", ("--budget", "latency=10ms", "--time", "3m", "--horizon", "96"), 0.40),
    "sst2": Proof("sst2", ("--budget", "latency=10ms", "--time", "3m"), 0.80),
}


def prove(name: str, proof: Proof, out: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Runs the command and gives what came of it."""
    source = proof.data if proof.data == "digits" else str(DATA / proof.data)
    words = list(proof.words)
    if quick:
        words[words.index("--time") + 1] = "30s"
    run = out / name
    shutil.rmtree(run, ignore_errors=True)
    load = os.getloadavg()[0]
    command = ["gossamer", "fit", source, *words, "--seed", str(seed), "--out", str(run)]
    print("$", " ".join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    row: dict[str, Any] = {
        "command": " ".join(["gossamer", "fit", proof.data, *words, "--seed", str(seed)]),
        "target": proof.target,
        "exit_code": done.returncode,
        "load_before": round(load, 2),
    }
    if not (run / "results.json").exists():
        return row | {"reached": False}
    results = json.loads((run / "results.json").read_text())
    keys = ("task", "metric", "maximise", "budget", "meets_budget", "asked_seconds", "seconds", "seed", "gossamer")
    row |= {key: results[key] for key in (*keys, "device")}
    winner = results["winner"]
    if winner is None:
        return row | {"value": None, "reached": False}
    value = winner["test"][results["metric"]]
    better = value >= proof.target if results["maximise"] else value <= proof.target
    row |= {
        "value": value,
        "reached": bool(better and results["meets_budget"]),
        "winner": {key: winner[key] for key in ("name", "form", "model", "val", "test", "cost", "interval", "why")},
        "points": [{k: p[k] for k in ("name", "form", "val", "cost", "status", "why")} for p in results["points"]],
    }
    if proof.int8:
        row["int8"] = int8_against_eager(source, results, seed)
    return row


def int8_against_eager(source: str, results: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The int8 file of the winner beside its own float32 forms; None where no int8 file was kept."""
    import torch

    import gossamer
    from gossamer.io import onnx_callable, onnx_session
    from gossamer.measure import latency
    from gossamer.shrink.artefacts import ExportedModel
    from gossamer.train.trainer import model_outputs

    points = [p for p in results["points"] if "int8" in p["form"] and p["status"] != "rolled back"]
    chosen = [p for p in points if p["status"] == "winner"]
    chosen += [p for p in points if p["name"] == results["winner"]["name"]]
    if not chosen:
        return None
    small = chosen[0]
    floats = small["form"].replace("int8", "float32")
    (base,) = [p for p in results["points"] if (p["name"], p["form"]) == (small["name"], floats)]
    data = gossamer.read_dataset(source, seed=seed)
    task = gossamer.create_task(data.task, data.spec, data.meta)
    score = {p["form"]: task.metrics(*model_outputs(ExportedModel(p["file"]), task, data.test)) for p in (base, small)}
    model = gossamer.load(base["model"])
    inputs, _ = task.batch(data.test, torch.arange(1))
    with torch.inference_mode():
        timing = latency(
            {
                "int8": onnx_callable(onnx_session(small["file"]), list(inputs)),
                "eager": lambda: model(*inputs),
                "float32 file": onnx_callable(onnx_session(base["file"]), list(inputs)),
            },
            budget_s=20.0,
        )
    before, after = score[base["form"]]["accuracy"], score[small["form"]]["accuracy"]
    speedup = timing["eager"].median_ms / timing["int8"].median_ms
    return {
        "form": small["form"],
        "status": small["status"],
        "ms": {name: one.to_dict() for name, one in timing.items()},
        "speedup_over_eager": speedup,
        "accuracy_float32": before,
        "accuracy_int8": after,
        "points_lost": 100 * (before - after),
        "target": "at least 2 times faster, at most 1 point lost",
        "reached": speedup >= 2 and 100 * (before - after) <= 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PROOFS)}; all if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="30 s each, nothing is written")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(PROOFS):
        parser.error(f"no such proof: {', '.join(sorted(unknown))}; there are {', '.join(PROOFS)}")
    from gossamer.io import write_json

    for name in asked.names or PROOFS:
        proof = PROOFS[name]
        if proof.data != "digits" and not (DATA / proof.data).exists():
            print(f"{name}: left out, no {proof.data} in {DATA}; set GOSSAMER_DATA")
            continue
        row = prove(name, proof, asked.out, quick=asked.quick, seed=asked.seed)
        words = "reached" if row["reached"] else "NOT reached"
        print(f"{name}: {row.get('metric')} {row.get('value')} (target {proof.target}): {words}")
        if int8 := row.get("int8"):
            print(f"  int8 {int8['speedup_over_eager']:.2f} times eager, {int8['points_lost']:.2f} points lost")
        if not asked.quick:
            write_json(Path(__file__).parent / "results" / f"fit_{name}.json", row)


if __name__ == "__main__":
    main()
