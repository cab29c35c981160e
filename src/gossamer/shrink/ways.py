"""Passes that are tried unasked, and which of them suits a model best at one strength.

- one shot each, no training of their own; the others are for recipes
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.measure import macs
from gossamer.shrink.base import Calibration, Unsupported, passes, run_pass

TRIED = ("optin", "greenformers", "depth", "merging", "word_tables", "latency_widths", "magnitude", "dependency")
# What they are called with beyond `keep`, where it is not their default.
SETTINGS: dict[str, dict[str, Any]] = {"greenformers": {"solver": "whitened"}}
# In which order those of several families are done.
ORDER = ("depth", "structured pruning", "factorisation", "token reduction")
SCREENED = 500  # validation items a trial is judged by
LEAST_LOSS = 0.002  # two losses below this share of the metric are the same
WORTH = 0.95  # a model with more than this share of its multiply-adds was not made smaller


def kindest(
    model: nn.Module, calibration: Calibration, *, keep: float, enough: Callable[[], bool]
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The model after the pass that loses least of the metric for the multiply-adds it saves, before any training.

    `price = (loss + LEAST_LOSS) / -log(share of the multiply-adds left)`, the loss a share of the metric.

    Args:
        keep: strength of every pass.
        enough: true when no further pass should be tried.

    Returns:
        The smaller model and the entry of a recipe that made it; None where no pass makes it smaller.
    """
    one = calibration.example()
    whole = macs(model, one).total
    before = calibration.score(model, limit=SCREENED)
    sign = 1 if calibration.task.maximise else -1
    best: tuple[float, nn.Module, dict[str, Any]] | None = None
    for name in TRIED:
        if best is not None and enough():
            break
        if name not in passes():
            continue
        entry = {"keep": keep, **SETTINGS.get(name, {})}
        try:
            smaller, _ = run_pass(name, model, calibration, **entry)
            share = macs(smaller, one).total / max(whole, 1)
            if share > WORTH:
                continue
            loss = max(0.0, sign * (before - calibration.score(smaller, limit=SCREENED))) / max(abs(before), 1e-9)
        except (Unsupported, RuntimeError, ValueError):  # one that cannot handle this model leaves it to the others
            continue
        price = (loss + LEAST_LOSS) / -math.log(max(share, 1e-6))
        if not math.isnan(price) and (best is None or price < best[0]):
            best = (price, smaller, {"pass": name, **entry})
    return None if best is None else best[1:]
