"""`gossamer predict RUN INPUT...`: what a fitted model says of new files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.options import AsJson
from gossamer.cli.show import print_json


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished fit or shrink.")],
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
    for row in predictions:
        if "forecast" in row:
            typer.echo(f"# {row['input']}\n{_csv(row['forecast'])}", nl=False)
        elif "class" not in row:
            # Vectors are for --json; what is said of them is for reading.
            facts = [f"{k.replace('_', ' ')} {v}" for k, v in row.items() if k not in ("input", "vector")]
            typer.echo(f"{row['input']}: {', '.join(facts) or 'a vector (see --json)'}")
        else:
            others = ", ".join(f"{name} {chance:.1%}" for name, chance in list(row["top"].items())[1:])
            typer.echo(f"{row['input']}: {row['class']} {row['probability']:.1%}" + (f" ({others})" if others else ""))


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    return text.getvalue()
