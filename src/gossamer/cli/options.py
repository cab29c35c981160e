"""Options that several commands share, and what they say to the data readers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "AsJson",
    "Budget",
    "Data",
    "DataOrNone",
    "Horizon",
    "InputSize",
    "LabelColumn",
    "Lookback",
    "Seed",
    "Target",
    "Task",
    "TextColumn",
    "TimeColumn",
    "Tokenizer",
    "reader_options",
]

_DATA = typer.Argument(
    metavar="DATA",
    help="A folder or archive of images, a CSV, TSV, Parquet or JSON lines file, a Hub name, "
    "or a built-in: digits, toy-images, toy-text, toy-series.",
)
Data = Annotated[str, _DATA]
DataOrNone = Annotated[str | None, _DATA]
Task = Annotated[
    str | None,
    typer.Option(help="image-classification, text-classification or forecasting; recognised if not given."),
]
Budget = Annotated[
    str, typer.Option(help="What the exported model may cost: latency=5ms,memory=100MiB,size=2MB,params=1M,macs=50M.")
]
Seed = Annotated[int, typer.Option(help="Fixes splits, initialisation and order.", min=0)]
Horizon = Annotated[int | None, typer.Option(help="Series: steps to forecast.", min=1)]
Lookback = Annotated[int | None, typer.Option(help="Series: steps the model reads.", min=1)]
Target = Annotated[str | None, typer.Option(help="Series: forecast this column alone, not all.")]
TextColumn = Annotated[str | None, typer.Option(help="Text: the column to classify.")]
LabelColumn = Annotated[str | None, typer.Option(help="Text: the column that holds the class.")]
TimeColumn = Annotated[str | None, typer.Option(help="Series: the column that holds the time.")]
Tokenizer = Annotated[
    Path | None, typer.Option(help="Text: a tokenizer.json to use; one is trained on the data otherwise.")
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="3x224x224 for images, 3x16x224x224 for clips, 128 for tokens, 96x7 for steps x channels; the model's own "
        "if not given.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def reader_options(
    *,
    horizon: int | None,
    lookback: int | None,
    target: str | None,
    time_column: str | None,
    text_column: str | None,
    label_column: str | None,
    tokenizer: Path | None,
) -> dict[str, Any]:
    """The keywords of `gossamer.data.read_dataset` that were given."""
    given = {
        "horizon": horizon,
        "lookback": lookback,
        "target": target,
        "time": time_column,
        "text": text_column,
        "label": label_column,
        "tokenizer": str(tokenizer) if tokenizer else None,
    }
    return {key: value for key, value in given.items() if value is not None}
