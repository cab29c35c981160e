"""Export to ONNX, with a certificate of what the file was seen to do.

- the file is run by ONNX Runtime at the exported shape and at a second one, and compared with the module
- a dynamic form that cannot be had falls back, size to batch to static, and the certificate says why
- `exporter="fast"` traces by TorchScript, some twenty times quicker than `torch.export` on small networks, and
  the certificate holds it to the same comparison; what it cannot trace goes the other way
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import atomic_path
from .onnx_sizes import fix_sizes

# Protocol buffers end at 2 GiB; a little is left for the graph itself.
_MOST_BYTES = 2**31 - 2**24
_OPSET = 20
_LOG = "_jit_is_onnx_log_enabled"


@dataclass(frozen=True)
class Certificate:
    """What an exported file was seen to do.

    Attributes:
        passed: it ran at both shapes, and agreed with the module within `tolerance`.
        path, size_mb, opset, exporter, seconds: the file, and how it was made.
        requested, held: the dynamic form that was asked for, and the one the file has.
        shapes: input shapes it was run at.
        max_abs, max_rel: largest difference from the module over all outputs and shapes; the relative one is
            against the largest entry of the output.
        reason: why `held` is less than `requested`, why another exporter was used, or why it did not pass.
        warnings: what the exporter warned of.
        versions: torch and onnxruntime.
    """

    passed: bool
    path: str
    size_mb: float
    opset: int
    exporter: str
    seconds: float
    requested: str | None
    held: str | None
    shapes: list[list[list[int]]]
    max_abs: float
    max_rel: float
    tolerance: float
    reason: str
    warnings: list[str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: str | None = "batch",
    second_inputs: Tensor | tuple[Tensor, ...] | None = None,
    real_inputs: Tensor | tuple[Tensor, ...] | None = None,
    tolerance: float | int = 1e-4,
    exporter: str = "dynamo",
) -> Certificate:
    """Write `model` in evaluation mode to one ONNX file and certify it.

    Args:
        model: a module of tensors in, one tensor or several out.
        inputs: example of each input, batch first.
        path: the file; written atomically, and not at all if the model cannot be exported.
        input_names, output_names: names in the file; "input" and "output", numbered where there are several.
        dynamic: "batch": the first axis of every input is free. "size": so are the axes in which `inputs` and
            `second_inputs` differ (height and width of images, length of sequences). None: all fixed.
        second_inputs: another shape to run the file at; made from `inputs` if None.
        real_inputs: data for the comparison at the first shape, where random inputs would flatter.
        tolerance: largest allowed difference, relative to the largest entry of the output or to 1 below that.
        exporter: "dynamo" (`torch.export`) or "fast" (TorchScript tracing, with "dynamo" behind it). A model with a
            `write_onnx(inputs, path, input_name=)` of its own is written by that.

    Raises:
        ValueError: weights above 2 GB, or no form of the model could be exported.
    """
    first = _tuple(inputs)
    names_in = list(input_names or _numbered("input", len(first)))
    if len(names_in) != len(first):
        raise ValueError(f"input_names must name {len(first)} inputs, got {names_in}")
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    if weights > _MOST_BYTES:
        raise ValueError(f"one ONNX file holds less than 2 GB, the weights are {weights:,} bytes")

    start = time.perf_counter()
    path = Path(path)
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            outputs = _leaves(model(*first))
            names_out = list(output_names or _numbered("output", len(outputs)))
            reasons: list[str] = []
            doubtful: Certificate | None = None
            with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
                own = hasattr(model, "write_onnx")
                for held, kind in [(dynamic, "own")] if own else _attempts(dynamic, exporter):
                    second = _second(first, second_inputs, held)
                    heard: list[str] = []
                    candidate = Path(folder) / "candidate.onnx"
                    try:
                        model(*second)
                    except Exception as error:  # bound to its size: no exporter can help
                        reasons.append(f"{held or 'static'}: the module itself refuses it: {_first_line(error)}")
                        continue
                    try:
                        with _quiet(heard):
                            _WRITERS[kind](model, first, second, candidate, names_in, names_out, held)
                        if held == "batch" and kind != "own":
                            fix_sizes(candidate, (_feed(names_in, first), _feed(names_in, second)))
                        result = _compare(model, candidate, names_in, [first, second, real_inputs], held, tolerance)
                    except Exception as error:  # an exporter may fail in any way its many parts do
                        reasons.append(f"{kind}, {held or 'static'}: {_first_line(error)}")
                        continue
                    if result.wrong:
                        reasons.append(f"{kind}, {held or 'static'}: {result.wrong}")
                        if doubtful is not None:
                            continue
                    certificate = Certificate(
                        passed=not result.wrong,
                        path=str(path),
                        size_mb=candidate.stat().st_size / 1e6,
                        opset=result.opset,
                        exporter=kind,
                        seconds=time.perf_counter() - start,
                        requested=dynamic,
                        held=held,
                        shapes=result.shapes,
                        max_abs=result.max_abs,
                        max_rel=result.max_rel,
                        tolerance=float(tolerance),
                        reason="; ".join(dict.fromkeys(reasons)),
                        warnings=heard,
                        versions=_versions(),
                    )
                    if certificate.passed:
                        _move(candidate, path)
                        return certificate
                    # Kept in case nothing better comes: what is asked for most, and differs.
                    doubtful = certificate
                    candidate.replace(candidate.with_name("doubtful.onnx"))
                if doubtful is not None:
                    _move(Path(folder) / "doubtful.onnx", path)
                    reason = "; ".join(dict.fromkeys(reasons))
                    return replace(doubtful, reason=reason, seconds=time.perf_counter() - start)
    finally:
        for module, training in flags.items():
            module.training = training
    raise ValueError(f"{type(model).__name__} could not be exported to ONNX: {'; '.join(dict.fromkeys(reasons))}")


def onnx_session(path: str | Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, all graph optimisations on.

    Args:
        path: the file.
        threads: threads inside an operation; PyTorch's number if None, so that figures compare.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, it need not be printed too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own kinds of errors have no common base
        raise ValueError(f"{path} is no ONNX file that can be run: {_first_line(error)}") from error


def onnx_callable(session: Any, inputs: Tensor | np.ndarray | Sequence[Tensor | np.ndarray]) -> Callable[[], Any]:
    """A callable that runs `session` on `inputs` once, for measuring; the inputs are converted beforehand."""
    several = [inputs] if isinstance(inputs, Tensor | np.ndarray) else inputs
    arrays = [np.ascontiguousarray(_array(x)) for x in several]
    feed = dict(zip((node.name for node in session.get_inputs()), arrays, strict=True))
    return lambda: session.run(None, feed)


# --- the two exporters ----------------------------------------------------------------------------------------


def _by_dynamo(
    model: nn.Module,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    path: Path,
    names_in: list[str],
    names_out: list[str],
    held: str | None,
) -> None:
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = None
    if held is not None:
        shapes = tuple(
            {axis: batch if axis == 0 else torch.export.Dim.DYNAMIC for axis in axes}
            for axes in _free_axes(first, second, held)
        )
        # A batch of 1 would be taken for a constant.
        first = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in first)
    with _rules_of_linear_time():
        torch.onnx.export(
            model,
            first,
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names_in,
            output_names=names_out,
            external_data=False,
            optimize=True,
            verbose=False,
        )


@contextmanager
def _rules_of_linear_time() -> Iterator[None]:
    """Leaves out one rule of the exporter's clean-up, which goes through the whole graph again for each of its nodes.

    It turns two slices into a split; on 2,000 nodes it takes half of the time of an export.
    """
    from onnxscript import rewriter

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is None:  # another version
        yield
        return
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


def _by_tracing(
    model: nn.Module,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    path: Path,
    names_in: list[str],
    names_out: list[str],
    held: str | None,
) -> None:
    axes: dict[str, dict[int, str]] = {}
    if held is not None:
        for name, free in zip(names_in, _free_axes(first, second, held), strict=True):
            axes[name] = {axis: "batch" if axis == 0 else f"{name}_{axis}" for axis in free}
        axes |= {name: {0: "batch"} for name in names_out}
    torch.onnx.register_custom_op_symbolic("aten::movedim", _movedim, _OPSET)
    try:
        torch.onnx.export(
            model,
            first,
            str(path),
            dynamo=False,
            dynamic_axes=axes or None,
            input_names=names_in,
            output_names=names_out,
            opset_version=_OPSET,
            verbose=False,
        )
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::movedim", _OPSET)


def _movedim(g: Any, x: Any, source: Any, destination: Any) -> Any:
    """A transposition. The tracer's own form writes negative axes into the file, where they mean nothing."""
    rank = x.type().dim()
    ends = [[int(i) % rank for i in value.node().t("value").reshape(-1)] for value in (source, destination)]
    moved = dict(zip(ends[1], ends[0], strict=True))
    rest = (axis for axis in range(rank) if axis not in ends[0])
    return g.op("Transpose", x, perm_i=[moved[axis] if axis in moved else next(rest) for axis in range(rank)])


