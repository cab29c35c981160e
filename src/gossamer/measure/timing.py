"""Latency of several callables, measured side by side so that they can be compared.

- interleaved: every round calls each form once, in an order drawn anew, so that a change of clock or load
  falls on all of them, and no form always runs behind the same neighbour
- warmed up until the medians of successive windows agree within 5 %; the first call (lazy set-up,
  compilation) is outside the budget
- repeated until the median of each form is known within 1 %, or the budget is spent
- garbage collection is off while the clock runs
- the 95 % interval of the median comes from a block bootstrap: whole stretches of consecutive runs are drawn,
  since neighbours in time are alike and counting them as independent would make the interval too narrow
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

WARM = 0.05  # successive windows this near are called stable
PRECISE = 0.01  # half-width of the interval, as a share of the median, at which measuring ends
SAME = 0.01  # medians nearer than this are never told apart: layout in memory alone moves them so far
MAX_RUNS = 2000
WINDOW = 5
ENOUGH = 30  # runs below which an interval is too uncertain itself to end the measurement
RESAMPLES = 400


@dataclass(frozen=True)
class Latency:
    """Latency of one callable, in milliseconds.

    Attributes:
        median_ms, p10_ms, p90_ms, iqr_ms: of all runs after warm-up.
        low_ms, high_ms: 95 % interval of the median, block bootstrap.
        runs, warmup: calls counted, and calls before them.
        stable: whether warm-up ended by agreement, not by its limit.
        threads: PyTorch's intra-op threads during the runs.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    iqr_ms: float
    low_ms: float
    high_ms: float
    runs: int
    warmup: int
    stable: bool
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.low_ms:.3g} to {self.high_ms:.3g})"


def distinguishable(a: Latency, b: Latency) -> bool:
    """Whether `a` and `b` differ by more than the noise.

    True when the 95 % intervals of the two medians do not overlap and the medians are more than 1 % apart.
    That is stricter than a test at 5 %: two such intervals of equal things seldom part, so it errs towards
    "same".
    """
    apart = a.high_ms < b.low_ms or b.high_ms < a.low_ms
    return apart and abs(a.median_ms - b.median_ms) > SAME * min(a.median_ms, b.median_ms)


def latency(
    forms: Mapping[str, Callable[[], object]],
    *,
    budget_s: float | int = 2.0,
    min_runs: int = 10,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time each callable of `forms`, interleaved.

    Args:
        forms: name to a callable of no arguments that does the whole work once.
        budget_s: seconds for all forms together, warm-up included, first calls not. Ends sooner where the
            medians are known well enough.
        min_runs: counted runs of each form even when the budget is spent.
        threads: PyTorch's intra-op threads meanwhile; None leaves them. ONNX Runtime sessions have their own.

    Raises:
        ValueError: no forms, or a budget or run count that is not positive.
    """
    if not forms:
        raise ValueError("forms must hold at least one callable, got none")
    if budget_s <= 0 or min_runs < 1:
        raise ValueError(f"budget_s and min_runs must be positive, got {budget_s} and {min_runs}")
    with _threads(threads), _no_collection():
        clock = _Clock(forms)
        clock.round()  # lazy set-up, compilation: nobody's budget
        start = time.perf_counter()
        stable = _warm_up(clock, start + budget_s / 4)
        warmup = clock.runs
        clock.clear()
        deadline, check = start + budget_s, max(min_runs, ENOUGH)
        while clock.runs < MAX_RUNS:
            clock.round()
            if clock.runs >= min_runs and time.perf_counter() > deadline:
                break
            if clock.runs >= check:
                if all(_precise(samples) for samples in clock.samples.values()):
                    break
                check = int(check * 1.5)
        used = torch.get_num_threads()
    return {
        name: _summary(np.asarray(samples) * 1e3, warmup, name in stable, used)
        for name, samples in clock.samples.items()
    }


class _Clock:
    """Calls every form once a round, and keeps the seconds."""

    def __init__(self, forms: Mapping[str, Callable[[], object]]) -> None:
        self.forms = list(forms.items())
        self.order = random.Random(0)
        self.wait = torch.cuda.synchronize if torch.cuda.is_available() else None
        self.samples: dict[str, list[float]] = {}
        self.runs = 0
        self.clear()

    def clear(self) -> None:
        self.samples = {name: [] for name, _ in self.forms}
        self.runs = 0

    def round(self) -> None:
        for name, call in self.order.sample(self.forms, len(self.forms)):
            if self.wait:
                self.wait()
            start = time.perf_counter()
            call()
            if self.wait:
                self.wait()
            self.samples[name].append(time.perf_counter() - start)
        self.runs += 1


def _warm_up(clock: _Clock, deadline: float) -> set[str]:
    """Run until each form's last two windows have like medians, or until `deadline`; the names that did."""
    while True:
        for _ in range(WINDOW):
            clock.round()
            if time.perf_counter() > deadline:
                return _stable(clock)
        stable = _stable(clock)
        if len(stable) == len(clock.samples):
            return stable


def _stable(clock: _Clock) -> set[str]:
    names = set()
    for name, samples in clock.samples.items():
        if len(samples) >= 2 * WINDOW:
            last, before = np.median(samples[-WINDOW:]), np.median(samples[-2 * WINDOW : -WINDOW])
            if abs(last - before) <= WARM * min(last, before):
                names.add(name)
    return names


def _precise(samples: list[float]) -> bool:
    low, high = _interval(np.asarray(samples))
    return bool(high - low <= 2 * PRECISE * np.median(samples))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median by circular block bootstrap with blocks of sqrt(runs)."""
    n = len(samples)
    if n < 3:
        return float(samples.min()), float(samples.max())
    length = max(1, int(n**0.5))
    draw = np.random.default_rng(0)
    starts = draw.integers(0, n, (RESAMPLES, -(-n // length)))
    index = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :n] % n
    low, high = np.quantile(np.median(samples[index], axis=1), [0.025, 0.975])
    return float(low), float(high)


def _summary(ms: np.ndarray, warmup: int, stable: bool, threads: int) -> Latency:
    p10, p25, median, p75, p90 = (float(q) for q in np.quantile(ms, [0.1, 0.25, 0.5, 0.75, 0.9]))
    low, high = _interval(ms)
    return Latency(median, p10, p90, p75 - p25, low, high, len(ms), warmup, stable, threads)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
