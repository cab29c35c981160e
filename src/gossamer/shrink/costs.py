"""What the members of prunable parts cost, in MACs and in measured time, and the best choice within a budget.

- MACs are those of one member, counted on the part itself: for heads of width `e` of plain attention on `n` tokens of
  `d` channels that is `3 n d e + 2 n^2 e + n e d`, for a hidden unit `2 n d` (OPTIN, Khaki and Plataniotis 2024), and
  it holds as well for groups, gates, windows and reduced keys
- time is a staircase: what a width costs is the least that any measured width at least as large costs, for members
  can always be left in; it never falls as the width grows
- measured once for each part's shape, input shape, thread count and device, and kept between runs
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer import __version__
from gossamer.layers.prune import Prunable
from gossamer.measure import LatencyTable, latency, macs
from gossamer.shrink.masks import Member

Call = tuple[tuple[Any, ...], dict[str, Any]]

POINTS = 32  # widths of a part that are timed, at most
COPIES = 2**30  # bytes their copies may take together
PART_S = 2.0  # seconds of timing a part
NOISE = 0.02  # a width is a step where it costs less than the next by this share
FRONT = 4096  # partial choices kept beside each other


def calls_of(model: nn.Module, inputs: tuple[Any, ...], names: Sequence[str]) -> dict[str, list[Call]]:
    """What each named part is called with while the model, in eval mode, answers `inputs`."""
    seen: dict[str, list[Call]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append((args, kwargs)), with_kwargs=True
        )
        for name in seen
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def member_macs(model: nn.Module, inputs: tuple[Any, ...], widths: Mapping[Member, int]) -> dict[Member, float]:
    """MACs that one member of each `(part, axis)` costs when the model answers `inputs`, divided by the batch size."""
    calls = calls_of(model, inputs, sorted({name for name, _ in widths}))
    batch = _batch(inputs)
    known: dict[str, float] = {}
    costs = {}
    for (name, axis), width in widths.items():
        part = model.get_submodule(name)
        key = _key(part, axis, calls[name])
        if key not in known:
            # A member alone and all of them: equal members cost the same, so the difference is theirs. A part that
            # has only one is compared with one that has it twice.
            first, last = ([0], list(range(width))) if width > 1 else ([0], [0, 0])
            few, many = (_count(_cut(part, axis, index), calls[name]) for index in (first, last))
            known[key] = (many - few) / (len(last) - 1) / batch
        costs[(name, axis)] = known[key]
    return costs


@dataclass(frozen=True)
class Staircase:
    """Measured latency of a part against the width of one axis.

    Args:
        widths: ascending; the last is the part's own.
        ms: what each was measured at.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.ms) or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must ascend, each with a latency; got {self.widths} and {self.ms}")

    def __call__(self, width: int) -> float:
        """Milliseconds of `width` members: the least of all measured widths that hold them.

        Raises:
            ValueError: the part is narrower.
        """
        if not 0 < width <= self.widths[-1]:
            raise ValueError(f"width must be in 1 … {self.widths[-1]}, got {width}")
        return min(self.ms[bisect_left(self.widths, width) :])

    def steps(self, noise: float = NOISE) -> list[tuple[int, float]]:
        """`(width, milliseconds)` of the widths worth choosing, ascending: the widest there are at their latency.

        A width is left out where a wider one costs as little, or less than `noise` (a share) more.
        """
        found = [(self.widths[-1], self.ms[-1])]
        for width, ms in zip(self.widths[-2::-1], self.ms[-2::-1], strict=True):
            if ms < found[-1][1] * (1 - noise):
                found.append((width, ms))
        return found[::-1]


def staircases(
    model: nn.Module,
    inputs: tuple[Any, ...],
    widths: Mapping[Member, int],
    *,
    table: LatencyTable | None = None,
    seconds: float = float("inf"),
) -> dict[Member, Staircase]:
    """The staircase of each `(part, axis)`, with the inputs the part has when the model answers `inputs`.

    Args:
        table: where they are kept between runs.
        seconds: for all timing together; a share of it for each part that is not yet in the table.
    """
    table = table or LatencyTable()
    calls = calls_of(model, inputs, sorted({name for name, _ in widths}))
    keys = {}
    for name, axis in widths:
        part_key = _key(model.get_submodule(name), axis, calls[name])
        keys[(name, axis)] = f"widths-{__version__}-{torch.get_num_threads()}-{axis}-{part_key}"
    missing = {key for key in keys.values() if table.get(key) is None}
    budget = min(PART_S, seconds / max(1, len(missing)))
    for (name, axis), key in keys.items():
        if table.get(key) is None:
            part = model.get_submodule(name)
            chosen = widths_to_time(widths[(name, axis)], axis, _bytes(part))
            ms = _time(part, axis, calls[name], chosen, budget)
            table.put(key, {"widths": list(chosen), "ms": ms})
    known = {key: table.get(key) for key in keys.values()}
    return {member: Staircase(tuple(known[key]["widths"]), tuple(known[key]["ms"])) for member, key in keys.items()}


