"""`gossamer advise`: the candidates ranked by measured cost and by what there is time to learn; none is trained."""

from __future__ import annotations

import time
from typing import Any

from gossamer.data import read_dataset
from gossamer.fit.candidates import enumerate_candidates, measure_candidates
from gossamer.fit.race import base_settings
from gossamer.measure import device_info
from gossamer.tasks import create_task

TRAIN_S = 600.0
MEASURE_S = 120.0


def advise(
    source: str,
    *,
    task: str | None = None,
    budget: dict[str, float] | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Candidates for `source` within `budget`, the most promising first, with their cost on this device.

    Returns:
        `candidates`: rows of `name, fits, params, macs, latency (ms), why`; `device`; `assumes`.
    """
    data = read_dataset(source, task=task, seed=seed, **(options or {}))
    job = create_task(data.task, data.spec, data.meta)
    settings = base_settings(data, seed)
    end = time.perf_counter() + MEASURE_S
    found = measure_candidates(
        enumerate_candidates(data),
        job,
        data,
        budget or {},
        train_s=TRAIN_S,
        batch_size=settings.batch_size,
        stop=lambda: time.perf_counter() > end,
    )
    rows = []
    for c in found:
        cost = c.int8 if c.status == "int8" else c.cost
        rows.append(
            {
                "name": c.name,
                "model": c.model,
                "options": c.options,
                "fits": c.status in ("ready", "int8"),
                "form": "int8" if c.status == "int8" else "float32",
                "params": cost.get("params"),
                "macs": cost.get("macs"),
                "latency": cost.get("latency"),
                "size": cost.get("size"),
                "epochs": None if not c.cost else TRAIN_S / c.step_s * c.batch / len(data.train),
                "why": c.why,
            }
        )
    return {
        "task": data.task,
        "budget": budget or {},
        "candidates": rows,
        "device": device_info(),
        "assumes": f"{TRAIN_S:.0f} s of training for the winner",
    }
