"""Which models a fit considers, and what each costs on this device before any is trained.

- every registered system for the task, in up to four sizes, scaled to the input by its own rule
- the cost is that of the exported file under ONNX Runtime, one sample at a time; figures are kept between runs
- a candidate above the budget is measured again as int8; if that does not fit either it is left out, and the
  report says by how much it missed
- the order of trying is a guess from the number of passes over the data there is time for; the race decides
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import __version__, catalogue
from gossamer.data.base import Dataset
from gossamer.io import quantize_onnx
from gossamer.measure import LatencyTable, macs, parameters
from gossamer.models import create_model
from gossamer.models.registry import system
from gossamer.shrink.artefacts import calibration_feeds, export_quickly, file_cost
from gossamer.shrink.budget import excess, over_budget
from gossamer.tasks.base import Task

SIZES = ("xs", "s", "m", "l")
# int8 files are about this much smaller, and int8 is worth measuring up to this much above a latency limit.
INT8_SIZE, INT8_REACH = 0.3, 4.0
# Passes over the data after which more time helps little, and below which a model has hardly started.
ENOUGH_EPOCHS, FEW_EPOCHS = 25.0, 3.0
# The same for steps, which count where the data are few.
ENOUGH_STEPS, FEW_STEPS = 3000.0, 500.0
# Once timing the training steps of a candidate has taken this long, what is known is enough.
MOST_TIMED_S = 5.0
# What a doubling of the work a sample is worth: much for images, little for texts and series learnt from scratch.
WORK = {"image-classification": 0.5, "text-classification": 0.1, "forecasting": 0.05}
# A family this far behind after the first minutes (points, per cent) counts as half as good.
LAG = 4.0


@dataclass
class Candidate:
    """One model that may be trained.

    Args:
        name: system and size, e.g. `swin-s`.
        model, options: what `create_model` takes.
        cost: of the exported float file: latency (ms), memory (None until exported), size (MB), params, macs.
        int8: cost of the int8 file where it was measured.
        step_s: seconds of one training step at `batch`, measured.
        export_s: seconds of one export, measured.
        status: `ready`, `int8` (meets the budget only as int8), `left out`, `not measured`.
        why: the reason, in words.
    """

    name: str
    system: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    int8: dict[str, float | None] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    step_s: float = math.nan
    export_s: float = 0.0
    batch: int = 0
    prior: float = 0.0
    status: str = "not measured"
    why: str = ""

    def build(self) -> nn.Module:
        return create_model(self.model, **self.options)

    def to_dict(self) -> dict[str, Any]:
        return {k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Candidate:
        values = dict(values)
        values["step_s"] = math.nan if values["step_s"] is None else values["step_s"]
        values["interval"] = tuple(values["interval"]) if values["interval"] else None
        return Candidate(**values)


def enumerate_candidates(data: Dataset) -> list[Candidate]:
    """Every built system that is for `data.task`, in its sizes for this input; not yet measured."""
    found: list[Candidate] = []
    for entry in catalogue.systems():
        if entry.status == "planned" or data.task not in entry.tasks:
            continue
        scale = system(entry.slug).scale
        for size in SIZES if scale else ():
            scaled = scale(dict(data.spec), size) if scale else None
            if scaled is not None:
                variant, options = scaled
                same = any(c.model == variant and c.options == options for c in found)
                if not same:
                    found.append(Candidate(f"{entry.slug}-{size}", entry.slug, variant, options))
    return found


def measure_candidates(
    candidates: list[Candidate],
    task: Task,
    data: Dataset,
    budget: dict[str, float],
    *,
    train_s: float,
    batch_size: int,
    stop: Callable[[], bool],
    tell: Callable[[str], None] = lambda _: None,
) -> list[Candidate]:
    """Fills in cost, training speed, status and prior of `candidates`; the most promising are measured first.

    Args:
        train_s: seconds of training there will be for the winner, from which the passes over the data follow.
        stop: no more measuring once it is true; the rest stays `not measured`.

    Returns:
        The candidates, best prior first.
    """
    table = LatencyTable()
    inputs = task.example(data.train)
    for candidate in _promising_first(candidates, data.task):
        if stop():
            candidate.why = "the time for measuring was over"
            continue
        tell(f"measuring {candidate.name}")
        key = _key(candidate, inputs, batch_size)
        known = table.get(key)
        if known is None:
            try:
                known = _measure(candidate, task, data, inputs, batch_size)
            except Exception as error:  # one system that cannot be built or exported here must not end the fit
                candidate.status, candidate.why = "left out", f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            table.put(key, known)
        candidate.cost, candidate.step_s, candidate.batch = dict(known["cost"]), known["step_s"], batch_size
        candidate.interval, candidate.export_s = tuple(known["interval"]), known.get("export_s", 0.0)
        over = excess(candidate.cost, budget)
        if over <= 1:
            candidate.status = "ready"
        elif over <= INT8_REACH and not any(
            (candidate.cost[k] or 0) > v for k, v in budget.items() if k in ("params", "macs")
        ):
            if "int8" not in known:
                known = {**known, "int8": _int8_cost(candidate, inputs)}
                table.put(key, known)
            candidate.int8 = dict(known["int8"])
            fits = bool(candidate.int8) and excess(candidate.int8, budget) <= 1
            candidate.status = "int8" if fits else "left out"
            candidate.why = "" if fits else over_budget(candidate.int8 or candidate.cost, budget) + " even as int8"
        else:
            candidate.status, candidate.why = "left out", over_budget(candidate.cost, budget)
        candidate.prior = prior(candidate, data.task, len(data.train), train_s)
    order = {"ready": 0, "int8": 1, "not measured": 2, "left out": 3}
    return sorted(candidates, key=lambda c: (order[c.status], -c.prior))


def prior(candidate: Candidate, task: str, samples: int, train_s: float) -> float:
    """A guess of how good the candidate will be, in doublings: more work a sample is better, if there is time to learn.

    `WORK * log2(macs) - shortfall - lag / LAG`: the shortfall is how far the passes over the data, or the steps, fall
    short of what such models need; the lag is how far the family was behind the best after equal seconds of training
    on like data (`benchmarks/first_minutes.py`).
    """
    if math.isnan(candidate.step_s):
        return -math.inf
    steps = max(train_s / candidate.step_s, 1e-9)
    epochs = steps * candidate.batch / max(samples, 1)
    short = max(0.0, math.log2(ENOUGH_EPOCHS / epochs), math.log2(ENOUGH_STEPS / steps))
    starved = max(0.0, math.log2(FEW_EPOCHS / epochs), math.log2(FEW_STEPS / steps))
    work = WORK[task] * math.log2(max(float(candidate.cost["macs"] or 1), 1.0))
    return work - 0.7 * short - 2.0 * starved - lag(candidate, task) / LAG


@cache
def first_minutes() -> dict[str, dict[str, float]]:
    """For each task, a family's lag after the same short training: points of accuracy, or per cent of error."""
    return json.loads(files("gossamer.fit").joinpath("first_minutes.json").read_text(encoding="utf-8"))


