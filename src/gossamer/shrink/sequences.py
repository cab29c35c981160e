"""What passes that drop tokens share: which models they work on, and how their blocks are exchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.layers.distilled import DistilledClassifier
from gossamer.shrink.base import Calibration, Unsupported
from gossamer.trunks import Isotropic


class Sequence(NamedTuple):
    """A model of one sequence of tokens from end to end.

    Args:
        tokens: that come into the first block, `protect` in front of which a head or other tokens rely on.
        learned: the first of them is a class token of images (False for texts, whose first word stands for it).
    """

    blocks: list[Block]
    tokens: int
    protect: int
    learned: bool


def sequence_of(
    model: Any,
    calibration: Calibration,
    what: str,
    *,
    causal: bool = False,
    mixers: tuple[str, ...] = ("attention",),
) -> Sequence:
    """The sequence `model` makes of the user's data.

    Args:
        what: the pass, for the message.
        causal: the pass leaves an answer for every position, so causal models may come.
        mixers: those it works with.

    Raises:
        Unsupported: its tokens cannot be dropped; the message names the module and the reason.
    """
    if not isinstance(model, Isotropic):
        raise Unsupported(
            f"{what}: {type(model).__name__} is not one sequence of tokens from end to end (Isotropic); "
            "windows, convolutions and downsampling read neighbours by place"
        )
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        if getattr(block, "reduces", False):
            raise Unsupported(f"{what}: {name} ({type(block).__name__}) reduces tokens already")
        if not isinstance(block, Block) or block.norm2 is None:
            raise Unsupported(f"{what}: {name} ({type(block).__name__}) has not the two residual branches of a Block")
        if getattr(block.mixer, "causal", False) and not causal:
            raise Unsupported(
                f"{what}: {name}.mixer ({type(block.mixer).__name__}) is causal: every position has to give an answer"
            )
        if getattr(block.mixer, "name", None) not in mixers:
            raise Unsupported(
                f"{what}: {name}.mixer ({type(block.mixer).__name__}) does not attend over tokens of any number; "
                f"mixers may be {', '.join(mixers)}"
            )
    with torch.no_grad():
        x, mask = model.stem(*(t.to(next(model.parameters()).device) for t in calibration.example()))
    if x.ndim != 3:
        raise Unsupported(f"{what}: stem ({type(model.stem).__name__}) gives a map of tokens, not a sequence")
    count = protected(model, mask)
    if x.shape[1] - count < 1:
        raise Unsupported(f"{what}: stem ({type(model.stem).__name__}) gives no token that may go")
    return Sequence(list(model.blocks), x.shape[1], count, _learned(model) > 0)  # type: ignore[arg-type]


def protected(model: Any, mask: Tensor | None) -> int:
    """Tokens in front that must stay: learned ones, what a head reads, and the first of every text."""
    if any(getattr(block.mixer, "causal", False) for block in model.blocks):
        return 0
    reads = getattr(model.head, "kind", getattr(model.head, "pool", None)) == "token"
    if isinstance(model.head, DistilledClassifier):
        return max(_learned(model), 2 * reads)
    return max(_learned(model), int(reads or mask is not None))


def _learned(model: Any) -> int:
    tokens = getattr(model.stem, "tokens", None)
    if not isinstance(tokens, Tensor):
        tokens = getattr(model.stem, "token", None)
    return tokens.shape[1] if isinstance(tokens, Tensor) else 0


def need_class_token(found: Sequence, model: Any, what: str) -> None:
    """Raises Unsupported where no token in front gathers what the others say."""
    if not found.protect:
        raise Unsupported(
            f"{what}: stem ({type(model.stem).__name__}) puts no class token in front, "
            "whose attention would rank the others"
        )


def wrap(model: Any, index: int, make: Callable[[Block], nn.Module]) -> None:
    """Puts `make(block)` in the place of block `index`.

    Raises:
        ValueError: there is no such block, or it is no plain one.
    """
    blocks = getattr(model, "blocks", [])
    if not 0 <= index < len(blocks) or not isinstance(blocks[index], Block):
        raise ValueError(f"block must be the number of a plain block, 0 … {len(blocks) - 1}, got {index}")
    made = make(blocks[index])
    blocks[index] = made.to(next(blocks[index].parameters()).device).train(model.training)


def needs_sizes(model: Any) -> bool:
    """Whether the head of `model` takes how many original tokens each stands for."""
    return "sizes" in inspect.signature(model.head.forward).parameters
