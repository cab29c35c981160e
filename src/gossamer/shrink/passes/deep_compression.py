"""Deep Compression: weights are pruned, then share a few numbers, then are Huffman-coded.

Source: Han et al. 2016, "Deep Compression", the chain that Goel et al. 2020, "A Survey of Methods for Low-Power Deep
Learning and Computer Vision", holds up; storage and codebooks are `gossamer.layers.shared_weights`.

1. of the products' weights the share `keep` stays, those that are largest in units of their layer's root mean square;
   in rounds, more of them at first (Zhu and Gupta 2017), trained in between with the zeros frozen
2. each matrix gets `2^bits` shared numbers by k-means from evenly spaced ones; they are trained by the sum of their
   weights' gradients, biases and norms along with them
3. gaps between kept weights and their numbers are Huffman-coded

- the teacher in both trainings is the model as it was
- pruned are the products between stem and head; shared and coded is every matrix, embeddings and positions included
- `shrink_report["deep_compression"]` has the bits a weight after each stage (places at 8 bits until they are coded)
- the paper prunes each layer by its own hand-set threshold and takes 8 bits for convolutions, 5 for the rest; here one
  threshold and one number of bits serve all
- small is the saved folder; what is computed is the dense product, and the exported file is dense
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.layers.coded import announce_coded, keep_coded, learned
from gossamer.layers.shared_weights import Codebook, Shared
from gossamer.measure import weight_bytes
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.products import products
from gossamer.shrink.recipe import note, register_step
from gossamer.shrink.recovery import check_steps

# A matrix smaller than this does not earn its codebook.
LEAST = 256
# Of the time and the steps, what pruning takes.
PRUNING = 0.6

Places = dict[nn.Parameter, list[tuple[str, str]]]


@register_pass(
    "deep_compression", family="quantisation", paper="low-power-dl-survey", saves=("size",), default={"keep": 0.3}
)
def deep_compression(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.3,
    bits: int = 5,
    rounds: int = 6,
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Prunes single weights, lets the others share `2^bits` numbers a matrix, and stores them Huffman-coded.

    Args:
        keep: share of the products' weights that stays; 1 prunes none.
        bits: of a shared number's index, 2 to 8 (at 8 bits there are 255 numbers, and zero).
        rounds: in which they are pruned.
        steps: of training in all, six epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: there is no matrix large enough.
        ValueError: a setting is out of range.
    """
    check_share("keep", keep)
    check_steps(steps)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2 … 8, got {bits}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    places = matrices(model)
    began = time.perf_counter()
    dense = weight_bytes(model)
    teacher = copy.deepcopy(model).eval() if steps != 0 else None
    pruned = _prunable(model, calibration, places) if keep < 1 else {}
    _prune(model, pruned, calibration, teacher, keep=keep, rounds=rounds, steps=steps, lr=lr, began=began)
    kept = {weight: int(weight.count_nonzero()) for weight in places}
    _share(model, places, calibration, teacher, bits=bits, steps=steps, lr=lr, began=began)
    taken: list[Step] = []
    for held in places.values():
        parts = None
        for part, name in held:
            # One array for a tied weight, so that it is stored once.
            parts = keep_coded(model, part, name, Shared(), parts).parts
            step: Step = {"step": "deep_compression.shared", "part": part, "name": name}
            note(model, step)
            taken.append(step)
    model.eval()
    report = {**getattr(model, "shrink_report", {}), "deep_compression": _report(model, kept, dense, bits)}
    setattr(model, "shrink_report", report)  # noqa: B010 (a plain attribute of a module)
    return taken


@register_step("deep_compression.shared")
def _shared(model: nn.Module, step: Step) -> None:
    announce_coded(model, step["part"], step["name"], Shared())


def matrices(model: nn.Module) -> Places:
    """The trained parameters of two axes or more that are large enough, and where `model` holds them.

    Raises:
        Unsupported: there are none.
    """
    found: Places = defaultdict(list)
    for part, module in model.named_modules():
        # Lists have no attribute to put a codebook before; recurrent layers keep their weights in a list of their own.
        if isinstance(module, nn.ParameterList | nn.ParameterDict | nn.RNNBase | parametrize.ParametrizationList):
            continue
        for name, weight in module._parameters.items():
            if weight is None or weight.ndim < 2 or weight.numel() < LEAST or not weight.is_floating_point():
                continue
            if weight.requires_grad and name not in module.__dict__.get("coded", {}):
                found[weight].append((part, name))
    if not found:
        raise Unsupported(f"{type(model).__name__} has no trained matrix of {LEAST} numbers or more")
    return dict(found)


