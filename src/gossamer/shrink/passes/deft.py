"""DEFT: parameter-efficient fine-tuning with a loss on how many activations of the MLPs are not zero.

`c = mean_i a_i^2 / (a_i^2 + eps)` over the tokens and hidden units of a sample and layer, a soft count of the non-zero;
`D = mean over samples and layers of c`;  `loss = task + weight * D`, learned by small added parts and the task's head.

Source: Runwal et al. 2024, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
Transformers"; code of the authors (IBM/DEFT).

- the density loss and the density metric equal the authors' code, padding included; here padding may be left out too
- added parts: `lora` on queries and values (8 ranks, alpha 16, dropout 0.1), merged in the end, so that no new part is
  left; `adapter` behind each MLP (a sixteenth of the channels); `prefix` and `prompt` (60 slots; `eps` 20 for prompts)
- adapters, prefixes and merged LoRA start as the model itself: the last product and the prefix's values are zero
- encoder and decoder have a term each, and the terms are added (`density_terms`); without them there is one
- the model becomes no cheaper by itself: PyTorch and ONNX Runtime compute the zeros. `active_product` shows what
  software that skips them would do, and counts its multiply-adds. GELU leaves few exact zeros: beside the share of
  non-zero activations the report has the share above 1e-3
- not built: 4-bit bases (QLoRA)
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.adapters import Adapted, LoraLinear, PromptHead, PromptStem
from gossamer.layers.blocks import Block
from gossamer.mixers.attention import Attention
from gossamer.mixers.grouped_query import GroupedMixer
from gossamer.mixers.heads import HeadMixer
from gossamer.mixers.prefix import PrefixAttention
from gossamer.shrink.base import Batch, Calibration, Step, Unsupported, blocks_of, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.trunks import Isotropic

# Where MLPs have their activation; behind an adapter too.
PATTERN = r"(^|\.)mlp(\.inner)*\.act$"
NEAR_ZERO = 1e-3
EPS = {"lora": 1e-7, "adapter": 1e-7, "prefix": 1e-7, "prompt": 20.0}
SLOTS, RANK, ALPHA, REDUCTION, LORA_DROP = 60, 8, 16.0, 16, 0.1
# Samples the density is measured on.
MEASURED = 64


@register_pass("deft", family="sparsity", paper="deft", default={})
def deft(
    model: nn.Module,
    calibration: Calibration,
    *,
    kind: str = "lora",
    weight: float = 1.0,
    eps: float | None = None,
    size: int | None = None,
    steps: int | None = None,
    lr: float = 3e-4,
) -> list[Step]:
    """Fine-tunes small added parts so that fewer activations of the MLPs are not zero.

    Args:
        kind: the parts: `lora`, `adapter`, `prefix` or `prompt`.
        weight: of the density loss; 0 is plain parameter-efficient fine-tuning.
        eps: squared activations far above it count, far below it do not; 1e-7 by default, 20 for prompts.
        size: ranks, channels of the adapters, or slots; the authors' by default.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: the model has no activation in an MLP, or nothing the parts can be added to.
        ValueError: an unknown kind, a negative weight, or `eps`, `size` or `steps` not above 0.
    """
    if kind not in EPS:
        raise ValueError(f"kind must be one of {', '.join(EPS)}; got {kind!r}")
    if weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    eps = EPS[kind] if eps is None else eps
    for name, value in (("eps", eps), ("size", size), ("steps", steps)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    start = time.perf_counter()
    find_activations(model)
    plan = _plan(model, kind, size)
    before = _measured(model, calibration)
    once = time.perf_counter() - start  # it is measured once more in the end
    learned = {id(p): p.requires_grad for p in model.parameters()}
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(calibration.seed)
        taken = _install(model, plan)
    if calibration.task.name != "language-modelling":
        # A head of words is the table of words itself; it stays as it is.
        for p in _head(model):
            p.requires_grad_(learned[id(p)])

    def objective(net: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        if not weight:
            return calibration.loss(net, inputs, target)
        with recorded(net) as records:
            loss = calibration.loss(net, inputs, target)
        terms = density_terms(records, eps).values()
        return loss + weight * torch.stack(list(terms)).sum()

    try:
        trainer = calibration.trainer(model, objective=objective, lr=lr, ema=0.0, weight_decay=0.0)
        total = steps or 3 * trainer.steps_per_epoch
        left = calibration.seconds - (time.perf_counter() - start) - once
        trainer.train(steps=total, seconds=left, schedule="linear")
    finally:
        _merge(model)
        for p in model.parameters():
            p.requires_grad_(learned.get(id(p), True))
    model.eval()
    report = {"kind": kind, "weight": weight, "eps": eps, "before": before, "after": _measured(model, calibration)}
    report = {**getattr(model, "shrink_report", {}), "deft": report}
    setattr(model, "shrink_report", report)  # noqa: B010 (a plain attribute of a module)
    return taken


# --- the loss and the metric --------------------------------------------------------------------------------------


@dataclass
class Record:
    """What an activation gave: the name of the module, its output `(b, *grid, f)`, and the mask of its block."""

    name: str
    output: Tensor
    mask: Tensor | None


def find_activations(model: nn.Module, pattern: str = PATTERN) -> dict[str, nn.Module]:
    """The modules whose name matches `pattern`, by name.

    Raises:
        Unsupported: there are none.
    """
    found = {name: part for name, part in model.named_modules() if re.search(pattern, name)}
    if not found:
        raise Unsupported(f"no activation of {type(model).__name__} matches {pattern!r}")
    return found


@contextmanager
def recorded(model: nn.Module, pattern: str = PATTERN) -> Iterator[list[Record]]:
    """Within the block, a list of what the model's activations give, filled at each forward pass.

    Raises:
        Unsupported: no activation matches `pattern`.
    """
    records: list[Record] = []
    masks: dict[str, Tensor | None] = {}
    handles = []
    for name, part in find_activations(model, pattern).items():
        block = next((b for b, m in model.named_modules() if isinstance(m, Block) and name.startswith(f"{b}.")), None)
        if block is not None:

            def note(_: Any, __: Any, kwargs: dict[str, Any], block: str = block) -> None:
                masks[block] = kwargs.get("mask")

            handles.append(model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True))

        def record(_: Any, __: Any, output: Tensor, name: str = name, block: str | None = block) -> None:
            records.append(Record(name, output, masks.get(block or "")))

        handles.append(part.register_forward_hook(record))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def soft_count(a: Float[Tensor, "b ..."], eps: float = 1e-7) -> Float[Tensor, " b"]:
    """Mean of `a^2 / (a^2 + eps)` over all but the first axis.

    Raises:
        ValueError: `eps` is not above 0.
    """
    if eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    squares = a.square()
    return (squares / (squares + eps)).flatten(1).mean(1)


def density_loss(activations: Sequence[Tensor], eps: float = 1e-7) -> Float[Tensor, ""]:
    """Mean of `soft_count` over samples and layers."""
    return torch.stack([soft_count(a, eps) for a in activations], 1).mean()


def density_terms(records: Sequence[Record], eps: float = 1e-7) -> dict[str, Tensor]:
    """`density_loss` of `encoder` and `decoder`, by their names in the model, or of all as `""`; their sum is D."""
    parts: dict[str, list[Tensor]] = {}
    for record in records:
        parts.setdefault(_side(record.name), []).append(record.output)
    return {side: density_loss(outputs, eps) for side, outputs in parts.items()}


def _side(name: str) -> str:
    return next((side for side in ("decoder", "encoder") if side in name), "")


@torch.no_grad()
def activation_density(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    threshold: float = 0.0,
    padding: bool = True,
    pattern: str = PATTERN,
) -> dict[str, float]:
    """Share of activations with `|a| > threshold`, of each layer by name and the mean of all layers as `""`.

    Args:
        threshold: 0 counts what is not exactly zero.
        padding: count padding too, as the authors do; False counts valid tokens only.

    Raises:
        Unsupported: no activation matches `pattern`.
    """
    alive: dict[str, float] = {}
    whole: dict[str, float] = {}
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    with recorded(model, pattern) as records:
        for inputs, _ in batches:
            model(*(x.to(device) for x in inputs))
            for record in records:
                large = record.output.abs() > threshold
                if record.mask is not None and not padding:
                    large = large[record.mask]
                alive[record.name] = alive.get(record.name, 0.0) + float(large.sum())
                whole[record.name] = whole.get(record.name, 0.0) + large.numel()
            records.clear()
    model.train(was_training)
    shares = {name: alive[name] / max(1.0, whole[name]) for name in alive}
    return {"": sum(shares.values()) / max(1, len(shares)), **shares}


def _measured(model: nn.Module, calibration: Calibration) -> dict[str, float]:
    """Density of activations on validation items: not zero, and above `NEAR_ZERO`."""
    found = {}
    for name, threshold in (("density", 0.0), (f"above_{NEAR_ZERO:g}", NEAR_ZERO)):
        batches = calibration.batches(MEASURED, split="val")
        found[name] = activation_density(model, batches, threshold=threshold)[""]
    return found


def active_product(
    a: Float[Tensor, "*b f"], weight: Float[Tensor, "c f"], bias: Float[Tensor, " c"] | None = None
) -> tuple[Float[Tensor, "*b c"], int]:
    """`W a + b` from the entries of `a` that are not zero alone, and the multiply-adds it took.

    It is what software that skips zeros computes, written to be counted, not to be fast.
    """
    flat = a.flatten(0, -2)
    rows, columns = flat.nonzero(as_tuple=True)
    products = flat[rows, columns, None] * weight.T[columns]
    y = a.new_zeros(len(flat), weight.shape[0]).index_add(0, rows, products)
    if bias is not None:
        y = y + bias
    return y.view(*a.shape[:-1], weight.shape[0]), len(rows) * weight.shape[0]


# --- the added parts ----------------------------------------------------------------------------------------------


def _plan(model: nn.Module, kind: str, size: int | None) -> dict[str, Any]:
    """The step that adds the parts; nothing is changed yet.

    Raises:
        Unsupported: there is nothing they can be added to.
    """
    blocks = blocks_of(model)
    if kind == "lora":
        parts = {f"{name}.mixer": _query_value_rows(block.mixer) for name, block in blocks}
        found = {name: rows for name, rows in parts.items() if rows}
        if not found:
            raise Unsupported(f"{_first_mixer(blocks)} has no fused query, key and value product for LoRA")
        return {"step": "deft.lora", "parts": found, "rank": size or RANK}
    if kind == "adapter":
        dims = {name: _dim(block) for name, block in blocks if block.mlp is not None}
        if not dims:
            raise Unsupported(f"the blocks of {type(model).__name__} have no MLP for an adapter to stand behind")
        return {"step": "deft.adapter", "parts": {n: [d, size or max(1, d // REDUCTION)] for n, d in dims.items()}}
    if kind == "prefix":
        names = [name for name, block in blocks if type(block.mixer) is Attention]
        if not names:
            raise Unsupported(f"{_first_mixer(blocks)} takes no prefix; only plain attention does")
        return {"step": "deft.prefix", "parts": names, "slots": size or SLOTS}
    if not isinstance(model, Isotropic):
        raise Unsupported(f"{type(model).__name__} is no sequence from end to end that prompts could stand before")
    for name, block in blocks:
        if type(block.mixer) is not Attention or block.mixer.causal:
            what = type(block.mixer).__name__
            raise Unsupported(f"{name}.mixer ({what}) takes no prompts; plain attention over all tokens does")
    reducing = next((name for name, b in model.named_modules() if getattr(b, "reduces", False)), None)
    if reducing is not None:
        raise Unsupported(f"{reducing} reduces tokens, so prompts could not be told from the others behind it")
    return {"step": "deft.prompt", "count": size or SLOTS, "dim": _dim(blocks[0][1])}


def _first_mixer(blocks: Sequence[tuple[str, Block]]) -> str:
    name, block = blocks[0]
    return f"{name}.mixer ({type(block.mixer).__name__})"


def _dim(block: Block) -> int:
    dim = getattr(block.mixer, "dim", None)
    if not isinstance(dim, int):
        raise Unsupported(f"{type(block.mixer).__name__} does not say how many channels it has")
    return dim


def _query_value_rows(mixer: nn.Module) -> list[tuple[int, int]]:
    if isinstance(mixer, HeadMixer):
        q = k = mixer.heads * mixer.head_dim
    elif isinstance(mixer, GroupedMixer):
        q, k = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    else:
        return []
    return [(0, q), (q + k, q + 2 * k)] if type(mixer.qkv) is nn.Linear else []


def _install(model: nn.Module, plan: dict[str, Any]) -> list[Step]:
    """Adds the parts; LoRA takes no step of the recipe, for nothing of it stays."""
    if plan["step"] != "deft.lora":
        apply(model, plan)
        return [plan]
    for name, rows in plan["parts"].items():
        mixer: Any = model.get_submodule(name)
        mixer.qkv = LoraLinear(mixer.qkv, plan["rank"], alpha=ALPHA, rows=rows, drop=LORA_DROP)
    return []


def _merge(model: nn.Module) -> None:
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, LoraLinear):
                setattr(part, name, child.merged())


def _head(model: nn.Module) -> list[nn.Parameter]:
    head = getattr(model, "head", None)
    return list(head.parameters()) if isinstance(head, nn.Module) else []


@register_step("deft.adapter")
def _add_adapters(model: nn.Module, step: dict[str, Any]) -> None:
    for name, (dim, width) in step["parts"].items():
        block: Any = model.get_submodule(name)
        block.mlp = Adapted(block.mlp, dim, width).to(next(block.parameters()).device)


@register_step("deft.prefix")
def _add_prefixes(model: nn.Module, step: dict[str, Any]) -> None:
    for name in step["parts"]:
        block: Any = model.get_submodule(name)
        block.mixer = PrefixAttention.of(block.mixer, slots=step["slots"])


@register_step("deft.prompt")
def _add_prompts(model: nn.Module, step: dict[str, Any]) -> None:
    parts: Any = model
    parts.stem = PromptStem(parts.stem, step["dim"], step["count"]).to(next(model.parameters()).device)
    parts.head = PromptHead(parts.head, step["count"])
