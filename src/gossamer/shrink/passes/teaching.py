"""Teaching: some of the blocks stay, and learn from the whole model what the others did.

Source: Sanh et al. 2019, "DistilBERT" and Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression"
(a student made of evenly spaced blocks of its teacher); what is taught is in `gossamer.train.teaching`.

Of the `L` blocks of each stage stay `m = max(1, round(keep L))`, those nearest to `i (L - 1) / (m - 1)`.

- first and last block stay, as in the DistilBERT authors' own choice of layers; the paper takes one of two
- where windows shift in every second block they go on doing so: the nearest blocks are taken that shift in turn
- blocks only: widths stay, so that hidden states need no map
- by default answers alone are taught: blocks that come from the teacher gained nothing from hidden signals in the time
  of a recovery (half of MiniLM on STS-B, 100 s), unlike students that start from nothing
- the weights kept are the moving average of training, as in the recovery of `gossamer shrink`
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.shrink.base import Calibration, Step, Unsupported, blocks_of, check_share, register_pass
from gossamer.shrink.recipe import apply
from gossamer.tasks.base import Task
from gossamer.train.teaching import Teaching, check_signals, stage_of


@register_pass("teaching", family="teaching", saves=("macs", "params", "size"), default={"keep": 0.5})
def teaching(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.5,
    signals: Sequence[str] | Mapping[str, float] = ("logits",),
    relation_heads: int | None = None,
    epochs: float = 5.0,
    lr: float = 2e-4,
) -> list[Step]:
    """Drops blocks, evenly, and teaches those that stay by the whole model.

    Args:
        keep: share of the blocks of each stage that stay; 1 changes nothing.
        signals: what is taught, names or weights by name, of `gossamer.train.teaching.SIGNALS`.
        relation_heads: of the signal `relations`.
        epochs: of training, as far as the time goes; 0 for none.
        lr: learning rate.

    Raises:
        Unsupported: no block can go, the model does not run without some, or cannot be taught by these signals.
        ValueError: a setting is out of range.
    """
    start = time.perf_counter()
    check_share("keep", keep)
    check_signals(signals)
    if epochs < 0:
        raise ValueError(f"epochs must be at least 0, got {epochs}")
    if keep == 1:
        return []
    steps = dropped(model, keep)
    teacher = copy.deepcopy(model).eval()
    student = copy.deepcopy(model).eval()
    inputs = tuple(x.to(next(model.parameters()).device) for x in calibration.example(4))
    for step in steps:
        apply(student, step)
    try:
        with torch.no_grad():
            student(*inputs)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise Unsupported(f"{type(model).__name__} does not run without {steps[-1]['part']}: {first}") from error
    if epochs:
        loss = objective(signals, student, teacher, calibration.task, relation_heads=relation_heads, inputs=inputs)
    for step in steps:
        apply(model, step)
    if not epochs:
        return steps
    trainer = calibration.trainer(model, objective=loss, lr=lr, ema=0.98)
    left = calibration.seconds - (time.perf_counter() - start)
    trainer.train(
        steps=max(1, round(epochs * trainer.steps_per_epoch)),
        seconds=left if math.isfinite(left) else None,
        schedule="linear",
    )
    if trainer.ema is not None and trainer.ema.steps:
        trainer.ema.swap()
    model.eval()
    return steps


def objective(
    signals: Sequence[str] | Mapping[str, float],
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    *,
    relation_heads: int | None = None,
    inputs: tuple[Tensor, ...] | None = None,
) -> Teaching:
    """What `Calibration.trainer(student, objective=…)` takes to teach by `signals`; one for each training.

    Args:
        inputs: a few samples on which the two models are compared at once, so that what cannot be is known before
            anything is trained.

    Raises:
        Unsupported: these models cannot be compared so; it names the block and the reason.
        ValueError: an unknown signal.
    """
    check_signals(signals)
    try:
        found = Teaching(signals, student, teacher, task, relation_heads=relation_heads)
        if inputs is not None:
            found.compare(student, inputs)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    return found


def dropped(model: nn.Module, keep: float) -> list[Step]:
    """The steps that drop all blocks but the share `keep` of each stage, the last first.

    Raises:
        Unsupported: there are no blocks in lists, or none would go.
    """
    # A block within a wrapper goes with it.
    members: dict[str, Block] = {}
    for name, block in blocks_of(model):
        stage = stage_of(name)
        container = model.get_submodule(stage)
        if isinstance(container, nn.ModuleList | nn.Sequential):
            place = name.removeprefix(f"{stage}.").partition(".")[0]
            members.setdefault(f"{stage}.{place}" if stage else place, block)
    if not members:
        raise Unsupported(f"{blocks_of(model)[0][0]} is not in a list of blocks, so it cannot be dropped")
    gone = []
    counts = []
    for _, names in groupby(members, stage_of):
        found = list(names)
        counts.append(len(found))
        stay = spaced([getattr(members[n].mixer, "shifted", None) for n in found], max(1, round(keep * len(found))))
        gone += [name for i, name in enumerate(found) if i not in stay]
    if not gone:
        shown = ", ".join(map(str, counts))
        raise Unsupported(f"keep={keep:g} takes no block of {type(model).__name__}: its stages have {shown}")
    return [{"step": "axformer.drop", "part": name} for name in reversed(gone)]


def spaced(kinds: Sequence[bool | None], stay: int) -> list[int]:
    """`stay` places, evenly spaced, first and last among them, whose kinds come in the order they came in before."""
    chosen: list[int] = []
    for i in range(stay):
        ideal = i * (len(kinds) - 1) / max(stay - 1, 1)
        free = range(chosen[-1] + 1 if chosen else 0, len(kinds) - stay + i + 1)
        fitting = [j for j in free if kinds[j] == kinds[i]] or list(free)
        chosen.append(min(fitting, key=lambda j: (abs(j - ideal), -j)))
    return chosen
