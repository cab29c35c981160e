"""What the blocks of a model make of fixed inputs, the model run again from one of its blocks on, and the fit of what
pruning left to what there was.

- blocks before the one where a run starts answer from memory, so that only what can have changed is computed
- the fit is in closed form, block by block, each on what the blocks before it now give
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.shrink.base import Unsupported, blocks_of
from gossamer.shrink.masks import Member, reader

ROWS = 16384  # tokens a fit reads, at most
RIDGES = (0.0003, 0.003, 0.03, 0.3)


class _Enough(Exception):
    """Raised by a hook where a run may end."""


class Trajectory:
    """A model in eval mode, inputs of one batch, and what each block gave, in the order they ran.

    Raises:
        Unsupported: there are no blocks, one runs more than once, or the answer is not one tensor.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model = model.eval()
        self.inputs = inputs
        found = dict(blocks_of(model))
        outermost = {n: b for n, b in found.items() if not any(n.startswith(f"{other}.") for other in found)}
        self._all = outermost
        self.names: list[str] = []
        self.outputs: list[Any] = []
        self.masks: list[Tensor | None] = []
        with ExitStack() as hooks:
            for name, block in outermost.items():

                def note(_: nn.Module, args: Any, kwargs: dict[str, Any], y: Any, name: str = name) -> None:
                    self.names.append(name)
                    self.outputs.append(y)
                    self.masks.append(kwargs.get("mask"))

                hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
            with self._branches() as traces, torch.no_grad():
                answer = model(*inputs)
        if len(set(self.names)) < len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise Unsupported(f"block {twice} runs more than once in a pass")
        if not isinstance(answer, Tensor):
            raise Unsupported(f"{type(model).__name__} answers with {type(answer).__name__}, not with one tensor")
        self.answer: Tensor = answer
        self.traces = [traces[name] for name in self.names]

    def layer(self, part: str) -> int | None:
        """The number of the block that holds the part of this name; None if none does."""
        return next((i for i, name in enumerate(self.names) if part.startswith(f"{name}.")), None)

    def run(self, first: int = 0, inputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The model's answer, and what the last branch of each block from `first` on gave before it was added.

        Blocks before `first` answer from memory. With other `inputs`, `first` must be 0.
        """
        with self._from_memory(first), self._branches() as traces:
            answer = self.model(*(self.inputs if inputs is None else inputs))
        return answer, [traces[name] for name in self.names[first:]]

    def given(self, layer: int, module: nn.Module) -> Tensor:
        """What `module`, in block `layer`, is called with; the run ends there."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Enough

        self._until(layer, module.register_forward_pre_hook(note))
        return seen[0]

    def renew(self, layer: int) -> None:
        """Computes block `layer` again from what is remembered of those before it, and remembers that."""

        def note(_: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
            self.outputs[layer] = y
            raise _Enough

        self._until(layer, self._all[self.names[layer]].register_forward_hook(note))

    def rows(self, layer: int, like: Float[Tensor, "*n c"]) -> Int[Tensor, " r"]:
        """Which rows of a tensor of block `layer`, its axes but the last made one, are real tokens; at most `ROWS`."""
        mask = self.masks[layer]
        count = like[..., 0].numel()
        if mask is not None and mask.shape == like.shape[:-1]:
            chosen = mask.flatten().nonzero().flatten()
        else:
            chosen = torch.arange(count, device=like.device)
        if len(chosen) > ROWS:
            generator = torch.Generator().manual_seed(count)
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[:ROWS].sort().values.to(chosen.device)]
        return chosen

    @torch.no_grad()
    def _until(self, layer: int, hook: Any) -> None:
        try:
            with self._from_memory(layer), self._branches():
                self.model(*self.inputs)
        except _Enough:
            return
        finally:
            hook.remove()

    @contextmanager
    def _branches(self) -> Iterator[dict[str, Tensor]]:
        # Hooks in every block also keep a pyramid from taking large batches in parts, which memory does not know.
        traces: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, block in self._all.items():
                last = block.mixer if block.mlp is None else block.mlp
                hook = last.register_forward_hook(lambda _, args, y, name=name: traces.update({name: y}))
                hooks.callback(hook.remove)
            yield traces

    @contextmanager
    def _from_memory(self, first: int) -> Iterator[None]:
        with ExitStack() as undo:
            for name, y in zip(self.names[:first], self.outputs, strict=False):
                block = self._all[name]
                object.__setattr__(block, "forward", lambda *_, y=y, **__: y)
                undo.callback(object.__delattr__, block, "forward")
            yield


@torch.no_grad()
def readings(model: nn.Module, inputs: tuple[Tensor, ...], members: Sequence[Member]) -> dict[str, Tensor]:
    """What the readers of these members give for `inputs`, real tokens only: `(tokens, channels)` for each part."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, axis in members:
            layer = reader(model.get_submodule(name), axis)
            hook = layer.register_forward_hook(lambda _, args, y, name=name: seen.update({name: y}))
            hooks.callback(hook.remove)
        path = Trajectory(model, inputs)
    kept = {}
    for name, y in seen.items():
        i = path.layer(name)
        if i is not None:
            kept[name] = y.flatten(0, -2)[path.rows(i, y)]
    return kept


@torch.no_grad()
def refit(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    members: Sequence[Member],
    wanted: Mapping[str, Float[Tensor, "n c"]],
    held: tuple[Tensor, ...],
    judge: Callable[[Tensor], float],
    *,
    seconds: float = float("inf"),
) -> list[str]:
    """Changes the readers of pruned members so that they give what is `wanted` (`readings` from before), nearly.

    `min_{W, b} |X W^T + b - Y|^2 + r |(W, b) - (W_0, b_0)|^2`, `X` what the reader is now given for `inputs`, `r` a
    share of the mean square of `X`'s columns; parts in order, each behind those already changed. Of the shares
    `RIDGES`, and of leaving the reader alone, the one is taken that `judge` likes best.

    Args:
        held: inputs that no fit sees.
        judge: how bad an answer to `held` is.

    Returns:
        The parts that were changed; where the time was short, the last were left alone.
    """
    start = time.perf_counter()
    path, trial = Trajectory(model, inputs), Trajectory(model, held)
    least = judge(trial.answer)
    fitted: list[str] = []
    for i in range(len(path.names)):
        for name, axis in members:
            if path.layer(name) != i or name not in wanted:
                continue
            if time.perf_counter() - start > seconds:
                return fitted
            layer = reader(model.get_submodule(name), axis)
            x = path.given(i, layer)
            x = x.flatten(0, -2)[path.rows(i, x)]
            left = (wanted[name] - layer(x)).double()
            x = x.double()
            if layer.bias is not None:
                x = torch.cat((x, x.new_ones(len(x), 1)), 1)
            square, cross = x.T @ x, x.T @ left
            best = before = [p.clone() for p in layer.parameters()]
            for share in RIDGES:
                ridge = share * square.diagonal().mean()
                change = torch.linalg.solve(square + torch.diag(ridge.expand(len(square))), cross).T
                layer.weight.copy_(before[0] + change[:, : layer.in_features])
                if layer.bias is not None:
                    layer.bias.copy_(before[1] + change[:, -1])
                found = judge(trial.run(i)[0])
                if found < least:
                    least, best = found, [p.clone() for p in layer.parameters()]
            for p, value in zip(layer.parameters(), best, strict=True):
                p.copy_(value)
            if best is not before:
                fitted.append(name)
        path.renew(i)
        trial.renew(i)
    return fitted
