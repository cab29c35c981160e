"""What a pass is: `pass(model, calibration, **settings) -> steps`, and the register that finds it by name.

- a pass changes `model` in place and gives the recipe steps it took; it works on the copy its caller made
- what a pass cannot handle it says with `Unsupported`, before it has changed anything
- steps are plain JSON, carried out by functions registered beside the pass (`gossamer.shrink.recipe.register_step`);
  a pass that only changes weights takes no steps
- `keep` is the one strength all passes with a strength share: the share of the resource they save that is left
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.data.base import Dataset
from gossamer.layers import Block
from gossamer.tasks.base import Task
from gossamer.train import Settings, Trainer
from gossamer.train.settings import build_optimiser
from gossamer.train.trainer import model_outputs

Step = dict[str, Any]
Batch = tuple[tuple[Tensor, ...], Tensor]

FAMILIES = (
    "structured pruning",
    "depth",
    "sparsity",
    "factorisation",
    "token reduction",
    "early exit",
    "quantisation",
    "exact rewrite",
    "joining",
    "teaching",
)
Family = Literal[
    "structured pruning",
    "depth",
    "sparsity",
    "factorisation",
    "token reduction",
    "early exit",
    "quantisation",
    "exact rewrite",
    "joining",
    "teaching",
]


class Unsupported(ValueError):
    """A pass cannot handle this model: the message names the module and the reason. The model is as it was."""


@dataclass(frozen=True)
class ShrinkPass:
    """A registered pass.

    Args:
        name: what recipes call it.
        run: `(model, calibration, **settings) -> steps`.
        family: what kind of technique it is, one of `FAMILIES`.
        paper: slug of its system in the catalogue; None for a baseline of our own choosing.
        saves: what it can make smaller: `macs`, `params`, `size`; latency is for the gate to tell.
        default: settings `gossamer shrink` starts from.
    """

    name: str
    run: Callable[..., list[Step]]
    family: Family
    paper: str | None
    saves: tuple[str, ...]
    default: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Names and defaults of the pass's keywords."""
        parameters = list(inspect.signature(self.run).parameters.values())[2:]
        return {p.name: p.default for p in parameters}

    @property
    def about(self) -> str:
        """First sentence of the pass's docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n\n")[0].replace("\n", " ")


_PASSES: dict[str, ShrinkPass] = {}


def register_pass(
    name: str,
    *,
    family: Family,
    paper: str | None = None,
    saves: tuple[str, ...] = (),
    default: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., list[Step]]], Callable[..., list[Step]]]:
    """Registers a function as the pass `name`; see `ShrinkPass` for the arguments."""

    def register(run: Callable[..., list[Step]]) -> Callable[..., list[Step]]:
        _PASSES[name] = ShrinkPass(name, run, family, paper, saves, dict(default or {}))
        return run

    return register


def passes() -> dict[str, ShrinkPass]:
    """All passes by name."""
    import gossamer.shrink.passes as folder

    for found in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{found.name}")
    return dict(sorted(_PASSES.items()))


def find_pass(name: str) -> ShrinkPass:
    """The pass `name`.

    Raises:
        ValueError: there is no such pass.
    """
    known = passes()
    if name not in known:
        raise ValueError(f"pass must be one of {', '.join(known)}; got {name!r}")
    return known[name]


@dataclass
class Calibration:
    """What a pass may learn from: the user's data, in the form the model reads, and the time it may take.

    Args:
        task: makes batches, losses and metrics.
        data: passes read `train`; `val` is for scores, `test` is never touched.
        seconds: wall-clock time the pass may take for everything it does, training included.
        seed: of every choice by chance.
        cache: what passes have found out about the model and may need again at another strength (scores); it is the
            caller's to keep one cache for one model.
    """

    task: Task
    data: Dataset
    seconds: float = float("inf")
    seed: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def example(self, count: int = 1) -> tuple[Tensor, ...]:
        """Model inputs of the first `count` training samples."""
        return self.task.example(self.data.train, count)

    def batches(self, samples: int, *, batch_size: int = 32, split: str = "train") -> Iterator[Batch]:
        """`samples` evenly spaced items (all, if there are fewer) as `(inputs, target)`, not augmented."""
        part = getattr(self.data, split)
        index = torch.linspace(0, len(part) - 1, min(samples, len(part))).round().long()
        for chosen in index.split(batch_size):
            yield self.task.batch(part, chosen, train=False)

    def loss(self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """The task's loss of one batch; of a model of several answers, their mean."""
        output = model(*inputs)
        answers = output if isinstance(output, tuple) else (output,)
        return torch.stack([self.task.loss(answer.float(), target) for answer in answers]).mean()

    def score(self, model: nn.Module, *, limit: int | None = 1000) -> float:
        """The task's metric on (at most `limit` items of) the validation split."""
        return float(self.task.metrics(*model_outputs(model, self.task, self.data.val, limit=limit))[self.task.metric])

    def trainer(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        objective: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor] | None = None,
        optimiser: Callable[[nn.Module, Settings], Optimizer] = build_optimiser,
        **settings: Any,
    ) -> Trainer:
        """A trainer for recovery: `settings` are keywords of `gossamer.train.Settings`, fine-tuning by default."""
        calm: dict[str, Any] = {"lr": 1e-4, "batch_size": 32, "strength": 0.0, "warmup": 20, "weight_decay": 0.01}
        calm |= {"precision": "float32", "seed": self.seed}
        chosen = Settings(**{**calm, **settings})
        return Trainer(model, self.task, self.data, chosen, teacher=teacher, objective=objective, optimiser=optimiser)


def check_settings(name: str, settings: Iterable[str]) -> ShrinkPass:
    """The pass `name`, if it has all of these settings.

    Raises:
        ValueError: there is no such pass, or a setting it does not have.
    """
    chosen = find_pass(name)
    if unknown := sorted(set(settings) - set(chosen.settings)):
        raise ValueError(f"pass {name} has no setting {', '.join(unknown)}; it has {', '.join(chosen.settings)}")
    return chosen


def run_pass(name: str, model: nn.Module, calibration: Calibration, **settings: Any) -> tuple[nn.Module, list[Step]]:
    """A copy of `model` shrunk by the pass `name`, its steps noted in the copy's `recipe`, and the steps.

    Raises:
        Unsupported: the pass cannot handle this model.
        ValueError: no such pass or setting.
    """
    chosen = check_settings(name, settings)
    shrunk = copy.deepcopy(model)
    before = list(getattr(shrunk, "recipe", []))
    steps = chosen.run(shrunk, calibration, **settings)
    setattr(shrunk, "recipe", [*before, *steps])  # noqa: B010 (a plain attribute of a module)
    return shrunk.eval(), steps


def check_share(name: str, value: Any) -> None:
    """Raises a ValueError where a share is not a number in (0, 1]."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


def blocks_of(model: nn.Module) -> list[tuple[str, Block]]:
    """The residual blocks of one of our models, in order, by name.

    Raises:
        Unsupported: there is none.
    """
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, Block)]
    if not found:
        raise Unsupported(f"{type(model).__name__} has no residual blocks of ours (gossamer.layers.Block)")
    return found
