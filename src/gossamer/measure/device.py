"""What a figure was measured on: processor, threads, versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def device_info() -> dict[str, Any]:
    """The device and the software on it, as JSON-able facts; `threads` is PyTorch's number now."""
    return {**_fixed(), "threads": torch.get_num_threads()}


def device_key() -> str:
    """Short hash of everything that moves latency but the thread count: one latency table for each."""
    facts = {key: value for key, value in _fixed().items() if key not in ("memory_gib", "python")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _fixed() -> dict[str, Any]:
    import psutil

    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False) or logical,
        "usable_cores": logical,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
    }


@cache
def cpu_model() -> str:
    """Name of the processor; cloud machines hide the model in the name, so its numbers are added."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.machine()
    numbers = [facts[key] for key in ("cpu family", "model", "stepping") if key in facts]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
