"""From models to files: export, int8, each measured as the file that will run.

Every file is a point (validation metric, cost). A point that the speed gate rejects is rolled back; the others form
the front. The winner is the best point within the budget, or a faster one that cannot be told from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx, onnx_callable, onnx_session, quantize_onnx, sensitivity
from gossamer.measure import latency, macs, parameters, peak_memory
from gossamer.measure.timing import Latency
from gossamer.models.folder import save
from gossamer.shrink.budget import excess, over_budget
from gossamer.shrink.gate import Verdict, speed_gate
from gossamer.tasks.base import Task
from gossamer.train.trainer import model_outputs

CALIBRATION = 256
MODES = ("dynamic", "static", "mixed")
LOSS = 0.01  # share of the metric an int8 form may lose before layers are left in floats
MOST_EXCLUDED = 4


@dataclass
class Point:
    """A file that could be the result.

    Args:
        form: what was done to it, then `float32` or `int8`.
        val: the task's metric over the validation split, computed with the file.
        interval: of the latency, ms.
        status: `front`, `dominated`, `rolled back`, `over budget`, `winner`.
    """

    name: str
    form: str
    file: str
    val: float
    cost: dict[str, float | None]
    interval: tuple[float, float]
    status: str = ""
    why: str = ""
    certificate: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        """What `to_dict` gave, after JSON: no number is null there."""
        val = math.nan if values["val"] is None else values["val"]
        return cls(**{**values, "val": val, "interval": tuple(values["interval"])})


class Workshop:
    """Makes and measures the files of trained models.

    Args:
        folder: where the files go.
        late: true when the time is nearly up: what is not needed for a result is then left out.
    """

    def __init__(
        self, task: Task, data: Dataset, folder: Path, *, tell: Callable[[str], None], late: Callable[[], bool]
    ) -> None:
        self.task = task
        self.data = data
        self.folder = folder
        self.tell = tell
        self.late = late
        self.one = task.example(data.train)
        self.points: list[Point] = []
        self.mode: str | None = None
        self._judged: dict[str, float] = {}

    def export(self, name: str, form: str, model: nn.Module) -> Point:
        """The model as a float file, certified on real inputs."""
        self.tell(f"exporting {name} ({form})")
        stem = f"{name}-{form}".replace(" ", "-")
        path = self.folder / f"{stem}.onnx"
        real, _ = self.task.batch(self.data.val, torch.arange(min(8, len(self.data.val))), train=False)
        names = [f"input_{i}" for i in range(len(self.one))]
        certificate = export_onnx(
            model,
            self.one,
            path,
            input_names=names,
            output_names=["output"],
            dynamic="batch",
            real_inputs=real,
            exporter="fast",
        )
        weights = save(model, self.folder / stem)
        macs_here = macs(model, self.one).total
        point = self._point(name, form, path, parameters(model), macs_here, str(weights))
        point.certificate = certificate.to_dict()
        if not certificate.passed:
            point.status, point.why = "rolled back", f"export certificate failed: {certificate.reason}"
        elif not math.isfinite(point.val):
            point.status, point.why = "rolled back", "its answers are no numbers"
        self.points.append(point)
        return point

    def int8(self, base: Point, form: str = "int8", *, look: bool = False) -> Point | None:
        """`base` with 8-bit weights and activations: the fastest way of quantising it that loses little.

        Each mode of `quantize_onnx` is tried, while there is time; for later files of the workshop the first file's
        mode is tried first, and alone if it loses little. Where even the best loses more than `LOSS`, the
        layers that a trial of each alone shows to lose most stay in floats. The result is a point, rolled back if the
        speed gate rejects it. `look` measures how sensitive each layer is even where none has to stay in floats.
        """
        self.tell(f"quantising {base.name}")
        source = Path(base.file)
        path = source.with_name(f"{base.name}-{form}.onnx".replace(" ", "-"))
        index = torch.linspace(0, len(self.data.train) - 1, min(CALIBRATION, len(self.data.train))).long()
        size = ExportedModel(source).batch or 32
        batches = [self.task.batch(self.data.train, part, train=False)[0] for part in index.split(size)]
        feeds = list(calibration_feeds(source, batches))
        tried: list[tuple[float, str, Path]] = []
        reasons = []
        for mode in sorted(MODES, key=lambda m: m != self.mode):
            if tried and (self.late() or (self.mode and self._loss(base, tried[0][2]) <= LOSS)):
                break
            trial = path.with_name(f"{path.stem}-{mode}.onnx")
            try:
                quantize_onnx(source, trial, feeds, mode=mode)
                tried.append((file_cost(trial, self.one)[0], mode, trial))
            except Exception as error:  # a graph that a mode cannot take is tried in the next
                reasons.append(f"{mode}: {str(error).splitlines()[0].replace(str(source), source.name)}")
                trial.unlink(missing_ok=True)
        if not tried:
            base.why = f"{base.why} int8 was not possible ({'; '.join(reasons)})".strip()
            return None
        words, sensitive = "", {}
        good = next(((mode, trial) for _, mode, trial in sorted(tried) if self._loss(base, trial) <= LOSS), None)
        if good is not None:
            mode, trial = good
            self.mode = self.mode or mode
            trial.replace(path)
            if look and not self.late():
                sensitive = sensitivity(source, feeds[:1], mode=mode)
        else:
            _, mode, trial = min(tried)
            if self.late():
                base.why = f"{base.why} int8 lost too much, and no time was left to find out where".strip()
                trial.unlink()
                return None
            sensitive = sensitivity(source, feeds[:2], mode=mode)
            worst = list(sensitive)[:MOST_EXCLUDED]
            quantize_onnx(source, path, feeds, mode=mode, exclude=worst)
            words = f", {len(worst)} layers left in floats"
        for _, _, trial in tried:
            trial.unlink(missing_ok=True)
        point = self._point(base.name, form, path, base.cost["params"], base.cost["macs"], base.model)
        point.certificate = {**base.certificate, "quantised": f"int8, {mode}, per channel{words}"}
        if sensitive:
            point.certificate["sensitivity"] = sensitive
        verdict = self.gate(base, point, "int8")
        point.why = verdict.why
        if not math.isfinite(point.val):
            point.status, point.why = "rolled back", "its answers are no numbers"
        elif not verdict.passed:
            point.status = "rolled back"
        self.points.append(point)
        return point

    def gate(self, before: Point, after: Point, what: str) -> Verdict:
        """The speed gate between two files. Both are timed again, interleaved, and their costs say so: figures of
        the same moment compare, those of different minutes may not."""
        verdict = speed_gate(self._caller(before.file), self._caller(after.file), what=what)
        for timed, one in ((before, verdict.before), (after, verdict.after)):
            timed.cost["latency"], timed.interval = one.median_ms, (one.low_ms, one.high_ms)
        return verdict

    def _loss(self, base: Point, path: Path) -> float:
        """How much worse than `base` a file is on part of the validation split, as a share of `base`'s metric."""
        if base.file not in self._judged:
            self._judged = {base.file: self._judge(base.file)}
        before, after = self._judged[base.file], self._judge(path)
        return (before - after if self.task.maximise else after - before) / max(abs(before), 1e-9)

    def together(self, files: list[Path], *, seconds: float) -> list[Latency]:
        """Latency of each file on one sample, all timed in turn."""
        return together(files, self.one, seconds=seconds)

    def _judge(self, path: str | Path) -> float:
        return float(self.task.metrics(*self.outputs(path, self.data.val, limit=1000))[self.task.metric])

    def outputs(self, path: str | Path, split: Split, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Answers of a file and targets over `split`."""
        return model_outputs(ExportedModel(path), self.task, split, limit=limit)

    def _point(self, name: str, form: str, path: Path, params: float | None, work: float | None, model: str) -> Point:
        median, interval = file_cost(path, self.one, seconds=1.0)
        memory = peak_memory(lambda: self._caller(path)()).mib
        cost: dict[str, float | None] = {
            "latency": median,
            "memory": memory,
            "size": path.stat().st_size / 1e6,
            "params": params,
            "macs": work,
        }
        val = float(self.task.metrics(*self.outputs(path, self.data.val))[self.task.metric])
        return Point(name, form, str(path), val, cost, interval, model=model)

    def _caller(self, path: str | Path) -> Callable[[], Any]:
        return _caller(Path(path), self.one)


class ExportedModel(nn.Module):
    """An exported file behind a module's call, so that files and models are evaluated by the same code.

    A file of one batch size (`batch`; None where it is free) is run as often as need be.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.session = onnx_session(path)
        self.names = [node.name for node in self.session.get_inputs()]
        self.nothing = nn.Parameter(torch.zeros(0))
        first = self.session.get_inputs()[0].shape[0]
        self.batch = first if isinstance(first, int) else None

    def forward(self, *inputs: Tensor) -> Tensor:
        count, size = len(inputs[0]), self.batch or len(inputs[0])
        if count == size:
            return self._run(inputs)
        # The last part is filled up with what it ends in.
        index = torch.arange(-(-count // size) * size).clamp(max=count - 1)
        return torch.cat([self._run(tuple(x[part] for x in inputs)) for part in index.split(size)])[:count]

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        feed = {f"input_{i}": x.numpy() for i, x in enumerate(inputs) if f"input_{i}" in self.names}
        return torch.from_numpy(self.session.run(None, feed)[0])


def file_cost(path: Path, inputs: tuple[Tensor, ...], *, seconds: float = 0.4) -> tuple[float, tuple[float, float]]:
    """Latency of an exported file on one sample: the median in ms, and the interval it lies in."""
    timing = latency({"file": _caller(path, inputs)}, budget_s=seconds)["file"]
    return timing.median_ms, (timing.low_ms, timing.high_ms)


def together(files: list[Path], inputs: tuple[Tensor, ...], *, seconds: float) -> list[Latency]:
    """Latency of each exported file on one sample, all timed in turn."""
    timing = latency({str(i): _caller(path, inputs) for i, path in enumerate(files)}, budget_s=seconds)
    return [timing[str(i)] for i in range(len(files))]


def _caller(path: Path, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    session = onnx_session(path)
    # The exporter drops inputs a model does not read.
    kept = {node.name for node in session.get_inputs()}
    return onnx_callable(session, [x for i, x in enumerate(inputs) if f"input_{i}" in kept])


def export_quickly(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, dynamic: str | None = None) -> None:
    """An ONNX file good enough to be timed, by the fast exporter: one shape unless `dynamic` says otherwise.

    To be compared with a file of free batch it has to be one: ONNX Runtime makes another graph of fixed sizes, which
    of a small text encoder takes a quarter longer.
    """
    names = [f"input_{i}" for i in range(len(inputs))]
    export_onnx(model, inputs, path, input_names=names, dynamic=dynamic, exporter="fast")


def calibration_feeds(path: Path, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[dict[str, np.ndarray]]:
    """Model-ready batches as the feeds of an exported file."""
    kept = {node.name for node in onnx_session(path).get_inputs()}
    for batch in batches:
        yield {f"input_{i}": x.numpy() for i, x in enumerate(batch) if f"input_{i}" in kept}


def metric_noise(task: Task, values: list[float], count: int) -> float:
    """What two values of the metric over `count` items may differ by without meaning anything: one standard error.

    `sqrt(p (1 - p) / n)` of an accuracy p, `(1 - r^2) / sqrt(n - 1)` of a rank correlation r.
    """
    best = (max if task.maximise else min)(values, default=0.0)
    if task.metric == "accuracy":
        return math.sqrt(max(best * (1 - best), 1e-4) / max(count, 1))
    if task.metric == "spearman":
        return 100 * (1 - (best / 100) ** 2) / math.sqrt(max(count - 1, 1))
    return 0.005 * abs(best)


def choose(
    points: list[Point],
    budget: dict[str, float],
    *,
    maximise: bool,
    noise: float,
    prefer: Literal["fastest", "least changed"] = "fastest",
) -> tuple[Point | None, Point | None]:
    """Sets every point's status; gives the winner, and the point closest to the budget if none is within it.

    Of the points within the budget whose metric is within `noise` of the best of them, the winner is the fastest, or
    the one that the shortest recipe made, and then the fastest.
    """
    sign = 1 if maximise else -1
    usable = [p for p in points if p.status != "rolled back"]
    for point in usable:
        point.status = "dominated" if any(_dominates(q, point, sign) for q in usable) else "front"
    within = []
    for point in usable:
        if excess(point.cost, budget) <= 1:
            within.append(point)
        else:
            point.status = "over budget"
            point.why = f"{point.why}; {over_budget(point.cost, budget)}".removeprefix("; ")
    if not within:
        return None, min(usable, key=lambda p: excess(p.cost, budget), default=None)
    best = max(sign * p.val for p in within)

    def order(p: Point) -> tuple[int, float]:
        changed = len(p.certificate.get("recipe", ())) if prefer == "least changed" else 0
        return changed, p.cost["latency"] or 0.0

    winner = min((p for p in within if sign * p.val >= best - noise), key=order)
    winner.status = "winner"
    return winner, None


def _dominates(a: Point, b: Point, sign: int) -> bool:
    """`a` is at least as good and as fast as `b`, and one of them strictly."""
    fa, fb = a.cost["latency"] or 0.0, b.cost["latency"] or 0.0
    return a is not b and sign * a.val >= sign * b.val and fa <= fb and (a.val != b.val or fa < fb)
