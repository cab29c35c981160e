"""What a fit shows while it works: what is being tried, the best so far, the time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gossamer.train.clock import Clock

LINE_EVERY_S = 20.0


class Progress:
    """A few live lines on a terminal; a plain line now and then elsewhere; nothing if `quiet`."""

    def __init__(self, clock: Clock, *, quiet: bool) -> None:
        self.clock = clock
        self.quiet = quiet
        self.doing = ""
        self.best = "nothing yet"
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._last = 0.0

    def __enter__(self) -> Progress:
        if not self.quiet and self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def tell(self, doing: str) -> None:
        """What is being done now."""
        stage = doing.split(":")[0].split(" ")[0] != self.doing.split(":")[0].split(" ")[0]
        self.doing = doing
        if self._live is None and not self.quiet and (stage or time.perf_counter() - self._last > LINE_EVERY_S):
            self._last = time.perf_counter()
            self._console.print(
                f"[{self.clock.used:5.0f}s of {self.clock.total:.0f}s] {doing}; best {self.best}",
                highlight=False,
                soft_wrap=True,
            )

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        left = max(0, round(self.clock.left))
        table.add_row("trying", self.doing)
        table.add_row("best so far", self.best)
        ending = "  (Ctrl-C: finishing with what is there)" if self.clock.interrupted else ""
        table.add_row("time left", f"{left // 60}m {left % 60:02d}s{ending}")
        return table
