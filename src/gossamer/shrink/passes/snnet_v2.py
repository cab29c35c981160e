"""SN-Netv2: two trained models joined both ways, and trained so that every cost gets its share.

Source: Pan, Liu, He, Cai, Zhuang 2023, "Stitched ViTs are Flexible Vision Backbones"; the joined model is
`gossamer.trunks.stitched`.

- paths may change over twice: small, large, S-L, L-S, L-S-L, S-L-S; 135 of them for depths of 12 and 12, or 12 and 24
- stitching layers are their least-squares maps, frozen, and a learned low-rank update
- paths are grouped by cost; a step draws a group, then a path of it, so that the many paths of middling cost do not
  crowd out the others
- the task's loss alone, no teacher; the authors train 50 epochs with LAMB, 3e-5; ours is AdamW
- that cheap paths end better so than drawn all alike is not shown: the toys tried learned every path either way
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.shrink.base import Calibration, Step, register_pass
from gossamer.shrink.passes.snnet import Draw, Objective, join_family
from gossamer.trunks.stitched import Stitched


@register_pass(
    "snnet_v2",
    family="joining",
    paper="snnet-v2",
    saves=("macs", "params", "size"),
    default={"keep": 0.6, "single": True},
)
def snnet_v2(
    model: nn.Module,
    calibration: Calibration,
    *,
    family: Sequence[nn.Module | str | Path] = (),
    keep: float = 0.6,
    rank: int = 64,
    gap: float | None = None,
    slope: float | None = None,
    samples: int = 100,
    epochs: float = 1.0,
    lr: float = 3e-5,
    single: bool = False,
) -> list[Step]:
    """Joins the model with a smaller or larger one, both ways, into one network for each point between them.

    Args:
        family: the other anchor: a model, or the folder it was saved in.
        keep: share of the larger anchor's MACs that the chosen path may cost.
        rank: of the learned update of a stitching layer; 0 trains its weights themselves.
        gap: MACs by which the paths of a group may differ; a twelfth of the whole span by default.
        slope: groups of rising cost are drawn with chances `i / slope + 1 / groups`; equally by default.
        samples: items the stitching layers are solved from.
        epochs: of joint training, as far as the time goes; 0 for none.
        single: keep only the chosen path.

    Raises:
        Unsupported: no family, or models that cannot be joined so.
        ValueError: `keep` is not in (0, 1], `rank` is negative, `gap` or `slope` is not positive.
    """
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    for name, value in (("gap", gap), ("slope", slope)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")

    def by_cost(joined: Stitched, _: nn.Module) -> tuple[Objective, Draw]:
        cost = joined.costs(calibration.example())
        width = max(1.0, (max(cost) - min(cost)) / 12) if gap is None else gap
        groups = group_by_cost({i: cost[i] for i, path in enumerate(joined.paths) if path.sampled}, width)
        chances = group_chances(len(groups), slope)
        chance = torch.Generator().manual_seed(calibration.seed)
        return calibration.loss, lambda: draw_path(groups, chances, chance)

    settings = {"ways": 2, "rank": rank}
    return join_family(
        model, calibration, family, settings, by_cost, keep=keep, samples=samples, epochs=epochs, lr=lr, single=single
    )


def group_by_cost(cost: dict[int, int], gap: float) -> list[list[int]]:
    """Paths in groups of rising cost: a path more than `gap` above where its group began begins the next.

    The first group begins at no cost at all, as in the released code.
    """
    groups: list[list[int]] = []
    start = 0.0
    for path in sorted(cost, key=lambda p: cost[p]):
        if cost[path] - start > gap:
            groups.append([])
            start = cost[path]
        elif not groups:
            groups.append([])
        groups[-1].append(path)
    return [sorted(group) for group in groups]


def group_chances(groups: int, slope: float | None = None) -> Tensor:
    """Chance of each of `groups` groups: equal, or `p_i ~ i / slope + 1 / groups`."""
    rising = torch.arange(groups, dtype=torch.float64) / slope if slope else torch.zeros(groups, dtype=torch.float64)
    chances = rising + 1 / groups
    return chances / chances.sum()


def draw_path(groups: Sequence[Sequence[int]], chances: Tensor, generator: torch.Generator) -> int:
    """A group by its chance, then one of its paths, all alike."""
    group = groups[int(torch.multinomial(chances, 1, generator=generator))]
    return group[int(torch.randint(len(group), (), generator=generator))]
