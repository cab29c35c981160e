"""Latency-driven slimming: a trained supernet loses what costs the least accuracy for each millisecond it saves.

Source: Li et al. 2022, "EfficientFormer: Vision Transformers at MobileNet Speed", section 4.2 and appendix.

- the supernet is trained with the weights of its paths; the latencies are this device's own (`costs.py`)
- a move takes out the least important slot, turns the first 3-D block into a 4-D one, or makes the least important
  stage narrower by 16; the move with the smallest drop for each millisecond is made, until the target is met
- what is found is trained anew, from scratch
- a killed search goes on: supernet, plan and training are on disk
- the paper reads the drop of accuracy off its validation set; here it is the rise of the loss, which is finer
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.data import Dataset, read_dataset
from gossamer.io import export_onnx, onnx_callable, onnx_session, read_json, write_json
from gossamer.layers.init import init_by_width
from gossamer.measure import device_info, latency, macs, parameters
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.models.registry import config_of, system
from gossamer.search.costs import CostTable
from gossamer.search.supernet import ATTEND, CONV, SKIP, STEP, Plan, Supernet, allowed
from gossamer.tasks import create_task
from gossamer.tasks.base import Task
from gossamer.train import Settings, Trainer

# Shares of the time: of the supernet's training, until when moves are judged, of the training of what was found.
TRAINED, SLIMMED, RETRAINED = 0.45, 0.6, 0.33
HOT, COLD = 1.0, 0.1  # temperature of the mixture, first and last
SAVE_EVERY_S = 20.0
JUDGED = 512  # validation images that a move is judged on


def slim(
    supernet: Supernet,
    cost: Callable[[Plan], float],
    target_ms: float,
    score: Callable[[Plan], float],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that meets `target_ms`, and the moves that led to it.

    Args:
        cost: latency of a plan, in ms.
        score: how good a plan is, higher is better.
        stop: true when there is no time left to judge moves by `score`; those that save most are then made.

    Raises:
        ValueError: no move is left and the target is not met.
    """
    plan = supernet.largest()
    now, value = cost(plan), score(plan)
    trace: list[dict[str, Any]] = []
    while now > target_ms:
        options: list[dict[str, Any]] = []
        for what, other in moves(plan, supernet.importance()):
            saved = now - cost(other)
            if saved > 0:
                worth = 0.0 if stop() else score(other)
                drop = 0.0 if stop() else value - worth
                options.append({"move": what, "plan": other, "saved_ms": saved, "score": worth, "drop": drop})
        if not options:
            raise ValueError(f"no move makes the network faster than {now:.3g} ms; the budget is {target_ms:.3g} ms")
        best = min(options, key=lambda o: (o["drop"] / o["saved_ms"], -o["saved_ms"]))
        plan, value = best["plan"], best["score"]
        now = cost(plan)
        kept = {k: v for k, v in best.items() if k != "plan"}
        trace.append({**kept, **asdict(plan), "ms": now, "considered": len(options)})
    return plan, trace


def moves(plan: Plan, importance: list[list[float]]) -> list[tuple[str, Plan]]:
    """Up to three plans next to `plan`, in words and as plans."""
    found: list[tuple[str, Plan]] = []
    used = [(i, j) for i, stage in enumerate(plan.slots) for j, kind in enumerate(stage) if kind != SKIP]
    if len(used) > 1:
        i, j = min(used, key=lambda at: importance[at[0]][at[1]])
        found.append((f"take out slot {j} of stage {i}", plan.put(i, j, SKIP)))
    first = next(((i, j) for i, j in used if plan.slots[i][j] == ATTEND), None)
    if first is not None:
        i, j = first
        found.append((f"slot {j} of stage {i} becomes a 4-D block", plan.put(i, j, CONV)))
    wide = [i for i, width in enumerate(plan.widths) if width > STEP]
    if wide:
        i = min(wide, key=lambda i: sum(importance[i]))
        found.append((f"stage {i} becomes {STEP} channels narrower", plan.narrow(i)))
    return [(what, other) for what, other in found if allowed(other.slots)]


