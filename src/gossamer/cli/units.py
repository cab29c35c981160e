"""What a user writes, in base units: budgets, durations, sizes of inputs; and numbers as a user reads them.

- latency in ms, memory in MiB, size in MB (10^6 bytes), parameters and multiply-adds as counts
- a quantity with a dimension needs its unit: `latency=5` could be anything
"""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["parse_budget", "parse_duration", "parse_positive", "parse_settings", "parse_shape", "parse_shares", "short"]

_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BUDGET: dict[str, tuple[dict[str, float], str]] = {
    "latency": ({"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}, "latency=5ms (us, ms, s)"),
    "memory": ({k: v / 2**20 for k, v in _BYTES.items()}, "memory=100MiB (KiB, MiB, GiB, KB, MB, GB)"),
    "size": ({k: v / 1e6 for k, v in _BYTES.items()}, "size=2MB (KB, MB, GB, KiB, MiB, GiB)"),
    "params": (dict(_COUNTS), "params=1M (K, M, G or nothing)"),
    "macs": (dict(_COUNTS), "macs=50M (K, M, G or nothing)"),
}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?|[0-9]+\.)\s*([a-zµ]*)", re.IGNORECASE)
_DURATION = re.compile(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?")


def parse_budget(text: str) -> dict[str, float]:
    """`"latency=5ms,params=1M"` -> `{"latency": 5.0, "params": 1e6}`: ms, MiB, MB, counts.

    Raises:
        ValueError: a key is unknown or given twice, or a value is no positive number with one of its units.
    """
    budget: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in _BUDGET or not equals:
            examples = ", ".join(example for _, example in _BUDGET.values())
            raise ValueError(f"budget must be made of {examples}; got {part.strip()!r}")
        if key in budget:
            raise ValueError(f"budget gives {key} twice, in {text!r}")
        units, example = _BUDGET[key]
        budget[key] = _quantity(value, units, f"budget {key}", example)
    return budget


def parse_shares(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """`"latency=70%,size=5MB"` -> `({"size": 5.0}, {"latency": 0.7})`: limits in base units, and shares of what is.

    Raises:
        ValueError: as `parse_budget`, or a share is no positive percentage.
    """
    parts = [part.strip() for part in text.split(",")]
    fixed = ",".join(part for part in parts if not part.endswith("%"))
    budget = parse_budget(fixed) if fixed else {}
    shares: dict[str, float] = {}
    for part in parts:
        if part.endswith("%"):
            key, _, value = (piece.strip() for piece in part[:-1].partition("="))
            if key in budget or key in shares:
                raise ValueError(f"budget gives {key} twice, in {text!r}")
            units = {"": 0.01}
            if key not in _BUDGET:
                raise ValueError(f"budget must name {', '.join(_BUDGET)}; got {part!r}")
            shares[key] = _quantity(value, units, f"budget {key}", f"{key}=70%")
    return budget, shares


def parse_duration(text: str) -> float:
    """`"90s"`, `"3m"`, `"1h30m"`, `"1.5h"` -> seconds.

    Raises:
        ValueError: `text` is no positive duration, or has no unit.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    try:
        seconds = sum(float(n) * s for n, s in zip(match.groups(), (3600, 60, 1), strict=True) if n) if match else 0.0
    except ValueError:  # two points in one number
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"a duration must be written like 90s, 3m or 1h30m and be positive; got {text!r}")
    return seconds


def parse_shape(text: str) -> tuple[int, ...]:
    """`"3x224x224"` -> `(3, 224, 224)`; `"128"` -> `(128,)`.

    Raises:
        ValueError: `text` is not made of positive whole numbers with `x` between them.
    """
    parts = text.strip().lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"input must be positive sizes with x between them, like 3x224x224; got {text!r}")
    return tuple(int(part) for part in parts)


def parse_settings(words: list[str]) -> dict[str, Any]:
    """`["dim=64", "depths=[2,2]", "pad=true"]` -> `{"dim": 64, "depths": [2, 2], "pad": True}`: values as in YAML.

    Raises:
        ValueError: no `=`, a name twice, or a value that is not YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"--set must be NAME=VALUE, each name once, like dim=64; got {word!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name}: {value!r} is not a value") from error
    return found


def parse_positive(text: str, name: str) -> int:
    """`"16"` -> 16. `name` is what an error calls the value.

    Raises:
        ValueError: `text` is no positive whole number.
    """
    text = text.strip()
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{name} must be a positive whole number, got {text!r}")
    return int(text)


def _quantity(text: str, units: dict[str, float], name: str, example: str) -> float:
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        raise ValueError(f"{name} must be written like {example}; got {text!r}")
    value = float(match[1]) * units[unit]
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {text!r}")
    return value


def short(value: float | int | None, digits: int = 3) -> str:
    """A number in `digits` significant digits with K, M or G: `5717416` -> `5.72M`; None -> `-`."""
    if value is None:
        return "-"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        # What rounds up to the next unit takes it: 999,999 reads 1M, not 1e+03K.
        if abs(value) >= limit * (1 - 0.5 * 10**-digits):
            return f"{value / limit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"
