"""SN-Net: a family of trained models becomes one model of dozens of networks, from the smallest to the largest.

Source: Pan, Cai, Zhuang 2023, "Stitchable Neural Networks"; the joined model is `gossamer.trunks.stitched`.

- stitching layers start as least-squares maps between the anchors' tokens on `samples` items, then everything is
  trained a little: each step draws one path, uniformly, and only what lies on it learns
- loss `0.5 task + 0.5 taught`, where the teacher's best class is the label (hard distillation of DeiT). The authors'
  teacher is a RegNetY; ours is the largest anchor as it was. Answers that are no classes are taught by `Task.teaching`
- afterwards all paths are timed and scored; `path` is the best that costs at most the share `keep` of the MACs
- `single=True` leaves that one network, an ordinary model
- the authors train 50 epochs of ImageNet with AdamW, 5e-5 for each 512 samples of a batch
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.measure import macs
from gossamer.models.registry import config_of, create_model
from gossamer.models.stitched import join
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import load, note, register_step, replay
from gossamer.tasks.base import Task
from gossamer.trunks.stitched import Stitched

Objective = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
Draw = Callable[[], int]


@register_pass(
    "snnet",
    family="joining",
    paper="snnet",
    saves=("macs", "params", "size"),
    default={"keep": 0.6, "single": True},
)
def snnet(
    model: nn.Module,
    calibration: Calibration,
    *,
    family: Sequence[nn.Module | str | Path] = (),
    keep: float = 0.6,
    kernel: int = 2,
    stride: int = 1,
    nearest: bool = True,
    samples: int = 100,
    epochs: float = 1.0,
    lr: float = 1e-4,
    single: bool = False,
) -> list[Step]:
    """Joins the model with others of its `family`, one network for each point between the smallest and the largest.

    Args:
        family: the other anchors, smaller or larger: models, or folders they were saved in.
        keep: share of the largest anchor's MACs that the chosen path may cost.
        kernel, stride: window of blocks within which two anchors of one depth are joined.
        nearest: join only neighbours in size.
        samples: items the stitching layers are solved from.
        epochs: of joint training, as far as the time goes; 0 for none.
        single: keep only the chosen path.

    Raises:
        Unsupported: no family, or models that cannot be joined.
        ValueError: `keep` is not in (0, 1], `kernel` or `stride` is below 1.
    """
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel and stride must be at least 1, got kernel={kernel}, stride={stride}")
    settings = {"kernel": kernel, "stride": stride, "nearest": nearest}

    def uniform(joined: Stitched, teacher: nn.Module) -> tuple[Objective, Draw]:
        chance = torch.Generator().manual_seed(calibration.seed)
        objective = hard_distillation(calibration.task, teacher)
        return objective, lambda: int(torch.randint(len(joined.paths), (), generator=chance))

    return join_family(
        model, calibration, family, settings, uniform, keep=keep, samples=samples, epochs=epochs, lr=lr, single=single
    )


def join_family(
    model: nn.Module,
    calibration: Calibration,
    family: Sequence[nn.Module | str | Path],
    settings: dict[str, Any],
    lesson: Callable[[Stitched, nn.Module], tuple[Objective, Draw]],
    *,
    keep: float,
    samples: int,
    epochs: float,
    lr: float,
    single: bool,
) -> list[Step]:
    """The pass, for either way to join: stitches, trains, chooses.

    Args:
        settings: of `gossamer.models.stitched.join`.
        lesson: of the joined model and a copy of the largest anchor as it was, the loss and which path a step runs.
    """
    begun = time.perf_counter()
    teacher, step = stitch(model, calibration, family, samples=samples, keep=keep, settings=settings)
    assert isinstance(model, Stitched)
    objective, draw = lesson(model, teacher)
    train(model, calibration, objective, draw, begun, epochs=epochs, lr=lr)
    return [step, *settle(model, calibration, begun, keep=keep, single=single)]


def stitch(
    model: nn.Module,
    calibration: Calibration,
    family: Sequence[nn.Module | str | Path],
    *,
    samples: int,
    keep: float,
    settings: dict[str, Any],
) -> tuple[nn.Module, Step]:
    """Makes `model`, in place, the joined model of itself and `family`, its stitches solved.

    Returns:
        A copy of the largest anchor as it was, and the step that joins them again.
    """
    check_share("keep", keep)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not family:
        raise Unsupported(f"{type(model).__name__} alone cannot be stitched: give family=[…], models or their folders")
    given = [m if isinstance(m, nn.Module) else load(m) for m in family]
    # What the pass trains are copies; the caller's own models stay as they are.
    anchors = [copy.copy(model), *(copy.deepcopy(m) for m in given)]
    example = calibration.example()
    try:
        configs = [{"config": config_of(m), "recipe": list(getattr(m, "recipe", []))} for m in anchors]
        cost = [macs(m, example).total for m in anchors]
        with torch.no_grad():
            answers = [tuple(m.eval()(*example).shape) for m in anchors]
        if "num_classes" in calibration.task.spec and len(set(answers)) > 1:
            raise ValueError(f"the answers of the family differ in shape: {answers}")
        order = sorted(range(len(anchors)), key=lambda i: cost[i])
        joined = join([anchors[i] for i in order], **settings)
        joined.solve(inputs for inputs, _ in calibration.batches(samples))
    except ValueError as error:
        raise Unsupported(f"this family cannot be stitched: {error}") from error
    place = order.index(0)
    step = {
        "step": "stitch.join",
        "anchors": [None if i == 0 else configs[i] for i in order],
        "place": place,
        "settings": settings,
    }
    teacher = copy.deepcopy(anchors[order[-1]]).eval()
    become(model, joined)
    note(model, step)
    return teacher, step


def hard_distillation(task: Task, teacher: nn.Module) -> Objective:
    """`0.5 loss(answer, target) + 0.5 loss(answer, argmax teacher)`; a model of two answers gives one to each."""

    def objective(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        answer = model(*inputs)
        first, second = answer if isinstance(answer, tuple) else (answer, answer)
        with torch.no_grad():
            taught = teacher(*inputs).float()
        loss = task.loss(first.float(), target)
        if task.name.endswith("classification"):
            return (loss + task.loss(second.float(), taught.argmax(-1))) / 2
        return (loss + task.teaching(second.float(), taught)) / 2

    return objective


def train(
    model: Stitched,
    calibration: Calibration,
    objective: Objective,
    draw: Draw,
    begun: float,
    *,
    epochs: float,
    lr: float,
) -> None:
    """Joint training: each step runs the path that `draw` gives. It ends with two thirds of the pass's time."""

    def one_path(wrapped: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        model.path = draw()
        return objective(wrapped, inputs, target)

    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    trainer = calibration.trainer(model, objective=one_path, lr=lr, ema=0.0)
    left = calibration.seconds * 2 / 3 - (time.perf_counter() - begun)
    steps = ceil(epochs * trainer.steps_per_epoch)
    if steps and left > 0:
        trainer.train(steps=steps, seconds=left, schedule="cosine")


def settle(model: nn.Module, calibration: Calibration, begun: float, *, keep: float, single: bool) -> list[Step]:
    """Times and scores the paths, as far as the time goes, and chooses one."""
    assert isinstance(model, Stitched)
    model.eval()
    example = calibration.example()
    left = calibration.seconds - (time.perf_counter() - begun)
    model.measure(example, seconds=max(0.1, min(1.5, left / 3)))
    cost = model.costs(example)
    allowed = [i for i, c in enumerate(cost) if c <= keep * max(cost)] or [cost.index(min(cost))]
    # Anchors first, then what may be chosen, then the others, the dear before the cheap.
    anchors = [i for i, path in enumerate(model.paths) if not path.stitches]
    order = dict.fromkeys([*anchors, *sorted(range(len(cost)), key=lambda i: (i not in allowed, -cost[i]))])
    sign = 1 if calibration.task.maximise else -1
    for number in order:
        if time.perf_counter() - begun > calibration.seconds * 0.95:
            break
        model.path = number
        model.scores[number] = sign * calibration.score(model, limit=512)
    model.path = max(allowed, key=lambda i: (float(model.scores[i].nan_to_num(nan=-inf)), cost[i]))
    if not single:
        return []
    step = {"step": "stitch.single", "path": model.path}
    _single(model, step)
    note(model, step)
    return [step]


def become(model: nn.Module, other: nn.Module) -> None:
    """Makes `model` the module `other`, in place; its config and recipe stay."""
    kept = {name: model.__dict__[name] for name in ("config", "recipe") if name in model.__dict__}
    object.__setattr__(model, "__class__", type(other))
    object.__setattr__(model, "__dict__", {**other.__dict__, **kept})


@register_step("stitch.join")
def _join(model: nn.Module, step: Step) -> None:
    anchors: list[nn.Module] = []
    for place, entry in enumerate(step["anchors"]):
        if place == step["place"]:
            anchors.append(copy.copy(model))
        else:
            anchors.append(replay(create_model(**entry["config"]), entry["recipe"]))
    become(model, join(anchors, **step["settings"]))


@register_step("stitch.single")
def _single(model: nn.Module, step: Step) -> None:
    if not isinstance(model, Stitched):
        raise ValueError(f"stitch.single needs a stitched model, got {type(model).__name__}")
    become(model, model.extract(step["path"]))