def _by_itself(
    model: Any, first: Any, second: Any, path: Path, names_in: list[str], names_out: list[str], held: str | None
) -> None:
    model.write_onnx(first, path, input_name=names_in[0])


_WRITERS = {"own": _by_itself, "dynamo": _by_dynamo, "fast": _by_tracing}


def _attempts(dynamic: str | None, exporter: str) -> list[tuple[str | None, str]]:
    """From what was asked for down to what every model can have."""
    forms: dict[str | None, list[str | None]] = {
        "size": ["size", "batch", None],
        "batch": ["batch", None],
        None: [None],
    }
    if dynamic not in forms or exporter not in _WRITERS:
        raise ValueError(
            f"dynamic must be 'batch', 'size' or None and exporter 'dynamo' or 'fast', got {dynamic!r}, {exporter!r}"
        )
    kinds = ["fast", "dynamo"] if exporter == "fast" else ["dynamo"]
    return [(form, kind) for form in forms[dynamic] for kind in kinds]


def _free_axes(first: tuple[Tensor, ...], second: tuple[Tensor, ...], held: str) -> list[list[int]]:
    if held == "batch":
        return [[0] for _ in first]
    return [
        [0, *(axis for axis in range(1, a.ndim) if a.shape[axis] != b.shape[axis])]
        for a, b in zip(first, second, strict=True)
    ]


