"""A stitched family at its published sizes: what every path costs on this device, and calls that ask for a latency.

`python benchmarks/stitched.py [--system snnet_deit_ti_s_b] [--seconds 90]` writes `benchmarks/results/stitched.json`:
multiply-adds and latency of every path, their rank correlation, whether latency rises along the paths by cost (ten of
them, evenly spaced, within the intervals of the measurement), and for five limits what a call within each took.

- weights are random: time does not depend on them
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any, cast

import torch
from scipy.stats import spearmanr

from gossamer.io import write_json
from gossamer.measure import device_info, latency
from gossamer.models import create_model

OUT = Path(__file__).parent / "results" / "stitched.json"
SHOWN, LIMITS = 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="snnet_deit_ti_s_b")
    parser.add_argument("--seconds", type=float, default=90.0, help="for timing all paths side by side")
    given = parser.parse_args()
    load_before = os.getloadavg()[0]
    net = cast(Any, create_model(given.system).eval())
    image = (torch.randn(1, 3, 224, 224),)
    costs = net.costs(image)
    timed = net.measure(image, seconds=given.seconds)
    rows = [
        {"path": i, "macs": cost, "ms": t.median_ms, "interval": [t.low_ms, t.high_ms]}
        for i, (cost, t) in enumerate(zip(costs, timed, strict=True))
    ]
    ranked = sorted(rows, key=lambda row: row["macs"])
    shown = [ranked[i * (len(ranked) - 1) // (SHOWN - 1)] for i in range(SHOWN)]
    rises = [b["interval"][1] >= a["interval"][0] for a, b in itertools.pairwise(shown)]
    times = sorted(row["ms"] for row in rows)
    limits = [1.05 * times[i * (len(times) - 1) // (LIMITS - 1)] for i in range(LIMITS)]
    with torch.inference_mode():
        calls = {str(i): (lambda limit=limit: net(*image, latency_ms=limit)) for i, limit in enumerate(limits)}
        kept = latency(calls, budget_s=given.seconds / 3)
    result = {
        "system": given.system,
        "paths": len(rows),
        "rank_correlation": float(spearmanr([r["macs"] for r in rows], [r["ms"] for r in rows]).statistic),
        "rises_along_the_front": all(rises),
        "shown": shown,
        "calls": [
            {"limit_ms": limit, "took_ms": kept[str(i)].median_ms, "path": net.within(limit)}
            for i, limit in enumerate(limits)
        ],
        "rows": rows,
        "load_before": load_before,
        "device": device_info(),
    }
    write_json(OUT, result)
    print(*(f"{k}: {result[k]}" for k in ("paths", "rank_correlation", "rises_along_the_front")), sep="\n")
    print(*result["calls"], sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
