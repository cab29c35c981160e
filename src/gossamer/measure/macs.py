"""Multiply-adds of a forward pass, counted twice by two counters that share no code.

The first counter watches every operation that reaches PyTorch's dispatcher and applies the formulas below.
The second is PyTorch's own `FlopCounterMode`, halved, with the one formula it lacks (fused attention on CPU,
which it counts as zero). Where the two differ by more than 1 % the result says by how much and through what.

What is a MAC here:

- one multiplication whose product is added to a sum: matrix products, convolutions, attention, recurrences
- attention is `queries * keys * (d + d_v)` for each head, whichever kernel runs; a mask or causal flag does
  not lower the figure, but the blocks that a FlexAttention block mask skips are not counted
- normalisation, softmax, activations, pooling, elementwise products, resampling and gathers are not MACs
- Fourier transforms are not MACs either; a model that uses them has them listed in `uncounted`
- the figure is for the inputs given: with a batch of 8 it is 8 times that of one sample

Nothing is read but shapes, so a model and inputs on the meta device are counted without allocating weights.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

Formula = Callable[..., int]

_FORMULAS: dict[Any, Formula] = {}
_REGISTERED: dict[Any, Formula] = {}  # added by other floors; given to the second counter as well

# Heavy operations that are no MACs by the convention above: their presence is reported.
_UNCOUNTED = ("_fft_r2c", "_fft_c2r", "_fft_c2c", "_cdist_forward", "_trilinear")

TOLERANCE = 0.01


@dataclass(frozen=True)
class MacCount:
    """The multiply-adds of one forward pass.

    Attributes:
        total: by our own counter.
        second: by PyTorch's counter, or None where it could not follow the model.
        by_module: MACs inside each named module, children included; `""` is the model. Empty unless asked.
        by_op: MACs of each operation.
        uncounted: heavy operations that ran and are not MACs by convention, or have no formula.
        warning: how and where the counters differ, or `""`.
    """

    total: int
    second: int | None
    by_module: dict[str, int] = field(default_factory=dict)
    by_op: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    warning: str = ""


def register_macs(*ops: Any) -> Callable[[Formula], Formula]:
    """Give custom operations a formula: `formula(*args, out, **kwargs) -> int`, on the op's own arguments.

    Args:
        ops: operation packets, such as `torch.ops.gossamer.scan`, or higher-order operators.

    Raises:
        ValueError: an op has a formula already.
    """

    def add(formula: Formula) -> Formula:
        for op in ops:
            if op in _FORMULAS:
                raise ValueError(f"op already has a MAC formula: {op}")
            _FORMULAS[op] = formula
            _REGISTERED[op] = formula
        return formula

    return add


def macs(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | list[Any],
    *,
    per_layer: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> MacCount:
    """Count the multiply-adds of `model(*inputs)` in evaluation mode.

    Args:
        model: any module; its training flags are restored afterwards.
        inputs: one tensor, or the positional arguments; moved to the meta device if the model is there.
        per_layer: fill `by_module`.
        kwargs: keyword arguments of the forward.
    """
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    named = dict(kwargs or {})
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    if first is not None and first.is_meta:
        args, named = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, named))

    counter = _Counter()
    with _evaluation(model):
        with counter.names(model) if per_layer else _nothing(), counter:
            model(*args, **named)
        second, by_second, reason = _count_by_torch(model, args, named)

    by_op = {str(op): n for op, n in sorted(counter.by_op.items(), key=lambda item: -item[1]) if n}
    total = sum(by_op.values())
    by_module = {name: counter.by_module[name] for name, _ in model.named_modules()} if per_layer else {}
    uncounted = tuple(sorted(counter.uncounted))
    warning = reason or _difference(total, second, by_op, by_second)
    return MacCount(total, second, by_module, by_op, uncounted, warning)


# --- the first counter: our formulas ------------------------------------------------------------------------


def _formula(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula under operation names, those that this PyTorch has."""

    def add(formula: Formula) -> Formula:
        for name in names:
            if hasattr(aten, name):
                _FORMULAS[getattr(aten, name)] = formula
        return formula

    return add


