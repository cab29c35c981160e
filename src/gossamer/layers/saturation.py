"""Layers that stop when they change little: early exit by the likeness of a layer's input and output.

Source: Tang et al. 2022, "You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language
Model" (MuE).

- `s_l = cos(x_l, x_{l-1})`; what saturates, `s_l > threshold`, leaves with `x_l`, and the layers behind are not run
- encoders: one likeness a sample, over all channels of its valid tokens; samples that have left no longer cost anything
- decoders: one likeness a token; a skipped layer takes over the keys and values of the layer where the token left
- no parameters are added, and while training all layers run
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def check_threshold(threshold: object) -> float:
    """`threshold` as a float.

    Raises:
        ValueError: it is no number.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):
        raise ValueError(f"threshold must be a number (a cosine; above 1 nothing leaves), got {threshold!r}")
    return float(threshold)


def saturation(
    before: Float[Tensor, "b *grid c"],
    after: Float[Tensor, "b *grid c"],
    mask: Bool[Tensor, "b *grid"] | None = None,
    *,
    per_token: bool = False,
) -> Float[Tensor, "b ..."]:
    """`cos(after, before)` of each sample over its valid tokens, or of each token."""
    if per_token:
        return F.cosine_similarity(before, after, -1)
    if mask is not None:
        before, after = before * mask[..., None], after * mask[..., None]
    return F.cosine_similarity(before.flatten(1), after.flatten(1), -1)


