"""`gossamer advise DATA --budget ...`: which models are worth trying, from their cost alone."""

from __future__ import annotations

import typer

from gossamer.cli.options import (
    AsJson,
    Budget,
    Data,
    Horizon,
    LabelColumn,
    Lookback,
    Seed,
    Target,
    Task,
    TextColumn,
    TimeColumn,
    Tokenizer,
    reader_options,
)
from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import parse_budget, short


def command(
    data: Data,
    task: Task = None,
    budget: Budget = "",
    seed: Seed = 0,
    horizon: Horizon = None,
    lookback: Lookback = None,
    target: Target = None,
    time_column: TimeColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Rank models for your data and budget without training any."""
    limits = parse_budget(budget) if budget else {}
    options = reader_options(
        horizon=horizon,
        lookback=lookback,
        target=target,
        time_column=time_column,
        text_column=text_column,
        label_column=label_column,
        tokenizer=tokenizer,
    )

    from gossamer.fit import advise

    advice = advise(data, task=task, budget=limits, seed=seed, options=options)
    if as_json:
        print_json(advice)
        return
    print_table(
        ("model", "fits", "params", "MACs", "latency ms", "why"),
        [
            (
                row["name"],
                "yes" if row["fits"] else "no",
                short(row["params"]),
                short(row["macs"]),
                short(row["latency"]),
                row["why"],
            )
            for row in advice["candidates"]
        ],
        numbers=("params", "MACs", "latency ms"),
        cut=("why",),
    )
    typer.echo("ranked by cost measured on this device and by what such models reached on like data; none was trained")
