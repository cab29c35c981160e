"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gossamer import __version__


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends, and leaves `path` alone if it raises.

    The bytes go to a temporary name in the same folder, are forced to disk, and are renamed.

    Args:
        path: the file; its folder is made if it is missing.
        mode: "w" for text (UTF-8) or "wb" for bytes.

    Raises:
        ValueError: another mode.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    with _beside(path) as temporary, open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """As `atomic_write`, for writers that want a name rather than a file object."""
    with _beside(Path(path)) as temporary:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


def plain(value: Any) -> Any:
    """`value` with nothing but JSON in it: tensors and tuples as lists, what is not a number as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def claim(folder: str | Path, run: dict[str, Any]) -> None:
    """Notes in `run.json` of `folder` what was asked of a run, or makes sure that the one there was asked the same.

    Raises:
        ValueError: the folder holds a run that was asked something else.
    """
    file, asked = Path(folder) / "run.json", json.loads(json.dumps(run, default=str))
    if not file.exists():
        write_json(file, {**asked, "gossamer": __version__})
        return
    there = read_json(file)
    other = sorted(k for k, v in asked.items() if not _same(there, k, v))
    if other:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(other)}; give --out another folder, or the same settings"
        )


def _same(there: dict[str, Any], key: str, asked: Any) -> bool:
    """A setting that the version which began the run did not know was off."""
    if key not in there:
        return not asked
    if isinstance(asked, dict) and isinstance(there[key], dict) and asked.keys() >= there[key].keys():
        return all(_same(there[key], k, v) for k, v in asked.items())
    return there[key] == asked


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file is missing, or is not JSON; the message names it and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for the owner alone; a new file should have the rights any new file has.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