def widths_to_time(width: int, axis: str, size: int = 0) -> list[int]:
    """At most `POINTS` widths: multiples of a power of two (8 at least for channels), and the whole.

    Args:
        size: bytes of the part; fewer widths for a large one.
    """
    points = max(4, min(POINTS, 2 * COPIES // max(1, size)))
    step = 1 if axis in ("heads", "groups") or width <= 16 else 8
    while width / step > points:
        step *= 2
    return sorted({*range(step, width, step), width})


def choose(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """For each part the index of one of its options `(cost, value)`: the greatest total value within `budget`.

    Partial choices that cost more and are worth less than another are dropped part by part; what is left is exact as
    long as no more than `FRONT` are left beside each other, and near it beyond (the best of each slice of the budget).

    Raises:
        ValueError: even the cheapest options together cost more.
    """
    cheapest = [min(cost for cost, _ in part) for part in options]
    if sum(cheapest) > budget * (1 + 1e-9):
        raise ValueError(f"the budget must be at least {sum(cheapest):.4g}, got {budget:.4g}")
    limit = budget * (1 + 1e-9)
    costs, values = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i, part in enumerate(options):
        own = np.asarray(part, dtype=float)
        cost = (costs[:, None] + own[None, :, 0]).ravel()
        value = (values[:, None] + own[None, :, 1]).ravel()
        index = np.flatnonzero(cost <= limit - sum(cheapest[i + 1 :]))
        index = index[np.lexsort((-value[index], cost[index]))]
        best = np.maximum.accumulate(value[index])
        index = index[np.r_[True, best[1:] > best[:-1]]]
        if len(index) > FRONT:
            low, high = cost[index[0]], cost[index[-1]]
            slices = ((cost[index] - low) / (high - low) * FRONT).astype(int)
            # Values ascend with costs, so the last of a slice is its best.
            index = index[np.r_[slices[1:] != slices[:-1], True]]
        trail.append((index // len(part), index % len(part)))
        costs, values = cost[index], value[index]
    at = len(values) - 1
    chosen = []
    for before, option in reversed(trail):
        chosen.append(int(option[at]))
        at = int(before[at])
    return chosen[::-1]


def fit_widths(
    ranks: Mapping[Member, Int[Tensor, " n"]],
    worth: Mapping[Member, Float[Tensor, " n"]],
    stairs: Mapping[Member, Staircase],
    keep: float,
) -> dict[Member, Float[Tensor, " n"]]:
    """Masks of the widths worth most among the steps of all parts, within the share `keep` of their latency together.

    Args:
        ranks: members of each part, the best first.
        worth: at `w - 1`, what it is worth to keep the best `w`.

    Raises:
        ValueError: `keep` is below what the narrowest steps take.
    """
    steps = {member: stairs[member].steps() for member in ranks}
    total = sum(stairs[member](len(rank)) for member, rank in ranks.items())
    least = sum(of[0][1] for of in steps.values())
    if least > keep * total:
        raise ValueError(
            f"keep must be at least {least / total:.3f}, the narrowest parts' share of latency; got {keep}"
        )
    options = [[(ms, float(worth[member][width - 1])) for width, ms in steps[member]] for member in ranks]
    masks = {}
    for (member, rank), pick in zip(ranks.items(), choose(options, keep * total), strict=True):
        masks[member] = torch.zeros(len(rank)).index_fill_(0, rank[: steps[member][pick][0]].cpu(), 1.0)
    return masks


def _cut(part: nn.Module, axis: str, index: Sequence[int]) -> nn.Module:
    """A copy of `part` with the members `index`."""
    own = copy.deepcopy(part).eval()
    assert isinstance(own, Prunable)
    own.keep(axis, torch.tensor(index))
    return own


def _count(part: nn.Module, calls: list[Call]) -> int:
    return sum(macs(part, args, kwargs=kwargs).total for args, kwargs in calls)


def _time(part: nn.Module, axis: str, calls: list[Call], widths: Sequence[int], seconds: float) -> list[float]:
    def run(own: nn.Module) -> None:
        for args, kwargs in calls:
            own(*args, **kwargs)

    forms: dict[str, Callable[[], object]] = {
        str(width): partial(run, _cut(part, axis, range(width))) for width in widths
    }
    with torch.inference_mode():
        found = latency(forms, budget_s=max(seconds, 1e-3))
    # What disturbs a run only ever makes it longer.
    return [found[str(width)].p10_ms for width in widths]


def _key(part: nn.Module, axis: str, calls: list[Call]) -> str:
    """Equal for parts that cost the same: what they are, the shapes of their weights and of what they are given."""
    plain = sorted((k, repr(v)) for k, v in vars(part).items() if isinstance(v, int | float | str | tuple))
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in part.state_dict().items()]
    given = torch.utils._pytree.tree_map_only(Tensor, lambda t: (tuple(t.shape), str(t.dtype)), calls)
    what = (type(part).__qualname__, repr(part), [p for p in plain if p[0] != "training"], shapes, axis, given)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _bytes(part: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in part.parameters())


def _batch(inputs: tuple[Any, ...]) -> int:
    return next((len(x) for x in inputs if isinstance(x, Tensor) and x.ndim), 1)
