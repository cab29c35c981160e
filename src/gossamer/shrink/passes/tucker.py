"""Tucker: convolutions become chains of small ones, Tucker-2, CP or depth-wise separable; matrices become thin.

Source: Goel et al. 2020, "A Survey of Methods for Low-Power Deep Learning and Computer Vision", sections on compressed
filters and matrix factorisation; the forms are `gossamer.layers.tucker` and, for linear layers, whose Tucker and CP
form is their singular value decomposition, `gossamer.layers.low_rank`.

- ranks by energy: the share of the squared weights that the directions kept of outputs and of inputs hold, one share
  for all layers, chosen so that `keep` of the multiply-adds are left, or given
- CP has no such order of directions: each layer gets the rank that `keep` of its own multiply-adds allow
- `separable` has no rank: `1 / C_out + 1 / k^2` of the multiply-adds, whatever `keep` says; linear layers stay
- a layer becomes a chain only where that has fewer multiply-adds; the steps of a stride are counted as they run
- batch norms that can be folded into products are folded first, as in `greenformers`
- afterwards trained, the model as it was being the teacher
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.layers.exchange import exchange
from gossamer.layers.fold import fold_batch_norm, norm_pairs, norm_readers, settled
from gossamer.layers.low_rank import LowRankLinear, best_factors, low_rank, matrices, set_factors
from gossamer.layers.tucker import CpConv, Spaces, TuckerConv, cp_factors, fill, kernel, separable_factors
from gossamer.measure import macs
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.costs import calls_of
from gossamer.shrink.products import Product, is_product, products
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps, recover

Kind = Literal["tucker", "cp", "separable"]
KINDS = ("tucker", "cp", "separable")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register_pass(
    "tucker",
    family="factorisation",
    paper="low-power-dl-survey",
    saves=("macs", "params", "size"),
    default={"keep": 0.6},
)
def tucker(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    kind: Kind = "tucker",
    energy: float | None = None,
    submodules: Sequence[str] | None = None,
    steps: int | None = None,
    lr: float = 1e-4,
) -> list[Step]:
    """Replaces convolutions by chains of small ones and matrices by thin ones, `keep` of their multiply-adds left.

    Args:
        keep: share of the multiply-adds of all layers that may be replaced.
        kind: of chain; see the head of this file.
        energy: in place of `keep`, the share of the squared weights that each side's directions hold (`tucker` alone).
        submodules: names of modules; only layers in them. None: all but those that read the input or give the answer.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: no layer would be cheaper.
        ValueError: a setting is out of range.
    """
    check_share("keep", keep)
    check_steps(steps)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if energy is not None:
        check_share("energy", energy)
        if kind != "tucker":
            raise ValueError(f"energy goes with kind='tucker' alone, got {kind!r}")
    if keep == 1 and energy is None and kind != "separable":
        return []
    began = time.perf_counter()
    inputs = calibration.example()
    found = products(model, inputs, within=submodules, wanted=_separable if kind == "separable" else _dense)
    counts = _Counts(model, inputs, found)
    chosen = _choose(found, counts, fold_batch_norm(copy.deepcopy(model)), kind, keep, energy)
    if not chosen:
        raise Unsupported(f"no layer of {type(model).__name__} has fewer multiply-adds as a {kind} chain")
    teacher = copy.deepcopy(model).eval() if steps != 0 else None
    taken = _fold(model)
    for product in found:
        ranks = chosen.get(product.name)
        if ranks is None:
            continue
        layer = model.get_submodule(product.name)
        step: Step = {"step": "tucker.chain", "part": product.name, "kind": kind, "ranks": list(ranks)}
        apply(model, step)
        _fill(model.get_submodule(product.name), layer, kind, ranks)
        taken.append(step)
    recover(model, calibration, steps=steps, lr=lr, began=began, teacher=teacher)
    model.eval()
    return taken


@register_step("tucker.chain")
def _chain(model: nn.Module, step: Step) -> None:
    layer = model.get_submodule(step["part"])
    if not _dense(layer):
        raise ValueError(f"{step['part']} ({type(layer).__name__}) is no product without groups")
    exchange(model, step["part"], chain(layer, step["kind"], tuple(step["ranks"])).train(layer.training))


def chain(layer: nn.Module, kind: str, ranks: tuple[int, ...]) -> nn.Module:
    """The unfilled form of `layer`: ranks `(in, out)` of Tucker, `(r,)` of CP and matrices, `()` of separable."""
    weight: Any = layer.weight
    new: nn.Module
    if not isinstance(layer, CONVS):
        new = low_rank(layer, ranks[0])
    elif kind == "tucker":
        new = TuckerConv(layer, *ranks)
    else:
        new = CpConv(layer, ranks[0] if ranks else None)
    return new.to(device=weight.device, dtype=weight.dtype)


def _fill(new: nn.Module, layer: nn.Module, kind: str, ranks: tuple[int, ...]) -> None:
    if isinstance(new, LowRankLinear):
        down, up, _ = best_factors(matrices(layer)[0])
        bias: Any = layer.bias
        set_factors(new, down[None, : ranks[0]], up[None, :, : ranks[0]], None if bias is None else bias.detach())
        return
    assert isinstance(new, TuckerConv | CpConv)
    first: Tensor | None
    if kind == "tucker":
        first, core, last = Spaces(kernel(layer)).factors(*ranks)
    elif kind == "cp":
        last, mix, places = cp_factors(kernel(layer), ranks[0])
        first, core = mix.T, places.T
    else:
        core, last = separable_factors(kernel(layer))
        first = None
    fill(new, layer, first, core, last)


def _dense(layer: nn.Module) -> bool:
    return is_product(layer) and getattr(layer, "groups", 1) == 1


def _separable(layer: nn.Module) -> bool:
    return _dense(layer) and isinstance(layer, CONVS) and kernel(layer).shape[2] > 1


class _Counts:
    """Multiply-adds of the layers, as they are and as chains, for the example."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], found: list[Product]) -> None:
        self.calls = calls_of(model, inputs, [p.name for p in found])
        self.layers = {p.name: copy.deepcopy(p.layer).to("meta") for p in found}
        self.own = {name: self._count(name, layer) for name, layer in self.layers.items()}
        self._known: dict[tuple[str, tuple[int, ...]], int] = {}

    def chain(self, name: str, kind: str, ranks: tuple[int, ...]) -> int:
        """Counted at the lowest ranks, and carried on: each part is linear in each of its ranks."""
        if len(ranks) == 1:
            return ranks[0] * self._chain(name, kind, (1,))
        if not ranks or 1 in self._channels(name):
            return self._chain(name, kind, ranks)
        # a r_in + b r_in r_out + c r_out, from its values at three pairs of ranks.
        once, wide, deep = (self._chain(name, kind, pair) for pair in ((1, 1), (2, 1), (1, 2)))
        ab, bc = wide - once, deep - once
        b = ab + bc - once
        r_in, r_out = ranks
        return (ab - b) * r_in + b * r_in * r_out + (bc - b) * r_out

    def _channels(self, name: str) -> tuple[int, int]:
        layer: Any = self.layers[name]
        return layer.in_channels, layer.out_channels

    def _chain(self, name: str, kind: str, ranks: tuple[int, ...]) -> int:
        key = (name, ranks)
        if key not in self._known:
            with torch.device("meta"):
                self._known[key] = self._count(name, chain(self.layers[name], kind, ranks))
        return self._known[key]

    def _count(self, name: str, layer: nn.Module) -> int:
        return sum(macs(layer, args, kwargs=kwargs).total for args, kwargs in self.calls[name])


