"""The training after a change, within the time that the pass has left."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor, nn

from gossamer.shrink.base import Calibration


def recover(
    model: nn.Module,
    calibration: Calibration,
    *,
    steps: int | None,
    lr: float,
    began: float,
    teacher: nn.Module | None = None,
    objective: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor] | None = None,
    share: float = 1.0,
) -> float:
    """Trains `model` for `steps` (three epochs by default), within the share of what is left of the calibration's time.

    Args:
        began: `time.perf_counter()` when the pass started.

    Returns:
        The mean loss, NaN if there was no step.
    """
    left = (calibration.seconds - (time.perf_counter() - began)) * share
    if left <= 0 or steps == 0:
        return float("nan")
    trainer = calibration.trainer(model, teacher=teacher, objective=objective, lr=lr, ema=0.0)
    count = 3 * trainer.steps_per_epoch if steps is None else steps
    loss = trainer.train(steps=count, seconds=left, schedule="linear")
    trainer.optimiser.zero_grad()
    model.eval()
    return loss


def check_steps(steps: int | None) -> None:
    """Raises a ValueError where a number of steps is negative."""
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
