"""`shrink`: measure, try passes, recover the best, export, gate, report; a folder that can be killed and taken up.

- the model as it came is exported and measured first, then as int8: that is what every change is held against
- passes are tried one by one at the strength the budget needs, by what the exported file costs and scores; then
  together, where one does not reach it, and those of two families that lost least
- the best few are trained for the rest of the time, with the model as it came for a teacher, and become files
- a file that the speed gate rejects is rolled back, and the report says why
- the test split is read by the first and the winning file, after everything has been decided
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from gossamer.data.base import Dataset
from gossamer.io import atomic_write, claim, plain, read_json, write_json
from gossamer.models.folder import save
from gossamer.shrink.answer import common_results, keep_winner
from gossamer.shrink.artefacts import Point, Workshop, choose, metric_noise
from gossamer.shrink.base import Calibration, Unsupported, check_settings, check_share, run_pass
from gossamer.shrink.options import ShrinkOptions, ShrinkResult
from gossamer.shrink.passes.teaching import check_signals, objective
from gossamer.shrink.recipe import as_written, load, restore
from gossamer.shrink.recovery import BATCHES, recover_in_rounds
from gossamer.shrink.report import write_report
from gossamer.shrink.search import Search, Trial, first_line, least_seconds, stem
from gossamer.shrink.subject import Subject, check_answers, open_subject, read_for
from gossamer.shrink.ways import SCREENED
from gossamer.tasks import create_task
from gossamer.tasks.base import Task
from gossamer.train import Trainer
from gossamer.train.clock import Clock
from gossamer.train.progress import Progress
from gossamer.train.settings import Precision

TRAINED_BY = 0.8  # share of the time
FILES_SHARE = 0.4  # of the time left after the trials, at most, goes into making files instead of training
HEAD_SHARE = 0.2  # of the time, for training a head the model came without
MOST_FINALISTS = 2
FIRST_SHARE = 0.65  # of the time for recovery goes to the most promising way
LOOK_FROM_S = 600.0  # from this much time on, the sensitivity of each layer to int8 is reported
HEAD_RATE = 2e-4
LOOK_SHARE = 0.02  # of a recovery's time goes into each score where that affords more items than trials are judged by
HINTED = 0.15  # of the time left after the trials goes into a short recovery of each way, to choose among them
RECOVER = ("seconds", "signals", "relation_heads")  # settings of `recover` in a recipe


def shrink(options: ShrinkOptions) -> ShrinkResult:
    """The model of `options`, cheaper; see the head of this file.

    Raises:
        ValueError: model or data cannot be used or do not fit each other, or the folder is of another run.
    """
    _check_steps(options.recipe or [], options.seconds)
    folder = options.folder()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, {folder} is a file")
    fresh = not (folder / "run.json").exists()
    claim(folder, options.identity())
    if not fresh and (folder / "results.json").exists():
        return ShrinkResult(read_json(folder / "results.json"), folder)
    try:
        with Clock(options.seconds, folder / "clock.json") as clock, Progress(clock, quiet=options.quiet) as progress:
            progress.tell("reading the model")
            subject = open_subject(options.model, options.weights)
            progress.tell("reading the data")
            data = read_for(subject, str(options.data), task=options.task, seed=options.seed, options=options.options)
            task = create_task(data.task, data.spec, data.meta)
            check_answers(subject, task, data)
            noted = folder / "task.json"
            if not fresh and noted.exists() and read_json(noted)["meta"].get("split") != plain(data.meta.get("split")):
                raise ValueError(f"{options.data} has changed since {folder} was begun; give --out another folder")
            write_json(noted, {"task": data.task, "spec": data.spec, "meta": data.meta})
            run = _Run(options, folder, clock, progress, subject, data, task)
            fresh = False
            return run.go()
    finally:
        if fresh:  # what could not begin keeps no folder from the next call
            for name in ("run.json", "clock.json", "task.json"):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


class _Run:
    def __init__(
        self,
        options: ShrinkOptions,
        folder: Path,
        clock: Clock,
        progress: Progress,
        subject: Subject,
        data: Dataset,
        task: Task,
    ) -> None:
        self.options = options
        self.folder = folder
        self.clock = clock
        self.progress = progress
        self.subject = subject
        self.data = data
        self.task = task
        self.sign = 1 if task.maximise else -1
        self.calibration = Calibration(task, data, seed=options.seed)
        files = folder / "files"
        files.mkdir(exist_ok=True)
        nearly = 0.93 * clock.total
        self.workshop = Workshop(task, data, files, tell=progress.tell, late=lambda: clock.over(nearly))
        self.trials: list[Trial] = []
        self.budget: dict[str, float] = {}

    def go(self) -> ShrinkResult:
        torch.manual_seed(self.options.seed)
        if not self.subject.trained:
            self._train_head()
        self.model = self.subject.model.eval()
        before, small = self._before()
        self.budget = dict(self.options.budget)
        for k, share in self.options.shares.items():
            if before.cost[k]:
                self.budget[k] = share * float(before.cost[k] or 0)
            else:
                self.data.problems.append(f"the {k} of the model is too small to be measured: its budget is left out")
        if self.options.shares and not self.budget:
            raise ValueError(f"budget {', '.join(self.options.shares)}: the model has too little of it to be measured")
        if self.options.recipe is not None:
            self._recipe(before, self.options.recipe)
        else:
            self._search(before, small)
        return self._conclude(before)

    # --- stages ---------------------------------------------------------------------------------------------------

    def _train_head(self) -> None:
        place = self.folder / "start"
        if not (place / "model.safetensors").exists():
            self.progress.tell("training a head for the data's classes")
            trainer = self.calibration.trainer(self.subject.model, lr=HEAD_RATE, ema=0.0)
            trainer.train(seconds=HEAD_SHARE * self.clock.total, schedule="linear", stop=lambda: self.clock.interrupted)
            save(self.subject.model, place)
        self.subject.model = load(place)

    def _before(self) -> tuple[Point, Point | None]:
        """The model as it came, as a float file and as int8."""
        begun = self.clock.used
        found = self._points("as it came", lambda: self.model, gated=None)
        if found[0].status == "rolled back":
            raise ValueError(f"model {self.subject.name} does not become a file that answers like it: {found[0].why}")
        pace = self.folder / "pace.json"
        if not pace.exists():
            files_s = self.clock.used - begun
            begun = self.clock.used
            self.workshop.outputs(found[0].file, self.data.val, limit=256)
            test_s = 2 * (self.clock.used - begun) * len(self.data.test) / min(256, len(self.data.val))
            write_json(pace, {"files_s": files_s, "test_s": test_s})
        self.pace = read_json(pace)
        return found[0], found[1] if len(found) > 1 else None

    def _points(
        self, name: str, build: Callable[[], nn.Module], *, gated: Point | None, recipe: Any = ()
    ) -> list[Point]:
        """The float and the int8 file of a model, from disk if they were made before; held to the gate."""
        file = self.folder / "files" / f"{stem(name)}.json"
        if file.exists():
            points = [Point.from_dict(p) for p in read_json(file)]
            self.workshop.points += points
            return points
        start = len(self.workshop.points)
        point = self.workshop.export(name, "float32", build())
        if point.status != "rolled back":
            if gated is not None:
                self._gate(gated, point)
            # Quantising every layer by itself takes a while: once, for the model as it came.
            small = self.workshop.int8(point, look=gated is None and self.clock.total >= LOOK_FROM_S)
            if small is not None and math.isfinite(small.val) and (less := self._smaller(point, small)):
                small.status, small.why = "", f"smaller in {', '.join(less)}; {small.why}"
        points = self.workshop.points[start:]
        for p in points:
            p.certificate["recipe"] = list(recipe)
        write_json(file, plain([p.to_dict() for p in points]))
        return points

    def _gate(self, before: Point, point: Point) -> None:
        """Rolls `point` back unless it is faster than `before`, or smaller where only that was asked for."""
        verdict = self.workshop.gate(before, point, "the change")
        point.why = verdict.why
        if not verdict.passed:
            if smaller := self._smaller(before, point):
                point.why = f"smaller in {', '.join(smaller)}; {verdict.why}"
            else:
                point.status = "rolled back"

    def _smaller(self, before: Point, after: Point) -> list[str]:
        """What was asked for beside speed and `after` has less of, just timed beside `before`.

        None where it is slower, or where more speed was asked for than `before` has.
        """
        limits, shares = self.options.budget, self.options.shares
        hurried = shares.get("latency", 1) < 1 or limits.get("latency", math.inf) < (before.cost["latency"] or 0)
        if hurried or after.interval[0] > before.interval[1]:
            return []
        asked = [k for k in (*limits, *shares) if k != "latency"]
        return [k for k in asked if (after.cost[k] or math.inf) < (before.cost[k] or math.inf)]

    def _search(self, before: Point, small: Point | None) -> None:
        """Tries passes, then recovers the best and makes their files."""
        search = Search(
            self.folder,
            self.model,
            before,
            small,
            self.budget,
            self.calibration,
            self.workshop,
            self.clock,
            self.progress,
            self._trainer,
            self.trials,
        )
        # A run killed after its choice goes on with what it chose: another may not be trained in the time left.
        noted = self.folder / "chosen.json"
        if not noted.exists():
            search.run()
            left = self.clock.left - self.pace["test_s"]
            count = max(1, min(MOST_FINALISTS, int(FILES_SHARE * left / max(self.pace["files_s"], 1e-3))))
            best = search.best(HINTED * left)[:count]
            write_json(noted, [trial.name for trial in best])
        names = read_json(noted)
        chosen = sorted((t for t in self.trials if t.name in names), key=lambda t: names.index(t.name))
        for number, trial in enumerate(chosen):
            more = len(chosen) - number
            left = self.clock.left - self.pace["test_s"] - more * self.pace["files_s"]
            seconds = max(0.0, left * (FIRST_SHARE if more > 1 else 1.0))
            self._finish(trial, search.place(trial), before, seconds)
            if self.clock.interrupted:
                break

    def _finish(self, trial: Trial, tried: Path, before: Point, seconds: float) -> None:
        """Trains a trial's model, saved in `tried`, with the model as it came for a teacher, and makes its files."""
        place = self.folder / "finalists" / stem(trial.name)
        if not (place / "done.json").exists():
            self.progress.tell(f"recovering {trial.name}")
            untrained = self.calibration.score(restore(tried / "model", self.model), limit=None)
            # A short recovery that helped is gone on from.
            hinted = (tried / "hinted" / "model.safetensors").exists()
            model = restore(tried / ("hinted" if hinted else "model"), self.model)
            begun = time.perf_counter()
            steps, val, failed = 0, untrained, ""
            try:
                steps = self._recover(model, seconds, place)
                val = self.calibration.score(model, limit=None)
            except Exception as error:  # a module that cannot be trained is left as the pass made it
                failed = first_line(error)
            kept = self.sign * val > self.sign * untrained
            save(model if kept else restore(tried / "model", self.model), place / "model")
            words = {"steps": steps, "seconds": round(time.perf_counter() - begun, 1), "untrained": untrained}
            write_json(place / "done.json", plain({**words, "val": val, "kept": kept, "failed": failed}))
            (place / "best.pt").unlink(missing_ok=True)
        done = read_json(place / "done.json")
        trial.status = "finished"
        if done.get("failed"):
            trial.why = f"recovery was not possible: {done['failed']}"
        else:
            reached = "no number" if done["val"] is None else f"{done['val']:.4f}"
            trial.why = (
                f"{done['steps']} steps of recovery in {done['seconds']:.0f} s: {self.task.metric} "
                f"{done['untrained']:.4f} to {reached}" + ("" if done["kept"] else ", not kept")
            )
        self._points(trial.name, lambda: restore(place / "model", self.model), gated=before, recipe=trial.recipe)

    def _recover(self, model: nn.Module, seconds: float, place: Path, **taught: Any) -> int:
        """Trains `model` with the model as it came for a teacher; `taught` are keywords of `objective`, if any."""
        if seconds < 2:
            return 0
        one_s = self.pace["test_s"] / 2 / len(self.data.test)
        limit = max(SCREENED, int(LOOK_SHARE * seconds / max(one_s, 1e-9)))
        return recover_in_rounds(
            model,
            place,
            seconds=seconds,
            make=partial(self._trainer, **taught),
            score=lambda m: self.sign * self.calibration.score(m, limit=limit),
            stop=lambda: self.clock.interrupted,
        )

    def _trainer(
        self,
        model: nn.Module,
        *,
        lr: float,
        batch_size: int = BATCHES[0],
        precision: Precision = "auto",
        seed: int = 0,
        **taught: Any,
    ) -> Trainer:
        precision = precision if self.mixed else "float32"
        settings: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "ema": 0.98, "precision": precision}
        settings["seed"] = self.options.seed + seed
        if taught:
            how = objective(
                student=model, teacher=self.model, task=self.task, inputs=self.calibration.example(4), **taught
            )
            return self.calibration.trainer(model, objective=how, **settings)
        return self.calibration.trainer(model, teacher=self.model, **settings)

    @cached_property
    def mixed(self) -> bool:
        """Whether the model runs in mixed precision, as the code of others may not."""
        device = next(self.model.parameters()).device
        try:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                self.model(*(x.to(device) for x in self.calibration.example(2)))
        except Exception:
            return False
        return True

    def _recipe(self, before: Point, recipe: list[dict[str, Any]]) -> None:
        """The user's own passes in order; `recover` trains, and each step's files are made and gated."""
        model, done, last, self.last = self.model, [], before, before.name
        for number, entry in enumerate(recipe, 1):
            name = f"{number} {entry['pass']}"
            settings = {k: v for k, v in entry.items() if k != "pass"}
            if entry["pass"] == "int8":
                continue  # each step's file is made as int8 too
            place = self.folder / "steps" / stem(name) / "model"
            if (place / "model.safetensors").exists():  # what is saved last
                changed = restore(place, self.model)
            else:
                self.progress.tell(f"step {name}")
                try:
                    changed = self._step(entry["pass"], model, place, settings)
                except Unsupported as error:
                    why = f"cannot handle this model: {error}"
                    self.trials.append(Trial(name, [entry], status="failed", why=why))
                    continue
                except Exception as error:
                    raise ValueError(f"step {name} of the recipe: {first_line(error)}") from error
                save(changed, place)
                place.with_name("best.pt").unlink(missing_ok=True)
            done.append(entry)
            points = self._points(name, partial(_same, changed), gated=None, recipe=done)
            if entry["pass"] != "recover" and points[0].status != "rolled back":
                self._gate(last, points[0])
            if points[0].status == "rolled back":
                done.pop()
                continue
            model, last, self.last = changed, points[0], name
        if self.trials and not done and not any(entry["pass"] == "int8" for entry in recipe):
            raise ValueError("nothing of the recipe was done; " + "; ".join(f"{t.name} {t.why}" for t in self.trials))

    def _step(self, name: str, model: nn.Module, place: Path, settings: dict[str, Any]) -> nn.Module:
        """What a line of a recipe makes of `model`."""
        if name != "recover":
            seconds = max(least_seconds(self.clock.total), self.clock.left * 0.7)
            return run_pass(name, model, Calibration(self.task, self.data, seconds, self.options.seed), **settings)[0]
        changed = restore(save(model, place.with_name("from")), self.model)
        share = max(0.0, TRAINED_BY * self.clock.total - self.clock.used)
        self._recover(changed, float(settings.pop("seconds", share)), place.parent, **settings)
        return changed

    # --- what is written --------------------------------------------------------------------------------------------

    def _conclude(self, before: Point) -> ShrinkResult:
        points = self.workshop.points
        self._time_together([p for p in points if p.status != "rolled back"], before)
        offered = [p for p in points if self.options.recipe is None or p.name == self.last] or points
        # What cannot be told from the best is preferred where less was done to it: a model trained on these data may
        # have lost what they do not show.
        values = [p.val for p in offered if math.isfinite(p.val)]
        noise = metric_noise(self.task, values, len(self.data.val))
        prefer: Literal["fastest", "least changed"] = "least changed" if self.budget else "fastest"
        winner, closest = choose(offered, self.budget, maximise=self.task.maximise, noise=noise, prefer=prefer)
        chosen = winner or closest or before
        self.progress.tell("testing")
        results = self._results(before)
        outputs, targets = self.workshop.outputs(before.file, self.data.test)
        results["before"] = {**before.to_dict(), "test": self.task.metrics(outputs, targets)}
        outputs, targets = self.workshop.outputs(chosen.file, self.data.test)
        figures = self.task.figures(outputs, targets, self.data.test)
        results["winner"] = {
            **chosen.to_dict(),
            "recipe": chosen.certificate.get("recipe", []),
            "test": self.task.metrics(outputs, targets),
        }
        results["meets_budget"] = winner is not None
        results["points"] = [p.to_dict() for p in points]
        keep_winner(chosen, self.folder)
        with atomic_write(self.folder / "recipe.yaml") as file:
            steps = [*results["winner"]["recipe"], *([{"pass": "int8"}] if "int8" in chosen.form else [])]
            yaml.safe_dump(as_written(steps), file, sort_keys=False)
        self.progress.tell("writing the report")
        results["seconds"] = round(self.clock.used, 1)
        results = plain(results)
        write_report(results, figures, self.folder / "report.html")
        write_json(self.folder / "results.json", results)
        return ShrinkResult(results, self.folder)

    def _time_together(self, points: list[Point], before: Point) -> None:
        """The last word on latency: all files in one run, in turn, and shares of what was measured there."""
        listed = [before, *(p for p in points if p is not before)]
        found = self.workshop.together([Path(p.file) for p in listed], seconds=1.5 * len(listed))
        for point, timed in zip(listed, found, strict=True):
            point.cost["latency"], point.interval = timed.median_ms, (timed.low_ms, timed.high_ms)
        if "latency" in self.options.shares:
            self.budget["latency"] = self.options.shares["latency"] * float(before.cost["latency"] or math.inf)

    def _left_out(self) -> list[str]:
        """The steps of a recipe that are not in the result, each with the reason."""
        rolled = [p for p in self.workshop.points if p.form == "float32" and p.status == "rolled back"]
        return [*(f"{t.name} {t.why}" for t in self.trials), *(f"{p.name} is rolled back: {p.why}" for p in rolled)]

    def _results(self, before: Point) -> dict[str, Any]:
        asked = self.options
        return {
            **common_results(asked.data, self.data, self.task, self.clock, budget=self.budget, seed=asked.seed),
            "model": {"name": self.subject.name, "origin": self.subject.origin, "trained": self.subject.trained},
            "shares": asked.shares,
            "trials": [asdict(t) for t in self.trials],
            "left_out": self._left_out() if asked.recipe is not None else [],
        }


