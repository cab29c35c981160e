"""`gossamer predict RUN INPUT...`: what a fitted model says of new files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.options import AsJson
from gossamer.cli.show import print_json


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished `gossamer fit`.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files, texts or text files, or a CSV with the last steps of a series.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Use the result of a fit (by ONNX Runtime) on files of the same kind."""
    if not run.is_dir():
        raise FileNotFoundError(2, "no such run folder", str(run))

    from gossamer.fit import predict

    predictions = predict(run, inputs)
    if as_json:
        print_json(predictions)
        return
    for name, prediction in zip(inputs, predictions, strict=True):
        typer.echo(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in prediction.items()))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
