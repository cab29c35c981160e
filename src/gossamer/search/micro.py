"""Micro-NAS: a space of some hundred small networks, evolved for accuracy and latency together.

Source: Tan et al. 2019, "MnasNet: Platform-Aware Neural Architecture Search for Mobile", equation 2; Real et al. 2019,
"Regularized Evolution for Image Classifier Architecture Search" (AmoebaNet); as Goel et al. 2020, "A Survey of Methods
for Low-Power Deep Learning and Computer Vision", bring them together.

`reward = accuracy (latency / target)^w`, `w = -0.07`: a network twice as slow has to be 5 % better.

- a network is a `vit` of ours: patch, width, depth, MLP ratio, and one mixer for all blocks: attention, pooling or
  depth-wise convolution
- regularised evolution: of some networks drawn from the newest ones the best has a child that differs in one choice;
  every network is trained once, all equally long
- the choice among the judged ones is by the reward alone: with a more negative w the chosen network is never slower
- MnasNet's controller learns by reinforcement; so small a space needs none
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import __version__
from gossamer.data import read_dataset
from gossamer.io import export_onnx, onnx_callable, onnx_session, write_json
from gossamer.measure import LatencyTable, device_info, latency, macs, parameters
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.tasks import create_task
from gossamer.train import Settings, Trainer
from gossamer.train.trainer import model_outputs

WEIGHT = -0.07
CHOICES: dict[str, tuple[Any, ...]] = {
    "patch": (2, 4, 8),
    "dim": (16, 32, 64),
    "depth": (1, 2, 3, 4),
    "ratio": (1, 2, 4),
    "mixer": ("attention", "pool", "depthwise"),
}
# Networks that are compared for a child; of so many of the newest.
DRAWN, NEWEST = 4, 16
# Of the time, what is left for the chosen network.
LAST = 0.35
PIECE_S = 0.25  # of timing a network


@dataclass(frozen=True)
class Micro:
    """A network of the space; fields as in `CHOICES`."""

    patch: int
    dim: int
    depth: int
    ratio: int
    mixer: str

    def options(self) -> dict[str, Any]:
        """Keywords of `vit` that build it, those of the data aside."""
        shape = {"patch": self.patch, "dim": self.dim, "depth": self.depth, "mlp_ratio": float(self.ratio)}
        return {**shape, "heads": max(1, self.dim // 16), "mixer": self.mixer, "pad": True, "position_tokens": False}


@dataclass(frozen=True)
class Judged:
    """A network with what it is worth and what it costs."""

    net: Micro
    accuracy: float
    ms: float


def space(img_size: tuple[int, int]) -> list[Micro]:
    """All networks for images of that size: those with at least two tokens a side and at most 32."""
    found = [Micro(*values) for values in product(*CHOICES.values())]
    return [net for net in found if all(2 <= -(-side // net.patch) <= 32 for side in img_size)]


def reward(accuracy: float, ms: float, target_ms: float, weight: float = WEIGHT) -> float:
    """`accuracy (ms / target)^w`.

    Raises:
        ValueError: a latency is not positive, or the weight is positive.
    """
    if ms <= 0 or target_ms <= 0:
        raise ValueError(f"latency and target must be positive, got {ms} and {target_ms}")
    if weight > 0:
        raise ValueError(f"weight must be at most 0, or slow networks would be preferred; got {weight}")
    return accuracy * (ms / target_ms) ** weight


def choose(found: Sequence[Judged], target_ms: float, weight: float = WEIGHT) -> Judged:
    """The judged network with the greatest reward; of equals the faster."""
    return max(found, key=lambda j: (reward(j.accuracy, j.ms, target_ms, weight), -j.ms))


def evolve(
    nets: Sequence[Micro],
    judge: Callable[[Micro], float],
    cost: Callable[[Micro], float],
    target_ms: float,
    *,
    weight: float = WEIGHT,
    count: int = 40,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[Judged]:
    """At most `count` networks, judged, in the order they were met; the first quarter by chance.

    Args:
        judge: accuracy of a network; called once for each.
        cost: its latency in ms.
        stop: true when there is no time for another; one at least is judged.

    Raises:
        ValueError: there are no networks, or `count` is below 1.
    """
    if not nets or count < 1:
        raise ValueError(f"there must be networks and a count of at least 1, got {len(nets)} and {count}")
    known = set(nets)
    chance = random.Random(seed)
    order = list(nets)
    chance.shuffle(order)
    met: list[Judged] = []
    seen: set[Micro] = set()
    while len(met) < min(count, len(nets)) and not (met and stop()):
        net = None
        if len(met) >= max(1, count // 4):
            drawn = chance.sample(met[-NEWEST:], min(DRAWN, len(met[-NEWEST:])))
            near = [n for n in _neighbours(choose(drawn, target_ms, weight).net) if n in known and n not in seen]
            net = chance.choice(near) if near else None
        if net is None:
            net = next(n for n in order if n not in seen)
        seen.add(net)
        met.append(Judged(net, judge(net), cost(net)))
    return met


def _neighbours(net: Micro) -> list[Micro]:
    return [
        replace(net, **{f.name: value})
        for f in fields(net)
        for value in CHOICES[f.name]
        if value != getattr(net, f.name)
    ]


def search_micro(
    source: str,
    *,
    latency_ms: float,
    seconds: float,
    out: str | Path,
    weight: float = WEIGHT,
    count: int = 40,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Searches the small network for the images at `source` with the best of accuracy and latency on this device.

    Args:
        latency_ms: the target T, of the exported network, one image at a time.
        seconds: wall-clock time for everything.
        out: folder for `results.json` and `model/`.
        weight: w; 0 asks for accuracy alone.
        count: networks that are judged at most.

    Returns:
        What `results.json` holds: the chosen network, all judged ones, validation and test metrics.

    Raises:
        ValueError: the data are no images, or a setting is out of range.
    """
    reward(1.0, 1.0, latency_ms, weight)
    begun = time.perf_counter()
    data = read_dataset(source, seed=seed)
    if data.task != "image-classification":
        raise ValueError(f"micro-NAS wants images in class folders, {source} is for {data.task}")
    task = create_task(data.task, data.spec, data.meta)
    share = (1 - LAST) * seconds / count

    def build(net: Micro) -> nn.Module:
        torch.manual_seed(seed)
        return create_model("vit_tiny_patch16_224", **{**data.spec, **net.options()})

    def train(net: Micro, limit: float) -> Trainer:
        trainer = Trainer(build(net), task, data, Settings(lr=2e-3, batch_size=64, strength=0.2, warmup=20, seed=seed))
        trainer.train(seconds=limit, schedule="cosine")
        return trainer

    def judge(net: Micro) -> float:
        tell(f"judging {net}")
        return train(net, share).evaluate(data.val)["accuracy"]

    def stop() -> bool:
        return time.perf_counter() - begun > (1 - LAST) * seconds

    table = LatencyTable()
    one = task.example(data.train)

    def cost(net: Micro) -> float:
        key = f"micro-{__version__}-{torch.get_num_threads()}-{net}-{sorted(data.spec.items())}"
        if table.get(key) is None:
            table.put(key, _time(build(net), one))
        return float(table.get(key))

    nets = space(tuple(data.spec["img_size"]))
    met = evolve(nets, judge, cost, latency_ms, weight=weight, count=count, seed=seed, stop=stop)
    best = choose(met, latency_ms, weight)
    tell(f"training {best.net}")
    trainer = train(best.net, max(1.0, seconds - (time.perf_counter() - begun)))
    model = trainer.model.eval()
    with trainer.averaged():
        metrics = {
            split: task.metrics(*model_outputs(model, task, part))
            for split, part in (("val", data.val), ("test", data.test))
        }
        save(model, Path(out) / "model")
    results = {
        "command": "search micro",
        "data": str(source),
        "target_ms": latency_ms,
        "weight": weight,
        "chosen": asdict(best),
        "judged": [asdict(j) for j in met],
        "space": len(nets),
        **metrics,
        "params": parameters(model),
        "macs": macs(model, one).total,
        "device": device_info(),
    }
    write_json(Path(out) / "results.json", results)
    return results


def _time(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(model.eval(), inputs, path, input_names=["x"], dynamic=None, exporter="fast")
        return latency({"net": onnx_callable(onnx_session(path), list(inputs))}, budget_s=PIECE_S)["net"].median_ms
