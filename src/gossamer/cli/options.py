"""Options that several commands share, and what they say to the data readers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

__all__ = ["AsJson", "Budget", "Data", "DataOrNone", "InputSize", "Seed", "Task", "Tokenizer", "reads_data"]

_DATA = typer.Argument(
    metavar="DATA",
    help="A folder or archive of images, a CSV, TSV, Parquet or JSON lines file, a Hub name, "
    "or a built-in: digits, toy-images, toy-text, toy-series.",
)
Data = Annotated[str, _DATA]
DataOrNone = Annotated[str | None, _DATA]
Task = Annotated[
    str | None,
    typer.Option(
        help="image-classification, text-classification, forecasting, or of models to be shrunk sentence-similarity "
        "or language-modelling; recognised if not given."
    ),
]
Budget = Annotated[
    str, typer.Option(help="What the exported model may cost: latency=5ms,memory=100MiB,size=2MB,params=1M,macs=50M.")
]
Seed = Annotated[int, typer.Option(help="Fixes splits, initialisation and order.", min=0)]
Tokenizer = Annotated[
    str | None, typer.Option(help="Text: a tokenizer.json to use; one is trained on the data otherwise.")
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


# A command's option, what it says, and the keyword of `gossamer.data.read_dataset` it becomes.
_READING: dict[str, tuple[Any, str]] = {
    "horizon": (Annotated[int | None, typer.Option(help="Series: steps to forecast.", min=1)], "horizon"),
    "lookback": (Annotated[int | None, typer.Option(help="Series: steps the model reads.", min=1)], "lookback"),
    "target": (Annotated[str | None, typer.Option(help="Series: forecast this column alone, not all.")], "target"),
    "time_column": (Annotated[str | None, typer.Option(help="Series: the column that holds the time.")], "time"),
    "text_column": (Annotated[str | None, typer.Option(help="Text: the column to classify.")], "text"),
    "label_column": (Annotated[str | None, typer.Option(help="Text: the column that holds the class.")], "label"),
    "tokenizer": (Tokenizer, "tokenizer"),
}


def reads_data(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of the data readers to `command`, which is called with those that were given as `options`."""
    own = inspect.signature(command, eval_str=True)

    @wraps(command)
    def reading(**given: Any) -> None:
        said = {keyword: given.pop(name) for name, (_, keyword) in _READING.items()}
        command(**given, options={k: v for k, v in said.items() if v is not None})

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(n, keyword_only, default=None, annotation=kind) for n, (kind, _) in _READING.items()]
    kept = [p.replace(kind=keyword_only) for name, p in own.parameters.items() if name != "options"]
    # `--json` stays last.
    setattr(reading, "__signature__", own.replace(parameters=[*kept[:-1], *added, kept[-1]]))  # noqa: B010
    return reading