def _prunable(model: nn.Module, calibration: Calibration, places: Places) -> dict[nn.Parameter, nn.Module]:
    """The weights of products between stem and head, and their modules."""
    try:
        found = products(model, calibration.example())
    except Unsupported:
        return {}
    weights = {p.layer._parameters.get("weight"): p.layer for p in found}
    return {weight: layer for weight, layer in weights.items() if weight is not None and weight in places}


class _Masked(nn.Module):
    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.unit = float(weight.detach().square().mean().sqrt().clamp(min=1e-30))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _prune(
    model: nn.Module,
    pruned: dict[nn.Parameter, nn.Module],
    calibration: Calibration,
    teacher: nn.Module | None,
    *,
    keep: float,
    rounds: int,
    steps: int | None,
    lr: float,
    began: float,
) -> None:
    """Sets all but the share `keep` of the weights to zero, round by round, training in between."""
    if not pruned:
        return
    masks = {weight: _Masked(weight) for weight in pruned}
    for weight, layer in pruned.items():
        parametrize.register_parametrization(layer, "weight", masks[weight])
    trainer = calibration.trainer(model, teacher=teacher, lr=lr, ema=0.0) if teacher is not None else None
    for turn in range(rounds):
        left = keep + (1 - keep) * (1 - (turn + 1) / rounds) ** 3
        sizes = {w: (w.detach() * m.mask).abs() / m.unit for w, m in masks.items()}
        flat = torch.cat([size.flatten() for size in sizes.values()])
        gone = len(flat) - max(1, round(left * len(flat)))
        limit = flat.kthvalue(gone).values if gone else -1.0
        for weight, mask in masks.items():
            mask.mask.copy_(sizes[weight] > limit)
        if trainer is not None:
            total = _steps(6 * trainer.steps_per_epoch if steps is None else steps, PRUNING)
            until = calibration.seconds * PRUNING * (turn + 1) / rounds
            trainer.begin_phase()
            count = total * (turn + 1) // rounds - total * turn // rounds
            trainer.train(steps=count, seconds=until - (time.perf_counter() - began))
    for weight, layer in pruned.items():
        learned(layer, "weight")
        with torch.no_grad():
            weight.mul_(masks[weight].mask)


def _share(
    model: nn.Module,
    places: Places,
    calibration: Calibration,
    teacher: nn.Module | None,
    *,
    bits: int,
    steps: int | None,
    lr: float,
    began: float,
) -> None:
    """Every matrix becomes `2^bits` numbers, which are trained."""
    books = {weight: Codebook(weight, min(2**bits, 255)) for weight in places}
    for weight, held in places.items():
        weight.requires_grad_(False)
        for part, name in held:
            parametrize.register_parametrization(model.get_submodule(part), name, books[weight])
    if teacher is not None:
        trainer = calibration.trainer(model, teacher=teacher, lr=lr, ema=0.0)
        total = 6 * trainer.steps_per_epoch if steps is None else steps
        left = calibration.seconds - (time.perf_counter() - began)
        trainer.train(steps=total - _steps(total, PRUNING), seconds=left, schedule="linear")
    for weight, held in places.items():
        for part, name in held:
            learned(model.get_submodule(part), name)
        with torch.no_grad():
            weight.copy_(books[weight](weight))


def _steps(total: int, share: float) -> int:
    return round(total * share)


def _report(model: nn.Module, kept: dict[nn.Parameter, int], dense: int, bits: int) -> dict[str, float]:
    """Bits a weight after each stage, of all coded ones together, and how many times smaller the whole model is."""
    count = sum(weight.numel() for weight in kept)
    sparse, shared = 0, 0
    for weight, alive in kept.items():
        place = 0 if alive == weight.numel() else 8
        sparse += (32 + place) * alive
        shared += (bits + place) * alive + 32 * 2**bits
    stored = weight_bytes(model)
    floats = sum(4 * weight.numel() for weight in kept)
    return {
        "density": sum(kept.values()) / count,
        "pruned_bits": sparse / count,
        "shared_bits": shared / count,
        "coded_bits": 8 * (stored - (dense - floats)) / count,
        "times_smaller": dense / stored,
    }
