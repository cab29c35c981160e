"""The race: an Optuna study in which each trial is a candidate with its learning settings, trained in rungs.

- a rung is a span of training time, each twice the last; all trials are compared at equal training time
- a trial goes on while it is among the best third at its rung, or not distinguishable from the best
- first each candidate once with default settings, every family's best prior first; then the leaders with settings
  sampled by TPE
- a trial's state is on disk at every rung: the finish goes on from there, and a killed trial is taken up again
- any number of processes may work on one study (`--storage`, `--join`)

Source: Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning" (asynchronous successive halving).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gossamer.data.base import Dataset
from gossamer.fit.candidates import Candidate
from gossamer.fit.options import FitOptions
from gossamer.layers.init import init_by_width
from gossamer.models.registry import system
from gossamer.tasks.base import Task
from gossamer.train import Diverged, Settings, Trainer
from gossamer.train.clock import MEASURED_BY, RACED_BY

RUNGS = (1, 2, 4)
KEEP = 3  # the best 1/KEEP of a rung goes on
EVALUATE = 2000  # validation items at a rung
# The first rung is this share of the race, so that the first trial and about a dozen weaker ones fit into it.
UNIT_SHARE = 1 / 14

# Published ranges of the learning rate and the share of them a default takes.
LR = {"image-classification": (5e-4, 6e-3), "text-classification": (3e-4, 1e-2), "forecasting": (1e-4, 1e-2)}
DEFAULT_LR = {"image-classification": 2e-3, "text-classification": 2e-3, "forecasting": 1e-3}


def open_study(name: str, storage: str, maximise: bool, seed: int) -> optuna.Study:
    """The study of a run, made if it is not there yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    waits = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    while True:
        try:
            return optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize" if maximise else "minimize",
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
                load_if_exists=True,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            # Another process was making the same tables.
            if not waits:
                raise
            time.sleep(waits.pop(0))


def unit_seconds(total: float) -> float:
    """Training time up to the first rung in a run of `total` seconds."""
    return total * (RACED_BY - MEASURED_BY) * UNIT_SHARE


def study_place(options: FitOptions, folder: Path) -> tuple[str, str]:
    """Name and storage of the run's study; the name is of the question asked, so that other machines find it."""
    asked = {k: v for k, v in options.identity().items() if k not in ("storage", "seconds")}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return f"gossamer-{digest}", options.storage or f"sqlite:///{(folder / 'study.db').resolve()}"


