"""Which networks lie among stitched models: paths through them, and the stitching layers these share.

Source: Pan et al. 2023, "Stitchable Neural Networks" (`one_way`); Pan et al. 2023, "Stitched ViTs are Flexible Vision
Backbones" (`two_way`). The models that are joined are called anchors.

- a path is a run of blocks of one anchor, a stitching layer, a run of blocks of the next
- blocks are counted through all stages of a pyramid; stitches lie within a stage
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

Place = tuple[int, int, int, int]
"""Front anchor, its last block, end anchor, its first block."""


@dataclass(frozen=True)
class Path:
    """One network among the stitched ones.

    Args:
        route: runs of blocks `(anchor, first, stop)`, in order.
        stitches: `(group, layer)` of the stitching layer behind each run but the last.
        sampled: whether training draws it.
    """

    route: tuple[tuple[int, int, int], ...]
    stitches: tuple[tuple[int, int], ...] = ()
    sampled: bool = True

    @property
    def anchors(self) -> tuple[int, ...]:
        return tuple(anchor for anchor, _, _ in self.route)

    @property
    def places(self) -> list[Place]:
        """Where each of its stitches lies."""
        return [(a, stop - 1, b, first) for (a, _, stop), (b, first, _) in pairwise(self.route)]


@dataclass(frozen=True)
class Plan:
    """All paths through the anchors, and the groups of stitching layers they share.

    Args:
        groups: `(front anchor, end anchor, stage, layers)`.
    """

    paths: list[Path]
    groups: list[tuple[int, int, int, int]]


def nearest_map(front: int, end: int) -> list[int]:
    """For each of `end` positions the nearest of `front` positions below it, proportionally."""
    return [i * front // end for i in range(end)]


def window_pairs(depth: int, kernel: int, stride: int, *, ahead: bool = False) -> list[tuple[int, int, int]]:
    """`(front block, end block, layer)` of two anchors of `depth` blocks each.

    A window of `kernel` blocks slides by `stride`; each pair of blocks within it is a stitch, and the pairs that are
    new in one window share one layer.

    Args:
        ahead: only pairs that skip a block or more of the end anchor (the rule of pyramids).
    """
    pairs: dict[tuple[int, int], int] = {}
    layer = 0
    for start in range(0, depth, stride):
        ids = range(start, min(start + kernel, depth))
        new = [(i, j) for i in ids for j in ids if (i, j) not in pairs and (i < j or not ahead)]
        pairs |= dict.fromkeys(new, layer)
        layer += bool(new)
    return [(i, j, k) for (i, j), k in pairs.items()]


def unequal_pairs(front: int, end: int) -> list[tuple[int, int, int]]:
    """`(front block, end block, layer)` of a shallow anchor before a deep one: each block of the deep one is entered
    from the block at the same share of the shallow one.

    The layer is that of the block before, as in the released code: its list of layers is one place behind its pairs.
    """
    at = nearest_map(front, end)
    pairs = [(at[j], j) for j in range(end) if at[j] < j]
    return [(i, j, layer) for (i, j), layer in zip(pairs, at, strict=False)]


def one_way(depths: Sequence[Sequence[int]], *, kernel: int = 2, stride: int = 1, nearest: bool = True) -> Plan:
    """The anchors, and the paths that lead from smaller anchors to larger ones.

    Args:
        depths: for each anchor, smallest first, the blocks of its stages.
        kernel, stride: of the sliding window.
        nearest: only neighbours in size are joined; otherwise any two, and any three.

    Raises:
        ValueError: kernel or stride below 1, an anchor shallower than a smaller one, or a setting pyramids lack.
    """
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel and stride must be at least 1, got kernel={kernel}, stride={stride}")
    stages = len(depths[0])
    if stages > 1 and not nearest:
        raise ValueError("nearest must be True for anchors of several stages")
    for small, large in pairwise(depths):
        if any(a > b for a, b in zip(small, large, strict=True)):
            raise ValueError(f"no stage may have fewer blocks than in a smaller anchor, got {small} before {large}")

    def pairs(front: int, end: int, stage: int) -> list[tuple[int, int, int]]:
        a, b = depths[front][stage], depths[end][stage]
        return window_pairs(a, kernel, stride, ahead=stages > 1) if a == b else unequal_pairs(a, b)

    total = [sum(d) for d in depths]
    paths = [Path(((a, 0, total[a]),)) for a in range(len(depths))]
    neighbours = [(a, a + 1) for a in range(len(depths) - 1)]
    groups: list[tuple[int, int, int, int]] = []
    if stages > 1:
        for stage in range(stages - 1):
            for a, b in neighbours:
                at_a, at_b = sum(depths[a][:stage]), sum(depths[b][:stage])
                found = pairs(a, b, stage)
                for i, j, layer in found:
                    route = ((a, 0, at_a + i + 1), (b, at_b + j, total[b]))
                    paths.append(Path(route, ((len(groups), layer),)))
                groups.append((a, b, stage, _layers(found, depths[a][stage], depths[b][stage])))
        return Plan(paths, groups)
    joined = neighbours if nearest else list(combinations(range(len(depths)), 2))
    group = {pair: number for number, pair in enumerate(joined)}
    lists = {pair: pairs(*pair, 0) for pair in joined}
    for a, b in joined:
        for i, j, layer in lists[a, b]:
            paths.append(Path(((a, 0, i + 1), (b, j, total[b])), ((group[a, b], layer),)))
        groups.append((a, b, 0, _layers(lists[a, b], total[a], total[b])))
    for a, b, c in [] if nearest else combinations(range(len(depths)), 3):
        for i, j, first in lists[a, b]:
            for k, m, second in lists[b, c]:
                if k >= j:
                    route3 = ((a, 0, i + 1), (b, j, k + 1), (c, m, total[c]))
                    paths.append(Path(route3, ((group[a, b], first), (group[b, c], second))))
    return Plan(paths, groups)


def _layers(pairs: list[tuple[int, int, int]], front: int, end: int) -> int:
    # Of unequal depth there is a layer for each block of the shallow anchor, used or not.
    return front if front != end else max((layer for _, _, layer in pairs), default=-1) + 1


def two_way(small: int, large: int) -> Plan:
    """Two anchors of `small` and `large` blocks joined both ways, once or twice a path: S, L, SL, LS, LSL, SLS.

    Raises:
        ValueError: `large` is no multiple of `small`.
    """
    if large % small:
        raise ValueError(f"the deeper anchor must have a multiple of the blocks of the other, got {large} and {small}")
    ratio = large // small
    at = nearest_map(small, large)
    up = [(i, (i + 1) * ratio, i) for i in range(small)]
    down = [(i, at[i] + 1, i // ratio) for i in range(large - 1) if large == small or i % 2 == 1]
    paths = [Path(((0, 0, small),)), Path(((1, 0, large),))]
    # The stitch behind the last small block leaves no block of the large anchor: a head on a stitch, never trained.
    paths += [Path(((0, 0, i + 1), (1, j, large)), ((0, k),), i < small - 1) for i, j, k in up]
    paths += [Path(((1, 0, i + 1), (0, j, small)), ((1, k),)) for i, j, k in down]
    paths += [
        Path(((1, 0, i + 1), (0, j, m + 1), (1, n, large)), ((1, k), (0, l)))
        for i, j, k in down
        for m, n, l in up[:-1]
        if m >= j
    ]
    paths += [
        Path(((0, 0, i + 1), (1, j, m + 1), (0, n, small)), ((0, k), (1, l)))
        for i, j, k in up
        for m, n, l in down
        if m >= j
    ]
    return Plan(paths, [(0, 1, 0, len(up)), (1, 0, 0, len(down))])


def out_indices(depth: int, deepest: int, indices: Sequence[int]) -> list[int]:
    """The blocks of an anchor of `depth` blocks that stand for the blocks `indices` of one of `deepest` blocks."""
    at = nearest_map(depth, deepest)
    return [at[i] for i in indices]
