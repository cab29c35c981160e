"""Sizes that an ONNX file counts at every call, written into it as far as they are the same at every batch size.

A traced `x.view(x.shape[0], n, h, d)` becomes half a dozen operators that count what never changes. On a small model
they take as long as its products.

- sizes are read at two batch sizes: those that agree are constants; of a shape, the one entry that does not is left to
  the runtime (-1)
- what only counted is dropped, and so is padding by nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Inputs of operators that are sizes.
_SIZES = {"Reshape": (1,), "Expand": (1,), "Pad": (1,), "Slice": (1, 2), "Tile": (1,), "ConstantOfShape": (0,)}


def fix_sizes(path: Path, feeds: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]) -> None:
    """Rewrites the file at `path`, whose inputs at two batch sizes are `feeds`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    given = {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    given |= {node.name for node in graph.input} | {""}
    places = [
        (node, i)
        for node in graph.node
        for i in _SIZES.get(node.op_type, ())
        if i < len(node.input) and node.input[i] not in given
    ]
    if not places:
        return
    # What a reshape gives, where it asks for "the same" (0) or "the rest" (-1).
    asked = {node.output[0] if node.op_type == "Reshape" else node.input[i] for node, i in places}
    first, second = (_values(model, sorted(asked), feed) for feed in feeds)
    for node, i in places:
        if node.op_type == "Reshape":
            a, b = (np.array(values[node.output[0]].shape, np.int64) for values in (first, second))
            known = len(a) == len(b) and int((a != b).sum()) <= 1 and 0 not in a
            new = np.where(a == b, a, -1) if known else None
        else:
            a, b = first[node.input[i]], second[node.input[i]]
            new = a if np.array_equal(a, b) else None
        if new is not None:
            node.input[i] = f"{node.output[0]}_size_{i}"
            graph.initializer.append(numpy_helper.from_array(new, node.input[i]))
            if node.op_type == "Pad" and not new.any():
                node.op_type = "Identity"
                del node.input[1:], node.attribute[:]
    _drop_unread(graph)
    onnx.save(model, path)


def _values(model: Any, names: list[str], feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inner values of a graph for a feed."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    shown = {out.name for out in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}
    found = session.run(names, {k: v for k, v in feed.items() if k in used})
    return dict(zip(names, found, strict=True))


def _drop_unread(graph: Any) -> None:
    """Takes out operators and constants whose outputs nothing reads."""
    while True:
        read = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
        inner = [a.g for node in graph.node for a in node.attribute] + [
            g for node in graph.node for a in node.attribute for g in a.graphs
        ]
        if any(g.node for g in inner):
            return  # a branch or a loop may read what lies outside it
        unread = [i for i, node in enumerate(graph.node) if not any(name in read for name in node.output)]
        if not unread:
            break
        for i in reversed(unread):
            del graph.node[i]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in read:
            del graph.initializer[i]
