"""SparseOptimizer: fine-tuning with a proximal step, until the wanted share of the weights is exactly zero.

Source: Guo 2023, "SparseOptimizer: Sparsify Language Models through Moreau-Yosida Regularization and Accelerate via
Compiler Co-design"; Guo et al. 2019, "Reweighted Proximal Pruning for Large-Scale Language Representation". A
reconstruction: of the first, neither code nor full text is public. The optimiser is `gossamer.train.moreau_yosida`.

1. the first 70 % of the steps (half of them for members): AdamW with the reweighted map. `shrink` is set every few
   steps so that a weight at the wanted quantile q is zero when the phase ends: `|w| -> |w| - lr * shrink / |w|` takes
   `w^2 / (lr * shrink)` steps, so `shrink = q^2 / (lr * steps left)`; what is longer than q is left alone (both ours:
   the paper tries a grid of constants, on all weights)
2. what is still too much is set to zero, smallest first
3. the rest: the zeros are frozen and the others trained without the penalty, which takes its bias out again

- `unit="weights"`, the paper's: single weights. The model is no faster and its file no smaller unless it is stored and
  run sparse, which the paper leaves to its compiler; `density` says what there is
- `unit="members"`: whole heads and hidden units, by the columns of the product that reads them, in shares of the mean
  of their layer; they are sliced away
- either way, heads and units that have come to give nothing are sliced away
- prunable are the matrices of the residual blocks, never embeddings and the task's head
"""

from __future__ import annotations

import math
import time
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gossamer.shrink.base import Calibration, Step, Unsupported, blocks_of, check_share, register_pass
from gossamer.shrink.masks import Member, keep_members, members, reader
from gossamer.train import Settings, Trainer
from gossamer.train.moreau_yosida import MoreauYosida, group_norms

# Of the steps (or of the time), those that shrink; the others recover.
SHRINKING = {"weights": 0.7, "members": 0.5}
# Steps from one setting of `shrink` to the next.
EVERY = 5


