"""ONNX files that calculate with integers alone: written from symbols, and checked by walking them.

- a `Symbol` stands for an integer tensor and has a tensor's operators; each writes an ONNX node. What is written with
  operators for tensors is thereby written for ONNX too
- matrix products are `MatMulInteger`, in 8 bits; a factor of 16 bits without sign is taken as two bytes
- shifts of what may be negative add a large power of two first, because ONNX shifts unsigned integers only
- `float_operators` lists what a file does with floats between its quantised input and its dequantised output
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomic_path

_OPSET = 20
_IR = 10
_BIG = 2**62
Size = int | str


def float_operators(path: str | Path) -> list[str]:
    """Nodes of an ONNX file that read or write floats, or types that cannot be told, as `operator: tensor`.

    Left out are a `QuantizeLinear` that reads an input of the file, and a `DequantizeLinear` that writes an output:
    between them, an integer-only file has none.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    graph = model.graph
    inputs, outputs = {x.name for x in graph.input}, {x.name for x in graph.output}
    found: list[str] = []

    def walk(graph: Any, outer: dict[str, int]) -> None:
        types = dict(outer)
        types |= {t.name: t.data_type for t in graph.initializer}
        types |= {t.values.name: t.values.data_type for t in graph.sparse_initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            types[value.name] = value.type.tensor_type.elem_type
        for node in graph.node:
            border = (node.op_type == "QuantizeLinear" and node.input[0] in inputs) or (
                node.op_type == "DequantizeLinear" and node.output[0] in outputs
            )
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    walk(inner, types)
            if border:
                continue
            for name in (*node.input, *node.output):
                if name and _is_float(types.get(name, 0)):
                    found.append(f"{node.op_type}: {name}")
                    break

    walk(graph, {})
    return found


def _is_float(kind: int) -> bool:
    """Whether values of an ONNX type are not integers or truth values; a type that is not known counts."""
    from onnx import TensorProto as T

    integers = (T.INT8, T.UINT8, T.INT16, T.UINT16, T.INT32, T.UINT32, T.INT64, T.UINT64, T.BOOL)
    return kind not in integers


class IntegerGraph:
    """An ONNX graph that is being written."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self._known: dict[tuple[int, torch.dtype], str] = {}

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[Size]) -> Symbol:
        """An input of the file."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, _kind(dtype), list(shape)))
        return Symbol(self, name, dtype, tuple(shape))

    def constant(self, value: Tensor | int, dtype: torch.dtype) -> str:
        """Name of a constant tensor."""
        from onnx import numpy_helper

        if isinstance(value, int):
            if (value, dtype) in self._known:
                return self._known[value, dtype]
            self._known[value, dtype] = f"c{len(self.constants)}"
        array = torch.as_tensor(value).detach().cpu().to(dtype).contiguous().numpy()
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node of one output, and gives its name."""
        from onnx import helper

        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}_{len(self.nodes)}", **attributes))
        return name

    def quantise(self, x: Symbol, scale: Tensor) -> Symbol:
        """`clamp(round(x / scale))` in int8: the one step from floats to integers."""
        zero = self.constant(0, torch.int8)
        name = self.node("QuantizeLinear", [x.name, self.constant(scale, torch.float32), zero])
        return Symbol(self, name, torch.int8, x.shape)

    def save(self, path: str | Path, output: Symbol, scale: Tensor, *, name: str = "output") -> None:
        """Writes the file, atomically: its output is `scale * output`."""
        import onnx
        from onnx import helper

        last = output.to(torch.int32)
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", [last.name, self.constant(scale, torch.float32)], [name], name="DequantizeLinear"
            )
        )
        value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(output.shape))
        graph = helper.make_graph(self.nodes, "integers", self.inputs, [value], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        onnx.checker.check_model(model)
        with atomic_path(path) as temporary:
            onnx.save(model, temporary)


class Symbol:
    """An integer tensor of a graph that is being written, with the operators of a tensor.

    Args:
        shape: sizes; names for those that are free (the batch, in front).
        positive: it is known to have no negative entry.
    """

    def __init__(
        self, graph: IntegerGraph, name: str, dtype: torch.dtype, shape: tuple[Size, ...], positive: bool = False
    ) -> None:
        self.graph = graph
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.positive = positive

    @property
    def ndim(self) -> int:
        return len(self.shape)

    # --- arithmetic

    def _binary(self, kind: str, other: Any, *, turned: bool = False, dtype: torch.dtype | None = None) -> Symbol:
        if isinstance(other, Symbol):
            if other.dtype != self.dtype:
                raise TypeError(f"{kind} of {self.dtype} and {other.dtype}; convert one")
            name, shape = other.name, other.shape
        else:
            name, shape = self.graph.constant(other, self.dtype), tuple(getattr(other, "shape", ()))
        names = [name, self.name] if turned else [self.name, name]
        positive = self.positive and _positive(other) and kind in ("Add", "Mul", "Div")
        out = self.graph.node(kind, names)
        return Symbol(self.graph, out, dtype or self.dtype, _broadcast(self.shape, shape), positive)

    def __add__(self, other: Any) -> Symbol:
        return self._binary("Add", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._binary("Sub", other)

    def __rsub__(self, other: Any) -> Symbol:
        return self._binary("Sub", other, turned=True)

    def __mul__(self, other: Any) -> Symbol:
        return self._binary("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> Symbol:
        _check_dividend(self.positive and _positive(other))
        return self._binary("Div", other)

    def __rfloordiv__(self, other: Any) -> Symbol:
        _check_dividend(self.positive and _positive(other))
        return self._binary("Div", other, turned=True)

    def __rshift__(self, other: Any) -> Symbol:
        x = self if self.positive else self + _BIG
        if isinstance(other, Symbol):
            bits, shape = other.to(torch.uint64).name, other.shape
        else:
            value = torch.as_tensor(other)
            bits, shape = self.graph.constant(value, torch.uint64), tuple(value.shape)
        out = self.graph.node("BitShift", [x.to(torch.uint64).name, bits], direction="RIGHT")
        y = Symbol(self.graph, out, torch.uint64, _broadcast(self.shape, shape), True).to(torch.int64)
        if self.positive:
            return y
        if isinstance(other, Symbol):
            high = self.graph.node("BitShift", [self.graph.constant(_BIG, torch.uint64), bits], direction="RIGHT")
            return y - Symbol(self.graph, high, torch.uint64, shape, True).to(torch.int64)
        return y - (torch.tensor(_BIG) >> torch.as_tensor(other))

    def __ge__(self, other: Any) -> Symbol:
        """0 or 1, of numbers below 2^61."""
        # Not by GreaterOrEqual: see `clamp`.
        return (self - other + _BIG).known_positive() >> 62

    def __gt__(self, other: Any) -> Symbol:
        return (self - other) >= 1

    def __lt__(self, other: Any) -> Symbol:
        return (other - self) >= 1

    def known_positive(self) -> Symbol:
        """The same, of which it is known that nothing is below 0."""
        return Symbol(self.graph, self.name, self.dtype, self.shape, True)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        same = self._binary("Equal", other, dtype=torch.bool)
        return Symbol(self.graph, self.graph.node("Not", [same.name]), torch.bool, same.shape)

    __hash__ = None  # type: ignore[assignment]

    def __matmul__(self, other: Any) -> Symbol:
        if not isinstance(other, Symbol):
            shape = tuple(other.shape)
            other = Symbol(self.graph, self.graph.constant(other, torch.int8), torch.int8, shape)
        if self.dtype == torch.int8:
            return self._product(self.name, other)
        # 16 bits without sign are two bytes: 256 high + low.
        high = self >> 8
        low = self - high * 256
        first, second = (self._product(part.to(torch.uint8).name, other) for part in (high, low))
        return first * 256 + second

    def _product(self, name: str, other: Symbol) -> Symbol:
        out = self.graph.node("MatMulInteger", [name, other.name])
        shape = (*_broadcast(self.shape[:-2], other.shape[:-2]), self.shape[-2], other.shape[-1])
        return Symbol(self.graph, out, torch.int32, shape)

    def clamp(self, min: int | None = None, max: int | None = None) -> Symbol:
        """Within bounds; of numbers between -2^31 and 2^31."""
        # For numbers below 2^31: the vectorised comparisons of int64 in ONNX Runtime 1.31 take what has bit 31 for
        # negative, those of Clip, Max and Min among them. Max and Min have no form for int8.
        x = self.to(torch.int32) if self.dtype == torch.int8 else self
        name = x.name
        for kind, bound in (("Max", min), ("Min", max)):
            if bound is not None:
                name = self.graph.node(kind, [name, self.graph.constant(int(bound), x.dtype)])
        positive = self.positive or (min is not None and min >= 0)
        return Symbol(self.graph, name, x.dtype, self.shape, positive).to(self.dtype)

    def to(self, dtype: torch.dtype) -> Symbol:
        if dtype == self.dtype:
            return self
        out = self.graph.node("Cast", [self.name], to=_kind(dtype))
        positive = self.positive or self.dtype == torch.bool or self.dtype in (torch.uint8, torch.uint64)
        return Symbol(self.graph, out, dtype, self.shape, positive)

    # --- along axes

    def _reduce(self, kind: str, dim: int, keepdim: bool) -> Symbol:
        dim %= self.ndim
        axes = self.graph.constant(torch.tensor([dim]), torch.int64)
        out = self.graph.node(kind, [self.name, axes], keepdims=int(keepdim))
        shape = (*self.shape[:dim], *([1] if keepdim else []), *self.shape[dim + 1 :])
        return Symbol(self.graph, out, self.dtype, shape, self.positive)

    def sum(self, dim: int, keepdim: bool = False) -> Symbol:
        return self._reduce("ReduceSum", dim, keepdim)

    def amax(self, dim: int, keepdim: bool = False) -> Symbol:
        return self._reduce("ReduceMax", dim, keepdim)

    def rows(self, table: Tensor) -> Symbol:
        """Rows of a constant table, one for each entry."""
        out = self.graph.node("Gather", [self.graph.constant(table, table.dtype), self.name], axis=0)
        return Symbol(self.graph, out, table.dtype, (*self.shape, *table.shape[1:]), bool((table >= 0).all()))

    def select(self, dim: int, index: int) -> Symbol:
        dim %= self.ndim
        out = self.graph.node("Gather", [self.name, self.graph.constant(index, torch.int64)], axis=dim)
        return Symbol(self.graph, out, self.dtype, (*self.shape[:dim], *self.shape[dim + 1 :]), self.positive)

    def permute(self, *axes: int) -> Symbol:
        out = self.graph.node("Transpose", [self.name], perm=list(axes))
        return Symbol(self.graph, out, self.dtype, tuple(self.shape[axis] for axis in axes), self.positive)

    def transpose(self, first: int, second: int) -> Symbol:
        axes = list(range(self.ndim))
        axes[first], axes[second] = axes[second], axes[first]
        return self.permute(*axes)

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Symbol:
        dim %= self.ndim
        whole, rest = self.shape[dim], list(sizes)
        if -1 in rest:
            if not isinstance(whole, int):
                raise TypeError(f"axis {dim} has no known size")
            rest[rest.index(-1)] = whole // -math.prod(rest)
        return self._reshape((*self.shape[:dim], *rest, *self.shape[dim + 1 :]))

    def flatten(self, start: int, end: int = -1) -> Symbol:
        start, end = start % self.ndim, end % self.ndim
        joined = math.prod(int(size) for size in self.shape[start : end + 1])
        return self._reshape((*self.shape[:start], joined, *self.shape[end + 1 :]))

    def _reshape(self, shape: tuple[Size, ...]) -> Symbol:
        # A free size stays where it is, which ONNX writes as 0.
        sizes = torch.tensor([0 if isinstance(size, str) else size for size in shape])
        out = self.graph.node("Reshape", [self.name, self.graph.constant(sizes, torch.int64)])
        return Symbol(self.graph, out, self.dtype, shape, self.positive)

    def pad_front(self, count: int) -> Symbol:
        """`count` zero rows ahead of the last axis but one."""
        return self._pad([*[0] * (self.ndim - 2), count, 0], [0] * self.ndim)

    def pad_end(self, below: int, right: int) -> Symbol:
        """Zero rows below and columns to the right, on the last two axes."""
        return self._pad([0] * self.ndim, [*[0] * (self.ndim - 2), below, right])

    def _pad(self, before: list[int], after: list[int]) -> Symbol:
        pads = self.graph.constant(torch.tensor(before + after), torch.int64)
        out = self.graph.node("Pad", [self.name, pads])
        shape = tuple(
            size if isinstance(size, str) else size + a + b
            for size, a, b in zip(self.shape, before, after, strict=True)
        )
        return Symbol(self.graph, out, self.dtype, shape, self.positive)


def _positive(x: Any) -> bool:
    if isinstance(x, Symbol):
        return x.positive
    return bool((x >= 0).all()) if isinstance(x, Tensor) else x >= 0


def _check_dividend(positive: bool) -> None:
    # ONNX divides towards zero, a floor is wanted: below zero the two differ.
    if not positive:
        raise ValueError("a division needs dividend and divisor that are known to be positive; clamp them first")


def _broadcast(a: Sequence[Size], b: Sequence[Size]) -> tuple[Size, ...]:
    length = max(len(a), len(b))
    pairs = zip((*[1] * (length - len(a)), *a), (*[1] * (length - len(b)), *b), strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


def _kind(dtype: torch.dtype) -> int:
    from onnx import TensorProto as T

    return {
        torch.int8: T.INT8,
        torch.uint8: T.UINT8,
        torch.int16: T.INT16,
        torch.int32: T.INT32,
        torch.int64: T.INT64,
        torch.uint64: T.UINT64,
        torch.bool: T.BOOL,
        torch.float32: T.FLOAT,
    }[dtype]
