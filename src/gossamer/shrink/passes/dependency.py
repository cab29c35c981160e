"""Structured pruning of any module by Torch-Pruning's dependency groups, for models that are not built of our parts.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (the library `torch-pruning`).

- groups of channels that have to go together are found by tracing; those with the smallest weights go
- the layers the answers come from are kept whole, so answers keep their shape
- models of our own parts are better served by `optin` and `magnitude`, which know heads and hidden units by name
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from gossamer.layers import Block
from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.recipe import register_step

ROUND = 8  # widths stay multiples of this: narrower steps are not faster in vector units


@register_pass("dependency", family="structured pruning", saves=("macs", "params", "size"), default={"keep": 0.6})
def dependency(model: nn.Module, calibration: Calibration, *, keep: float = 0.6) -> list[Step]:
    """Keeps about the share `keep` of the multiply-adds: channels of each dependency group with the largest weights.

    Raises:
        Unsupported: a model of our own parts, torch-pruning is not installed, or it cannot trace the model.
        ValueError: `keep` is not in (0, 1].
    """
    check_share("keep", keep)
    if any(isinstance(part, Block) for part in model.modules()):
        raise Unsupported(f"{type(model).__name__} is built of our parts, which state their own rules: use optin")
    if importlib.util.find_spec("torch_pruning") is None:
        raise Unsupported("torch-pruning is not installed; pip install 'gossamer[foreign]'")
    import torch_pruning as tp

    inputs = calibration.example()
    model.eval()
    with torch.no_grad():
        before = model(*inputs)
    last = _last_layers(model, inputs)
    try:
        # Work falls with the product of the widths on both sides of a layer.
        pruner = tp.pruner.MagnitudePruner(
            model,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - keep**0.5,
            ignored_layers=last,
            round_to=ROUND,
        )
        pruner.step()
        history = [[name, bool(out), [int(i) for i in index]] for name, out, index in pruner.DG.pruning_history()]
        with torch.no_grad():
            after = model(*inputs)
    except Exception as error:  # the library raises whatever tracing ran into
        raise Unsupported(f"{type(model).__name__} cannot be traced: {str(error).splitlines()[0]}") from error
    if after.shape != before.shape:
        raise Unsupported(f"pruning would change the answer from {tuple(before.shape)} to {tuple(after.shape)}")
    if not history:
        return []
    shapes = [[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in inputs]
    return [{"step": "dependency", "inputs": shapes, "history": history}]


@register_step("dependency")
def _replay(model: nn.Module, step: Step) -> None:
    import torch_pruning as tp

    example = tuple(torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in step["inputs"])
    graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=example)
    graph.load_pruning_history([(name, out, index) for name, out, index in step["history"]])


def _last_layers(model: nn.Module, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """The layer whose answer is the model's own, found by what it puts out."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda mod, _, y: seen.append((mod, y)))
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[-1][0]] if seen else []
