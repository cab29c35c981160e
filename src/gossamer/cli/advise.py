"""`gossamer advise DATA --budget ...`: which models are worth trying, from their cost alone."""

from __future__ import annotations

from typing import Any

import typer

from gossamer.cli.options import (
    AsJson,
    Budget,
    Data,
    Seed,
    Task,
    reads_data,
)
from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import parse_budget, short


@reads_data
def command(
    data: Data,
    task: Task = None,
    budget: Budget = "",
    seed: Seed = 0,
    *,
    options: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Rank models for your data and budget without training any."""
    limits = parse_budget(budget) if budget else {}

    from gossamer.fit import advise

    advice = advise(data, task=task, budget=limits, seed=seed, options=options)
    if as_json:
        print_json(advice)
        return
    print_table(
        ("candidate", "fits", "form", "params", "MACs", "latency ms", "size MB", "why"),
        [
            (
                row["name"],
                "yes" if row["fits"] else "no",
                row["form"],
                *(short(row[cost]) for cost in ("params", "macs", "latency", "size")),
                row["why"],
            )
            for row in advice["candidates"]
        ],
        numbers=("params", "MACs", "latency ms", "size MB"),
        cut=("why",),
    )
    device = advice["device"]
    typer.echo(
        f"measured on {device['cpu']}, {device['threads']} threads; assumes {advice['assumes']}; none was trained"
    )
