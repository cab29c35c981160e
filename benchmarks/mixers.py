"""How the time of every mixer grows between 1,024 and 16,384 tokens, on sequences and on images.

`python benchmarks/mixers.py [--dim 96] [--minutes 5]` writes `benchmarks/results/mixers.json`: for each mixer and
number of grid axes the exponent of time on tokens, of its block and of the mixer alone (the block's time less that of a
block without a mixer, timed in turn), and for those whose cost is said to be linear whether it is at most 1.15.

- a mixer that takes less than a fifth of its block's time cannot be told from the noise: its block's exponent counts
- those said to be linear for which the time did not do are timed once more without the others
- figures at each grid are kept too; `gossamer bench mixers` gives the same for other grids, with accuracy if asked
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gossamer.bench.mixers import bench_mixers, exponent
from gossamer.io import write_json

OUT = Path(__file__).parent / "results" / "mixers.json"
GRIDS = ((16384,), (128, 128))
LIMIT = 1.15
SHARE = 0.2
LINEAR = (
    "bigbird",
    "cross_feature",
    "depthwise",
    "gam",
    "grid_attention",
    "hashed_linear",
    "linear",
    "linformer",
    "local",
    "local_aggregator",
    "longformer",
    "mamba2",
    "performer",
    "plain_window",
    "pool",
    "simplified_linear",
    "window",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each number of grid axes")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-mixers"), help="where runs are kept")
    given = parser.parse_args()
    result: dict[str, Any] = {"limit": LIMIT, "dim": given.dim, "load_before": round(os.getloadavg()[0], 2)}
    for grid in GRIDS:
        axes = f"{len(grid)}d"
        found = bench_mixers(grid, given.dim, seconds=60 * given.minutes, out=given.runs / axes)
        rows = {row["name"]: row for row in found["mixers"]}
        short = [name for name, row in rows.items() if name in LINEAR and row["exponent"] is None]
        if short:
            again = bench_mixers(grid, given.dim, mixers=["identity", *short], seconds=60, out=given.runs / f"{axes}-2")
            rest = {row["name"]: row for row in again["mixers"]}
            found["mixers"] = [rest[row["name"]] if row["name"] in short else row for row in found["mixers"]]
        result[axes] = {
            "grids": found["grids"],
            "mixers": [_row(row, rows["identity"]) for row in found["mixers"]],
            "left_out": found["left_out"],
        }
        result["device"] = found["device"]
        write_json(OUT, result)
        for row in result[axes]["mixers"]:
            print(axes, row["name"], row["exponent"], row["mixer_exponent"], row.get("reached", ""))


def _row(row: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """A mixer's exponents; None where there were too few grids, or it takes no time that can be told."""
    base = {size["tokens"]: size["ms"] for size in without["sizes"]}
    alone = [(size["tokens"], size["ms"] - base[size["tokens"]]) for size in row["sizes"] if size["tokens"] in base]
    told = alone and all(ms > SHARE * (ms + base[tokens]) for tokens, ms in alone)
    power = exponent(*zip(*alone, strict=True)) if told else None
    kept = {"name": row["name"], "exponent": row["exponent"], "mixer_exponent": power, "sizes": row["sizes"]}
    if row["name"] in LINEAR:
        counts = row["exponent"] if power is None else power
        kept["reached"] = counts is not None and counts <= LIMIT
    return kept


if __name__ == "__main__":
    main()
