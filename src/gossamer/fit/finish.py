"""The finish: the best trial goes on from where the race left it, its learning rate falling to zero.

- warm-up/stable/decay: the race trained at a constant rate, so nothing is lost or done twice
- a cheaper candidate is then taught by the best one, if a short trial of both ways shows that teaching helps
- a trial that was overfitting goes on from its best state, for no longer than it took to get there
- what the finish began with is kept if it is better than what came out
- the state is on disk every few seconds: a killed finish goes on where it was
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from torch import nn

from gossamer.data.base import Dataset
from gossamer.fit.candidates import Candidate
from gossamer.fit.race import make_trainer, state_file
from gossamer.io import read_json, write_json
from gossamer.models.folder import save
from gossamer.shrink.recipe import load
from gossamer.tasks.base import Task
from gossamer.train import Settings, Trainer

SAVE_EVERY_S = 15.0
PROBE_SHARE = 0.15  # of a cheaper finalist's time, for each of the two ways of teaching it
POINTS = 12  # validation points on a learning curve


@dataclass
class Finalist:
    """A trained candidate.

    Args:
        val: the task's metric over the validation split.
        curve: `{seconds, step, loss, value}` along the finish.
        taught: by whom, or why not.
    """

    candidate: Candidate
    model: nn.Module
    trial: int
    val: float
    lr: float
    strength: float
    curve: list[dict[str, float]] = field(default_factory=list)
    precision: str = "float32"
    taught: str = ""


def finish(
    trial: FrozenTrial,
    candidate: Candidate,
    task: Task,
    data: Dataset,
    base: Settings,
    folder: Path,
    trials: Path,
    *,
    seconds: float,
    stop: Callable[[], bool],
    tell: Callable[[str], None] = lambda _: None,
    teacher: Finalist | None = None,
) -> Finalist:
    """Trains `trial` on for `seconds`; gives the result, from disk if it was finished before."""
    place = folder / candidate.name
    lr, strength = float(trial.params["lr"]), float(trial.params["strength"])
    done = place / "done.json"
    if done.exists():
        kept = read_json(done)
        return Finalist(candidate, load(place / "model"), trial.number, lr=lr, strength=strength, **kept)

    def trainer_from(start: Path, learn_from: Finalist | None) -> tuple[Trainer, dict[str, Any]]:
        made = make_trainer(
            candidate, task, data, base, lr, strength, teacher=None if learn_from is None else learn_from.model
        )
        extra = made.load(start) if start.exists() else {}
        return made, extra

    if overfits(trial):
        seconds = min(seconds, float(trial.user_attrs["best_seconds"]))
    state, taught = place / "state.pt", ""
    start = state_file(trials, trial.number)
    if not start.exists():  # raced on another machine: trained again from the beginning, at its settings
        start = place / "none.pt"
    learn_from = teacher
    if state.exists():
        extra = read_json(place / "way.json")
        taught, learn_from = extra["taught"], teacher if extra["teach"] else None
        seconds = extra["seconds"]
    elif teacher is not None:
        learn_from, taught = _probe(trainer_from, start, teacher, task, data, seconds * PROBE_SHARE, stop, tell)
        seconds *= 1 - 2 * PROBE_SHARE
    trainer, extra = trainer_from(state if state.exists() else start, learn_from)
    begun = place / "begun"
    curve: list[dict[str, float]] = list(extra.get("finish_curve", []))
    if not state.exists():
        trainer.begin_phase()
        with trainer.averaged():
            save(trainer.model, begun)
        way = {"taught": taught, "teach": learn_from is not None, "seconds": seconds}
        before = float(trainer.evaluate(data.val)[task.metric]) if trainer.steps else None
        write_json(place / "way.json", {**way, "before": before})
    last = time.perf_counter()
    shown: list[float] = []

    def on_step(loss: float) -> None:
        nonlocal last
        shown.append(loss)
        if trainer.phase_seconds >= seconds * (len(curve) + 1) / POINTS:
            value = trainer.evaluate(data.val, limit=1000)[task.metric]
            trainer.wrapped.train()
            recent = shown[-50:]
            curve.append(
                {
                    "seconds": trainer.phase_seconds,
                    "step": float(trainer.steps),
                    "loss": sum(recent) / len(recent),
                    "value": float(value),
                }
            )
            tell(f"finishing {candidate.name}: {task.metric} {value:.4f}")
        if time.perf_counter() - last > SAVE_EVERY_S:
            last = time.perf_counter()
            trainer.save(state, finish_curve=curve)

    tell(f"finishing {candidate.name}")
    trainer.train(seconds=seconds, schedule="linear", on_step=on_step, stop=stop)
    value = float(trainer.evaluate(data.val)[task.metric])
    before = read_json(place / "way.json")["before"]
    if before is not None and (before > value) == task.maximise and before != value:
        value = before
        shutil.copytree(begun, place / "model", dirs_exist_ok=True)
    else:
        with trainer.averaged():
            save(trainer.model, place / "model")
    kept = {"val": value, "curve": curve, "precision": trainer.precision, "taught": taught}
    write_json(done, kept)
    state.unlink(missing_ok=True)
    return Finalist(candidate, load(place / "model"), trial.number, lr=lr, strength=strength, **kept)


def overfits(trial: FrozenTrial) -> bool:
    """Whether the trial was better at an earlier rung than where the race left it."""
    curve = trial.user_attrs.get("curve", [])
    return bool(curve) and float(trial.user_attrs["best_seconds"]) < curve[-1]["seconds"]


def _probe(
    trainer_from: Callable[[Path, Finalist | None], tuple[Trainer, dict[str, Any]]],
    start: Path,
    teacher: Finalist,
    task: Task,
    data: Dataset,
    seconds: float,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> tuple[Finalist | None, str]:
    """Trains both ways for `seconds` from the same state; the way that is ahead, and the figures in words."""
    values = []
    for learn_from in (teacher, None):
        tell("trying whether a teacher helps")
        trainer, _ = trainer_from(start, learn_from)
        trainer.begin_phase()
        trainer.train(seconds=seconds, schedule="linear", stop=stop)
        values.append(trainer.evaluate(data.val)[task.metric])
    helps = (values[0] > values[1]) == task.maximise and values[0] != values[1]
    words = (
        f"after {seconds:.0f} s each, taught by {teacher.candidate.name} {task.metric} {values[0]:.4f}, "
        f"by the labels alone {values[1]:.4f}"
    )
    return (teacher if helps else None), words