def base_settings(data: Dataset, seed: int) -> Settings:
    """Settings all trials share: batch size by the amount of data, smoothing and augmentation by the task."""
    count = len(data.train)
    batch = int(min(128, max(32, 2 ** round(math.log2(max(count, 80) / 80)))))
    if data.task == "forecasting":
        return Settings(batch_size=min(batch, 64), strength=0.0, weight_decay=0.01, warmup=20, seed=seed)
    smoothing = 0.1 if data.spec["num_classes"] > 2 else 0.05
    warmup = max(10, min(100, count // batch))
    strength = 0.4 if data.task == "image-classification" else 0.2
    return Settings(batch_size=batch, strength=strength, smoothing=smoothing, warmup=warmup, seed=seed)


class Race:
    """Works on a study until told to stop.

    Args:
        folder: where trials keep their state, `folder/<trial>/state.pt`.
        unit_s: seconds of training up to the first rung.
        base: settings shared by all trials.
    """

    def __init__(
        self,
        study: optuna.Study,
        candidates: list[Candidate],
        task: Task,
        data: Dataset,
        folder: Path,
        *,
        unit_s: float,
        base: Settings,
        stop: Callable[[], bool],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.study = study
        self.candidates = {c.name: c for c in by_family(candidates) if c.status in ("ready", "int8")}
        self.task = task
        self.data = data
        self.folder = folder
        self.unit_s = unit_s
        self.base = base
        self.stop = stop
        self.tell = tell
        self.lr = LR[data.task]

    def run(self) -> None:
        """Trial after trial until `stop()`."""
        self._take_up_killed()
        while not self.stop():
            params = self._next()
            if params is not None:
                self.study.enqueue_trial(params)
            trial = self.study.ask()
            try:
                self._run(trial)
            except (Diverged, RuntimeError) as error:
                trial.set_user_attr("why", str(error).splitlines()[0])
                self.study.tell(trial, state=TrialState.FAIL)

    def _run(self, trial: optuna.Trial) -> None:
        names = self._names()
        name = trial.suggest_categorical("candidate", names)
        lr = trial.suggest_float("lr", *self.lr, log=True)
        strength = trial.suggest_float("strength", 0.0, 1.0)
        trial.set_user_attr("worker", worker_name())
        if name not in self.candidates:
            trial.set_user_attr("why", "does not meet the budget on this device")
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        trainer = make_trainer(self.candidates[name], self.task, self.data, self.base, lr, strength)
        state = state_file(self.folder, trial.number)
        before = trial.user_attrs.get("continues")
        curve: list[dict[str, float]] = []
        if before is not None and state_file(self.folder, before).exists():
            curve = trainer.load(state_file(self.folder, before))["curve"]
        value = math.nan

        def stop() -> bool:
            # A trial that has begun takes at least one step: on a late start it is the only one.
            return trainer.steps > 0 and self.stop()

        for rung, factor in enumerate(RUNGS):
            if any(point["rung"] == rung for point in curve):
                value = next(point["value"] for point in curve if point["rung"] == rung)
            else:
                self.tell(f"trial {trial.number}: {name}, lr {lr:.1e}, rung {rung + 1}/{len(RUNGS)}")
                loss = trainer.train(seconds=self.unit_s * factor, schedule="stable", stop=stop)
                if trainer.steps == 0:
                    break
                value = trainer.evaluate(self.data.val, limit=EVALUATE)[self.task.metric]
                whole = trainer.phase_seconds >= self.unit_s * factor * 0.98
                point = {
                    "rung": rung if whole else -1,
                    "step": trainer.steps,
                    "seconds": trainer.phase_seconds,
                    "loss": loss,
                    "value": value,
                }
                curve.append({k: float(v) for k, v in point.items()} | {"rung": int(point["rung"])})
                best = self._best(curve)
                # A trial that gets worse has begun to overfit: its best state is the one to go on from.
                if best is curve[-1]:
                    trainer.save(state, curve=curve)
                trial.set_user_attr("best_seconds", best["seconds"])
                trial.set_user_attr("curve", curve)
                trial.set_user_attr("samples", trainer.samples)
                trial.set_user_attr("precision", trainer.precision)
                if not whole:
                    trial.set_user_attr("why", "the time of the race was over")
                    trial.set_user_attr("value", best["value"])
                    self.study.tell(trial, state=TrialState.PRUNED)
                    return
            trial.report(value, rung)
            if self._weak(trial.number, rung, value):
                trial.set_user_attr("why", f"weaker than others after {self.unit_s * factor:.0f} s of training")
                trial.set_user_attr("value", self._best(curve)["value"])
                self.study.tell(trial, state=TrialState.PRUNED)
                return
        if math.isnan(value):
            trial.set_user_attr("why", "the race was over before it had learnt anything")
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        value = self._best(curve)["value"]
        trial.set_user_attr("value", value)
        self.study.tell(trial, value)

    def _best(self, curve: list[dict[str, float]]) -> dict[str, float]:
        """The point of a learning curve with the best value, the latest of equals."""
        sign = 1 if self.task.maximise else -1
        return max(reversed(curve), key=lambda point: sign * point["value"])

    def _weak(self, number: int, rung: int, value: float) -> bool:
        """Whether `value` is neither in the best third of what reached this rung nor as good as the best."""
        others = [
            t.intermediate_values[rung]
            for t in self.study.get_trials(deepcopy=False)
            if t.number != number and rung in t.intermediate_values
        ]
        if not others:
            return False
        sign = 1 if self.task.maximise else -1
        ranked = sorted((sign * v for v in [*others, value]), reverse=True)
        kept = ranked[max(1, len(ranked) // KEEP) - 1]
        return sign * value < kept and sign * value < ranked[0] - self.noise(abs(ranked[0]))

    def noise(self, value: float) -> float:
        """Half the width of what cannot be told apart on the validation items of a rung."""
        count = min(EVALUATE, len(self.data.val))
        if self.task.metric == "accuracy":
            return math.sqrt(max(value * (1 - value), 1e-4) / count)
        return 0.01 * value

    def _names(self) -> list[str]:
        """The study's candidates: fixed by whoever made it, since a study's choices may not change."""
        names = self.study.user_attrs.get("candidates")
        if names is None:
            names = sorted(self.candidates)
            try:
                self.study.set_user_attr("candidates", names)
            except SQLAlchemyError:
                # Another process set them first.
                names = self.study.user_attrs["candidates"]
        return names

    def _next(self) -> dict[str, Any] | None:
        """What to try next: a candidate nobody has tried, or a leader with other settings."""
        names = set(self._names())
        trials = self.study.get_trials(deepcopy=False)
        if any(t.state == TrialState.WAITING for t in trials):
            return None
        tried = {t.params.get("candidate") for t in trials}
        for name, candidate in self.candidates.items():
            if name in names and name not in tried:
                own = system_lr(candidate, self.data.task)
                return {"candidate": name, "lr": min(max(own, self.lr[0]), self.lr[1]), "strength": self.base.strength}
        leaders = [t.params["candidate"] for t in ranking(self.study, self.task.maximise)]
        distinct = list(dict.fromkeys(leaders))
        if not distinct:
            return None
        # The best candidate gets every other trial, the next two share the rest.
        turn = len(trials) % 4
        return {"candidate": distinct[min({0: 0, 1: 1, 2: 0, 3: 2}[turn], len(distinct) - 1)]}

    def _take_up_killed(self) -> None:
        """Trials whose worker on this machine is dead are queued again, from the state they left."""
        host = socket.gethostname()
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            place, _, pid = str(trial.user_attrs.get("worker", ":0")).rpartition(":")
            gone = not psutil.pid_exists(int(pid)) or int(pid) == os.getpid()
            if (place == host and gone) or not place:
                self.study.tell(trial.number, state=TrialState.FAIL)
                if trial.params:
                    before = trial.user_attrs.get("continues")
                    last = trial.number if state_file(self.folder, trial.number).exists() else before
                    self.study.enqueue_trial(trial.params, user_attrs={} if last is None else {"continues": last})


def ranking(study: optuna.Study, maximise: bool) -> list[FrozenTrial]:
    """Trials with a value, best first, each at its best: one stopped early stands where it stood then."""
    done = [
        t
        for t in study.get_trials(deepcopy=False)
        if "value" in t.user_attrs and t.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    return sorted(done, key=lambda t: t.user_attrs["value"], reverse=maximise)


def by_family(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each family first, then the second best of each, and so on; families in their first one's order."""
    turns: dict[str, int] = {}
    placed = []
    for candidate in candidates:
        turn = turns[candidate.system] = turns.get(candidate.system, -1) + 1
        placed.append((turn, candidate))
    return [candidate for _, candidate in sorted(placed, key=lambda place: place[0])]


def state_file(folder: Path, number: int) -> Path:
    return folder / str(number) / "state.pt"


def worker_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def system_lr(candidate: Candidate, task: str) -> float:
    """The learning rate a candidate is first tried with: its system's recommendation, or the task's default."""
    return float(system(candidate.system).training.get("fit_lr", DEFAULT_LR[task]))


def make_trainer(
    candidate: Candidate, task: Task, data: Dataset, base: Settings, lr: float, strength: float, **extra: Any
) -> Trainer:
    """A trainer for `candidate`, initialised by the run's seed."""
    torch.manual_seed(base.seed)
    model = candidate.build()
    init_by_width(model)
    return Trainer(model, task, data, replace(base, lr=lr, strength=strength), **extra)
