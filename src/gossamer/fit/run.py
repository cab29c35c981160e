"""`fit`: read, measure, race, finish, shrink, export, report; a folder that can be killed and taken up at any point.

- `run.json` says what was asked, so the same call goes on with the folder and another call is refused
- `candidates.json`, `study.db`, `trials/`, `finalists/` hold what each stage has finished
- the test split is read once, by the winning file, after everything has been decided
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from gossamer.data import Dataset, read_dataset
from gossamer.fit.candidates import Candidate, enumerate_candidates, measure_candidates
from gossamer.fit.finish import Finalist, finish
from gossamer.fit.join import join
from gossamer.fit.options import FitOptions, FitResult
from gossamer.fit.race import RUNGS, Race, base_settings, open_study, ranking, study_place, unit_seconds
from gossamer.fit.report import write_report
from gossamer.io import claim, plain, read_json, write_json
from gossamer.shrink.answer import common_results, keep_winner
from gossamer.shrink.artefacts import Point, Workshop, choose, metric_noise
from gossamer.shrink.base import Calibration
from gossamer.shrink.budget import excess
from gossamer.shrink.ways import kindest
from gossamer.tasks import create_task
from gossamer.tasks.base import Task
from gossamer.train import Settings, Trainer
from gossamer.train.clock import TAIL_SHARE, Clock
from gossamer.train.progress import Progress

# With at least this much time a cheaper second finalist is trained as well, with this share of the finish.
SECOND_FROM_S, SECOND_SHARE = 480.0, 0.25
# And a smaller copy of the best is made and recovered for this share of the whole time, at most this share of that
# spent on choosing the pass.
SHRINK_FROM_S, SHRINK_SHARE = 240.0, 0.06
KEEP, CHOOSING = 0.6, 0.4
# Others are finished as well while the first have left at least a fifth of the time, up to this many.
MOST_FINALISTS = 4
# A finalist as cheap as this share of the best one's latency is worth having beside it.
CHEAPER = 0.7


def fit(options: FitOptions) -> FitResult:
    """The best small model for `options.data` within `options.budget`; see the head of this file.

    Raises:
        ValueError: the data cannot be used, the arguments contradict each other, or the folder is of another run.
    """
    if options.join is not None:
        return join(options)
    folder = options.folder()
    claim(folder, options.identity())
    if (folder / "results.json").exists():
        return FitResult(read_json(folder / "results.json"), folder)
    with Clock(options.seconds, folder / "clock.json") as clock, Progress(clock, quiet=options.quiet) as progress:
        progress.tell("reading the data")
        assert options.data is not None
        data = read_dataset(options.data, task=options.task, seed=options.seed, **options.options)
        task = create_task(data.task, data.spec, data.meta)
        write_json(folder / "task.json", {"task": data.task, "spec": data.spec, "meta": data.meta})
        run = _Run(options, folder, clock, progress, data, task)
        return run.go()


class _Run:
    def __init__(
        self, options: FitOptions, folder: Path, clock: Clock, progress: Progress, data: Dataset, task: Task
    ) -> None:
        self.options = options
        self.folder = folder
        self.clock = clock
        self.progress = progress
        self.data = data
        self.task = task
        self.base = base_settings(data, options.seed)

    def go(self) -> FitResult:
        candidates = self._candidates()
        usable = [c for c in candidates if c.status in ("ready", "int8")]
        if not usable:
            return self._nothing(candidates)
        self.clock.tail_s = tail_seconds(usable, self.task, self.data, self.clock.total)
        study = self._race(candidates)
        self.clock.save(now=True)  # a kill from here on does not open the race again
        finalists = self._finish(study, candidates)
        if not finalists:
            if self.clock.interrupted:
                raise KeyboardInterrupt
            raise ValueError(f"no candidate learnt anything in {self.options.seconds:.0f} s; give it more --time")
        workshop = self._files(finalists)
        return self._conclude(candidates, study, finalists, workshop)

    # --- stages ---------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        file = self.folder / "candidates.json"
        if file.exists():
            return [Candidate.from_dict(c) for c in read_json(file)]
        self.progress.tell("measuring the candidates")
        train_s = self.clock.finished_by - self.clock.raced_by
        begun = self.clock.used
        mark = max(self.clock.measured_by, begun + 0.08 * self.clock.total)
        listed = enumerate_candidates(self.data)

        def stop() -> bool:
            if not any(c.cost for c in listed):
                return self.clock.interrupted
            fits = any(c.status in ("ready", "int8") for c in listed)
            return self.clock.over(mark if fits else self.clock.finished_by)

        found = measure_candidates(
            listed,
            self.task,
            self.data,
            self.options.budget,
            train_s=train_s,
            batch_size=self.base.batch_size,
            stop=stop,
            tell=self.progress.tell,
        )
        write_json(file, [c.to_dict() for c in found])
        return found

    def _race(self, candidates: list[Candidate]) -> optuna.Study:
        study = open_study(*study_place(self.options, self.folder), self.task.maximise, self.options.seed)
        unit = unit_seconds(self.clock.total)
        race = Race(
            study,
            candidates,
            self.task,
            self.data,
            self.folder / "trials",
            unit_s=unit,
            base=self.base,
            stop=lambda: self.clock.over(self.clock.raced_by),
            tell=self._told(study),
        )
        if not self.clock.over(self.clock.raced_by):
            race.run()
        elif not ranking(study, self.task.maximise) and not self.clock.interrupted:
            # A late start (a long kill, a slow disk) still trains one candidate for one rung.
            mark = self.clock.used + unit * RUNGS[0]
            race.stop = lambda: self.clock.over(mark)
            race.run()
        return study

    def _told(self, study: optuna.Study) -> Callable[[str], None]:
        def tell(doing: str) -> None:
            best = ranking(study, self.task.maximise)
            if best:
                self.progress.best = (
                    f"{best[0].params['candidate']} {self.task.metric} {best[0].user_attrs['value']:.4f}"
                )
            self.progress.tell(doing)

        return tell

    def _finish(self, study: optuna.Study, candidates: list[Candidate]) -> list[Finalist]:
        by_name = {c.name: c for c in candidates}
        ranked = [t for t in ranking(study, self.task.maximise) if t.params["candidate"] in by_name]
        if not ranked:
            return []
        best = ranked[0]
        # Now that it is known whose files there will be, the time they take is known better too.
        self.clock.tail_s = tail_seconds([by_name[best.params["candidate"]]], self.task, self.data, self.clock.total)
        latency = by_name[best.params["candidate"]].cost["latency"] or math.inf
        cheaper = [
            t for t in ranked[1:] if (by_name[t.params["candidate"]].cost["latency"] or math.inf) < CHEAPER * latency
        ]
        second = bool(cheaper) and self.options.seconds >= SECOND_FROM_S
        shrinking = SHRINK_SHARE * self.clock.total if self.options.seconds >= SHRINK_FROM_S else 0.0
        left = max(0.0, self.clock.finished_by - self.clock.used - shrinking)
        share = 1 - SECOND_SHARE if second else 1.0
        marks = [self.clock.used + left * share, self.clock.used + left]
        finalists: list[Finalist] = []

        def end(trial: optuna.trial.FrozenTrial, mark: float, teacher: Finalist | None) -> None:
            finalists.append(
                finish(
                    trial,
                    by_name[trial.params["candidate"]],
                    self.task,
                    self.data,
                    self.base,
                    self.folder / "finalists",
                    self.folder / "trials",
                    seconds=max(0.0, mark - self.clock.used),
                    stop=lambda: self.clock.over(math.inf),
                    tell=self.progress.tell,
                    teacher=teacher,
                )
            )
            top = self._best(finalists)
            self.progress.best = f"{top.candidate.name} {self.task.metric} {top.val:.4f}"

        end(best, marks[0], None)
        if second and not self.clock.interrupted:
            end(cheaper[0], marks[1], finalists[0])
        # Where the best had learnt all it could before its time was up, others get what is left.
        for trial in ranked[1:]:
            known = {f.candidate.name for f in finalists}
            if len(finalists) > MOST_FINALISTS or self.clock.used > marks[-1] - 0.2 * left or self.clock.interrupted:
                break
            if trial.params["candidate"] not in known:
                end(trial, marks[-1], None)
        return sorted(finalists, key=lambda f: f is not self._best(finalists))

    def _best(self, finalists: list[Finalist]) -> Finalist:
        return (max if self.task.maximise else min)(finalists, key=lambda f: f.val)

    def _files(self, finalists: list[Finalist]) -> Workshop:
        files = self.folder / "files"
        files.mkdir(exist_ok=True)
        nearly = self.clock.total - 0.3 * self.clock.tail_s
        workshop = Workshop(self.task, self.data, files, tell=self.progress.tell, late=lambda: self.clock.over(nearly))
        for finalist in finalists:
            point = workshop.export(finalist.candidate.name, "float32", finalist.model)
            workshop.int8(point)
        spare = self.clock.finished_by - self.clock.used
        if self.options.seconds >= SHRINK_FROM_S and spare > 5 and not self.clock.interrupted:
            best = finalists[0]
            settings = Settings(
                **{**self.base.to_dict(), "lr": 0.3 * best.lr, "strength": best.strength, "warmup": 10, "ema": 0.99}
            )
            mark = self.clock.finished_by
            made = self._shrunk(best, settings, seconds=spare, stop=lambda: self.clock.over(mark))
            if made is not None:
                point = workshop.export(best.candidate.name, "shrunk float32", made[0])
                point.certificate["recipe"] = [made[1]]
                workshop.int8(point, "shrunk int8")
        return workshop

    def _shrunk(
        self, finalist: Finalist, settings: Settings, *, seconds: float, stop: Callable[[], bool]
    ) -> tuple[nn.Module, dict[str, Any]] | None:
        """The finalist's model after the pass that suits it best, recovered with the finalist as teacher."""
        self.progress.tell(f"shrinking {finalist.candidate.name}")
        begun = time.perf_counter()
        chosen_by = begun + CHOOSING * seconds
        calibration = Calibration(self.task, self.data, CHOOSING * seconds / 2, self.options.seed)
        made = kindest(finalist.model, calibration, keep=KEEP, enough=lambda: time.perf_counter() > chosen_by)
        if made is None:
            return None
        model, entry = made
        left = seconds - (time.perf_counter() - begun)
        trainer = Trainer(model, self.task, self.data, settings, teacher=finalist.model)
        trainer.train(seconds=max(0.0, left), schedule="linear", stop=stop)
        if trainer.ema is not None and trainer.ema.steps:
            trainer.ema.swap()
        return model.eval(), entry

    def _conclude(
        self, candidates: list[Candidate], study: optuna.Study, finalists: list[Finalist], workshop: Workshop
    ) -> FitResult:
        noise = metric_noise(self.task, [p.val for p in workshop.points], len(self.data.val))
        winner, closest = choose(workshop.points, self.options.budget, maximise=self.task.maximise, noise=noise)
        chosen = winner or closest
        results = self._common(candidates)
        results["points"] = [p.to_dict() for p in workshop.points]
        results["trials"] = [_trial(t) for t in study.get_trials(deepcopy=False)]
        results["finalists"] = [
            {
                "name": f.candidate.name,
                "trial": f.trial,
                "val": f.val,
                "lr": f.lr,
                "strength": f.strength,
                "precision": f.precision,
                "taught": f.taught,
                "curve": f.curve,
            }
            for f in finalists
        ]
        results["noise"] = noise
        results["meets_budget"] = winner is not None
        figures: list[Any] = []
        if chosen is not None:
            self.progress.tell("testing the winner")
            outputs, targets = workshop.outputs(chosen.file, self.data.test)
            finalist = next(f for f in finalists if f.candidate.name == chosen.name)
            results["winner"] = self._keep(chosen, finalist, self.task.metrics(outputs, targets))
            figures = self.task.figures(outputs, targets, self.data.test)
        return self._write(results, figures)

    def _nothing(self, candidates: list[Candidate]) -> FitResult:
        measured = [c for c in candidates if c.cost]
        nearest = min(measured, key=lambda c: excess(c.int8 or c.cost, self.options.budget), default=None)
        results = self._common(candidates)
        results |= {"points": [], "trials": [], "finalists": [], "meets_budget": False, "noise": 0.0}
        if nearest is not None:
            results["closest"] = {"name": nearest.name, "cost": nearest.int8 or nearest.cost, "why": nearest.why}
        return self._write(results, [])

    # --- what is written ------------------------------------------------------------------------------------------

    def _common(self, candidates: list[Candidate]) -> dict[str, Any]:
        asked = self.options
        return {
            **common_results(asked.data, self.data, self.task, self.clock, budget=asked.budget, seed=asked.seed),
            "settings": self.base.to_dict(),
            "candidates": [c.to_dict() for c in candidates],
            "winner": None,
            "closest": None,
        }

    def _keep(self, point: Point, finalist: Finalist, test: dict[str, Any]) -> dict[str, Any]:
        keep_winner(point, self.folder)
        return {
            "name": point.name,
            "system": finalist.candidate.system,
            "model": finalist.candidate.model,
            "options": finalist.candidate.options,
            "form": point.form,
            "val": point.val,
            "test": test,
            "cost": point.cost,
            "interval": list(point.interval),
            "certificate": point.certificate,
            "why": point.why,
        }

    def _write(self, results: dict[str, Any], figures: list[Any]) -> FitResult:
        self.progress.tell("writing the report")
        results["seconds"] = round(self.clock.used, 1)
        results = plain(results)
        write_report(results, figures, self.folder / "report.html")
        results["seconds"] = round(self.clock.used, 1)
        write_json(self.folder / "results.json", results)
        return FitResult(results, self.folder)


def tail_seconds(candidates: list[Candidate], task: Task, data: Dataset, total: float) -> float:
    """What shrinking, exporting and the report will take: several exports and passes over validation and test."""
    items = min(256, len(data.val))
    index = torch.arange(items)
    begun = time.perf_counter()
    task.batch(data.val, index, train=False)
    batch_s = time.perf_counter() - begun
    export_s = sorted(c.export_s for c in candidates)[len(candidates) // 2]
    item_s = sorted((c.cost["latency"] or 0.0) / 1e3 for c in candidates)[len(candidates) // 2]
    passes = (6 * len(data.val) + len(data.test)) * (item_s + batch_s / items)
    return max(TAIL_SHARE * total, 12.0 + 5 * export_s + passes)


def _trial(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    return {"number": trial.number, "state": trial.state.name.lower(), "params": trial.params, **trial.user_attrs}
