"""`gossamer shrink MODEL --data DATA --budget latency=70%`: a model the user already has, made cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.options import (
    AsJson,
    Seed,
    Task,
    reads_data,
)
from gossamer.cli.show import print_json
from gossamer.cli.units import parse_duration, parse_shares

NOTHING_FITS = 3
"""Exit code when no file meets the budget."""


@reads_data
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a run, of a saved model or of Hugging Face transformers; or a name, with --weights.",
        ),
    ],
    data: Annotated[str, typer.Option(help="What the model is for: anything `gossamer fit` reads.")],
    budget: Annotated[
        str, typer.Option(help="Most the file may cost, as a share or a figure: latency=70%,macs=60%,size=5MB.")
    ] = "",
    recipe: Annotated[
        Path | None, typer.Option(help="YAML list of passes with settings, in place of the search.")
    ] = None,
    time: Annotated[str, typer.Option(help="Wall-clock time for everything, like 20m.")] = "20m",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; the same one goes on with it.")] = None,
    weights: Annotated[str | None, typer.Option(help="The authors' checkpoint, for a model given by name.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say which techniques suit model, device and budget, and why.")
    ] = False,
    task: Task = None,
    seed: Seed = 0,
    *,
    options: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Make a model you already have cheaper, with accuracy before and after."""
    limits, shares = parse_shares(budget) if budget else ({}, {})
    if not budget and recipe is None and not explain:
        raise ValueError("shrink needs --budget (like latency=70%) or --recipe FILE")
    seconds = parse_duration(time)

    from gossamer.shrink.options import ShrinkOptions
    from gossamer.shrink.recipe import read_recipe
    from gossamer.shrink.run import shrink

    asked = ShrinkOptions(
        model=model,
        data=data,
        budget=limits,
        shares=shares,
        task=task,
        seconds=seconds,
        recipe=None if recipe is None else read_recipe(recipe),
        weights=weights,
        out=out,
        seed=seed,
        options=options,
        quiet=as_json,
    )
    if explain:
        from gossamer.shrink.explain import explain as explained

        advice = explained(asked)
        if as_json:
            print_json(advice.to_dict())
        else:
            typer.echo(advice.text())
        return
    result = shrink(asked)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(result.summary())
    if not result.meets_budget:
        raise typer.Exit(NOTHING_FITS)