@_formula("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_grouped_mm")
def _product(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    # Every entry of the result is a sum over the last axis of a.
    return out.numel() * a.shape[-1]


@_formula("addmm", "baddbmm", "addmv", "_addmm_activation")
def _product_and_sum(_bias: Tensor, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return out.numel() * a.shape[-1]


@_formula("addbmm")
def _product_summed_over_batch(_bias: Tensor, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return out.numel() * a.shape[-1] * a.shape[0]


@_formula("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")
def _packed_product(a: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return out.numel() * a.shape[-1]


@_formula("convolution", "_convolution", "convolution_overrideable")
def _convolution(x: Tensor, weight: Tensor, *args: Any, out: Any, **kwargs: Any) -> int:
    # weight is (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed. Each output entry
    # of a plain one, and each input entry of a transposed one, meets the weights of its own channel once.
    transposed = bool(args[4]) if len(args) > 4 else bool(kwargs.get("transposed", False))
    entries = x.numel() if transposed else out.numel()
    return entries * prod(weight.shape[1:])


@_formula("mkldnn_convolution", "cudnn_convolution", "miopen_convolution")
def _backend_convolution(_x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return out.numel() * prod(weight.shape[1:])


@_formula(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out: Any, **__: Any) -> int:
    # Query heads: in grouped attention several of them read one key head, each with its own products.
    rows = prod(query.shape[:-1])
    return rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


@_formula("mkldnn_rnn_layer")
def _recurrent_layer(x: Tensor, w_in: Tensor, w_hidden: Tensor, *_: Any, out: Any, **__: Any) -> int:
    # x is (steps, batch, width): each step of each sample meets every weight once.
    return prod(x.shape[:-1]) * (w_in.numel() + w_hidden.numel())


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out: Any, **kwargs: Any) -> int:
    rows = prod(query.shape[:-1])
    dense = rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    mask = args[1] if len(args) > 1 else kwargs.get("block_mask")
    return int(dense * _blocks_kept(mask, query.shape[-2], key.shape[-2]))


def _blocks_kept(mask: Any, queries: int, keys: int) -> float:
    """Share of the (query, key) pairs in the blocks that a flattened BlockMask keeps; 1 where unreadable.

    The tuple is (q_len, kv_len, kv_num_blocks, kv_indices, full_kv_num_blocks, ..., q_block, kv_block, mask).
    """
    if not isinstance(mask, tuple) or len(mask) < 5 or not isinstance(mask[2], Tensor) or mask[2].is_meta:
        return 1.0
    numbers = [n for n in (mask[2], mask[4]) if isinstance(n, Tensor)]
    sizes = [n for n in mask[5:] if isinstance(n, int) and not isinstance(n, bool)]
    if len(sizes) < 2:
        return 1.0
    query_block, key_block = sizes[0], sizes[1]
    if query_block > queries or key_block > keys:
        return 1.0
    kept = sum(float(n.sum()) for n in numbers) * query_block * key_block
    return min(1.0, kept / (prod(mask[2].shape[:-1]) * queries * keys))


_FORMULAS[torch.ops.higher_order.flex_attention] = _flex_attention


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd, where composite ones have fallen into their parts."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.by_op: dict[str, int] = defaultdict(int)
        self.by_module: dict[str, int] = defaultdict(int)
        self.uncounted: set[str] = set()
        self._stack: list[str] = []

    @contextmanager
    def names(self, model: nn.Module) -> Iterator[None]:
        """Attribute what runs to the named modules that are being called."""
        handles = []
        for name, module in model.named_modules():
            push: Any = lambda *_, name=name: self._stack.append(name)  # noqa: E731
            pop: Any = lambda *_: self._stack.pop() and None  # noqa: E731
            handles.append(module.register_forward_pre_hook(push, prepend=True))
            handles.append(module.register_forward_hook(pop, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", func)
        formula = _FORMULAS.get(packet)
        if formula is None and isinstance(func, torch._ops.OpOverload):
            # Tensors made in inference mode arrive here before composite operations are taken apart.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            count = int(formula(*args, out=out, **kwargs))
            self.by_op[_name(packet)] += count
            for name in set(self._stack):
                self.by_module[name] += count
        elif _name(packet) in _UNCOUNTED or getattr(func, "namespace", "aten") not in (
            "aten",
            "prim",
            "prims",
        ):
            self.uncounted.add(_name(packet))
        return out


# --- the second counter: PyTorch's --------------------------------------------------------------------------


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    b, heads, n, d = query
    return 2 * b * heads * n * key[-2] * (d + value[-1])


def _count_by_torch(model: nn.Module, args: Any, kwargs: Any) -> tuple[int | None, dict[str, int], str]:
    mapping: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    mapping |= {op: _as_flops(formula) for op, formula in _REGISTERED.items()}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with counter:
                model(*args, **kwargs)
    except Exception as error:  # the model itself ran under our counter a moment ago: this counter is at fault
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return None, {}, f"PyTorch's counter could not follow the model: {reason}"
    counts = {_name(op): n // 2 for op, n in counter.get_flop_counts().get("Global", {}).items()}
    return sum(counts.values()), counts, ""


def _as_flops(formula: Formula) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * formula(*args, out=out_val, **kwargs)

    flops._get_raw = True  # type: ignore[attr-defined]
    return flops


def _difference(total: int, second: int | None, by_op: dict[str, int], by_second: dict[str, int]) -> str:
    if second is None or abs(total - second) <= TOLERANCE * max(total, second):
        return ""
    gaps = {op: by_op.get(op, 0) - by_second.get(op, 0) for op in by_op.keys() | by_second.keys()}
    worst = sorted((op for op in gaps if gaps[op]), key=lambda op: -abs(gaps[op]))[:4]
    parts = ", ".join(f"{op} {gaps[op]:+,}" for op in worst)
    share = 100 * abs(total - second) / max(total, second)
    return f"the counters differ by {share:.1f} %: ours {total:,}, PyTorch's {second:,} ({parts})"


# --- shared -------------------------------------------------------------------------------------------------


def _name(packet: Any) -> str:
    return str(packet).removeprefix("aten.")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """No gradient, evaluation mode, and nothing that hides what it computes.

    Off are PyTorch's whole-layer kernels, and the compilation that FlexAttention does of itself, which cannot
    run below a counter (the switch is PyTorch's own, for debugging).
    """
    from torch.nn.attention import flex_attention as flex

    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    plain = getattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", None)
    torch.backends.mha.set_fastpath_enabled(False)
    if plain is not None:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if plain is not None:
            flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = plain
        for module, training in flags.items():
            module.training = training