class Saturation(nn.Module):
    """Blocks in turn, left early by what saturates.

    Stands in a trunk as one block. After a call, `depths` holds the layers that each sample, or each token, took.

    Args:
        blocks: `x -> x` of one shape, given `mask=` where there is one.
        threshold: cosine above which a layer is the last; above 1, all layers run.
        per_token: blocks are causal; each token leaves by itself.

    Raises:
        ValueError: no block, a threshold that is no number, or `per_token` with mixers whose keys and values cannot
            be copied from layer to layer.
    """

    dynamic = True  # what it costs depends on what it reads

    def __init__(self, blocks: Sequence[nn.Module], *, threshold: float, per_token: bool = False) -> None:
        super().__init__()
        if not len(blocks):
            raise ValueError("blocks must hold at least one block, got none")
        self.blocks = nn.ModuleList(blocks)
        self.threshold = check_threshold(threshold)
        self.per_token = per_token
        self.depths: Int[Tensor, "b ..."] | None = None
        if per_token:
            check_copies(list(self.blocks))

    def forward(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "b *grid c"]:
        if self.training:
            return self.states(x, mask=mask)[-1]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._static(x, mask)
        return self._tokens(x, mask) if self.per_token else self._samples(x, mask)

    def states(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> list[Float[Tensor, "b *grid c"]]:
        """`x_1 … x_L`: what each layer gives when none is skipped."""
        states = []
        for block in self.blocks:
            x = _run(block, x, mask)
            states.append(x)
        return states

    def likeness(
        self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, "b *grid"] | None = None
    ) -> Float[Tensor, "l b ..."]:
        """`s_1 … s_L` of each sample (token) when none is skipped."""
        states = [x, *self.states(x, mask=mask)]
        return torch.stack([saturation(a, b, mask, per_token=self.per_token) for a, b in pairwise(states)])

    def _samples(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The samples that have left are taken out of the batch."""
        left = torch.arange(len(x), device=x.device)
        depths = torch.full_like(left, len(self.blocks))
        out = torch.empty_like(x)
        for depth, block in enumerate(self.blocks, 1):
            y = _run(block, x, mask)
            done = saturation(x, y, mask) > self.threshold
            if depth == len(self.blocks) or done.all():
                out[left], depths[left] = y, depth
                break
            if done.any():
                out[left[done]], depths[left[done]] = y[done], depth
                left, y = left[~done], y[~done]
                mask = None if mask is None else mask[~done]
            x = y
        self.depths = depths
        return out

    def _tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All positions at once; a layer is not run when no token is left."""
        active = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        depths = torch.zeros_like(active, dtype=torch.long)
        kept: list[Tensor] = []
        for block in self.blocks:
            if not active.any():
                break
            depths += active
            x, active = self._masked(block, x, mask, active, kept)
        self.depths = depths
        return x

    def _masked(
        self, block: nn.Module, x: Tensor, mask: Tensor | None, active: Tensor, kept: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One layer for all, taken over by those still active (tokens, or samples)."""
        if self.per_token:
            with _copied(block, active, kept):
                y = _run(block, x, mask)
        else:
            y = _run(block, x, mask)
        done = saturation(x, y, mask, per_token=self.per_token) > self.threshold
        shown = active.reshape(*active.shape, *[1] * (x.ndim - active.ndim))
        return torch.where(shown, y, x), active & ~done

    def _static(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The same answers in one graph.

        `torch.export` keeps the exit of encoders: a layer whose samples have all left is skipped (`If` in ONNX). A
        trace, and the graph of a decoder over whole sequences, run all layers.
        """
        active = torch.ones_like(x[..., 0] if self.per_token else x.flatten(1)[:, 0], dtype=torch.bool)
        kept: list[Tensor] = []
        for block in self.blocks:
            if self.per_token or torch.jit.is_tracing():
                x, active = self._masked(block, x, mask, active, kept)
            else:
                given = (x, active) if mask is None else (x, active, mask)
                x, active = torch.cond(active.any(), self._layer(block), _skip, given)
        return x

    def _layer(self, block: nn.Module):
        def layer(x: Tensor, active: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self._masked(block, x, mask, active, [])

        return layer

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The empty decoding states of all layers."""
        blocks: Any = self.blocks
        return [block.initial_state(batch, device, dtype) for block in blocks]

    def step(
        self, x_t: Float[Tensor, "b c"], state: list[tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, "b c"], list[tuple[Tensor, Tensor]]]:
        """One token, equal to the full pass at its position; layers behind the last exit only copy their state."""
        active = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        depths = torch.zeros_like(active, dtype=torch.long)
        states: list[tuple[Tensor, Tensor]] = []
        blocks: Any = self.blocks
        for block, (keys, values) in zip(blocks, state, strict=True):
            if not active.any():
                newest = tuple(kept[:, :, -1:] for kept in states[-1])
                states.append((torch.cat((keys, newest[0]), 2), torch.cat((values, newest[1]), 2)))
                continue
            y, after = block.step(x_t, (keys, values))
            depths += active
            if states:
                shown = active[:, None, None, None]
                newest = tuple(
                    torch.where(shown, own[:, :, -1:], before[:, :, -1:])
                    for own, before in zip(after, states[-1], strict=True)
                )
                after = (torch.cat((keys, newest[0]), 2), torch.cat((values, newest[1]), 2))
            states.append(after)
            done = F.cosine_similarity(x_t, y, -1) > self.threshold
            x_t = torch.where(active[:, None], y, x_t)
            active = active & ~done
        self.depths = depths
        return x_t, states

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}, per_token={self.per_token}"


def check_copies(blocks: Sequence[nn.Module]) -> None:
    """Raises a ValueError where a layer's keys and values cannot stand in for those of the layer behind it."""
    widths = set()
    for number, block in enumerate(blocks):
        mixer: Any = getattr(block, "mixer", None)
        if not getattr(mixer, "causal", False) or not hasattr(mixer, "project"):
            raise ValueError(
                f"layer {number} ({type(mixer).__name__}) must be causal and make queries, keys and values by "
                "project(), so that skipped layers can copy them"
            )
        state = mixer.initial_state(1)
        if not (isinstance(state, tuple) and [getattr(s, "ndim", 0) for s in state] == [4, 4]):
            raise ValueError(
                f"layer {number} ({type(mixer).__name__}) must remember the keys and values themselves while decoding, "
                "so that skipped layers can copy them; it keeps a state of them"
            )
        widths.add((getattr(mixer, "kv_heads", mixer.heads), mixer.head_dim))
    if len(widths) > 1:
        raise ValueError(f"keys and values must be as wide in every layer to be copied, got (heads, width) {widths}")


def _run(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return block(x) if mask is None else block(x, mask=mask)


def _skip(x: Tensor, active: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.clone(), active.clone()


@contextmanager
def _copied(block: Any, active: Bool[Tensor, "b n"], kept: list[Tensor]) -> Iterator[None]:
    """Within the block, tokens that have left show the keys and values `kept` from the layer before."""
    mixer = block.mixer
    project = mixer.project

    def projected(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        q, *new = project(x, *given)
        if kept:
            shown = active[:, None, :, None]
            new = [torch.where(shown, own, before) for own, before in zip(new, kept, strict=True)]
        kept[:] = new
        return q, *new

    mixer.project = projected
    try:
        yield
    finally:
        del mixer.project
