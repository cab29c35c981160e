"""The loop: batches of one split through one model, on whatever devices Accelerate finds.

- a run is a sequence of phases (`stable`, then a decay, …), each bounded by steps, by seconds, or by both
- everything that decides what comes next is in `state_dict`, so a run goes on exactly where it was
- every process computes the same global batch and keeps its slice: two processes follow one process's loss curve
- the first steps may be taken in float32 and in bfloat16 by turns, and the faster form kept: no step is wasted
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.data.base import Dataset, Split
from gossamer.io import atomic_path
from gossamer.tasks.base import Task
from gossamer.train.ema import MovingAverage
from gossamer.train.settings import Schedule, Settings, build_optimiser, schedule_factor
from gossamer.trunks.checkpointing import set_checkpointing

# Of the loss, what a teacher's answers get; the rest is the task's own.
TAUGHT = 0.7
# Steps taken in each precision by turns when it is to be chosen; the first of each are not timed.
TRIED, UNTIMED = 14, 4
# bfloat16 has to be this much faster before it is taken.
WORTH = 0.95


class Diverged(ValueError):
    """The loss is no longer a number: the learning rate is too high for this model and data."""


class Trainer:
    """Trains `model` on `data.train` for `task`.

    Args:
        model: moved to the device and wrapped as Accelerate sees fit; `model` itself stays the plain module.
        teacher: a model whose answers are learned too, or None.
        objective: `(model, inputs, target) -> loss` in place of the task's own loss and the teacher's.
        optimiser: `(model, settings) -> optimiser` in place of the one `settings` name.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        data: Dataset,
        settings: Settings,
        *,
        teacher: nn.Module | None = None,
        objective: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor] | None = None,
        optimiser: Callable[[nn.Module, Settings], Optimizer] = build_optimiser,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.model = model.to(self.accelerator.device)
        self.teacher = None if teacher is None else teacher.to(self.accelerator.device).eval()
        self.task = task
        self.data = data
        self.settings = settings
        if settings.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size must be a multiple of the {self.accelerator.num_processes} processes, "
                f"got {settings.batch_size}"
            )
        if settings.checkpointing:
            set_checkpointing(self.model)
        self.objective = objective
        self.wrapped, self.optimiser = self.accelerator.prepare(self.model, optimiser(self.model, settings))
        self.ema = MovingAverage(self.model, settings.ema) if settings.ema else None
        self.precision = "float32" if settings.precision == "auto" else settings.precision
        self.chosen = settings.precision != "auto"
        self._tried: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        self.steps = 0
        self.samples = 0
        self.phase_steps = 0
        self.phase_seconds = 0.0
        self._order: tuple[int, Tensor] | None = None
        self.batch_size = min(settings.batch_size, _whole(len(data.train), self.accelerator.num_processes))

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.data.train) // self.batch_size)

    @property
    def epoch(self) -> int:
        return self.steps // self.steps_per_epoch

    def begin_phase(self) -> None:
        """Sets the steps and seconds of the phase to zero; a phase bounded by them starts here."""
        self.phase_steps, self.phase_seconds = 0, 0.0

    def train(
        self,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        schedule: Schedule = "stable",
        on_step: Callable[[float], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Goes on with the phase until it has had `steps` or `seconds` (infinite: no limit), or `stop()` is true.

        Returns:
            The mean loss of the steps taken, NaN if there was none.

        Raises:
            Diverged: the loss is not finite.
            ValueError: neither `steps` nor `seconds`.
        """
        if steps is None and seconds is None:
            raise ValueError("train needs steps= or seconds=")
        self.wrapped.train()
        losses = []
        before, start = self.phase_seconds, time.perf_counter()
        while not stop():
            progress = max(self.phase_steps / steps if steps else 0.0, self.phase_seconds / seconds if seconds else 0.0)
            if progress >= 1 or (steps == 0) or (seconds is not None and seconds <= 0):
                break
            loss = self._step(schedule_factor(schedule, progress, self.epoch))
            losses.append(loss)
            self.phase_seconds = before + time.perf_counter() - start
            if on_step is not None:
                on_step(loss)
        return sum(losses) / len(losses) if losses else float("nan")

    def _step(self, factor: float) -> float:
        began = time.perf_counter()
        inputs, target = self._batch()
        rate = self.settings.lr * factor * min(1.0, (self.steps + 1) / max(self.settings.warmup, 1))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        precision = self._turn()
        # Dropout and drop path follow the step, not the history, so that a resumed run draws the same.
        torch.manual_seed(hash((self.settings.seed, self.steps, self.accelerator.process_index)) % 2**63)
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            if self.objective is not None:
                loss = self.objective(self.wrapped, inputs, target)
            else:
                loss = self._loss(self.wrapped(*inputs), inputs, target)
        self.accelerator.backward(loss)
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ema is not None:
            self.ema.update()
        value = float(self.accelerator.reduce(loss.detach().float(), "mean"))
        if value != value or value in (float("inf"), float("-inf")):
            raise Diverged(f"the loss is {value} at step {self.steps} (lr {rate:.2g}, {precision})")
        self.steps += 1
        self.phase_steps += 1
        self.samples += self.batch_size
        if not self.chosen:
            self._tried[precision].append(time.perf_counter() - began)
        return value

    def _loss(self, output: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        answers = output if isinstance(output, tuple) else (output,)
        loss = torch.stack([self.task.loss(a.float(), target, self.settings.smoothing) for a in answers]).mean()
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher(*inputs).float()
        taught_loss = torch.stack([self.task.teaching(a.float(), taught) for a in answers]).mean()
        return (1 - TAUGHT) * loss + TAUGHT * taught_loss

    def _turn(self) -> str:
        if self.chosen:
            return self.precision
        fewest = min(len(times) for times in self._tried.values())
        if fewest >= TRIED // 2:
            fp32, bf16 = (median(self._tried[p][UNTIMED // 2 :]) for p in ("float32", "bfloat16"))
            self.precision, self.chosen = ("bfloat16" if bf16 < WORTH * fp32 else "float32"), True
            return self.precision
        return "float32" if self.steps % 2 == 0 else "bfloat16"

    def _batch(self) -> tuple[tuple[Tensor, ...], Tensor]:
        epoch, place = divmod(self.steps, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.data.train), generator=generator))
        index = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.steps)
        inputs, target = self.task.batch(
            self.data.train, index, train=True, strength=self.settings.strength, generator=generator
        )
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        device = self.accelerator.device
        return tuple(x[rank::world].to(device) for x in inputs), target[rank::world].to(device)

    @torch.no_grad()
    def outputs(self, split: Split, *, limit: int | None = None, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Answers and targets over `split` (evenly spaced items if more than `limit`), with the averaged weights."""
        with self.averaged():
            return model_outputs(self.model, self.task, split, limit=limit, batch_size=batch_size)

    def evaluate(self, split: Split, *, limit: int | None = None) -> dict[str, float]:
        """The task's metrics over `split`, with the averaged weights."""
        return self.task.metrics(*self.outputs(split, limit=limit))

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model holds the weights to be kept: the moving average where there is one."""
        return self.ema.applied() if self.ema is not None and self.ema.steps else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "settings": self.settings.to_dict(),
            "precision": self.precision,
            "chosen": self.chosen,
            "steps": self.steps,
            "samples": self.samples,
            "phase_steps": self.phase_steps,
            "phase_seconds": self.phase_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        for name in ("precision", "chosen", "steps", "samples", "phase_steps", "phase_seconds"):
            setattr(self, name, state[name])

    def save(self, path: str | Path, **extra: Any) -> None:
        """Writes the state, atomically, from the main process; `extra` are plain values kept beside it."""
        if self.accelerator.is_main_process:
            with atomic_path(path) as temporary:
                torch.save({**self.state_dict(), "extra": extra}, temporary)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Reads what `save` wrote and gives back its extra values."""
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self.load_state_dict(state)
        return state["extra"]


@torch.no_grad()
def model_outputs(
    model: nn.Module, task: Task, split: Split, *, limit: int | None = None, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Answers of `model` in eval mode and targets over `split`, on the CPU; evenly spaced items if above `limit`.

    Both are reduced batch by batch as the task says.
    """
    count = len(split)
    index = torch.arange(count)
    if limit is not None and count > limit:
        index = torch.linspace(0, count - 1, limit).round().long()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    answers, targets = [], []
    for part in index.split(min(batch_size, task.most_at_once)):
        inputs, target = task.batch(split, part, train=False)
        output, target = task.reduce(model(*(x.to(device) for x in inputs)).float().cpu(), target)
        answers.append(output)
        targets.append(target)
    model.train(was_training)
    return torch.cat(answers), torch.cat(targets)


def _whole(samples: int, processes: int) -> int:
    return max(processes, samples - samples % processes)
