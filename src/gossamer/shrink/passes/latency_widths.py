"""Widths where this device's latency drops: each part is cut to one of its steps, by what it keeps and what it costs.

Source: ours; the staircase of latency against width is that of Radu et al. 2019, "Performance Aware Convolutional
Neural Network Channel Pruning for Embedded GPUs"; the choice is a knapsack with one option a part (OFA and its kin).

- each part is timed at some widths, once for its shape, the threads and the device (`gossamer.shrink.costs`)
- `max sum_p worth_p(w_p)` so that `sum_p ms_p(w_p) <= keep * sum_p ms_p(full)`, `w_p` among the steps of part p
- with scores of `magnitude`, which compare members of one part only, `worth_p(w) = ms_p(full) log(share of the squared
  importance that the best w have)`: equal members everywhere would give every part the share `keep`
- with those of `optin`, which compare all members, it is their sum
"""

from __future__ import annotations

import time
from typing import Literal

from torch import nn

from gossamer.layers.prune import Prunable
from gossamer.shrink.base import Calibration, Step, check_share, register_pass
from gossamer.shrink.costs import fit_widths, staircases
from gossamer.shrink.masks import members
from gossamer.shrink.passes import optin


@register_pass(
    "latency_widths",
    family="structured pruning",
    saves=("macs", "params", "size"),
    default={"keep": 0.6},
)
def latency_widths(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    scores: Literal["magnitude", "optin"] = "magnitude",
    samples: int = 128,
    reconstruct: bool = True,
) -> list[Step]:
    """Cuts heads and hidden units to the widths where this device's latency drops, those worth most within a budget.

    Args:
        keep: share of the parts' measured latency that is left.
        scores: what a member is worth, by its weights or by OPTIN's scores.
        samples: rows that OPTIN's scores are measured on.
        reconstruct: fit what is left to what there was (`gossamer.shrink.trajectory.refit`).

    Raises:
        Unsupported: no part of the model can be masked and sliced.
        ValueError: `keep` is not in (0, 1], or below what the narrowest steps take.
    """
    check_share("keep", keep)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    begun = time.perf_counter()
    if scores == "optin":
        valued = optin.score(model, calibration, samples=samples)
        widths = {m: len(values) for m, values in valued.items()}
    else:
        widths = members(model)
    stairs = staircases(model, calibration.example(1), widths, seconds=max(1.0, calibration.seconds / 4))
    ranks, worth = {}, {}
    for m, width in widths.items():
        if scores == "optin":
            own = valued[m]
        else:
            part = model.get_submodule(m[0])
            assert isinstance(part, Prunable)
            own = part.importance(m[1]).double().square().cpu()
        ranks[m] = own.argsort(descending=True, stable=True)
        worth[m] = own[ranks[m]].cumsum(0)
        if scores == "magnitude":
            worth[m] = stairs[m](width) * (worth[m] / worth[m][-1].clamp(min=1e-30)).clamp(min=1e-12).log()
    masks = fit_widths(ranks, worth, stairs, keep)
    measured = time.perf_counter()
    steps = optin.prune(model, calibration, masks, samples=samples, reconstruct=reconstruct, begun=begun)
    report = {
        "seconds_scoring": measured - begun,
        "seconds_pruning": time.perf_counter() - measured,
        "latency_share": sum(stairs[m](int(k.sum())) for m, k in masks.items())
        / sum(stairs[m](n) for m, n in widths.items()),
    }
    setattr(model, "shrink_report", {**getattr(model, "shrink_report", {}), "latency_widths": report})  # noqa: B010
    return steps