def _second(
    first: tuple[Tensor, ...], given: Tensor | tuple[Tensor, ...] | None, held: str | None
) -> tuple[Tensor, ...]:
    """Inputs of another shape, as far as the form allows one, and in any case of other values.

    A tracer that has taken a value for a constant is not found out by running the same values again.
    """
    if held is None:
        return tuple(x.flip(-1) for x in first)
    if held == "batch":
        if given is not None and all(a.shape[1:] == b.shape[1:] for a, b in zip(first, _tuple(given), strict=True)):
            return _tuple(given)
        return tuple(torch.cat([x.flip(-1), x.flip(min(1, x.ndim - 1)), x]) for x in first)
    return _tuple(given) if given is not None else tuple(_resized(x) for x in first)


def _resized(x: Tensor) -> Tensor:
    """Images of double size, which every patch and window that divides the size divides too; half a sequence."""
    if x.ndim == 4:
        return x.repeat(1, 1, 2, 2)
    return x[:, : x.shape[1] // 2] if x.ndim > 1 else x


# --- the comparison -------------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    wrong: str
    opset: int
    shapes: list[list[list[int]]]
    max_abs: float
    max_rel: float


def _compare(
    model: nn.Module,
    path: Path,
    names: list[str],
    cases: list[Any],
    held: str | None,
    tolerance: float,
) -> _Comparison:
    import onnx

    opset = max(
        o.version for o in onnx.load(path, load_external_data=False).opset_import if o.domain in ("", "ai.onnx")
    )
    session = onnx_session(path)
    used = {node.name for node in session.get_inputs()}
    shapes, max_abs, max_rel, wrong = [], 0.0, 0.0, ""
    first, second, real = cases
    if real is not None and (held is not None or [x.shape for x in _tuple(real)] == [x.shape for x in first]):
        first = _tuple(real)
    for args in (first, second):
        shapes.append([list(x.shape) for x in args])
        # An input that the model does not read is not in the file.
        feed = {name: x for name, x in _feed(names, args).items() if name in used}
        theirs = session.run(None, feed)
        ours = [_array(x) for x in _leaves(model(*args))]
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                wrong = wrong or f"output shape {b.shape} where the module gives {a.shape}"
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            gap, scale = float(np.abs(a - b).max(initial=0)), float(np.abs(a).max(initial=0))
            max_abs, max_rel = max(max_abs, gap), max(max_rel, gap / (scale or 1.0))
            if not gap <= tolerance * max(1.0, scale):  # so that NaN fails
                wrong = wrong or f"differs by {gap:.2g} at input shape {shapes[-1]}, allowed {tolerance:g}"
    return _Comparison(wrong, opset, shapes, max_abs, max_rel)


# --- small things ---------------------------------------------------------------------------------------------


@contextmanager
def _quiet(heard: list[str]) -> Iterator[None]:
    """Keep the exporter's talk from the terminal; its warnings about the model go to `heard`."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # The tracer prints whole graphs from C++ when it fails unless its log is off; and it turns the log on itself
    # wherever this name is true, taking the function for its result.
    was_on = getattr(torch._C, _LOG, None)
    if was_on is not None:
        setattr(torch._C, _LOG, False)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        if was_on is not None:
            setattr(torch._C, _LOG, was_on)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning | FutureWarning):
            text = str(warning.message).splitlines()[0][:200]
            if text not in heard and len(heard) < 8:
                heard.append(text)


def _move(source: Path, path: Path) -> None:
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def _tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _leaves(output: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x


def _feed(names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {name: _array(x) for name, x in zip(names, inputs, strict=True)}


def _numbered(name: str, number: int) -> list[str]:
    return [name] if number == 1 else [f"{name}_{i}" for i in range(number)]


def _first_line(error: Exception) -> str:
    """What went wrong at the bottom of a chain of exporter errors, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:200] if lines else ''}"


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
