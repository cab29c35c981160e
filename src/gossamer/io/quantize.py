"""Post-training quantisation of an ONNX file to int8, in the forms that x86 integer kernels run fast.

- activations are unsigned and weights signed bytes, one scale for each output channel of a weight
- "dynamic": matrix products with constant weights, their input scaled as it comes; needs no calibration, and is
  the fastest and most exact form for transformers on a CPU with VNNI
- "static": those and convolutions, with ranges from calibration data; a product gives floats, as its neighbours
  (norms, activations) want them, and a run of convolutions stays in integers, additions and pools included
- "mixed": convolutions static, products dynamic, for networks that have both
- tables that are looked up (words) become int8 with one scale a row, in every form
- products of two activations (attention) stay in floats: they are short of work and lose most

Whether it pays is for the caller to measure: narrow layers can be slower than in floats.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .files import atomic_path
from .onnx import onnx_session

Batch = Mapping[str, np.ndarray]

LEAST_TABLE = 2**14  # entries of a table that is worth shortening
_PRODUCTS = ("MatMul", "Gemm")
# Operations that have an integer form and join a run of convolutions.
_CONVOLUTION_RUN = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")


def quantize_onnx(
    path_in: str | Path,
    path_out: str | Path,
    calibration_batches: Iterable[Batch] = (),
    *,
    mode: str = "static",
    exclude: Sequence[str] = (),
    per_channel: bool = True,
) -> list[str]:
    """Write an int8 form of an ONNX file, and return the names of the layers that were quantised.

    Args:
        path_in: a file in floats.
        path_out: the new file; written atomically.
        calibration_batches: inputs by name, for the ranges of "static" and "mixed"; a hundred samples do. Split
            where the file has a fixed batch.
        mode: see the head of this file.
        exclude: layers to leave in floats, by the names that `sensitivity` gives.
        per_channel: one scale for each output channel of a weight, else one for each weight.

    Raises:
        ValueError: an unknown mode or name, no calibration data where it is needed, or nothing to quantise.
    """
    if mode not in ("static", "dynamic", "mixed"):
        raise ValueError(f"mode must be 'static', 'dynamic' or 'mixed', got {mode!r}")
    with _workshop(path_in) as prepared:
        layers = _layers(prepared)
        unknown = set(exclude) - set(layers)
        if unknown:
            raise ValueError(f"exclude names layers that are not there: {sorted(unknown)}; there are {list(layers)}")
        chosen = [name for name in layers if name not in exclude]
        if mode == "dynamic":
            chosen = [name for name in chosen if layers[name] in _PRODUCTS]
        if not chosen:
            raise ValueError(f"{path_in} has no layer to quantise in mode {mode!r}")
        _write(prepared, path_out, list(calibration_batches), mode, chosen, per_channel)
        return [name for name in chosen if name not in _in_floats(Path(path_out))]


def sensitivity(
    path: str | Path,
    batches: Iterable[Batch],
    evaluate: Callable[[Any], float] | None = None,
    *,
    mode: str = "static",
    per_channel: bool = True,
) -> dict[str, float]:
    """What each layer costs when it alone is quantised, worst first.

    Args:
        path: a file in floats.
        batches: a few inputs, for calibration and comparison.
        evaluate: score of an ONNX Runtime session, higher is better; the cost is then the loss of score. None:
            the cost is the root of the mean squared change of the outputs, as a share of their deviation.
        mode, per_channel: as in `quantize_onnx`.
    """
    data = list(batches)
    if not data:
        raise ValueError("batches must hold at least one batch, got none")
    costs: dict[str, float] = {}
    with _workshop(path) as prepared:
        layers = _layers(prepared)
        before = onnx_session(prepared)
        data = list(_fitting(data, before))
        outputs = [before.run(None, dict(batch)) for batch in data]
        score = evaluate(before) if evaluate else 0.0
        for name, kind in layers.items():
            if mode == "dynamic" and kind not in _PRODUCTS:
                continue
            alone = prepared.with_name("alone.onnx")
            _write(prepared, alone, data, mode, [name], per_channel, whole_runs=False)
            session = onnx_session(alone)
            if evaluate:
                costs[name] = score - evaluate(session)
            else:
                costs[name] = _change(outputs, [session.run(None, dict(batch)) for batch in data])
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def _change(before: list[list[np.ndarray]], after: list[list[np.ndarray]]) -> float:
    """Largest over the outputs of rms(after - before) / deviation(before)."""
    shares = []
    for b, a in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        reference, other = (np.concatenate([x.ravel() for x in xs]).astype(np.float64) for xs in (b, a))
        deviation = float(reference.std()) or float(np.abs(reference).mean()) or 1.0
        shares.append(float(np.sqrt(np.mean((other - reference) ** 2))) / deviation)
    return max(shares)


def _write(
    prepared: Path,
    out: str | Path,
    data: list[Batch],
    mode: str,
    chosen: list[str],
    per_channel: bool,
    *,
    whole_runs: bool = True,
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    layers = _layers(prepared)
    products = [name for name in chosen if layers[name] in _PRODUCTS]
    static = chosen if mode == "static" else [name for name in chosen if name not in products]
    if mode == "dynamic":
        static = []
    dynamic = products if mode != "static" else []
    with atomic_path(out) as temporary, _silence():
        source = prepared
        if static:
            reader = _Reader(data, prepared)
            if not data:
                raise ValueError(f"calibration_batches must hold data for mode {mode!r}, got none")
            target = prepared.with_name("static.onnx") if dynamic else temporary
            quantize_static(
                source,
                target,
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                op_types_to_quantize=["Conv", *_PRODUCTS, *(_CONVOLUTION_RUN if whole_runs else ())],
                nodes_to_quantize=static + (_runs(prepared, static) if whole_runs else []),
                extra_options={"OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
            )
            source = target
        if dynamic:
            quantize_dynamic(
                source,
                temporary,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                op_types_to_quantize=list(_PRODUCTS),
                # A Gemm is taken apart first, and its product named so.
                nodes_to_quantize=dynamic + [name + "_MatMul" for name in dynamic],
            )
        _shorten_tables(temporary)


def _shorten_tables(path: Path) -> None:
    """Tables that are only looked up (words), one scale a row: `row = scale_i * int8_i`. A quarter of the size."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if table is None or axis or len(table.dims) != 2 or len(readers[table.name]) > 1:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(table)
        if values.size < LEAST_TABLE:
            nodes.append(node)
            continue
        scale = np.maximum(np.abs(values).max(1, keepdims=True), 1e-12) / 127
        name = table.name
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(np.round(values / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
        inner, gain, rows = (f"{node.output[0]}_{part}" for part in ("row_int8", "row_scale", "row_float"))
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [inner], axis=0),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [gain], axis=0),
            helper.make_node("Cast", [inner], [rows], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [rows, gain], list(node.output)),
        ]
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
        onnx.save(model, path)