def slim_efficientformer(
    source: str,
    *,
    latency_ms: float,
    seconds: float,
    out: str | Path,
    size: str = "m",
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Searches the EfficientFormer for the images at `source` that runs in `latency_ms` on this device.

    Args:
        latency_ms: of the exported network, one image at a time.
        seconds: wall-clock time for everything.
        out: folder; the same call goes on with it.
        size: of the supernet, `xs` to `l`.

    Returns:
        The plan, the moves, predicted and measured latency, and the metrics of the trained network; also in
        `results.json`. The network lies in `model/` and `model.onnx`.

    Raises:
        ValueError: the data are no images, the target cannot be met, or `out` is of another search.
    """
    out = Path(out)
    asked = {"data": str(source), "latency_ms": latency_ms, "seconds": seconds, "size": size, "seed": seed}
    if (out / "run.json").exists() and read_json(out / "run.json") != asked:
        raise ValueError(f"{out} holds a search with other settings; give --out another folder")
    if (out / "results.json").exists():
        return read_json(out / "results.json")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "run.json", asked)
    begun = time.perf_counter()
    data = read_dataset(source, seed=seed)
    if data.task != "image-classification":
        raise ValueError(f"slimming wants images in class folders, {source} is for {data.task}")
    scale = system("efficientformer").scale
    assert scale is not None
    scaled = scale(dict(data.spec), size)
    assert scaled is not None
    supernet = Supernet(**scaled[1])
    options = supernet.options
    found = out / "plan.json"
    task = create_task(data.task, data.spec, data.meta)
    if not found.exists():
        tell("training the supernet")
        torch.manual_seed(seed)
        trainer = _train(supernet, task, data, TRAINED * seconds, out / "supernet.pt", seed)
        tell("slimming")
        table = CostTable(options)

        def score(plan: Plan) -> float:
            supernet.follow(plan)
            answers, targets = trainer.outputs(data.val, limit=JUDGED)
            return -float(task.loss(answers, targets))

        late = begun + SLIMMED * seconds
        plan, trace = slim(supernet, table.total, latency_ms, score, stop=lambda: time.perf_counter() > late)
        write_json(found, {"plan": asdict(plan), "predicted_ms": table.total(plan), "moves": trace})
    kept = read_json(found)
    plan = Plan(tuple(kept["plan"]["widths"]), tuple(tuple(stage) for stage in kept["plan"]["slots"]))
    shape = {**{k: v for k, v in options.items() if k not in data.spec}, **plan.options()}
    tell("training what was found")
    torch.manual_seed(seed)
    model = create_model("efficientformer_l1", **{**data.spec, **shape})
    init_by_width(model)
    trainer = _train(model, task, data, RETRAINED * seconds, out / "network.pt", seed)
    tell("exporting")
    return _conclude(out, kept, trainer, task, data)


def _settings(data: Dataset, seed: int) -> Settings:
    batch = int(min(128, max(32, 2 ** round(math.log2(max(len(data.train), 80) / 80)))))
    return Settings(lr=2e-3, batch_size=batch, strength=0.4, smoothing=0.1, warmup=50, seed=seed)


def _train(model: nn.Module, task: Task, data: Dataset, seconds: float, file: Path, seed: int) -> Trainer:
    """Trains `model` for `seconds`; a supernet's mixture cools meanwhile. Goes on from `file` if there is one."""
    trainer = Trainer(model, task, data, _settings(data, seed))
    if file.exists():
        trainer.load(file)
    saved = time.perf_counter()

    def on_step(loss: float) -> None:
        nonlocal saved
        if isinstance(model, Supernet):
            model.cool(HOT * (COLD / HOT) ** min(1.0, trainer.phase_seconds / seconds))
        if time.perf_counter() - saved > SAVE_EVERY_S:
            saved = time.perf_counter()
            trainer.save(file)

    trainer.train(seconds=seconds, schedule="cosine", on_step=on_step)
    trainer.save(file)
    return trainer


def _conclude(out: Path, kept: dict[str, Any], trainer: Trainer, task: Task, data: Dataset) -> dict[str, Any]:
    """Saves and exports the network, measures the file and writes `results.json`."""
    model = trainer.model.eval()
    inputs, _ = task.batch(data.val, torch.arange(min(8, len(data.val))), train=False)
    one = (inputs[0][:1],)
    with trainer.averaged():
        metrics = {
            name: task.metrics(*trainer.outputs(split)) for name, split in (("val", data.val), ("test", data.test))
        }
        save(model, out / "model")
        certificate = export_onnx(
            model,
            one,
            out / "model.onnx",
            input_names=["input_0"],
            output_names=["output"],
            dynamic="batch",
            real_inputs=inputs,
            exporter="fast",
        )
    timing = latency({"file": onnx_callable(onnx_session(out / "model.onnx"), list(one))}, budget_s=2.0)["file"]
    results = {
        **kept,
        "config": config_of(model),
        **{split: {name: float(v) for name, v in found.items()} for split, found in metrics.items()},
        "measured_ms": timing.median_ms,
        "params": parameters(model),
        "macs": macs(model, one).total,
        "certificate": certificate.to_dict(),
        "device": device_info(),
    }
    write_json(out / "results.json", results)
    return results
