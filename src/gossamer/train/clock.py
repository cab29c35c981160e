"""Wall-clock time of a fit: kept across kills, cut into stages, stopped by Ctrl-C."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from gossamer.io import read_json, write_json

# Shares of the whole time at which a stage has to be over; what is left after the last is for shrinking,
# exporting and reporting.
MEASURED_BY, RACED_BY = 0.12, 0.40
TAIL_SHARE, TAIL_MOST = 0.10, 0.4
# A process older than this has been doing something else before.
START_UP_S = 15.0


class Clock:
    """Seconds used and left of `total`, counted from the start of the first process of this run.

    Within the block, the first Ctrl-C sets `interrupted` (stages end early, the run finishes with what is there);
    a second one ends the process as usual.
    """

    def __init__(self, total: float, file: Path) -> None:
        self.total = total
        self.tail_s = TAIL_SHARE * total
        self.interrupted = False
        self._file = file
        self._before = read_json(file)["seconds"] if file.exists() else 0.0
        self._start = time.perf_counter() - process_age()
        self._saved = 0.0

    @property
    def used(self) -> float:
        return self._before + time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return self.total - self.used

    @property
    def measured_by(self) -> float:
        return MEASURED_BY * self.total

    @property
    def raced_by(self) -> float:
        return RACED_BY * self.total

    @property
    def finished_by(self) -> float:
        """When training ends: the rest is needed for shrinking, exporting and the report."""
        return self.total - min(self.tail_s, TAIL_MOST * self.total)

    def over(self, mark: float) -> bool:
        """Whether the time `mark` has come, or the user has had enough."""
        self.save()
        return self.interrupted or self.used >= mark

    def save(self, *, now: bool = False) -> None:
        """Notes the seconds used, at most every few seconds unless `now`."""
        if now or time.perf_counter() - self._saved > 5:
            self._saved = time.perf_counter()
            write_json(self._file, {"seconds": round(self.used, 1)})

    def __enter__(self) -> Clock:
        self._previous: Any = None
        with suppress(ValueError):  # not the main thread: Ctrl-C is then somebody else's to handle
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save(now=True)
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def process_age() -> float:
    """Seconds since this process began, where that is start-up: imports are the user's time too, a session is not."""
    import psutil

    age = time.time() - psutil.Process().create_time()
    return age if 0 < age < START_UP_S else 0.0
