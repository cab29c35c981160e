"""Reversible blocks: two streams, of which the last tokens tell all earlier ones, so that none need be kept.

`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`; backwards `x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`.

Source: Gomez et al. 2017, "The Reversible Residual Network: Backpropagation Without Storing Activations"; Kitaev et al.
2020, "Reformer"; Mangalam et al. 2022, "Reversible Vision Transformers".

- f and g are the two branches of an ordinary pre-norm block: `f = s1 * mixer(norm1(.))`, `g = s2 * mlp(norm2(.))`,
  dropped paths included. A norm of the sum (post-norm) cannot be undone
- memory of activations does not grow with depth, for one more forward pass in the backward one
- dropout draws the same again; batch norms count a batch once
- both streams start as the stem's tokens, and their mean leaves, as in Reversible Vision Transformers
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.layers import Block
from gossamer.trunks.checkpointing import Counted, as_counted, counting
from gossamer.trunks.isotropic import Isotropic

Blocks = Sequence[Block] | nn.ModuleList
Pair = tuple[Float[Tensor, "b *grid c"], Float[Tensor, "b *grid c"]]


class Reversible(Isotropic):
    """An isotropic trunk whose blocks are reversible; the same parts and names of weights.

    Args:
        stem, norm, head: as in `Isotropic`.
        blocks: pre-norm blocks with a mixer and an MLP.

    Raises:
        ValueError: a block has another form.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], *, norm: nn.Module | None, head: nn.Module):
        for i, block in enumerate(blocks):
            if not isinstance(block, Block) or block.residual != "pre" or block.norm2 is None:
                kind = getattr(block, "residual", type(block).__name__)
                raise ValueError(f"a reversible block is a pre-norm Block with a mixer and an MLP; block {i} is {kind}")
        super().__init__(stem, blocks, norm=norm, head=head)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, mask = self.stem(x)
        one, two = forwards(self.blocks, (x, x), mask)
        x = (one + two) / 2
        return (x if self.norm is None else self.norm(x)), mask, None


def forwards(blocks: Blocks, x: Pair, mask: Bool[Tensor, "b *grid"] | None = None) -> Pair:
    """Both streams after all blocks; nothing between is kept for the gradients."""
    parameters = list({id(p): p for block in blocks for p in block.parameters() if p.requires_grad}.values())
    wanted = torch.is_grad_enabled() and (parameters or any(t.requires_grad for t in x))
    if not wanted or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _forwards(blocks, x, mask)
    return _Chain.apply(*x, mask, tuple(blocks), *parameters)


def backwards(blocks: Blocks, y: Pair, mask: Bool[Tensor, "b *grid"] | None = None) -> Pair:
    """Both streams before all blocks, from those after them; in eval mode, where nothing is drawn by chance."""
    one, two = y
    for block in reversed(blocks):
        two = two - _mlp(block, one)
        one = one - _mixed(block, two, mask)
    return one, two


def _forwards(blocks: Blocks, x: Pair, mask: Tensor | None, note: Callable[[], object] = lambda: None) -> Pair:
    one, two = x
    for block in blocks:
        note()
        one = one + _mixed(block, two, mask)
        note()
        two = two + _mlp(block, one)
    return one, two


def _mixed(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    y = block.mixer(block.norm1(x)) if mask is None else block.mixer(block.norm1(x), mask=mask)
    return _branch(block, y, block.scale1)


def _mlp(block: Any, x: Tensor) -> Tensor:
    return _branch(block, block.mlp(block.norm2(x)), block.scale2)


def _branch(block: Block, y: Tensor, scale: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if block.drop_path is None else block.drop_path(y)


class _Chain(torch.autograd.Function):
    """All blocks as one function that saves its answer alone."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, mask: Tensor | None, blocks: tuple[Block, ...], *parameters: Any):
        ctx.blocks, ctx.parameters = blocks, parameters
        ctx.chance = []
        device = one.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        counted: Counted = []
        ctx.counted = counted
        with counting(blocks, ctx.counted):
            one, two = _forwards(blocks, (one, two), mask, lambda: ctx.chance.append(_chance(one)))
        ctx.save_for_backward(one, two, mask)
        return one, two

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_one: Tensor, grad_two: Tensor):
        one, two, mask = ctx.saved_tensors
        sums: dict[int, Tensor] = {}
        chance = iter(reversed(ctx.chance))
        device, dtype, enabled = ctx.cast
        with torch.autocast(device, dtype, enabled), as_counted(ctx.counted):
            for block in reversed(ctx.blocks):
                # What each branch read is the other stream; what it added is taken off its own.
                two, grad_one = _undo(block, _mlp, (one, two), grad_two, grad_one, next(chance), sums)
                one, grad_two = _undo(block, _mixed, (two, one), grad_one, grad_two, next(chance), sums, mask)
        return grad_one, grad_two, None, None, *(sums.get(id(p)) for p in ctx.parameters)


def _undo(
    block: Block,
    branch: Callable[..., Tensor],
    streams: tuple[Tensor, Tensor],
    grad_out: Tensor,
    grad_read: Tensor,
    chance: list[Tensor],
    sums: dict[int, Tensor],
    *given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The stream before `branch` was added to it, and the gradient of the stream the branch read.

    Args:
        streams: the one that was read, and the one that was added to.
        grad_out: gradient of the second stream, which is that of the branch; `grad_read` that of the first.
        sums: gradients of the weights, added to in place.
    """
    read = streams[0].detach().requires_grad_()
    weights = [p for p in block.parameters() if p.requires_grad]
    with torch.enable_grad(), _same_chance(chance, read):
        added = branch(block, read, *given)
    found = torch.autograd.grad(added, [read, *weights], grad_out.to(added.dtype), allow_unused=True)
    for weight, grad in zip(weights, found[1:], strict=True):
        if grad is not None:
            sums[id(weight)] = sums[id(weight)] + grad if id(weight) in sums else grad
    return streams[1] - added.detach(), grad_read if found[0] is None else grad_read + found[0]


def _chance(x: Tensor) -> list[Tensor]:
    """States of the generators a branch may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(x.device)] if x.is_cuda else states


@contextmanager
def _same_chance(states: list[Tensor], x: Tensor) -> Iterator[None]:
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.set_rng_state(states[0])
        if x.is_cuda:
            torch.cuda.set_rng_state(states[1], x.device)
        yield