def _measure(
    candidate: Candidate, task: Task, data: Dataset, inputs: tuple[Tensor, ...], batch_size: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = candidate.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        begun = time.perf_counter()
        export_quickly(model, inputs, path)
        export_s = time.perf_counter() - begun
        median, interval = file_cost(path, inputs)
        size = path.stat().st_size / 1e6
    cost = {
        "latency": median,
        "memory": None,
        "size": size,
        "params": parameters(model),
        "macs": macs(model, inputs).total,
    }
    step_s = _step_seconds(model, task, data, batch_size)
    return {"cost": cost, "interval": interval, "step_s": step_s, "export_s": export_s}


def _int8_cost(candidate: Candidate, inputs: tuple[Tensor, ...]) -> dict[str, float | None]:
    torch.manual_seed(0)
    model = candidate.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        try:
            export_quickly(model, inputs, path)
            quantize_onnx(path, small, calibration_feeds(path, [inputs]))
            median, _ = file_cost(small, inputs)
        except Exception:  # what cannot be quantised here has no int8 cost
            return {}
        return {**candidate.cost, "latency": median, "size": small.stat().st_size / 1e6}


def _step_seconds(model: nn.Module, task: Task, data: Dataset, batch_size: int) -> float:
    """Seconds of a forward and backward pass of one batch, in float32 or bfloat16, whichever is faster."""
    index = torch.arange(min(batch_size, len(data.train)))
    inputs, target = task.batch(data.train, index, train=False)
    model.train()
    times = []
    for bfloat16 in (False, True, False, True):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = model(*inputs)
            loss = task.loss((output[0] if isinstance(output, tuple) else output).float(), target)
        loss.backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
        if sum(times) > MOST_TIMED_S:
            break
    return min(times)


def _promising_first(candidates: list[Candidate], task: str) -> list[Candidate]:
    """Small sizes of the families that learn soonest first: a family `LAG` behind stands a size behind."""

    def place(candidate: Candidate) -> float:
        return SIZES.index(candidate.name.rpartition("-")[2]) + lag(candidate, task) / LAG

    return sorted(candidates, key=place)


def lag(candidate: Candidate, task: str) -> float:
    """How far the candidate's family was behind the best one after the first minutes; the furthest if not known."""
    lags = first_minutes().get(task, {})
    return lags.get(candidate.system, max(lags.values(), default=0.0))


def _key(candidate: Candidate, inputs: tuple[Tensor, ...], batch_size: int) -> str:
    parts = {
        "model": candidate.model,
        "options": candidate.options,
        "shapes": [list(x.shape) for x in inputs],
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"fit-{candidate.name}-{digest}"