def _choose(
    found: list[Product], counts: _Counts, folded: nn.Module, kind: str, keep: float, energy: float | None
) -> dict[str, tuple[int, ...]]:
    """Ranks by name, for the layers that are cheaper with them."""
    if kind == "separable":
        wanted: dict[str, tuple[int, ...]] = {p.name: () for p in found}
    elif kind == "cp":
        wanted = {p.name: (_allowed(p, counts, keep),) for p in found}
    else:
        spaces = {p.name: _energies(folded.get_submodule(p.name)) for p in found}
        if energy is None:
            energy = _share_for(found, spaces, counts, keep)
        wanted = {p.name: _ranks(spaces[p.name], energy) for p in found}
    return {p.name: wanted[p.name] for p in found if counts.chain(p.name, kind, wanted[p.name]) < counts.own[p.name]}


def _energies(layer: nn.Module) -> Spaces | Tensor:
    return Spaces(kernel(layer)) if isinstance(layer, CONVS) else best_factors(matrices(layer)[0])[2].cumsum(0)


def _ranks(space: Spaces | Tensor, energy: float) -> tuple[int, ...]:
    if isinstance(space, Spaces):
        return space.ranks(energy)
    return (min(len(space), int((space < space[-1] * (energy - 1e-12)).sum()) + 1),)


def _share_for(found: list[Product], spaces: dict[str, Spaces | Tensor], counts: _Counts, keep: float) -> float:
    """The greatest share of energy at which no more than `keep` of the multiply-adds are left."""
    budget = keep * sum(counts.own.values())
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        costs = [min(counts.own[p.name], counts.chain(p.name, "tucker", _ranks(spaces[p.name], middle))) for p in found]
        low, high = (middle, high) if sum(costs) <= budget else (low, middle)
    return low


def _allowed(product: Product, counts: _Counts, keep: float) -> int:
    """The greatest rank whose multiply-adds are no more than `keep` of the layer's, 1 at least."""
    return max(1, int(keep * counts.own[product.name] / counts.chain(product.name, "cp", (1,))))


def _fold(model: nn.Module) -> list[Step]:
    pairs = [(part, norm) for part in model.modules() for _, norm in norm_pairs(part)]
    pairs += [(part, norm) for part in model.modules() for norm, readers in norm_readers(part) if readers]
    if all(settled(getattr(part, norm, None)) is None for part, norm in pairs):
        return []
    step: Step = {"step": "fold_batch_norm"}
    apply(model, step)
    return [step]