@register_pass(
    "sparse_optimizer",
    family="sparsity",
    paper="sparse-optimizer",
    saves=("macs", "params", "size"),
    default={"keep": 0.6, "unit": "members"},
)
def sparse_optimizer(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.5,
    unit: str = "weights",
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Fine-tunes with a proximal step until the share `keep` of weights, or of heads and units, is left.

    Args:
        keep: share that stays: of all weights of the blocks, or of all heads and of all hidden units.
        unit: what becomes zero: single `weights`, or whole `members`, which are sliced away.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: the model has no blocks of ours with matrices, or for `members` nothing prunable.
        ValueError: `keep` is not in (0, 1], an unknown unit, or `steps` below 1.
    """
    check_share("keep", keep)
    if unit not in SHRINKING:
        raise ValueError(f"unit must be one of {', '.join(SHRINKING)}; got {unit!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    matrices = list(block_matrices(model).values())
    found = members(model) if unit == "members" else {}
    if keep == 1:
        return []
    start = time.perf_counter()
    scopes = _member_scopes(model, found) if found else _scopes(matrices)

    def optimiser(net: nn.Module, settings: Settings) -> Optimizer:
        groups = _groups(net, scopes, settings.weight_decay)
        return MoreauYosida(AdamW(groups, lr=settings.lr, fused=True), weights="reweighted")

    trainer = calibration.trainer(model, optimiser=optimiser, lr=lr, ema=0.0)
    total = steps or 3 * trainer.steps_per_epoch
    first = math.ceil(SHRINKING[unit] * total)
    _shrink(trainer, scopes, keep, first, SHRINKING[unit] * calibration.seconds)
    with torch.no_grad():
        for scope in scopes:
            scope.cut(keep)
    taken = slice_dead(model)
    if taken:
        # Sliced tensors are new ones. Single weights at zero are to be frozen all the same.
        scopes = _scopes(list(block_matrices(model).values())) if unit == "weights" else []
        trainer = calibration.trainer(model, optimiser=optimiser, lr=lr, ema=0.0)
    for group in trainer.optimiser.param_groups:
        group["shrink"], group["frozen"] = 0.0, unit == "weights" and group["name"] is not None
    trainer.begin_phase()
    left = calibration.seconds - (time.perf_counter() - start)
    trainer.train(steps=total - first, seconds=left, schedule="linear")
    model.eval()
    report = {**getattr(model, "shrink_report", {}), "sparse_optimizer": {"density": density(model)}}
    setattr(model, "shrink_report", report)  # noqa: B010 (a plain attribute of a module)
    return taken


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all linear layers within residual blocks, by name.

    Raises:
        Unsupported: there are none.
    """
    inside = {id(part) for _, block in blocks_of(model) for part in block.modules()}
    found = {
        f"{name}.weight": part.weight
        for name, part in model.named_modules()
        if id(part) in inside and isinstance(part, nn.Linear) and isinstance(part.weight, nn.Parameter)
    }
    if not found:
        raise Unsupported(f"the residual blocks of {type(model).__name__} have no linear layers")
    return found


def density(model: nn.Module) -> dict[str, float]:
    """Share of weights that are not zero, of each matrix of the blocks by name and of all of them as `""`.

    Raises:
        Unsupported: there are no such matrices.
    """
    matrices = block_matrices(model)
    alive = {name: int(weight.count_nonzero()) for name, weight in matrices.items()}
    whole = sum(alive.values()) / sum(w.numel() for w in matrices.values())
    return {"": whole, **{name: count / matrices[name].numel() for name, count in alive.items()}}


class _Scope:
    """Matrices that share one quantile: all single weights, or the readers of all members of one axis.

    Args:
        size: columns of a member in each matrix, 0 where the unit is a single weight.
        least: members a matrix keeps, and what their number is a multiple of.
    """

    def __init__(self, name: str, matrices: list[nn.Parameter], sizes: list[int], least: int) -> None:
        self.name = name
        self.matrices = matrices
        self.sizes = sizes
        self.least = least
        # Members of different layers are compared in shares of what is usual in their layer.
        self.units = [float(_lengths(p.detach(), size).mean()) if size else 1.0 for p, size in self.parts]

    @property
    def parts(self) -> list[tuple[nn.Parameter, int]]:
        return list(zip(self.matrices, self.sizes, strict=True))

    def lengths(self) -> list[Tensor]:
        """Root mean square of each unit, matrix by matrix, in the matrix's own measure."""
        return [_lengths(p.detach(), size) / unit for (p, size), unit in zip(self.parts, self.units, strict=True)]

    def quantile(self, keep: float) -> float:
        """The length that the share `keep` exceeds."""
        flat = torch.cat(self.lengths())
        gone = len(flat) - round(keep * len(flat))
        return float(flat.kthvalue(gone).values) if gone else 0.0

    def cut(self, keep: float) -> None:
        """Sets all but the longest units to zero, the share `keep` of them staying."""
        limit = self.quantile(keep)
        for (p, size), lengths in zip(self.parts, self.lengths(), strict=True):
            alive = lengths > limit
            if size:
                count = round(int(alive.sum()) / self.least) * self.least
                # Members that are zero already would not fill a vector up.
                count = min(count, int((lengths > 0).sum()) // self.least * self.least)
                best = lengths.topk(max(self.least, count)).indices
                alive = torch.zeros_like(alive).index_fill(0, best, True).repeat_interleave(size)
            p.mul_(alive.view(p.shape) if not size else alive)


def _lengths(weight: Float[Tensor, "r c"], size: int) -> Float[Tensor, " n"]:
    if not size:
        return weight.abs().flatten()
    return group_norms(weight, "columns", size)[0] / (weight.shape[0] * size) ** 0.5


def _scopes(matrices: list[nn.Parameter]) -> list[_Scope]:
    return [_Scope("weights", matrices, [0] * len(matrices), 1)]


def _member_scopes(model: nn.Module, found: dict[Member, int]) -> list[_Scope]:
    scopes = []
    for axis in dict.fromkeys(axis for _, axis in found):
        layers = [(reader(model.get_submodule(part), axis), width) for (part, a), width in found.items() if a == axis]
        sizes = [layer.in_features // width for layer, width in layers]
        # Narrower steps are not faster in vector units.
        least = 8 if axis == "hidden" and all(width >= 8 for _, width in layers) else 1
        scopes.append(_Scope(axis, [cast(nn.Parameter, layer.weight) for layer, _ in layers], sizes, least))
    return scopes


def _groups(model: nn.Module, scopes: list[_Scope], decay: float) -> list[dict[str, Any]]:
    """Parameter groups: one for each matrix of a scope, one for the other matrices of the blocks, one for the rest."""
    groups: list[dict[str, Any]] = []
    for scope in scopes:
        for (p, size), unit in zip(scope.parts, scope.units, strict=True):
            kind = {"penalty": "columns", "size": size} if size else {"penalty": "l1", "size": 1}
            # The map works on a group's length: its root mean square times this.
            measure = unit * (p.shape[0] * size) ** 0.5 if size else unit
            groups.append({"params": [p], "name": scope.name, "measure": measure, "weight_decay": decay, **kind})
    chosen = {id(group["params"][0]) for group in groups}
    inner = {id(p) for p in block_matrices(model).values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for within in (True, False):
        some = [p for p in others if (id(p) in inner) == within]
        if some:
            groups.append({"params": some, "name": None, "weight_decay": decay if within else 0.0})
    return groups


def _shrink(trainer: Trainer, scopes: list[_Scope], keep: float, steps: int, seconds: float) -> None:
    """Trains, setting `shrink` anew so that the share `keep` is left when steps or seconds are over."""

    def control(_: float = 0.0) -> None:
        done = trainer.phase_steps
        if done % EVERY:
            return
        share = max(done / steps, trainer.phase_seconds / seconds)
        left = max(1.0, done / share - done if share else steps)
        for scope in scopes:
            limit = scope.quantile(keep)
            for group in trainer.optimiser.param_groups:
                if group["name"] == scope.name:
                    group["trim"] = limit * group["measure"]
                    group["shrink"] = group["trim"] ** 2 / (trainer.settings.lr * left)

    trainer.begin_phase()
    control()
    trainer.train(steps=steps, seconds=seconds, on_step=control)


def slice_dead(model: nn.Module) -> list[Step]:
    """Slices away, in place, the heads and hidden units whose columns in the product that reads them are all zero."""
    masks: dict[Member, Tensor] = {}
    try:
        found = members(model)
    except Unsupported:
        return []
    for (name, axis), width in found.items():
        mask = alive(reader(model.get_submodule(name), axis).weight, width)
        if not mask.any():
            mask[0] = True
        masks[(name, axis)] = mask.float()
    return keep_members(model, masks)


def alive(weight: Float[Tensor, "r c"], width: int) -> Bool[Tensor, " {width}"]:
    """Which of the `width` members that a matrix reads have a column that is not all zero."""
    return (weight.detach() != 0).any(0).view(width, -1).any(1)
