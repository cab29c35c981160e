"""Autoformer and Informer by name on ETTh1, 96 hours ahead, all variables, at the published setting.

Run from the repository root: `python benchmarks/forecasters.py [autoformer] [informer] [--epochs N] [--seeds 0 1 2]`
(hours on two cores: full width, 512). ETTh1 is looked for in `GOSSAMER_DATA` (default `../shared/data` beside the
checkout). Writes `benchmarks/results/forecasters.json`: test MSE and MAE on scaled data beside the published figures
(Wu et al. 2021, "Autoformer", table 1 and appendix), with seconds, device and versions.

- seq 96, label 48, width 512, 2 encoder layers and 1 decoder layer, batch 32, Adam at 1e-4, halved at each epoch but
  the first two, weights of the best validation; all of it the systems' own registered settings
- the split and the scaler are the published ones; no window of the test split is dropped
- a run that was stopped goes on where it was (`runs/benchmarks/`)
- `--quick` trains a tiny width for 10 s, only to see that it works: nothing is written
"""

import argparse
import os
from pathlib import Path
from typing import Any

from gossamer.io import read_json, write_json
from gossamer.train import train_model

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data")) / "ett" / "ETTh1.csv"
RESULTS = Path(__file__).parent / "results" / "forecasters.json"
WINDOW = {"horizon": 96, "lookback": 96}
PUBLISHED = {"autoformer": {"mse": 0.449, "mae": 0.459}, "informer": {"mse": 0.865, "mae": 0.713}}
MODELS = {"autoformer": "autoformer_etth1_96", "informer": "informer_m7"}
TINY = {"d_model": 16, "d_ff": 32, "n_heads": 2, "e_layers": 1}


def train(name: str, seed: int, out: Path, *, epochs: int | None, quick: bool) -> dict[str, Any]:
    result = train_model(
        MODELS[name],
        str(DATA),
        out=out / f"{name}-{seed}{'-quick' if quick else ''}",
        task="forecasting",
        epochs=epochs,
        seconds=10.0 if quick else None,
        seed=seed,
        options=WINDOW,
        model_options={**(TINY if quick else {}), "label_len": 48},
    )
    measured = result["test"]
    published = PUBLISHED[name]
    return {
        "model": MODELS[name],
        "seed": seed,
        "epochs": epochs or "the authors'",
        "published": published,
        "measured": measured,
        "reached": measured["mse"] <= published["mse"],
        **{key: result[key] for key in ("val", "best_epoch", "steps", "seconds", "precision", "device")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}; both if none is given")
    parser.add_argument("--epochs", type=int, help="the authors' number if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="tiny and short, nothing is written")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(MODELS):
        parser.error(f"no such forecaster: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if not DATA.exists():
        raise SystemExit(f"no {DATA}; set GOSSAMER_DATA")
    rows = read_json(RESULTS) if RESULTS.exists() and not asked.quick else {}
    for name in asked.names or MODELS:
        for seed in asked.seeds:
            row = train(name, seed, asked.out, epochs=asked.epochs, quick=asked.quick)
            words = "reached" if row["reached"] else "NOT reached"
            mse = row["measured"]["mse"]
            print(f"{name}, seed {seed}: MSE {mse:.4f} (published {row['published']['mse']}): {words}", flush=True)
            if not asked.quick:
                rows[f"{name}-{seed}"] = row
                write_json(RESULTS, rows)


if __name__ == "__main__":
    main()
