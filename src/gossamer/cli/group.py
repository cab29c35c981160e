"""How every command ends when the user's input was wrong: one line on stderr and exit code 2.

- `--debug`, anywhere on the line, shows the traceback instead
- Ctrl-C ends with exit code 130
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

__all__ = ["OneLineErrors"]

# Click's UsageError, by way of Typer, which brings its own Click from some version on.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)


class OneLineErrors(TyperGroup):
    """A Typer group that turns errors a user can mend into one line `error: ...` and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        with _one_line(debug=False):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(debug=ctx.params.get("debug", False)):
            return super().invoke(ctx)


@contextmanager
def _one_line(*, debug: bool) -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        # Called with nothing at all, Click raises a "usage error" whose message is the help itself.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        ctx = getattr(error, "ctx", None)
        where = f" (see `{ctx.command_path} --help`)" if ctx else ""
        _end(f"{error.format_message().rstrip('.')}{where}", error)  # type: ignore[attr-defined]
    except BrokenPipeError:
        raise
    except _USER_ERRORS as error:
        if debug:
            raise
        _end(_message(error), error)
    except KeyboardInterrupt as stop:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from stop


def _end(message: str, error: Exception) -> None:
    typer.echo("error: " + "; ".join(line.strip() for line in message.splitlines() if line.strip()), err=True)
    raise typer.Exit(2) from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{(error.strerror or type(error).__name__).lower()}: {error.filename}"
    return str(error) or type(error).__name__
