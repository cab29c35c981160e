"""PYRA: token merging learned together with the task, by adapters small enough for little data.

Source: Xiong et al. 2024, "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation";
code THU-MIG/PYRA (MIT). The merging is ToMe's (`gossamer.shrink.passes.merging`), the adapters are LoRA on the query,
key and value products (Hu et al. 2021).

`q, k, v = W_qkv x + B A drop(x)`; the tokens that go are rescaled by the block (`gossamer.layers.pyra`)

- LoRA, the rescaling and the head learn; everything else is frozen and, as in the code, does without its dropout
- afterwards LoRA is folded into `W_qkv`, exactly; the rescaling stays
- one learning rate for all, as the authors' code has it in effect: its separate rate looks for another name
- a written summary of the paper has the merging before attention; the code, and this, have it behind
- the code fails where a layer can merge fewer tokens than its schedule says; here the layer merges what it can
- texts too, which the paper does not have: padding goes first, and is not rescaled
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.layers.adapters import LoraLinear
from gossamer.layers.pyra import PyraBlock
from gossamer.layers.reduce import MergingBlock
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.passes.merging import check_schedule, mergeable, removals, wrap_blocks
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps

# The paper's schedules for 197 tokens (198 with a distillation token).
PUBLISHED = {
    "vit_base_low": [16] * 11 + [10],
    "vit_base_high": [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
    "vit_large_low": [8] * 23 + [6],
    "vit_large_high": [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1],
    "deit_base_distilled_low": [16] * 6 + [10] * 6,
    "deit_base_distilled_high": [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
}


@register_pass(
    "pyra", family="token reduction", paper="pyra", saves=("macs",), default={"keep": 0.7, "schedule": "decreasing"}
)
def pyra(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.7,
    schedule: str = "decreasing",
    r: Sequence[int] | None = None,
    rank: int = 8,
    drop: float = 0.1,
    lr: float = 1e-3,
    steps: int = 1000,
) -> list[Step]:
    """Merges tokens as `merging` does, and trains adapters and a rescaling of what is merged to make up for it.

    Args:
        keep: share of the blocks' MACs that is left; 1 changes nothing.
        schedule: `constant` or `decreasing`.
        r: tokens to merge in each block, in place of `keep` and `schedule` (`PUBLISHED` has the paper's).
        rank: of LoRA; `drop` is the dropout before it.
        lr: of everything that learns.
        steps: of training, or fewer where the time is up.

    Raises:
        Unsupported: tokens cannot be merged in this model, or a product has no place for LoRA.
        ValueError: a setting is out of range, or `r` has not one number for each block.
    """
    start = time.perf_counter()
    check_share("keep", keep)
    check_schedule(schedule)
    check_steps(steps)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    found = mergeable(model, calibration, "pyra")
    if r is not None and (len(r) != len(found.costs) or min(r) < 0):
        raise ValueError(f"r must be {len(found.costs)} numbers (blocks) from 0 up, got {list(r)}")
    for name, mixer in _mixers(model):
        if type(mixer.qkv) is not nn.Linear:
            raise Unsupported(
                f"pyra: {name}.qkv ({type(mixer.qkv).__name__}) is no plain linear layer for LoRA to adapt"
            )
    if r is None:
        if keep == 1:
            return []
        r = removals(found, keep, schedule)
    step: Step = {"step": "pyra", "r": list(r), "tokens": found.tokens, "protect": found.protect}
    torch.manual_seed(calibration.seed)
    apply(model, step)
    add_lora(model, rank, drop)
    frozen = {p: p.requires_grad for p in model.parameters()}
    learning = set(trainable(model))
    for parameter in frozen:
        parameter.requires_grad_(parameter in learning)

    def objective(net: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        still(model)
        return calibration.loss(net, inputs, target)

    trainer = calibration.trainer(
        model, objective=objective, lr=lr, weight_decay=1e-4, warmup=max(1, steps // 10), ema=0.0
    )
    trainer.train(steps=steps, seconds=calibration.seconds - (time.perf_counter() - start), schedule="cosine")
    fold_lora(model)
    for parameter in model.parameters():
        parameter.requires_grad_(frozen.get(parameter, True))
    return [step]


@register_step("pyra")
def _rescale(model: nn.Module, step: Step) -> None:
    def make(block: Block, r: int, **given: int) -> MergingBlock:
        return (PyraBlock if r else MergingBlock)(block, r, **given)

    wrap_blocks(model, step, make)


def add_lora(model: nn.Module, rank: int = 8, drop: float = 0.0) -> None:
    """LoRA of scale 1 beside the query, key and value products of every block."""
    for _, mixer in _mixers(model):
        mixer.qkv = LoraLinear(mixer.qkv, rank, alpha=float(rank), drop=drop)


def fold_lora(model: nn.Module) -> None:
    """Puts what LoRA learned into the products."""
    for _, mixer in _mixers(model):
        mixer.qkv = mixer.qkv.merged()


def trainable(model: Any) -> list[nn.Parameter]:
    """What learns: LoRA, the rescaling and the head."""
    found = list(model.head.parameters())
    for part in model.modules():
        if isinstance(part, LoraLinear):
            found += [part.a, *part.b]
        elif isinstance(part, PyraBlock):
            found += [part.a, part.b, *part.norm.parameters()]
    return found


def still(model: Any) -> None:
    """Everything in evaluation mode but LoRA and the head, which learn."""
    model.train()
    model.stem.eval()
    for block in model.blocks:
        block.eval()
        for part in block.modules():
            if isinstance(part, LoraLinear):
                part.train()


def _mixers(model: Any) -> list[tuple[str, Any]]:
    return [(f"blocks.{i}.mixer", getattr(block, "block", block).mixer) for i, block in enumerate(model.blocks)]
