"""MuE: each sample, or each token of a decoder, leaves the network at the layer where it stops to change.

Source: Tang et al. 2022, "You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language
Model".

    exit at the first layer l with cos(x_l, x_{l-1}) > threshold;   loss = mean_l task_loss(head(norm(x_l)))

- the layer-wise loss makes the output of every layer readable by the one norm and head; no parameters are added
- the threshold is the largest that leaves the share `keep` of the layers on calibration data; the paper sweeps it
- ours: sentences that are compared may leave at different layers, so their loss is also taken with each at a layer
  drawn by chance (for losses of single samples that is the layer-wise loss itself)
- encoders leave by sample, decoders by token (`gossamer.layers.saturation`)
- the authors' own code is not public; their model has two modalities in one encoder, which exit apart: here each
  model has one, and two stacks over the same blocks are that case
- a graph for one fixed course of calculation runs all layers: ONNX files made by tracing give the same answers at the
  full cost, those made by `torch.export` skip a layer when the whole batch has left
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.layers.saturation import Saturation, check_copies, check_threshold
from gossamer.measure import macs
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import note, register_step
from gossamer.tasks.base import Task
from gossamer.trunks import Isotropic

# A cosine above every other: nothing leaves.
NEVER = 2.0


@dataclass(frozen=True)
class Expected:
    """What a model with exits costs on given data.

    Args:
        layers: mean number of layers taken; `share` of all layers.
        macs: mean multiply-adds of a sample, estimated as those outside of the layers and `share` of those within.
        full_macs: when no layer is skipped.
    """

    layers: float
    share: float
    macs: float
    full_macs: float


def stack_of(model: nn.Module) -> Saturation:
    """The layers with exits of a model that `mue` has shrunk.

    Raises:
        ValueError: it has none.
    """
    for part in model.modules():
        if isinstance(part, Saturation):
            return part
    raise ValueError(f"{type(model).__name__} has no layers with exits; the pass mue makes them")


@torch.no_grad()
def expected_cost(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> Expected:
    """Layers and multiply-adds that `model` takes on the inputs `batches`, in the mean.

    Raises:
        ValueError: no layers with exits, or no batch.
    """
    stack = stack_of(model)
    depths, example = [], None
    for inputs in batches:
        model(*inputs)
        assert stack.depths is not None
        depths.append(_valid_depths(model, inputs[0], stack).double())
        example = inputs if example is None else example
    if example is None:
        raise ValueError("batches must hold at least one batch, got none")
    one = tuple(x[:1] for x in example)
    threshold, stack.threshold = stack.threshold, NEVER
    try:
        counted = macs(model, one, per_layer=True)
    finally:
        stack.threshold = threshold
    name = next(name for name, part in model.named_modules() if part is stack)
    within = counted.by_module.get(name, 0)
    layers = float(torch.cat(depths).mean())
    share = layers / len(stack.blocks)
    return Expected(layers, share, counted.total - (1 - share) * within, counted.total)


def layerwise_loss(
    model: Any, inputs: tuple[Tensor, ...], target: Tensor, loss: Any, *, mixed: bool = False
) -> Float[Tensor, ""]:
    """`mean_l loss(head(norm(x_l)), target)` over all layers, the last one included.

    Args:
        mixed: add as much of the loss with each sample at a layer drawn by chance, for losses that compare samples.
    """
    model = getattr(model, "module", model)
    x, mask = model.stem(*inputs)
    norm = model.norm or nn.Identity()
    states = stack_of(model).states(x, mask=mask)
    if mixed:
        drawn = torch.randint(len(states), (len(x),), device=x.device)
        one_each = torch.stack(states)[drawn, torch.arange(len(x), device=x.device)]
        states = [*states, *[one_each] * len(states)]
    losses = []
    for state in states:
        answer = model.head(norm(state), mask)
        # A distilled model has two answers while it trains.
        losses += [loss(a.float(), target) for a in (answer if isinstance(answer, tuple) else (answer,))]
    return torch.stack(losses).mean()


@register_pass("mue", family="early exit", paper="mue", saves=("macs",), default={"keep": 0.6})
def mue(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    threshold: float | None = None,
    steps: int = 300,
    samples: int = 256,
    lr: float = 1e-4,
) -> list[Step]:
    """Lets samples (tokens of a decoder) leave at the layer where they stop to change.

    Args:
        keep: share of the layers that is run, in the mean over the calibration data.
        threshold: the cosine itself, in place of the one found for `keep`.
        steps: training steps with the layer-wise loss, as far as the time goes.
        samples: of the training data, to choose the threshold on.
        lr: learning rate of the training.

    Raises:
        Unsupported: not a plain stack of blocks of ours, or a decoder whose layers cannot copy keys and values.
        ValueError: `keep` is not in (0, 1], or `threshold` is no number.
    """
    check_share("keep", keep)
    if threshold is not None:
        check_threshold(threshold)
    _check(model)
    step: Step = {"step": "mue.exits", "threshold": NEVER}
    _exits(model, step)
    stack = stack_of(model)
    if steps > 0 and calibration.seconds > 0:
        trainer = calibration.trainer(model, objective=_Objective(calibration.task), lr=lr, ema=0.0)
        trainer.train(steps=steps, seconds=0.7 * calibration.seconds, schedule="linear")
    model.eval()
    if threshold is None:
        threshold = choose_threshold(model, [x for x, _ in calibration.batches(samples)], keep)
    stack.threshold = step["threshold"] = float(threshold)
    # Carried out already, to train: only noted.
    note(model, step)
    return [step]


@torch.no_grad()
def choose_threshold(model: Any, batches: list[tuple[Tensor, ...]], keep: float) -> float:
    """The largest threshold at which no more than the share `keep` of the layers is run on `batches`.

    One layer is always run: a share below that is answered with the threshold at which everything leaves after it.
    """
    stack = stack_of(model)
    found = []
    for inputs in batches:
        x, mask = model.stem(*inputs)
        likeness = stack.likeness(x, mask=mask).flatten(1)
        if stack.per_token and mask is not None:
            likeness = likeness[:, mask.flatten()]
        found.append(likeness)
    likeness = torch.cat(found, 1)
    depth = len(stack.blocks)
    # A layer is the last when its likeness is *above* the threshold, so the next number below a likeness lets it go.
    levels = torch.nextafter(likeness[:-1].unique(), torch.tensor(-torch.inf))

    def within(level: float) -> bool:
        if not stack.per_token:
            # What happens behind an exit does not matter, so one full run tells the exits of every threshold.
            leaves = likeness > level
            leaves[-1] = True
            return float((leaves.int().argmax(0) + 1).double().mean()) <= keep * depth
        # In a decoder, the copied keys and values of those that have left change what the others see.
        before, stack.threshold = stack.threshold, level
        try:
            taken = []
            for inputs in batches:
                model(*inputs)
                taken.append(_valid_depths(model, inputs[0], stack))
        finally:
            stack.threshold = before
        return float(torch.cat(taken).double().mean()) <= keep * depth

    if keep == 1 or not len(levels):
        return NEVER
    low, high = 0, len(levels)  # the largest level within lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if within(float(levels[middle])):
            low = middle
        else:
            high = middle
    return float(levels[low])


def _valid_depths(model: Any, x: Tensor, stack: Saturation) -> Tensor:
    """Depths of the last call; those of padding are left out."""
    assert stack.depths is not None
    if not stack.per_token:
        return stack.depths
    mask = model.stem(x)[1]
    return stack.depths.flatten() if mask is None else stack.depths[mask]


class _Objective:
    """The layer-wise loss of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        # The two sentences of a pair may leave at different layers, and are compared all the same.
        return layerwise_loss(model, inputs, target, self.task.loss, mixed=self.task.name == "sentence-similarity")


def _check(model: nn.Module) -> None:
    if not isinstance(model, Isotropic):
        raise Unsupported(f"{type(model).__name__} is no stack of layers of one width and one head (Isotropic)")
    for number, block in enumerate(model.blocks):
        if not isinstance(block, Block) or getattr(block, "reduces", False):
            why = "gives other tokens than it takes" if getattr(block, "reduces", False) else "is no residual block"
            raise Unsupported(f"blocks.{number} ({type(block).__name__}) {why}, so input and output do not compare")
    if len(model.blocks) < 2:
        raise Unsupported(f"{type(model).__name__} has one layer: there is none to leave out")
    causal = [bool(getattr(block.mixer, "causal", False)) for block in model.blocks]
    if any(causal):
        try:
            check_copies(list(model.blocks))
        except ValueError as error:
            raise Unsupported(f"blocks: {error}") from error


@register_step("mue.exits")
def _exits(model: nn.Module, step: Step) -> None:
    _check(model)
    assert isinstance(model, Isotropic)
    blocks: list[Any] = list(model.blocks)
    stack = Saturation(blocks, threshold=step["threshold"], per_token=bool(blocks[0].mixer.causal))
    model.blocks = nn.ModuleList([stack.train(model.training)])
