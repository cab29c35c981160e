"""The command `gossamer`: one file per command; each parses, calls a floor below, and prints.

- a command's file imports Typer and the standard library only; the floor it calls is imported when it runs
- wrong input ends in one line and exit code 2 (`group.py`)
"""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer import __version__
from gossamer.cli import advise, bench, export, fit, info, listing, measure, predict, search, shrink, train
from gossamer.cli.group import OneLineErrors

__all__ = ["app", "main"]

app = typer.Typer(
    name="gossamer",
    cls=OneLineErrors,
    help="Efficient transformers, picked by budget on your own device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("fit")(fit.command)
app.command("shrink")(shrink.command)
app.command("advise")(advise.command)
app.command("predict")(predict.command)
app.command("list")(listing.command)
app.command("info")(info.command)
app.command("measure")(measure.command)
app.command("train")(train.command)
app.command("export")(export.command)
app.add_typer(bench.app, name="bench")
app.add_typer(search.app, name="search")


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"gossamer {__version__}")
        raise typer.Exit()
    return asked


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; this is what the installed script calls."""
    app()
