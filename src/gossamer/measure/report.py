"""Everything about the cost of one model in one JSON-able dictionary."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .device import device_info
from .energy import energy_estimate
from .macs import macs
from .memory import peak_memory
from .parameters import parameter_table, parameters, weight_bytes
from .timing import latency

FORMS = ("eager", "compiled")

# A form for one batch: takes the inputs, gives a callable that runs the model on them once.
MakeForm = Callable[[tuple[Tensor, ...]], Callable[[], object]]


def measure_model(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    batches: Sequence[int] = (1, 16),
    forms: Sequence[str] = ("eager",),
    extra_forms: Mapping[str, MakeForm] | None = None,
    budget_s: float | int = 2.0,
    threads: int | None = None,
    per_layer: bool = False,
) -> dict[str, Any]:
    """Parameters, MACs, size, energy, peak memory, and latency by form and batch.

    Args:
        model: any module on the CPU or a GPU; measured in evaluation mode, flags restored.
        inputs: one sample of each input, batch first; other batches repeat it.
        batches: batch sizes to time.
        forms: of "eager" and "compiled". One that fails has its reason in the place of figures.
        extra_forms: further forms by name, such as an ONNX Runtime session, made for each batch.
        budget_s: seconds of timing for each batch size, all forms together.
        threads: PyTorch's intra-op threads while timing; None leaves them.
        per_layer: add a row for each module.

    Raises:
        ValueError: an unknown form, a batch size below 1, or inputs of unequal batch.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    unknown = set(forms) - set(FORMS)
    if unknown:
        raise ValueError(f"forms must be among {FORMS}, got {sorted(unknown)}")
    if any(b < 1 for b in batches):
        raise ValueError(f"batches must be positive, got {tuple(batches)}")
    if len({len(x) for x in args}) != 1:
        raise ValueError(f"inputs must share one batch size, got {[tuple(x.shape) for x in args]}")

    sample = tuple(x[:1] for x in args)
    makers = {name: _MAKERS[name](model) for name in forms} | dict(extra_forms or {})
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            memory = peak_memory(lambda: model(*sample))
            rows = [row for b in batches for row in _rows(makers, sample, b, budget_s, threads)]
    finally:
        for module, training in flags.items():
            module.training = training

    count = macs(model, sample, per_layer=per_layer)
    size = weight_bytes(model)
    # Every weight is read once; what lies between the layers is taken to stay in the caches.
    moved = size + sum(x.numel() * x.element_size() for x in sample)
    weight = next(model.parameters(), None)
    result: dict[str, Any] = {
        "parameters": parameters(model),
        "macs": count.total,
        "macs_second": count.second,
        "macs_by_op": count.by_op,
        "macs_uncounted": list(count.uncounted),
        "macs_warning": count.warning,
        "size_mb": size / 1e6,
        "peak_memory": asdict(memory),
        "energy": asdict(energy_estimate(count.total, moved)),
        "latency": rows,
        "input": [list(x.shape) for x in sample],
        "dtype": str(weight.dtype if weight is not None else sample[0].dtype).removeprefix("torch."),
        "device": device_info(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if per_layer:
        table = parameter_table(model)
        types = {name: type(module).__name__ for name, module in model.named_modules()}
        result["layers"] = [
            {"name": name, "type": types[name], "parameters": table[name], "macs": count.by_module[name]}
            for name in table
        ]
    return result


def _eager(model: nn.Module) -> MakeForm:
    return lambda args: lambda: model(*args)


def _compiled(model: nn.Module) -> MakeForm:
    fast = torch.compile(model, dynamic=False)
    return lambda args: lambda: fast(*args)


_MAKERS: dict[str, Callable[[nn.Module], MakeForm]] = {"eager": _eager, "compiled": _compiled}


def _rows(
    makers: Mapping[str, MakeForm],
    sample: tuple[Tensor, ...],
    batch: int,
    budget_s: float,
    threads: int | None,
) -> list[dict[str, Any]]:
    """One row for each form at one batch size; the forms that run are timed together."""
    args = tuple(x.expand(batch, *x.shape[1:]).contiguous() for x in sample)
    calls: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        try:
            call = make(args)
            call()
        except Exception as error:  # no compiler, an operation without a kernel: the row says so
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            calls[name] = call
    timed = latency(calls, budget_s=budget_s, threads=threads) if calls else {}
    return [
        {
            "form": name,
            "batch": batch,
            **(timed[name].to_dict() if name in timed else {"error": reasons[name]}),
        }
        for name in makers
    ]
