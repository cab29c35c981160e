"""Few bits a weight: ternary, binary, powers of two, whole numbers by groups; trained straight through.

Source: Goel et al. 2020, "A Survey of Methods for Low-Power Deep Learning and Computer Vision", section on parameter
quantisation: Li et al. 2016 ("Ternary Weight Networks"), Rastegari et al. 2016 ("XNOR-Net"), Ding et al. 2018
("LightNN"). The grids are `gossamer.layers.coded.Grid`.

1. every product's weight is rounded on the way forward, and learns by the gradient of the rounded one; the loss is the
   task's and the teacher's, the model as it was
2. codes and scales are stored, packed; computed is the product of ever, with the rounded weight

- weights alone: inputs stay floats (the int8 form of an exported file rounds them, `gossamer.io.quantize_onnx`)
- the layers that read images and give the answer stay as they are, as in the papers; so do embeddings, norms, biases
- `bits="auto"` (`int` alone): a few bits more for the layers that show it in the answers. A layer's error is what
  rounding it alone to 3 bits does to the answers, and falls with its weights' own error; the sum is least for
  `mean_bits` (the survey names the idea; the form is ours, near HAWQ's)
- what is saved is storage: no kernel here computes with the codes, and no speed is promised
"""

from __future__ import annotations

import copy
import time
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.layers.coded import Grid, announce_coded, keep_coded, learned, straight_through
from gossamer.shrink.base import Calibration, Step, Unsupported, register_pass
from gossamer.shrink.costs import choose
from gossamer.shrink.products import Product, products
from gossamer.shrink.recipe import note, register_step
from gossamer.shrink.recovery import check_steps

Kind = Literal["ternary", "binary", "power", "power2", "int"]
CHOICES = (2, 3, 4, 5, 6, 8)
TRIAL = 3  # bits that sensitivities are measured at


@register_pass(
    "low_bits", family="quantisation", paper="low-power-dl-survey", saves=("size",), default={"kind": "int", "bits": 4}
)
def low_bits(
    model: nn.Module,
    calibration: Calibration,
    *,
    kind: Kind = "int",
    bits: int | Literal["auto"] = 4,
    group: int = 128,
    mean_bits: float = 4.0,
    steps: int | None = None,
    lr: float = 1e-4,
    samples: int = 64,
) -> list[Step]:
    """Rounds the weights of products to few bits, learning from the model as it was, and stores them packed.

    Args:
        kind: of numbers a weight may be; see `Grid`.
        bits: of `int`, 2 to 8, or `auto`: by each layer's sensitivity.
        group: numbers of a row that share a scale, of `int`.
        mean_bits: for `auto`, bits of all weights on the mean.
        steps: of training, two epochs by default, and never longer than the calibration's time.
        lr: learning rate.
        samples: training items that sensitivities are measured on.

    Raises:
        Unsupported: there is no product whose weight could be rounded.
        ValueError: a setting is out of range.
    """
    auto = bits == "auto"
    if auto and kind != "int":
        raise ValueError(f"bits='auto' goes with kind='int' alone, got {kind!r}")
    if isinstance(bits, str) and not auto:
        raise ValueError(f"bits must be 2 … 8 or auto, got {bits!r}")
    if auto and not CHOICES[0] <= mean_bits <= CHOICES[-1]:
        raise ValueError(f"mean_bits must be in {CHOICES[0]} … {CHOICES[-1]}, got {mean_bits}")
    check_steps(steps)
    grid = Grid(kind, TRIAL if auto else int(bits), group)
    start = time.perf_counter()
    found = float_products(model, calibration)
    chosen = _by_sensitivity(model, found, calibration, group, mean_bits, samples) if auto else {}
    grids = {p.name: Grid(kind, chosen[p.name], group) if auto else grid for p in found}
    if steps != 0:
        teacher = copy.deepcopy(model).eval()
        for p in found:
            straight_through(p.layer, "weight", grids[p.name].round)
        try:
            trainer = calibration.trainer(model, teacher=teacher, lr=lr, ema=0.0)
            total = 2 * trainer.steps_per_epoch if steps is None else steps
            left = calibration.seconds - (time.perf_counter() - start)
            trainer.train(steps=total, seconds=left, schedule="linear")
        finally:
            for p in found:
                learned(p.layer, "weight")
    taken: list[Step] = []
    for p in found:
        own = grids[p.name]
        keep_coded(model, p.name, "weight", own)
        step: Step = {"step": "low_bits.grid", "part": p.name, "kind": kind, "bits": own.bits, "group": own.group}
        note(model, step)
        taken.append(step)
    model.eval()
    return taken


@register_step("low_bits.grid")
def _grid(model: nn.Module, step: Step) -> None:
    announce_coded(model, step["part"], "weight", Grid(step["kind"], step["bits"], step["group"]))


def float_products(model: nn.Module, calibration: Calibration) -> list[Product]:
    """The products between stem and head whose weight is a plain trained parameter.

    Raises:
        Unsupported: there are none.
    """
    found = products(model, calibration.example())
    plain = [p for p in found if isinstance(p.layer._parameters.get("weight"), nn.Parameter) and _trains(p.layer)]
    if not plain:
        raise Unsupported(f"{type(model).__name__} has no product that is not stored in few bits already")
    return plain


def _trains(layer: nn.Module) -> bool:
    return not layer.__dict__.get("coded")


@torch.no_grad()
def _by_sensitivity(
    model: nn.Module, found: list[Product], calibration: Calibration, group: int, mean_bits: float, samples: int
) -> dict[str, int]:
    """Bits by name: the least sum of what rounding each layer alone does to the answers, for `mean_bits` of all."""
    model.eval()
    device = next(model.parameters()).device
    inputs = [tuple(x.to(device) for x in given) for given, _ in calibration.batches(samples)]
    dense = [_answer(model, given) for given in inputs]
    options = []
    for p in found:
        weight = p.layer._parameters["weight"]
        assert weight is not None
        whole = weight.detach().clone()
        errors = {b: float((Grid("int", b, group).round(whole) - whole).square().sum()) for b in CHOICES}
        weight.copy_(Grid("int", TRIAL, group).round(whole))
        moved = sum(float((_answer(model, x) - y).square().sum()) for x, y in zip(inputs, dense, strict=True))
        weight.copy_(whole)
        slope = moved / max(errors[TRIAL], 1e-30)
        options.append([(float(b * whole.numel()), -slope * errors[b]) for b in CHOICES])
    budget = mean_bits * sum(cost / CHOICES[0] for (cost, _), *_ in options)
    picks = choose(options, budget)
    return {p.name: CHOICES[pick] for p, pick in zip(found, picks, strict=True)}


def _answer(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    output = model(*inputs)
    while isinstance(output, tuple | list):
        output = output[0]
    return output.float()
