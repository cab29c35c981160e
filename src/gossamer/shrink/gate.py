"""The speed gate: a change is kept only if the artefact that will run is faster by more than the noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.measure.timing import Latency, distinguishable, latency

CLEAR, LONGER = 0.05, 4.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found: whether it opened, the two latencies, and the reason in words."""

    passed: bool
    before: Latency
    after: Latency
    why: str


def speed_gate(
    before: Callable[[], object], after: Callable[[], object], *, seconds: float = 1.5, what: str = "the change"
) -> Verdict:
    """Times both forms interleaved; passes if `after` is faster by more than the noise.

    Where the medians differ by more than `CLEAR` and the noise still hides it, they are timed once more, for longer.
    """
    for budget in (seconds, LONGER * seconds):
        timing = latency({"before": before, "after": after}, budget_s=budget)
        old, new = timing["before"], timing["after"]
        if distinguishable(old, new) or abs(new.median_ms / old.median_ms - 1) < CLEAR:
            break
    if not distinguishable(old, new):
        why = f"{what} is not distinguishable in speed: {new} against {old}"
        return Verdict(False, old, new, why)
    if new.median_ms >= old.median_ms:
        return Verdict(False, old, new, f"{what} is slower: {new} against {old}")
    return Verdict(True, old, new, f"{what} is {old.median_ms / new.median_ms:.2f} times faster: {new} against {old}")
