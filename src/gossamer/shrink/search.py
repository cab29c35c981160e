"""Which passes a run tries, how strong, and which of the ways found it follows.

- each pass is seen once at the strength the budget needs, then as many of the kindest together as it takes
- strengths are corrected by what the exported file costs; passes of two families go half of the way each
- ways within reach of the budget have a short recovery, and what it makes of them decides
- a trial is on disk when it is over: a killed run knows what it had tried
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.io import plain, read_json, write_json
from gossamer.measure import macs, parameters
from gossamer.models.folder import save
from gossamer.shrink.artefacts import Point, Workshop, export_quickly
from gossamer.shrink.base import Calibration, Unsupported, find_pass, passes, run_pass
from gossamer.shrink.budget import excess
from gossamer.shrink.recipe import restore
from gossamer.shrink.ways import LEAST_LOSS, ORDER, SCREENED, SETTINGS, TRIED, WORTH
from gossamer.train import Trainer
from gossamer.train.clock import Clock
from gossamer.train.progress import Progress

SCREEN_BY = 0.4  # share of the time
LEAST_SHARE = 0.2  # of the time, up to half a minute, is what a pass may take however late it is
CLOSE = 0.04  # a cost this far below its limit is close enough; a measured one may look so much above it
MISSED = 1.15  # a way this near to the budget is better than one farther away, if none is within it
SAFE = 0.92  # of a limit on latency is aimed at: what lies just below it now may lie above it in the last timing
LEAST_KEEP = 0.05
HINT_RATE = 2e-4
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


@dataclass
class Search:
    """Tries passes on `model` until its share of the time is over.

    Args:
        folder: of the run; a trial keeps its model and figures in `folder/trials/<name>`.
        before, small: the file of the model as it came, and its int8 form if there is one.
        budget: most that each cost of the result may be.
        trainer: makes a trainer of a model, with the model as it came for a teacher.
    """

    folder: Path
    model: nn.Module
    before: Point
    small: Point | None
    budget: dict[str, float]
    calibration: Calibration
    workshop: Workshop
    clock: Clock
    progress: Progress
    trainer: Callable[..., Trainer]
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sign = 1 if self.calibration.task.maximise else -1
        if self.small is not None and self.small.status == "rolled back":
            self.small = None

        # What a killed run has tried counts, even where no time is left to come by it again.
        files = sorted(self.folder.glob("trials/*/trial.json"), key=lambda file: file.stat().st_mtime)
        self.trials += [Trial(**read_json(file)) for file in files]

    def run(self) -> None:
        """All trials there is time for."""
        screen_by = SCREEN_BY * self.clock.total
        known = [name for name in TRIED if name in passes()]

        def late() -> bool:
            return self.clock.over(screen_by) and any(t.val is not None for t in self.trials)

        for target in self.targets():
            # Every pass is seen once before the strength of any is corrected: time may not do for all of it.
            going: list[Iterator[Trial]] = []
            for name in known:
                if late():
                    break
                _go_on(self._attempts([(name, 1.0)], target), going)
            if (parts := self.kindest_together(target)) and not self.clock.over(1.5 * screen_by):
                _go_on(self._attempts(parts, target), going)
            while going and not late():
                _go_on(going.pop(0), going)
            # Nothing within reach yet: that matters more than the time for recovery.
            while going and not self._near() and not self.clock.over(2 * screen_by):
                _go_on(going.pop(0), going)
            self._combine(target, screen_by)

    def best(self, seconds: float) -> list[Trial]:
        """The best trial of each way, best way first; those in doubt are trained for `seconds` together.

        Ways within reach are judged by what a short recovery makes of each: what loses most at once may be mended best.
        """
        # The best of each way first: three strengths of one way teach less than three ways.
        first: dict[tuple[str, ...], Trial] = {}
        for trial in self._ranked():
            first.setdefault(tuple(entry["pass"] for entry in trial.recipe), trial)
        ways = list(first.values())
        near = [t for t in ways if self._within(t)]
        if len(near) < 2:
            return ways
        for trial in near:
            place = self.place(trial)
            if trial.hint is None and not self.clock.interrupted:
                self.progress.tell(f"a short recovery of {trial.name}")
                trainer = self.trainer(restore(place / "model", self.model), lr=HINT_RATE)
                with suppress(Exception):  # what cannot be trained is judged as it is
                    trainer.train(seconds=seconds / len(near), schedule="linear", stop=lambda: self.clock.interrupted)
                with trainer.averaged():
                    trial.hint = self.calibration.score(trainer.model, limit=SCREENED)
                    if self.sign * trial.hint > self.sign * float(trial.val or 0):
                        save(trainer.model, place / "hinted")
                write_json(place / "trial.json", plain(asdict(trial)))
        # A short recovery that spoilt a way is not gone on from: it is still worth what it was.
        near.sort(key=lambda t: max(self.sign * v for v in (t.val, t.hint) if v is not None and v == v), reverse=True)
        return near

    def place(self, trial: Trial) -> Path:
        return self.folder / "trials" / stem(trial.name)

    def targets(self) -> list[dict[str, float]]:
        """Shares of the costs a float file must reach: for itself, and for its int8 form to be within the budget."""
        if not self.budget:
            return [{"macs": 0.6}]
        before, small = self.before.cost, None if self.small is None else self.small.cost
        aims = {k: SAFE * limit if k == "latency" else limit for k, limit in self.budget.items()}
        if small is not None and excess(small, aims) <= 1:
            small = None  # quantised it is within the budget already: the search is for what the float file can be
        wanted = {k: limit / float(before[k] or limit) for k, limit in aims.items() if k in COSTS}
        if "memory" in self.budget:
            # Trials do not measure memory; most of it is the file's own weights.
            share = self.budget["memory"] / float(before["memory"] or self.budget["memory"])
            wanted["size"] = min(share, wanted.get("size", 1.0))
        found = [wanted]
        if small is not None:
            with_int8 = {
                k: min(1.0, share * float(before[k] or 1) / float(small[k] or 1)) if k in ("latency", "size") else share
                for k, share in wanted.items()
            }
            if "size" in aims:
                over = self._int8_size(float(before["size"] or 0)) - aims["size"]
                with_int8["size"] = min(1.0, max(LEAST_KEEP, 1 - 4 * over / float(before["size"] or 1)))
            found = [with_int8] if all(v >= 1 for v in wanted.values()) else [with_int8, wanted]
        return [s for s in found if any(v < 1 for v in s.values())][:2]

    def kindest_together(self, target: dict[str, float]) -> list[tuple[str, float]]:
        """Passes that lose least for what they save, as many as the target needs; none where one alone is enough.

        A pass that reaches only some of the work (the words, the products) is kind for its share and ruinous beyond.
        """
        cost, wanted = min(target.items(), key=lambda item: item[1])
        whole = self.calibration.score(self.model, limit=SCREENED)
        priced: dict[str, tuple[float, float, str]] = {}
        for trial in self.trials:
            share = float(trial.cost.get(cost) or 0) / float(self.before.cost[cost] or 1)
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

    def _near(self) -> bool:
        return any(t.val is not None and self._within(t) for t in self.trials)

    def _attempts(self, parts: list[tuple[str, float]], target: dict[str, float]) -> Iterator[Trial]:
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
            trial = self.attempt(recipe)
            yield trial
            if trial.status == "failed":
                if attempt == 0:
                    break
                # A correction may ask for more than a pass can take away.
                keep = math.sqrt(keep * kept)
                continue
            kept = keep
            ratio = max(
                (float(trial.cost[k] or 0) / float(self.before.cost[k] or 1) / share for k, share in target.items()),
                default=1.0,
            )
            if 1 - CLOSE <= ratio <= 1 or attempt == 2 or keep <= LEAST_KEEP:
                break
            # The cost is about a fixed part and a part that `keep` scales.
            share = ratio * worst
            if share >= 1:
                break
            keep = min(1.0, max(LEAST_KEEP, 1 - (1 - worst * (1 - CLOSE / 2)) / (1 - share) * (1 - keep)))

    def attempt(self, recipe: list[dict[str, Any]]) -> Trial:
        """The passes of `recipe` in order on the model as it came, measured; what was tried before is not run again."""
        name = "+".join(f"{e['pass']}-{e['keep']:.3f}" if "keep" in e else e["pass"] for e in recipe)
        done = next((t for t in self.trials if t.name == name), None)
        if done is not None:
            return done
        self.progress.tell(f"trying {name}")
        begun = time.perf_counter()
        trial = Trial(name, recipe)
        left = 0.5 * (SCREEN_BY * self.clock.total - self.clock.used)
        self.calibration.seconds = max(least_seconds(self.clock.total), left)
        try:
            model = self._apply(recipe)
            trial.report = dict(getattr(model, "shrink_report", {}))
            trial.cost = self._quick_cost(model)
            trial.val = self.calibration.score(model, limit=SCREENED)
            if math.isnan(trial.val):
                trial.status, trial.why, trial.val = "failed", "its answers are no numbers", None
            else:
                save(model, self.place(trial) / "model")
        except Unsupported as error:
            trial.status, trial.why = "failed", f"cannot handle this model: {error}"
        except Exception as error:  # a pass that breaks on a model must not end the others
            trial.status, trial.why = "failed", first_line(error)
        trial.seconds = round(time.perf_counter() - begun, 2)
        self.trials.append(trial)
        write_json(self.place(trial) / "trial.json", plain(asdict(trial)))
        if trial.val is not None:
            top = self._ranked()[0]
            self.progress.best = f"{top.name} {self.calibration.task.metric} {top.val:.4f} untrained"
        return trial

    def _apply(self, recipe: list[dict[str, Any]]) -> nn.Module:
        model = self.model
        for entry in recipe:
            settings = {k: v for k, v in entry.items() if k != "pass"}
            # What was found out about the whole model does not hold for a part of it.
            calibration = self.calibration if model is self.model else replace(self.calibration, cache={})
            model, _ = run_pass(entry["pass"], model, calibration, **settings)
        return model

    def _quick_cost(self, model: nn.Module) -> dict[str, float | None]:
        one = self.workshop.one
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_quickly(model, one, path, dynamic=self.before.certificate.get("held", "batch"))
            # In turn with the model as it came: a busy machine slows both.
            now, then = self.workshop.together([path, Path(self.before.file)], seconds=0.8)
            size = path.stat().st_size / 1e6
        # And it only ever adds: of so short a look the fastest tenth tells most.
        median = now.p10_ms / then.p10_ms * float(self.before.cost["latency"] or 0)
        work = macs(model, one).total
        return {"latency": median, "memory": None, "size": size, "params": parameters(model), "macs": work}

    def _combine(self, target: dict[str, float], screen_by: float) -> None:
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
            for _ in self._attempts([(t.recipe[0]["pass"], 0.5) for t in pair], target):
                if self.clock.over(screen_by):
                    return

    def _ranked(self) -> list[Trial]:
        """Trials that are within reach of the budget as some file, best first; those the gate will reject last."""
        slow = self.before.interval[1]
        usable = [t for t in self.trials if t.val is not None]
        return sorted(
            usable,
            key=lambda t: (
                0 if self._within(t) else 1 if excess(self._foreseen(t), self.budget) <= MISSED else 2,
                float(t.cost["latency"] or 0) > slow,
                -self.sign * float(t.val or 0),
            ),
        )

    def _within(self, trial: Trial) -> bool:
        """Whether a file of this trial will be within the budget: what is counted must be, what is timed may be."""
        counted = ("size", "params", "macs")
        limits = {k: limit * (1 if k in counted else 1 + CLOSE) for k, limit in self.budget.items()}
        return excess(self._foreseen(trial), limits) <= 1

    def _foreseen(self, trial: Trial) -> dict[str, float | None]:
        """Costs of the trial's last file, which is int8 where the model as it came has such a form."""
        cost, form = dict(trial.cost), self.before.cost
        if self.small is not None:
            cost["size"] = self._int8_size(float(cost["size"] or 0))
            faster = float(self.small.cost["latency"] or 1) / float(form["latency"] or 1)
            cost["latency"] = float(cost["latency"] or 0) * faster
            form = self.small.cost
        if "memory" in self.budget:
            cost["memory"] = float(form["memory"] or 0) * float(cost["size"] or 0) / float(form["size"] or 1)
        return cost

    def _int8_size(self, size: float) -> float:
        """What a float file of `size` is as int8: a weight that is gone was a byte there, all else stays."""
        assert self.small is not None
        return float(self.small.cost["size"] or 0) - (float(self.before.cost["size"] or 0) - size) / 4


def least_seconds(total: float) -> float:
    """Seconds a pass may take, in a run of `total`, however late it is."""
    return min(30.0, LEAST_SHARE * total)


def first_line(error: BaseException) -> str:
    """What an exception says in one line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def stem(name: str) -> str:
    """A file's name for that of a trial or step."""
    return name.replace(" ", "-").replace("/", "-")


def _go_on(attempts: Iterator[Trial], going: list[Iterator[Trial]]) -> None:
    """One more attempt; what may be attempted again goes to the end of `going`."""
    if next(attempts, None) is not None:
        going.append(attempts)
