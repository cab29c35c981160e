"""EfficientFormer's supernet: every slot of every stage holds the blocks it may become, mixed by learned weights.

Source: Li et al. 2022, "EfficientFormer: Vision Transformers at MobileNet Speed", section 4.2, equations 6 and 7.

- a slot of the first stages is a 4-D block or nothing, one of the last two may be a 3-D (attention) block as well
- `x <- sum_n w_n path_n(x)`, `w = softmax((alpha + e) / tau)`, e uniform noise while training, tau falling
- a plan picks one path for each slot and the channels of each stage; the supernet then answers as that network would,
  with what is left out of it set to zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.models import create_model

CONV, ATTEND, SKIP = "4d", "3d", "-"
STEP = 16
"""Widths are multiples of this many channels."""


@dataclass(frozen=True)
class Plan:
    """A network out of the supernet.

    Args:
        widths: channels of each stage.
        slots: what stands in each slot of each stage: `4d`, `3d` or `-`.
    """

    widths: tuple[int, ...]
    slots: tuple[tuple[str, ...], ...]

    def options(self) -> dict[str, Any]:
        """Keywords of `efficientformer` that build it."""
        blocks = [[kind for kind in stage if kind != SKIP] for stage in self.slots]
        return {
            "widths": self.widths,
            "depths": tuple(len(stage) for stage in blocks),
            "attention_blocks": sum(kind == ATTEND for stage in blocks for kind in stage),
        }

    def put(self, stage: int, slot: int, kind: str) -> Plan:
        """The same with `kind` in one slot."""
        row = (*self.slots[stage][:slot], kind, *self.slots[stage][slot + 1 :])
        return replace(self, slots=(*self.slots[:stage], row, *self.slots[stage + 1 :]))

    def narrow(self, stage: int) -> Plan:
        """The same with one stage narrower by `STEP`."""
        widths = (*self.widths[:stage], self.widths[stage] - STEP, *self.widths[stage + 1 :])
        return replace(self, widths=widths)


class MetaPath(nn.Module):
    """One slot: `sum_n w_n path_n(x)` over its blocks and the identity, or the one path that a plan chose.

    Args:
        paths: blocks by kind.
    """

    paths: Any

    def __init__(self, paths: dict[str, nn.Module]) -> None:
        super().__init__()
        self.paths = nn.ModuleDict(paths)
        self.alpha = nn.Parameter(torch.zeros(len(paths) + 1))
        self.tau = 1.0
        self.choice: str | None = None
        self.kept: Tensor | None = None

    def weights(self) -> dict[str, float]:
        """The share of each path, without noise, at tau 1."""
        return dict(zip((*self.paths, SKIP), self.alpha.detach().softmax(0).tolist(), strict=True))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        if self.kept is not None:
            x = x * self.kept
        if self.choice is None:
            noise = torch.rand_like(self.alpha) if self.training else 0.0
            w = ((self.alpha + noise) / self.tau).softmax(0)
            y = w[-1] * x + sum(w[i] * path(x) for i, path in enumerate(self.paths.values()))
        else:
            y = x if self.choice == SKIP else self.paths[self.choice](x)
        return y if self.kept is None else y * self.kept


class Supernet(nn.Module):
    """The widest and deepest EfficientFormer of a search, its blocks replaced by slots.

    Args:
        options: keywords of `efficientformer`; widths are rounded up to multiples of `STEP`.

    Raises:
        ValueError: fewer than two stages.
    """

    net: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        widths = tuple(-(-w // STEP) * STEP for w in options["widths"])
        depths = tuple(options["depths"])
        if len(depths) < 2:
            raise ValueError(f"a supernet has two stages or more, got depths={depths}")
        self.options = {**options, "widths": widths, "depths": depths, "distillation": False}
        self.net = create_model("efficientformer_l1", **{**self.options, "attention_blocks": 0})
        attending: Any = create_model("efficientformer_l1", **{**self.options, "attention_blocks": sum(depths[-2:])})
        self.net.stem = attending.stem
        stages: Any = self.net.stages
        for i, stage in enumerate(stages):
            for j, block in enumerate(stage):
                paths = {CONV: block}
                if i >= len(depths) - 2:
                    paths[ATTEND] = attending.stages[i][j]
                stage[j] = MetaPath(paths)

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b k"]:
        return self.net(image)

    def slots(self) -> list[list[MetaPath]]:
        return [list(stage) for stage in self.net.stages]

    def cool(self, tau: float) -> None:
        """Sets the temperature of all slots."""
        for stage in self.slots():
            for slot in stage:
                slot.tau = tau

    def largest(self) -> Plan:
        """4-D blocks in the first stages, attention in every slot of the last two."""
        depths, last = self.options["depths"], len(self.options["depths"]) - 2
        kinds = [CONV if i < last else ATTEND for i in range(len(depths))]
        return Plan(self.options["widths"], tuple((kind,) * n for kind, n in zip(kinds, depths, strict=True)))

    def follow(self, plan: Plan | None) -> None:
        """Answers as `plan` says from now on, or as the mixture if None."""
        for i, stage in enumerate(self.slots()):
            kept = None if plan is None else self._mask(i, plan.widths[i])
            for j, slot in enumerate(stage):
                slot.choice = None if plan is None else plan.slots[i][j]
                slot.kept = kept

    def importance(self) -> list[list[float]]:
        """How much more a slot's blocks weigh than its identity: `(w_3d + w_4d) / w_identity`."""
        return [[(1 - w) / w for w in (slot.weights()[SKIP] for slot in stage)] for stage in self.slots()]

    def _mask(self, stage: int, width: int) -> Tensor | None:
        """Ones at the `width` channels that the stage's 4-D blocks use most, by the norms of their weights."""
        full = self.options["widths"][stage]
        blocks: list[Any] = [slot.paths[CONV] for slot in self.slots()[stage]]
        if width == full or not blocks:
            return None
        score = torch.stack([b.mlp.fc1.weight.norm(dim=0) * b.mlp.fc2.weight.norm(dim=1) for b in blocks]).sum(0)
        mask = torch.zeros_like(score.detach())
        mask[score.topk(width).indices] = 1
        return mask


def allowed(slots: Sequence[Sequence[str]]) -> bool:
    """Whether no 4-D block stands behind a 3-D one."""
    order = [kind for stage in slots for kind in stage if kind != SKIP]
    return CONV not in order[order.index(ATTEND) :] if ATTEND in order else True
