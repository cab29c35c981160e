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
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from gossamer import __version__
from gossamer.data.base import Dataset
from gossamer.io import atomic_write, claim, plain, read_json, write_json
from gossamer.measure import device_info, macs, parameters
from gossamer.models.folder import built_by_name, save
from gossamer.shrink.artefacts import Point, Workshop, choose, export_quickly, metric_noise
from gossamer.shrink.base import Calibration, Unsupported, check_settings, find_pass, passes, run_pass
from gossamer.shrink.budget import excess
from gossamer.shrink.options import ShrinkOptions, ShrinkResult
from gossamer.shrink.passes.teaching import check_signals, objective
from gossamer.shrink.recipe import as_written, load
from gossamer.shrink.recovery import BATCHES, recover_in_rounds
from gossamer.shrink.report import write_report
from gossamer.shrink.subject import Subject, check_answers, open_subject, read_for
from gossamer.shrink.ways import LEAST_LOSS, ORDER, SCREENED, SETTINGS, TRIED, WORTH
from gossamer.tasks import create_task
from gossamer.tasks.base import Task
from gossamer.train import Trainer
from gossamer.train.clock import Clock
from gossamer.train.progress import Progress
from gossamer.train.settings import Precision

SCREEN_BY, TRAINED_BY = 0.4, 0.8  # shares of the time
LEAST_SHARE = 0.2  # of the time, up to half a minute, is what a pass may take however late it is
FILES_SHARE = 0.4  # of the time left after the trials, at most, goes into making files instead of training
HEAD_SHARE = 0.2  # of the time, for training a head the model came without
MOST_FINALISTS = 2
FIRST_SHARE = 0.65  # of the time for recovery goes to the most promising way
CLOSE = 0.04  # a cost this far below its limit is close enough
SAFE = 0.92  # of a limit on latency is aimed at: what lies just below it now may lie above it in the last timing
LEAST_KEEP = 0.05
LOOK_FROM_S = 600.0  # from this much time on, the sensitivity of each layer to int8 is reported
HEAD_RATE = HINT_RATE = 2e-4
LOOK_SHARE = 0.02  # of a recovery's time goes into each score where that affords more items than trials are judged by
HINTED = 0.15  # of the time left after the trials goes into a short recovery of each way, to choose among them
RECOVER = ("seconds", "signals", "relation_heads")  # settings of `recover` in a recipe
COSTS = ("latency", "size", "params", "macs")


@dataclass
class Trial:
    """A recipe that was tried.

    Args:
        recipe: passes with settings, in order.
        val: the task's metric on `SCREENED` validation items, before any training.
        hint: the same after a short recovery, where there were more ways than could be followed.
        cost: of the exported float file.
        status: `tried`, `failed`, `finished`.
    """

    name: str
    recipe: list[dict[str, Any]]
    val: float | None = None
    cost: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    status: str = "tried"
    why: str = ""
    hint: float | None = None
    report: dict[str, Any] = field(default_factory=dict)