def _layers(path: Path) -> dict[str, str]:
    """Name and type of the nodes that have a weight of their own: convolutions and constant products.

    A product with a vector is none: ONNX Runtime writes it with a scale that it cannot run.
    """
    graph = _graph(path)
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    constants |= {
        node.output[0]
        for node in graph.node
        if node.op_type == "Constant" and any(len(a.t.dims) > 1 for a in node.attribute if a.name == "value")
    }
    return {
        node.name: node.op_type
        for node in graph.node
        if node.op_type in ("Conv", *_PRODUCTS) and node.input[1] in constants
    }


def _in_floats(path: Path) -> set[str]:
    """Names of the layers of a file whose weight is not an integer one."""
    graph = _graph(path)
    integers = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        name
        for node in graph.node
        if node.op_type in ("Conv", *_PRODUCTS) and node.input[1] not in integers
        for name in (node.name, node.name.removesuffix("_MatMul"))
    }


def _runs(path: Path, chosen: list[str]) -> list[str]:
    """Nodes that only read quantised convolutions, or each other, and can stay in integers with them."""
    inside: set[str] = set()  # tensors
    run = []
    for node in _graph(path).node:  # in topological order
        joins = node.op_type in _CONVOLUTION_RUN and all(
            name in inside for name in (node.input if node.op_type == "Add" else node.input[:1])
        )
        if joins:
            run.append(node.name)
        if joins or (node.op_type == "Conv" and node.name in chosen):
            inside.update(node.output)
    return run


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path).graph


@contextmanager
def _workshop(path: str | Path) -> Iterator[Path]:
    """A folder with the prepared form of a file: shapes inferred, normalisation folded, every node named."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        with _silence():
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        # The folding turns some weights round and leaves their old shapes behind, which contradict them.
        del model.graph.value_info[:]
        taken = {node.name for node in model.graph.node}
        for number, node in enumerate(model.graph.node):
            if not node.name:
                node.name = next(
                    name
                    for name in (f"{node.op_type}_{i}" for i in range(number, number + len(taken) + 1))
                    if name not in taken
                )
                taken.add(node.name)
        onnx.save(model, prepared)
        yield prepared


class _Reader:
    """Batches one by one, as ONNX Runtime's calibration reads them."""

    def __init__(self, data: list[Batch], path: Path) -> None:
        self.batches = _fitting(data, onnx_session(path))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.batches

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.batches)


def _fitting(data: Sequence[Batch], session: Any) -> Iterator[dict[str, np.ndarray]]:
    """The batches, cut where the file has a fixed batch; a remainder that does not fill one is left out."""
    fixed = [node.shape[0] for node in session.get_inputs() if node.shape and isinstance(node.shape[0], int)]
    names = {node.name for node in session.get_inputs()}
    for batch in data:
        missing = names - set(batch)
        if missing:
            raise ValueError(f"calibration_batches must name every input; missing {sorted(missing)}")
        size = len(next(iter(batch.values())))
        step = fixed[0] if fixed else size
        for start in range(0, size - step + 1, step):
            yield {name: np.ascontiguousarray(batch[name][start : start + step]) for name in names}


@contextmanager
def _silence() -> Iterator[None]:
    """ONNX Runtime's tools log through the root logger, which installs a handler there if there is none.

    They also work out scales of tensors that stay as they are, and masked scores reach to minus infinity.
    """
    root = logging.getLogger()
    guard = logging.NullHandler()
    level = root.level
    root.addHandler(guard)
    root.setLevel(logging.ERROR)
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(guard)
