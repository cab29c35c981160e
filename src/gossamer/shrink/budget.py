"""Budgets: the most each cost may be, in base units, and how far a cost is from its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping

BUDGET_UNITS = {"latency": "ms", "memory": "MiB", "size": "MB", "params": "", "macs": ""}


def check_budget(budget: Mapping[str, float]) -> None:
    """Raises a ValueError where a cost is unknown or a limit not positive."""
    for name, value in budget.items():
        if name not in BUDGET_UNITS:
            raise ValueError(f"budget must name {', '.join(BUDGET_UNITS)}; got {name!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"budget {name} must be positive, got {value}")


def excess(cost: dict[str, float | None], budget: dict[str, float]) -> float:
    """Largest ratio of a cost to its limit; at most 1 means the budget is met."""
    ratios = [value / limit for name, limit in budget.items() if (value := cost.get(name)) is not None]
    return max(ratios, default=0.0)


def over_budget(cost: dict[str, float | None], budget: dict[str, float]) -> str:
    """The costs above their limits, in words; empty if there is none."""
    return ", ".join(
        f"{name} {_figure(value)}{BUDGET_UNITS[name]} > {_figure(limit)}{BUDGET_UNITS[name]}"
        for name, limit in budget.items()
        if (value := cost.get(name)) is not None and value > limit
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
