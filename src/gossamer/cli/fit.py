"""`gossamer fit DATA --budget ...`: the best small transformer that fits, with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.options import (
    AsJson,
    Budget,
    DataOrNone,
    Seed,
    Task,
    reads_data,
)
from gossamer.cli.show import print_json
from gossamer.cli.units import parse_budget, parse_duration

NOTHING_FITS = 3
"""Exit code when no candidate meets the budget."""


@reads_data
def command(
    data: DataOrNone = None,
    task: Task = None,
    budget: Budget = "",
    time: Annotated[str, typer.Option(help="Wall-clock time for everything, like 10m or 1h30m.")] = "10m",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same one goes on with it.")] = None,
    seed: Seed = 0,
    storage: Annotated[
        str | None, typer.Option(help="Database of the study, so that other machines can join it.")
    ] = None,
    join: Annotated[Path | None, typer.Option(help="Work on the study of this run's folder; takes no DATA.")] = None,
    *,
    options: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Find, train, shrink and export the best small model for your data within a budget."""
    if (data is None) == (join is None):
        raise ValueError("fit needs either DATA or --join DIR, and not both")
    limits = parse_budget(budget) if budget else {}
    seconds = parse_duration(time)

    from gossamer.fit import FitOptions, fit

    result = fit(
        FitOptions(
            data=data,
            task=task,
            budget=limits,
            seconds=seconds,
            out=out,
            seed=seed,
            storage=storage,
            join=join,
            options=options,
            quiet=as_json,
        )
    )
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(result.summary())
    if not result.meets_budget:
        raise typer.Exit(NOTHING_FITS)
