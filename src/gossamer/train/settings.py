"""What a training run may choose, and the learning-rate schedules.

- `stable`: constant after the warm-up, so that a run can stop or go on at any time
- `linear`: falls to zero; after `stable` it is the decay of a warm-up/stable/decay run (Hu et al. 2024, "MiniCPM")
- `cosine`: half a cosine to zero (Loshchilov and Hutter 2017)
- `halve`: two epochs at the full rate, then half of it at each epoch (the forecasting papers' "type1", as their code
  runs it: the first adjustment multiplies by 1)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn, optim

Schedule = Literal["stable", "linear", "cosine", "halve"]
Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class Settings:
    """Learning settings of one run.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled; matrices and kernels only, never biases, norms, scales, tables of one axis.
        batch_size: samples a step, all processes together.
        strength: augmentation, 0 none to 1 strong; the task says what it does.
        smoothing: label smoothing.
        warmup: steps of linear rise.
        clip: largest gradient norm, 0 for no limit.
        ema: decay of the moving average of the weights, 0 for none.
        precision: `float32`, `bfloat16` autocast, or `auto`: whichever the first steps show to be faster.
        optimiser: `adamw`, or `adam` (no decay).
        seed: order, augmentation and dropout.
        checkpointing: keep the tokens between runs of blocks alone, and make the rest again in the backward pass:
            less memory, about a third more time, the same gradients.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 128
    strength: float = 0.3
    smoothing: float = 0.0
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.998
    precision: Precision = "auto"
    optimiser: Literal["adamw", "adam"] = "adamw"
    seed: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("strength", "smoothing", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def schedule_factor(schedule: Schedule, progress: float, epoch: int) -> float:
    """Multiplier of the peak learning rate when `progress` (0 to 1) of the run, and `epoch` whole epochs, are done."""
    if schedule == "stable":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    if schedule == "halve":
        return 0.5 ** max(0, epoch - 1)
    raise ValueError(f"schedule must be stable, linear, cosine or halve, got {schedule!r}")


def build_optimiser(model: nn.Module, settings: Settings) -> optim.Optimizer:
    """AdamW with decay on matrices and kernels only, or Adam; the fused form, which is fastest on CPU and GPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimiser == "adam":
        return optim.Adam(parameters, lr=settings.lr, fused=True)
    decayed = {id(p) for n, p in model.named_parameters() if p.ndim > 1 and not _is_table(n)}
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=True)


def _is_table(name: str) -> bool:
    # Position and relative-bias tables and learned tokens: the papers exclude them from weight decay.
    return any(part in name for part in ("positions", "bias_table", "biases", ".tokens", ".token"))
