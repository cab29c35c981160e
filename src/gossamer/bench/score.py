"""The score card: never one number for a model, but accuracy, memory, operations, latency and energy side by side.

Source: Goel et al. 2020, "A Survey of Methods for Low-Power Deep Learning and Computer Vision", its guideline for
evaluation: test accuracy, memory of parameters and of activations, operations and energy, at batch 1, over input sizes.

- `compare` times all models interleaved; every other figure is counted, and the same in every run
- energy is an estimate (`gossamer.measure.energy`): weights as they are stored, inputs and outputs come from main
  memory once; activations are written to and read from the memory on the chip
- a row is dominated where another is at least as good by every measure of the front and better by one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import __version__
from gossamer.bench.plot import COLOURS
from gossamer.io import atomic_write, write_json
from gossamer.measure import (
    EnergyCosts,
    activations,
    device_info,
    energy_estimate,
    latency,
    macs,
    parameters,
    weight_bytes,
)
from gossamer.tasks.base import new_plot, to_svg

DTYPES = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}
# By which a row may dominate another. Parameters and multiply-adds are in the table; they cost nothing by themselves.
FRONT = ("accuracy", "bytes", "peak_activations", "latency_ms", "energy_mj")

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Score:
    """The card of one model at one input size, batch 1.

    Args:
        accuracy: of the test data, higher is better (an error is given negative); None without data.
        bytes: of the stored weights.
        peak_activations: bytes that live at once.
        latency_ms: None where it was not timed.
        energy_mj: of one input, with the range.
        input: shapes.
        bits: that the device is taken to compute in.
        dominated_by: the first row that is at least as good by all of `FRONT` and better by one.
    """

    name: str
    accuracy: float | None
    parameters: int
    bytes: int
    macs: int
    peak_activations: int
    latency_ms: float | None
    energy_mj: float
    energy_range: tuple[float, float]
    formula: str
    input: list[list[int]] = field(default_factory=list)
    bits: int = 32
    dominated_by: str = ""


def score(
    model: nn.Module,
    inputs: Tensor | Inputs,
    *,
    name: str = "model",
    accuracy: float | None = None,
    bits: int = 32,
    costs: EnergyCosts | None = None,
    seconds: float = 1.0,
) -> Score:
    """The card of `model` for one sample.

    Args:
        inputs: one sample of each input, batch first.
        accuracy: measured by the caller on test data.
        bits: of the device's multiply-adds and activations: 32, 16, 8 or 4.
        costs: of the device, for energy.
        seconds: of timing; 0 leaves it out.

    Raises:
        ValueError: `bits` is none of these.
    """
    return compare({name: (model, inputs)}, {name: accuracy}, bits=bits, costs=costs, seconds=seconds)[0]


def compare(
    models: Mapping[str, tuple[nn.Module, Tensor | Inputs]],
    accuracies: Mapping[str, float | None] | None = None,
    *,
    bits: int = 32,
    costs: EnergyCosts | None = None,
    seconds: float = 2.0,
) -> list[Score]:
    """The cards of several models, each with a sample of its own, with what dominates them; see `score`."""
    if bits not in DTYPES:
        raise ValueError(f"bits must be one of {', '.join(map(str, DTYPES))}; got {bits}")
    samples = {n: x if isinstance(x, tuple) else (x,) for n, (_, x) in models.items()}
    nets = {name: model.eval() for name, (model, _) in models.items()}
    times: dict[str, float] = {}
    if seconds > 0:
        with torch.inference_mode():
            calls = {name: (lambda net=net, name=name: net(*samples[name])) for name, net in nets.items()}
            times = {name: found.median_ms for name, found in latency(calls, budget_s=seconds).items()}
    rows = []
    for name, net in nets.items():
        x = samples[name]
        count, held, stored = macs(net, x).total, activations(net, x), weight_bytes(net)
        width = bits / 32
        with torch.no_grad():
            ends = sum(t.numel() * t.element_size() for t in (*x, *_tensors(net(*x))))
        moved = min(stored, int(parameters(net) * bits / 8)) + int(ends * width)
        energy = energy_estimate(count, moved, DTYPES[bits], sram_bytes=int(2 * held.written * width), costs=costs)
        rows.append(
            Score(
                name,
                (accuracies or {}).get(name),
                parameters(net),
                stored,
                count,
                int(held.peak * width),
                times.get(name),
                energy.mj,
                (energy.low_mj, energy.high_mj),
                energy.formula,
                [list(t.shape) for t in x],
                bits,
            )
        )
    return with_front(rows)


def with_front(rows: Sequence[Score]) -> list[Score]:
    """The same rows, each with the first of the others that dominates it."""
    marked = []
    for row in rows:
        over = next((other.name for other in rows if dominates(other, row)), "")
        marked.append(Score(**{**vars(row), "dominated_by": over}))
    return marked


def dominates(one: Score, other: Score) -> bool:
    """Whether `one` is at least as good by every measure that both have, and better by one."""
    pairs = [(getattr(one, key), getattr(other, key), key) for key in FRONT]
    known = [(-a, -b) if key == "accuracy" else (a, b) for a, b, key in pairs if a is not None and b is not None]
    return all(a <= b for a, b in known) and any(a < b for a, b in known)


def front(rows: Sequence[Score]) -> list[Score]:
    """The rows that no other dominates, best accuracy first, then least energy."""
    kept = [row for row in rows if not row.dominated_by]
    return sorted(kept, key=lambda r: (-(r.accuracy if r.accuracy is not None else 0.0), r.energy_mj))


def draw(rows: Sequence[Score], metric: str = "accuracy") -> str:
    """A chart as SVG: accuracy (without data: latency) against energy, areas by bytes, the dominated ones hollow."""
    plot, axes = new_plot(7.6, 4.6)
    axis = axes[0, 0]
    scored = all(row.accuracy is not None for row in rows)
    most = max(row.bytes for row in rows)
    for i, row in enumerate(rows):
        y = row.accuracy if scored else (row.latency_ms or 0.0)
        colour = COLOURS[i % len(COLOURS)]
        area = 20 + 400 * row.bytes / most
        face = "none" if row.dominated_by else colour
        axis.scatter([row.energy_mj], [y], s=area, facecolor=face, edgecolor=colour, alpha=0.7)
        axis.annotate(row.name, (row.energy_mj, y), xytext=(6, 6), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel("energy of one input: mJ, an estimate (log scale)")
    axis.set_ylabel(metric if scored else "latency of one input: ms")
    axis.set_title("area: bytes of the weights; hollow: another is better by every measure", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    text = to_svg(plot).decode()
    return text[text.index("<svg") :]


def bench_models(
    models: Mapping[str, tuple[nn.Module, Tensor | Inputs]],
    accuracies: Mapping[str, float | None] | None = None,
    *,
    out: str | Path,
    metric: str = "accuracy",
    bits: int = 32,
    costs: EnergyCosts | None = None,
    seconds: float = 2.0,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compares models and writes `results.json` and `models.svg`; the body of `gossamer bench models`.

    Returns:
        What `results.json` holds: `models` (all rows), `front` (names), `device` and versions.
    """
    note(f"measuring {len(models)} models")
    rows = compare(models, accuracies, bits=bits, costs=costs, seconds=seconds)
    results = {
        "command": "bench models",
        "metric": metric,
        "models": [asdict(row) for row in rows],
        "front": [row.name for row in front(rows)],
        "measures": list(FRONT),
        "device": {**device_info(), "gossamer": __version__},
        "folder": str(out),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "results.json", results)
    with atomic_write(Path(out) / "models.svg") as file:
        file.write(draw(rows, metric))
    return results


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
