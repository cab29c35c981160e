"""Peak memory of a call, above what the process held before it.

- on Linux the kernel's own high-water mark, set back just before the call: no sampling, nothing missed
- elsewhere, and where the mark cannot be set back, a thread samples the resident size
- on a GPU, what PyTorch's allocator handed out at most
- memory that the process keeps for reuse is not seen again: measure a first call, not a warmed-up one
- other threads that allocate meanwhile are counted too
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20


@dataclass(frozen=True)
class PeakMemory:
    """Peak extra memory of a call in MiB, and how it was measured."""

    mib: float
    method: str


def peak_memory(call: Callable[[], object]) -> PeakMemory:
    """Run `call` once and return the most memory it held above the level before it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return PeakMemory((torch.cuda.max_memory_allocated() - before) / MIB, "CUDA allocator, most allocated")
    _return_free_memory()
    if _reset_mark():
        before = _status("VmRSS")
        call()
        return PeakMemory(max(0, _status("VmHWM") - before) / MIB, "resident size, high-water mark of the kernel")
    return _sampled(call)


def _return_free_memory() -> None:
    """Give the allocator's free lists back, or the call would fill them unseen (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some sandboxes accept the write and do nothing: then the mark stays above the size.
    return _status("VmHWM") - _status("VmRSS") < MIB


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled(call: Callable[[], object]) -> PeakMemory:
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return PeakMemory((peak - before) / MIB, "resident size, sampled every millisecond")
