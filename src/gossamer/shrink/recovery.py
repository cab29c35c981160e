"""The training after a change: of a pass, within the time it has left, and of a run, in rounds that can be killed.

- a run's recovery first takes short rounds at several rates, each from the same weights, then longer ones from the best
- each round ends at a rate of zero and is scored; one that scores worse is taken back, and the next is slower: what
  mends a damaged model soonest spoils what it has learnt when it goes on for long
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.io import atomic_path, read_json, write_json
from gossamer.shrink.base import Calibration
from gossamer.train import Diverged, Trainer

RATES = (3e-5, 2e-4, 1e-3)  # learning rates tried, each for this share of the time
PROBED = 0.07
ROUNDS = 4  # after that, fewer where a round would have less than this many steps
LEAST_STEPS = 60
SLOWER = 4.0
BATCHES = (32, 64, 128)  # batch sizes: the largest that pays, a sample taking this share of before
PAYS = 0.8
SAVED_S = 15.0


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


def recover_in_rounds(
    model: nn.Module,
    place: Path,
    *,
    seconds: float,
    make: Callable[..., Trainer],
    score: Callable[[nn.Module], float],
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Trains `model` for `seconds`, scores included; it holds the best weights found, maybe those it had.

    Args:
        place: folder for notes, the best weights and the running round; a call with the same folder goes on where the
            first was killed, for what that had left of its seconds or for `seconds`, whichever is less. `best.pt`
            stays, for the caller to delete when the model is safe.
        make: a trainer of the model given, with the keywords `lr`, `batch_size`, `precision` and `seed`.
        score: higher is better.
        stop: true when it should end now.

    Returns:
        Steps taken in all rounds.
    """
    notes, best, running = place / "rounds.json", place / "best.pt", place / "running.pt"
    start = copy.deepcopy(model)
    begun = time.perf_counter()
    if notes.exists():
        found: dict[str, Any] = read_json(notes)
        if best.exists():
            model.load_state_dict(torch.load(best, weights_only=True))
    else:
        found = {"score": _finite(score(model)), "used": 0.0, "steps": 0, "precision": "auto", "rounds": []}
        found["seconds"] = seconds
        found["looked"] = time.perf_counter() - begun
        found["batch_size"] = _batch_size(start, make, PROBED * seconds)
        place.mkdir(parents=True, exist_ok=True)
    before = found["used"]
    while not stop():
        number = len(found["rounds"])
        probing = number < len(RATES)
        left = min(seconds, found["seconds"] - before) - (time.perf_counter() - begun)
        if probing:
            rate, share = RATES[number], PROBED * found["seconds"]
        else:
            if number == len(RATES):
                found |= _plan(found["rounds"], left)
            if number >= len(RATES) + found["planned"]:
                break
            rate, share = found["rate"], left / (len(RATES) + found["planned"] - number) - found["looked"]
        if min(left, share) <= 0:
            break
        trial = copy.deepcopy(start if probing else model)
        trainer = make(trial, lr=rate, batch_size=found["batch_size"], precision=found["precision"], seed=number)
        _round(trainer, min(left, share), running, number, stop)
        with trainer.averaged():
            value = _finite(score(trial)) if all(bool(t.isfinite().all()) for t in trial.parameters()) else None
            kept = value is not None and (found["score"] is None or value >= found["score"])
            if kept:
                model.load_state_dict(trial.state_dict())
                with atomic_path(best) as temporary:
                    torch.save(model.state_dict(), temporary)
        done = {"rate": rate, "score": value, "steps": trainer.steps, "seconds": trainer.phase_seconds, "kept": kept}
        found["rounds"].append(done)
        found["steps"] += trainer.steps
        found["used"] = before + time.perf_counter() - begun
        found["score"] = value if kept else found["score"]
        if trainer.chosen:
            found["precision"] = trainer.precision
        if not probing and not kept:
            found["rate"] = rate / SLOWER
        write_json(notes, found)
        running.unlink(missing_ok=True)
    model.eval()
    return int(found["steps"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plan(probes: list[dict[str, Any]], left: float) -> dict[str, Any]:
    """How many rounds `left` seconds are parted in, and at which rate they begin."""
    steps, seconds = (sum(p[k] for p in probes) for k in ("steps", "seconds"))
    count = int(left * steps / max(seconds, 1e-9) / LEAST_STEPS)
    rates = {p["rate"]: p["score"] for p in probes if p["score"] is not None}
    rate = max(rates, key=lambda r: rates[r]) if rates else RATES[0] / SLOWER
    return {"planned": max(1, min(ROUNDS, count)), "rate": rate}


def _round(trainer: Trainer, seconds: float, running: Path, number: int, stop: Callable[[], bool]) -> None:
    """One round, taken up where it was killed."""
    if running.exists() and torch.load(running, weights_only=True)["extra"].get("round") == number:
        trainer.load(running)
    last = time.perf_counter()

    def on_step(loss: float) -> None:
        nonlocal last
        if time.perf_counter() - last > SAVED_S:
            last = time.perf_counter()
            trainer.save(running, round=number)

    with suppress(Diverged):
        trainer.train(seconds=seconds, schedule="linear", on_step=on_step, stop=stop)


def _batch_size(model: nn.Module, make: Callable[..., Trainer], seconds: float) -> int:
    """The largest of `BATCHES` at which a sample takes clearly less time than at the one before, as far as was seen."""
    best, before = BATCHES[0], math.inf
    end = time.perf_counter() + seconds
    for size in BATCHES:
        trainer = make(copy.deepcopy(model), lr=RATES[0], batch_size=size, precision="auto", seed=0)
        if 8 * size > len(trainer.data.train):
            break
        trainer.train(steps=1)
        begun = time.perf_counter()
        # `train` counts steps of the phase: two more.
        trainer.train(steps=3)
        each = (time.perf_counter() - begun) / (2 * size)
        if each > PAYS * before:
            break
        best, before = size, each
        if time.perf_counter() + 3 * size * each > end:
            break
    return best


def check_steps(steps: int | None) -> None:
    """Raises a ValueError where a number of steps is negative."""
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
