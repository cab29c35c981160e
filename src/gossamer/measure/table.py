"""Latencies kept between runs: one JSON file for each device.

- in `~/.cache/gossamer/latency/<device>.json`; the environment variable GOSSAMER_CACHE moves the cache
- written whole to a temporary name and renamed, so that a reader never sees half a file
- another process's entries are read again before each write and kept
- an unreadable file is an empty table: it is a cache, and is measured anew
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .device import device_key


class LatencyTable:
    """A dictionary of JSON-able values that outlives the process.

    Args:
        device: name of the file; the device at hand if None.
    """

    def __init__(self, device: str | None = None) -> None:
        root = Path(os.environ.get("GOSSAMER_CACHE") or Path.home() / ".cache" / "gossamer")
        self.path = root / "latency" / f"{device or device_key()}.json"
        self._entries = self._read()

    def get(self, key: str) -> Any:
        """What was put under `key`, or None."""
        return self._entries.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value` (JSON-able) under `key`, on disk at once; in memory only where that fails."""
        self._entries = {**self._entries, **self._read(), key: value}
        text = json.dumps(self._entries, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, self.path)
        except OSError:
            return

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}
