"""Printing: tables for people, pure JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

__all__ = ["print_json", "print_table"]


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout: dataclasses as objects, paths as text, NaN and infinity as null."""
    # Raw text to stdout: a console would wrap and colour it.
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Sequence[str] = (),
    cut: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """Print a table; `numbers` are set to the right, `cut` give way on a narrow terminal (column names)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe there is no width to keep to; cutting cells there would lose text that a program looks for.
    console = Console(width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for name in columns:
        # Rich narrows only columns that may wrap; a cell that does not wrap is then cut with an ellipsis.
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name not in cut)
    for row in rows:
        cells = ("-" if cell is None else str(cell) for cell in row)
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    console.print(table)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | int | float):  # NumPy and torch scalars
        return _plain(value.item())
    return value