def _check_steps(recipe: list[dict[str, Any]], total: float) -> None:
    """Refuses what can be seen to be wrong in a recipe before the first step has taken its time."""
    for entry in recipe:
        if entry["pass"] not in ("recover", "int8"):
            check_settings(entry["pass"], set(entry) - {"pass"})
            if entry.get("keep") is not None:
                check_share(f"keep of {entry['pass']}", entry["keep"])
        elif unknown := sorted(set(entry) - {"pass", *(RECOVER if entry["pass"] == "recover" else ())}):
            raise ValueError(f"{entry['pass']} has no setting {', '.join(unknown)}; recover has {', '.join(RECOVER)}")
        elif not isinstance(entry.get("seconds", 0), int | float) or not 0 <= entry.get("seconds", 0) < math.inf:
            raise ValueError(f"seconds of recover must be a number, 0 or more, got {entry['seconds']!r}")
        elif "signals" in entry:
            check_signals(entry["signals"])
        elif "relation_heads" in entry:
            raise ValueError("recover has relation_heads without signals: [relations, …]")
    wanted = sum(entry.get("seconds", 0) for entry in recipe if entry["pass"] == "recover")
    if wanted > total:
        raise ValueError(f"seconds of recover are {wanted:g} in all, more than the time for everything, {total:g}s")


def _same(model: nn.Module) -> nn.Module:
    return model
