"""`gossamer train MODEL DATA`: one model by name, trained without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.options import (
    AsJson,
    Data,
    Seed,
    Task,
    reads_data,
)
from gossamer.cli.show import print_json
from gossamer.cli.units import parse_duration, parse_settings, short


@reads_data
def command(
    model: Annotated[str, typer.Argument(help="A model's name, e.g. autoformer or cct_7_3x1_32.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on where it was.")],
    task: Task = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.", min=1)] = None,
    time: Annotated[str | None, typer.Option(help="Stop after this long, like 20m.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", min=0.0)] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size, all processes together.", min=1)] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A size of the model, like dim=64 or depths=[2,2]; repeat."),
    ] = None,
    pretrain: Annotated[
        int, typer.Option(help="Images: passes over them without labels first, for a ViT with a class token.", min=0)
    ] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory for a third more time; the same gradients.")
    ] = False,
    seed: Seed = 0,
    *,
    options: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Train one model by name."""
    seconds = parse_duration(time) if time is not None else None

    from gossamer.train import train_model

    result = train_model(
        model,
        data,
        out=out,
        task=task,
        epochs=epochs,
        seconds=seconds,
        lr=lr,
        batch_size=batch,
        seed=seed,
        settings={"checkpointing": True} if checkpointing else None,
        options=options,
        model_options=parse_settings(sizes or []),
        pretrain=pretrain,
        quiet=as_json,
    )
    if as_json:
        print_json(result)
        return
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {short(v) if isinstance(v, float) else v}" for name, v in value.items())
        typer.echo(f"{key:14} {value}")
