"""What stitching has to know of the models it joins, the anchors: their blocks, widths and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.mixers.base import Mixer
from gossamer.trunks.isotropic import Isotropic
from gossamer.trunks.pyramid import Pyramid


@torch.no_grad()
def block_tokens(anchor: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens `(tokens, channels)` that each block of `anchor` is given (and last what the head is), and those it
    gives; padding is left out."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    masks: list[Tensor | None] = [None]

    def note(_: nn.Module, args: Any, __: Any, y: Tensor) -> None:
        for kept, x in ((before, args[0]), (after, y)):
            kept.append(x.flatten(0, -2) if masks[-1] is None else x[masks[-1]])

    def note_mask(_: nn.Module, __: Any, y: Any) -> None:
        masks.append(y[1] if isinstance(y, tuple) else None)

    hooks = [block.register_forward_hook(note, with_kwargs=True) for _, block in anchor_blocks(anchor)]
    hooks.append(cast(nn.Module, anchor.stem).register_forward_hook(note_mask))
    try:
        anchor(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [*before, after[-1]], after


def depths_of(anchor: nn.Module) -> tuple[int, ...]:
    """Blocks of each stage."""
    if isinstance(anchor, Pyramid):
        return tuple(len(cast(Any, stage)) for stage in anchor.stages)
    return (len(anchor_blocks(anchor)),)


def check_anchors(anchors: Sequence[nn.Module]) -> None:
    """Raises a ValueError where models cannot be joined: other trunks than ours, or tokens that do not match."""
    if len(anchors) < 2:
        raise ValueError(f"anchors must hold at least two models, got {len(anchors)}")
    for anchor in anchors:
        kind: Any = type(anchor)
        plain = (
            kind.forward is Isotropic.forward and kind.encode is Isotropic.encode
            if isinstance(anchor, Isotropic)
            else isinstance(anchor, Pyramid) and kind.forward is Pyramid.forward
        )
        if not plain:
            raise ValueError(f"anchors must be plain Isotropic or Pyramid trunks, got {kind.__name__}")
        for stage, block in anchor_blocks(anchor):
            if getattr(block, "reduces", False):
                raise ValueError(f"a block of stage {stage} ({type(block).__name__}) changes the number of tokens")
    facts = [_facts(anchor) for anchor in anchors]
    for name in facts[0]:
        values = [fact.get(name) for fact in facts]
        if any(value != values[0] for value in values):
            raise ValueError(f"anchors must agree in {name}, got {', '.join(map(str, values))}")


def _facts(anchor: nn.Module) -> dict[str, Any]:
    """What anchors must have in common, as far as it can be read off them."""
    stem: Any = anchor.stem
    facts: dict[str, Any] = {
        "trunk": "pyramid" if isinstance(anchor, Pyramid) else "isotropic",
        "stages": len(depths_of(anchor)),
    }
    if hasattr(stem, "grid"):
        tokens = getattr(stem, "tokens", None)
        facts |= {"patch grid": tuple(stem.grid), "learned tokens": 0 if tokens is None else tokens.shape[1]}
    if isinstance(words := getattr(stem, "words", None), nn.Embedding):
        facts |= {"vocabulary": words.num_embeddings, "pad_id": getattr(stem, "pad_id", None)}
    return facts


def anchor_blocks(anchor: nn.Module) -> list[tuple[int, nn.Module]]:
    """Stage and module of every block, in order."""
    if isinstance(anchor, Pyramid):
        return [(s, block) for s, stage in enumerate(anchor.stages) for block in stage.children()]
    return [(0, block) for block in cast(Isotropic, anchor).blocks]


def block_names(anchor: nn.Module) -> list[str]:
    if isinstance(anchor, Pyramid):
        return [f"stages.{s}.{i}" for s, depth in enumerate(depths_of(anchor)) for i in range(depth)]
    return [f"blocks.{i}" for i in range(len(anchor_blocks(anchor)))]


def stage_offset(anchor: nn.Module, stage: int) -> int:
    """The number of the first block of `stage`."""
    return sum(depths_of(anchor)[:stage])


def stage_width(anchor: nn.Module, stage: int) -> int:
    """Channels of a stage."""
    for at, block in anchor_blocks(anchor):
        if at == stage:
            for part in block.modules():
                if isinstance(part, Mixer):
                    return part.dim
    raise ValueError(f"stage {stage} of {type(anchor).__name__} has no token mixer that states its width")