def shrink(options: ShrinkOptions) -> ShrinkResult:
    """The model of `options`, cheaper; see the head of this file.

    Raises:
        ValueError: model or data cannot be used or do not fit each other, or the folder is of another run.
    """
    for entry in options.recipe or ():
        if entry["pass"] not in ("recover", "int8"):
            check_settings(entry["pass"], set(entry) - {"pass"})
        elif unknown := sorted(set(entry) - {"pass", *(RECOVER if entry["pass"] == "recover" else ())}):
            raise ValueError(f"{entry['pass']} has no setting {', '.join(unknown)}; recover has {', '.join(RECOVER)}")
        elif not isinstance(entry.get("seconds", 0), int | float):
            raise ValueError(f"seconds of recover must be a number, got {entry['seconds']!r}")
        elif "signals" in entry:
            check_signals(entry["signals"])
        elif "relation_heads" in entry:
            raise ValueError("recover has relation_heads without signals: [relations, …]")
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
        file = self.folder / "files" / f"{_stem(name)}.json"
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
            self.workshop.int8(point, look=gated is None and self.clock.total >= LOOK_FROM_S)
        points = self.workshop.points[start:]
        for p in points:
            p.certificate["recipe"] = list(recipe)
        write_json(file, plain([p.to_dict() for p in points]))
        return points

    def _gate(self, before: Point, point: Point) -> None:
        """Rolls `point` back unless it is faster than `before`, or smaller where only that was asked for."""
        verdict = self.workshop.gate(before, point, "the change")
        smaller = [
            k for k in self.budget if k != "latency" and (point.cost[k] or math.inf) < (before.cost[k] or math.inf)
        ]
        if verdict.passed:
            point.why = verdict.why
        elif smaller and "latency" not in self.budget and verdict.after.low_ms <= verdict.before.high_ms:
            point.why = f"smaller in {', '.join(smaller)}; {verdict.why}"
        else:
            point.status, point.why = "rolled back", verdict.why

    def _search(self, before: Point, small: Point | None) -> None:
        screen_by = SCREEN_BY * self.clock.total
        if not self.budget or (
            small is not None and small.status != "rolled back" and excess(small.cost, self._aims()) <= 1
        ):
            strengths = self._strengths(before, None)
        else:
            strengths = self._strengths(before, small)
        known = [name for name in TRIED if name in passes()]
        # What a killed run has tried counts, even where no time is left to come by it again.
        files = sorted(self.folder.glob("trials/*/trial.json"), key=lambda file: file.stat().st_mtime)
        self.trials += [Trial(**read_json(file)) for file in files]

        def late() -> bool:
            return self.clock.over(screen_by) and any(t.val is not None for t in self.trials)

        for target in strengths:
            # Every pass is seen once before the strength of any is corrected: time may not do for all of it.
            going: list[Iterator[Trial]] = []
            for name in known:
                if late():
                    break
                self._go_on(self._attempts([(name, 1.0)], target, before), going)
            if (parts := self._stack(target, before)) and not self.clock.over(1.5 * screen_by):
                self._go_on(self._attempts(parts, target, before), going)
            while going and not late():
                self._go_on(going.pop(0), going)
            # Nothing within reach yet: that matters more than the time for recovery.
            while going and not self._near() and not self.clock.over(2 * screen_by):
                self._go_on(going.pop(0), going)
            self._combine(target, before, screen_by)
        left = self.clock.left - self.pace["test_s"]
        count = max(1, min(MOST_FINALISTS, int(FILES_SHARE * left / max(self.pace["files_s"], 1e-3))))
        # The best of each way first: three strengths of one way teach less than three ways.
        best: dict[tuple[str, ...], Trial] = {}
        for trial in self._ranked():
            best.setdefault(tuple(entry["pass"] for entry in trial.recipe), trial)
        chosen = self._hinted(list(best.values()), HINTED * left)[:count]
        for place, trial in enumerate(chosen):
            more = len(chosen) - place
            left = self.clock.left - self.pace["test_s"] - more * self.pace["files_s"]
            self._finish(trial, before, max(0.0, left * (FIRST_SHARE if more > 1 else 1.0)))
            if self.clock.interrupted:
                break

    def _hinted(self, ways: list[Trial], seconds: float) -> list[Trial]:
        """Ways within reach by what a short recovery makes of each: what loses most at once may be mended best."""
        near = [t for t in ways if self._reach(t) <= 1 + CLOSE]
        if len(near) < 2:
            return ways
        for trial in near:
            place = self.folder / "trials" / _stem(trial.name)
            if trial.hint is None and not self.clock.interrupted:
                self.progress.tell(f"a short recovery of {trial.name}")
                trainer = self._trainer(self._restore(place / "model"), lr=HINT_RATE)
                with suppress(Exception):  # what cannot be trained is judged as it is
                    trainer.train(seconds=seconds / len(near), schedule="linear", stop=lambda: self.clock.interrupted)
                with trainer.averaged():
                    trial.hint = self.calibration.score(trainer.model, limit=SCREENED)
                    if self.sign * trial.hint > self.sign * float(trial.val or 0):
                        save(trainer.model, place / "hinted")
                write_json(place / "trial.json", plain(asdict(trial)))
        worth = {id(t): self.sign * float((t.val if t.hint is None else t.hint) or 0) for t in near}
        near.sort(key=lambda t: (math.isnan(worth[id(t)]), -worth[id(t)]))
        return near

    def _aims(self) -> dict[str, float]:
        return {k: SAFE * limit if k == "latency" else limit for k, limit in self.budget.items()}

    def _strengths(self, before: Point, small: Point | None) -> list[dict[str, float]]:
        """Shares of the costs a float file must reach: for itself, and for its int8 form to be within the budget."""
        if not self.budget:
            return [{"macs": 0.6}]
        wanted = {k: limit / float(before.cost[k] or limit) for k, limit in self._aims().items() if k in COSTS}
        if "memory" in self.budget:
            # Trials do not measure memory; most of it is the file's own weights.
            share = self.budget["memory"] / float(before.cost["memory"] or self.budget["memory"])
            wanted["size"] = min(share, wanted.get("size", 1.0))
        found = [wanted]
        if small is not None and small.status != "rolled back":
            with_int8 = {
                k: min(1.0, share * float(before.cost[k] or 1) / float(small.cost[k] or 1))
                if k in ("latency", "size")
                else share
                for k, share in wanted.items()
            }
            found = [with_int8] if all(v >= 1 for v in wanted.values()) else [with_int8, wanted]
        return [s for s in found if any(v < 1 for v in s.values())][:2]

    @staticmethod
    def _go_on(attempts: Iterator[Trial], going: list[Iterator[Trial]]) -> None:
        """One more attempt; what may be attempted again goes to the end of `going`."""
        if next(attempts, None) is not None:
            going.append(attempts)

    def _near(self) -> bool:
        return any(t.val is not None and self._reach(t) <= 1 + CLOSE for t in self.trials)

    def _attempts(self, parts: list[tuple[str, float]], target: dict[str, float], before: Point) -> Iterator[Trial]:
        """Runs passes at the strength that brings the exported file to `target`; two corrections of the guess.

        `parts` are passes with the share of the way each goes, in logarithms.
        """
        worst = min(target.values(), default=0.6)
        keep, kept = worst, 1.0
        for attempt in range(3):
            recipe = [
                {"pass": name, "keep": round(max(LEAST_KEEP, keep**power), 4), **SETTINGS.get(name, {})}
                for name, power in parts
            ]
            trial = self._trial(recipe, before)
            yield trial
            if trial.status == "failed":
                if attempt == 0:
                    break
                # A correction may ask for more than a pass can take away.
                keep = math.sqrt(keep * kept)
                continue
            kept = keep
            ratio = max(
                (float(trial.cost[k] or 0) / float(before.cost[k] or 1) / share for k, share in target.items()),
                default=1.0,
            )
            if 1 - CLOSE <= ratio <= 1 or attempt == 2 or keep <= LEAST_KEEP:
                break
            # The cost is about a fixed part and a part that `keep` scales.
            share = ratio * worst
            if share >= 1:
                break
            keep = min(1.0, max(LEAST_KEEP, 1 - (1 - worst * (1 - CLOSE / 2)) / (1 - share) * (1 - keep)))

    def _trial(self, recipe: list[dict[str, Any]], before: Point) -> Trial:
        name = "+".join(f"{e['pass']}-{e['keep']:.3f}" if "keep" in e else e["pass"] for e in recipe)
        place = self.folder / "trials" / _stem(name)
        file = place / "trial.json"
        done = next((t for t in self.trials if t.name == name), None)
        if done is not None:
            return done
        self.progress.tell(f"trying {name}")
        begun = time.perf_counter()
        trial = Trial(name, recipe)
        left = 0.5 * (SCREEN_BY * self.clock.total - self.clock.used)
        self.calibration.seconds = max(self._least, left)
        try:
            model = self._apply(recipe)
            trial.report = dict(getattr(model, "shrink_report", {}))
            trial.cost = self._quick_cost(model, before)
            trial.val = self.calibration.score(model, limit=SCREENED)
            if math.isnan(trial.val):
                trial.status, trial.why, trial.val = "failed", "its answers are no numbers", None
            else:
                save(model, place / "model")
        except Unsupported as error:
            trial.status, trial.why = "failed", f"cannot handle this model: {error}"
        except Exception as error:  # a pass that breaks on a model must not end the others
            trial.status, trial.why = "failed", first_line(error)
        trial.seconds = round(time.perf_counter() - begun, 2)
        self.trials.append(trial)
        write_json(file, plain(asdict(trial)))
        if trial.val is not None:
            top = self._ranked()
            if top:
                self.progress.best = f"{top[0].name} {self.task.metric} {top[0].val:.4f} untrained"
        return trial

    def _apply(self, recipe: list[dict[str, Any]]) -> nn.Module:
        model = self.model
        for entry in recipe:
            settings = {k: v for k, v in entry.items() if k != "pass"}
            if model is not self.model:
                # What was found out about the whole model does not hold for a part of it.
                later = Calibration(self.task, self.data, self.calibration.seconds, self.options.seed)
                model, _ = run_pass(entry["pass"], model, later, **settings)
            else:
                model, _ = run_pass(entry["pass"], model, self.calibration, **settings)
        return model

    def _quick_cost(self, model: nn.Module, before: Point) -> dict[str, float | None]:
        one = self.workshop.one
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_quickly(model, one, path)
            # In turn with the model as it came: a busy machine slows both.
            now, then = self.workshop.together([path, Path(before.file)], seconds=0.8)
            size = path.stat().st_size / 1e6
        # And it only ever adds: of so short a look the fastest tenth tells most.
        median = now.p10_ms / then.p10_ms * float(before.cost["latency"] or 0)
        work = macs(model, one).total
        return {"latency": median, "memory": None, "size": size, "params": parameters(model), "macs": work}

    def _stack(self, target: dict[str, float], before: Point) -> list[tuple[str, float]]:
        """Passes that lose least for what they save, as many as the target needs; none where one alone is enough.

        A pass that reaches only some of the work (the words, the products) is kind for its share and ruinous beyond.
        """
        cost, wanted = min(target.items(), key=lambda item: item[1])
        whole = self.calibration.score(self.model, limit=SCREENED)
        priced: dict[str, tuple[float, float, str]] = {}
        for trial in self.trials:
            share = float(trial.cost.get(cost) or 0) / float(before.cost[cost] or 1)
            if trial.val is None or len(trial.recipe) > 1 or not 0 < share < WORTH:
                continue
            loss = max(0.0, self.sign * (whole - trial.val)) / max(abs(whole), 1e-9)
            name = trial.recipe[0]["pass"]
            family = find_pass(name).family
            price = (loss + LEAST_LOSS) / -math.log(share)
            # Words and products are factorised each by itself.
            place = name if family == "factorisation" else family
            priced[place] = min(priced.get(place, (math.inf, 0.0, "")), (price, share, name))
        chosen, left = [], 1.0
        for _, share, name in sorted(priced.values()):
            if left <= wanted:
                break
            chosen.append(name)
            left *= share
        chosen.sort(key=lambda name: ORDER.index(find_pass(name).family))
        return [(name, 1.0) for name in chosen] if len(chosen) > 1 else []

    def _combine(self, target: dict[str, float], before: Point, screen_by: float) -> None:
        """The two passes of different families that lost least, each going half of the way."""
        best: dict[str, Trial] = {}
        for trial in self._ranked():
            if len(trial.recipe) == 1:
                best.setdefault(find_pass(trial.recipe[0]["pass"]).family, trial)
        # Fewer parts and cheaper parts save different things: that pair is always looked at.
        pairs = sorted(combinations(best.values(), 2), key=lambda pair: not any("depth" in t.name for t in pair))
        for a, b in pairs[:3]:
            if self.clock.over(screen_by):
                return
            # Tokens last: what a pruned part is worth is better seen with all of them.
            pair = sorted((a, b), key=lambda t: find_pass(t.recipe[0]["pass"]).family == "token reduction")
            for _ in self._attempts([(t.recipe[0]["pass"], 0.5) for t in pair], target, before):
                if self.clock.over(screen_by):
                    return

    def _ranked(self) -> list[Trial]:
        """Trials that are within reach of the budget as some file, best first; those the gate will reject last."""
        before = next((p for p in self.workshop.points if p.name == "as it came"), None)
        slow = math.inf if before is None else before.interval[1]
        usable = [t for t in self.trials if t.val is not None]
        return sorted(
            usable,
            key=lambda t: (
                self._reach(t) > 1 + CLOSE,
                float(t.cost["latency"] or 0) > slow,
                -self.sign * float(t.val or 0),
            ),
        )

    def _reach(self, trial: Trial) -> float:
        """How far above the budget the trial's int8 file will be, guessed from that of the model as it came."""
        points = {p.form: p for p in self.workshop.points if p.name == "as it came"}
        float32, int8 = points.get("float32"), points.get("int8")
        cost = dict(trial.cost)
        if float32 and int8 and int8.status != "rolled back":
            for k in ("latency", "size"):
                cost[k] = float(cost[k] or 0) * float(int8.cost[k] or 1) / float(float32.cost[k] or 1)
        return excess(cost, self.budget)

    def _finish(self, trial: Trial, before: Point, seconds: float) -> None:
        """Trains a trial's model with the model as it came for a teacher, and makes its files."""
        place = self.folder / "finalists" / _stem(trial.name)
        if not (place / "done.json").exists():
            self.progress.tell(f"recovering {trial.name}")
            tried = self.folder / "trials" / _stem(trial.name)
            untrained = self.calibration.score(self._restore(tried / "model"), limit=None)
            # A short recovery that helped is gone on from.
            model = self._restore(tried / ("hinted" if (tried / "hinted" / "model.safetensors").exists() else "model"))
            begun = time.perf_counter()
            steps, val, failed = 0, untrained, ""
            try:
                steps = self._recover(model, seconds, place)
                val = self.calibration.score(model, limit=None)
            except Exception as error:  # a module that cannot be trained is left as the pass made it
                failed = first_line(error)
            kept = self.sign * val > self.sign * untrained
            save(model if kept else self._restore(tried / "model"), place / "model")
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
        self._points(trial.name, lambda: self._restore(place / "model"), gated=before, recipe=trial.recipe)

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
            place = self.folder / "steps" / _stem(name) / "model"
            if (place / "model.safetensors").exists():  # what is saved last
                changed = self._restore(place)
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
            seconds = max(self._least, self.clock.left * 0.7)
            return run_pass(name, model, Calibration(self.task, self.data, seconds, self.options.seed), **settings)[0]
        changed = self._restore(save(model, place.with_name("from")))
        share = max(0.0, TRAINED_BY * self.clock.total - self.clock.used)
        self._recover(changed, float(settings.pop("seconds", share)), place.parent, **settings)
        return changed

    @property
    def _least(self) -> float:
        """Seconds a pass may take however late it is."""
        return min(30.0, LEAST_SHARE * self.clock.total)

    # --- models on disk ---------------------------------------------------------------------------------------------

    def _restore(self, place: Path) -> nn.Module:
        return load(place, None if built_by_name(self.model) else self.model)

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
        shutil.copyfile(chosen.file, self.folder / "model.onnx.tmp")
        (self.folder / "model.onnx.tmp").replace(self.folder / "model.onnx")
        shutil.copytree(chosen.model, self.folder / "model", dirs_exist_ok=True)
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

    def _results(self, before: Point) -> dict[str, Any]:
        data = self.data
        return {
            "gossamer": __version__,
            "model": {"name": self.subject.name, "origin": self.subject.origin, "trained": self.subject.trained},
            "data": {
                "source": str(self.options.data),
                "train": len(data.train),
                "val": len(data.val),
                "test": len(data.test),
                "spec": data.spec,
                "problems": data.problems,
            },
            "task": data.task,
            "metric": self.task.metric,
            "maximise": self.task.maximise,
            "budget": self.budget,
            "shares": self.options.shares,
            "asked_seconds": self.options.seconds,
            "seed": self.options.seed,
            "interrupted": self.clock.interrupted,
            "device": device_info(),
            "trials": [asdict(t) for t in self.trials],
            "left_out": [f"{t.name} {t.why}" for t in self.trials] if self.options.recipe is not None else [],
        }


def first_line(error: BaseException) -> str:
    """What an exception says in one line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _same(model: nn.Module) -> nn.Module:
    return model


def _stem(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-")
