"""A training run is a folder: `run.json`, `metrics.jsonl`, `checkpoints/`, `model/`, `results.json`.

- the same command goes on where a killed run was: model, optimiser, order and schedule are in the checkpoint
- the weights kept are those of the best validation; the test split is read once, at the end
- `accelerate launch -m gossamer train …` runs the same on many processes; only the first writes
"""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gossamer.catalogue import find
from gossamer.data import Dataset, read_dataset
from gossamer.io import atomic_write, claim, load_weights, read_json, save_weights, write_json
from gossamer.measure import device_info
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.models.registry import system
from gossamer.tasks import create_task
from gossamer.train.pretrain import pretrain as pretrain_model
from gossamer.train.settings import Schedule, Settings
from gossamer.train.trainer import Trainer

CHECKPOINT_EVERY_S = 60.0
CURVE_POINTS_PER_EPOCH = 20


def train_model(
    name: str,
    source: str,
    *,
    out: str | Path,
    task: str | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    pretrain: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains the model `name` on `source`, with its authors' learning settings unless others are given.

    Args:
        epochs: passes over the training data (the authors' number, or 10); `seconds` bounds the run as well.
        settings: further fields of `Settings`.
        model_options: overrides of the model's builder.
        options: keywords of `read_dataset`.
        pretrain: passes over the training images before, without their labels (`gossamer.train.pretrain`), for a ViT
            with a class token; they take at most half of `seconds`.

    Returns:
        Validation and test metrics of the best weights, steps, seconds, and where they lie; also in `results.json`.

    Raises:
        ValueError: `out` holds a run with other settings.
    """
    out = Path(out)
    entry = system(find(name).slug)
    training = dict(entry.training)
    schedule: Schedule = training.pop("schedule", "cosine")
    patience = training.pop("patience", None)
    epochs = epochs or training.pop("epochs", 10)
    known = {f.name for f in fields(Settings)}
    chosen = Settings(**{**{k: v for k, v in training.items() if k in known}, **(settings or {}), "seed": seed})
    chosen = replace(chosen, lr=lr or chosen.lr, batch_size=batch_size or chosen.batch_size)
    run = {
        "command": "train",
        "model": name,
        "model_options": model_options or {},
        "data": str(source),
        "task": task,
        "options": options or {},
        "epochs": epochs,
        "seconds": seconds,
        "schedule": schedule,
        "settings": chosen.to_dict(),
        "pretrain": pretrain or None,
    }
    claim(out, run)
    if (out / "results.json").exists():
        return read_json(out / "results.json")

    data = read_dataset(source, task=task, seed=seed, **(options or {}))
    job = create_task(data.task, data.spec, data.meta)
    write_json(out / "task.json", {"task": data.task, "spec": data.spec, "meta": data.meta})
    if data.task not in entry.tasks:
        raise ValueError(f"{name} is not for {data.task}; it is for {', '.join(entry.tasks)}")
    torch.manual_seed(seed)
    model = create_model(name, **{**data.spec, **(model_options or {})})
    before = _pretrained(model, data, out, pretrain, seconds, seed, quiet) if pretrain else None
    trainer = Trainer(model, job, data, chosen)
    main = trainer.accelerator.is_main_process
    checkpoint, best_file = out / "checkpoints" / "last.pt", out / "checkpoints" / "best.safetensors"
    best: dict[str, Any] = {"epoch": -1, "value": None}
    spent, since = (before["seconds"] if before else 0.0), 0
    if checkpoint.exists():
        extra = trainer.load(checkpoint)
        best, spent, since = extra["best"], extra["spent"], extra["since"]
        if main:
            _forget_after(out / "metrics.jsonl", trainer.steps)
    total = epochs * trainer.steps_per_epoch
    began = time.perf_counter()
    last_save = began
    every = max(1, trainer.steps_per_epoch // CURVE_POINTS_PER_EPOCH)

    def log(**row: Any) -> None:
        if main:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def checkpointed() -> None:
        trainer.save(checkpoint, best=best, spent=spent + time.perf_counter() - began, since=since)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    goal = 0
    with Progress(*columns, disable=quiet or not main) as bar:
        row = bar.add_task(name, total=total, completed=trainer.steps, note="")

        def on_step(loss: float) -> None:
            nonlocal last_save
            if trainer.steps % every == 0:
                log(step=trainer.steps, loss=loss)
                bar.update(row, completed=trainer.steps, note=f"loss {loss:.4f}")
            if time.perf_counter() - last_save > CHECKPOINT_EVERY_S:
                last_save = time.perf_counter()
                checkpointed()

        def out_of_time() -> bool:
            return seconds is not None and spent + time.perf_counter() - began > seconds

        def epoch_over() -> bool:
            return trainer.steps >= goal or out_of_time()

        # A step short of an epoch's end means the run stopped inside it: the epoch is finished first.
        while trainer.steps < total and not out_of_time():
            goal = (trainer.epoch + 1) * trainer.steps_per_epoch
            trainer.train(steps=total, schedule=schedule, on_step=on_step, stop=epoch_over)
            metrics = trainer.evaluate(data.val)
            log(step=trainer.steps, epoch=trainer.epoch, val=_numbers(metrics))
            value = metrics[job.metric]
            if best["value"] is None or (value > best["value"]) == job.maximise:
                best, since = {"epoch": trainer.epoch, "value": value}, 0
                if main:
                    with trainer.averaged():
                        save_weights(model.state_dict(), best_file)
            else:
                since += 1
            checkpointed()
            trainer.accelerator.wait_for_everyone()
            if patience is not None and since >= patience:
                break

    spent += time.perf_counter() - began
    result: dict[str, Any] = {}
    if main:
        model.load_state_dict(load_weights(best_file))
        trainer.ema = None
        result = {
            "model": name,
            "val": _numbers(trainer.evaluate(data.val)),
            "test": _numbers(trainer.evaluate(data.test)),
            "best_epoch": best["epoch"],
            "steps": trainer.steps,
            "seconds": round(spent, 1),
            "precision": trainer.precision,
            "folder": str(save(model, out / "model")),
            "device": device_info(),
        }
        if before:
            result["pretrain"] = {**before["neighbours"], **before["last"], "epochs": before["epochs"]}
        write_json(out / "results.json", result)
    trainer.accelerator.wait_for_everyone()
    return result


def _pretrained(
    model: Any, data: Dataset, out: Path, epochs: int, seconds: float | None, seed: int, quiet: bool
) -> dict[str, Any]:
    """Learns `model` from the images alone, or reads what was learnt before."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as bar:
        row = bar.add_task("pre-training", total=None, note="")

        def note(step: int, total: int, losses: dict[str, float]) -> None:
            words = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            bar.update(row, completed=step, total=total, note=words)

        half = None if seconds is None else seconds / 2
        return pretrain_model(model, data, out / "pretrain", epochs=epochs, seconds=half, seed=seed, note=note)


def _forget_after(file: Path, step: int) -> None:
    """Takes out of a metrics file what came after the checkpoint: it will be done again."""
    if not file.exists():
        return
    rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    with atomic_write(file) as kept:
        kept.writelines(line + "\n" for line in rows if json.loads(line)["step"] <= step)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
