"""Token-reduction methods of the literature along the axes of the position paper, and which of them are passes here.

Source: Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models", arXiv 2505.18227, and the
list kept beside it (some 500 entries), of which `token_reduction.json` holds the representative ones.

- one record a method; every axis has one value, the chief one. Signal, stage and training are normalised: the authors
  name them in several ways, and where they do not, they are from general knowledge of the field
- `year` and `venue` are those of the publication; a venue that is not certain, and that of a preprint, is None
- diffusion models are vision, reduced across diffusion steps
- `covered_by` is the name of the pass (`gossamer.shrink`) that does it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

AXES: dict[str, tuple[str, ...]] = {
    "modality": ("vision", "language", "vision-language", "agentic", "state-space", "hardware"),
    "operation": (
        "pruning", "merging", "clustering", "compression", "routing", "cache eviction", "trace shortening",
        "adaptive tokenisation",
    ),
    "signal": (
        "attention", "learned predictor", "similarity", "saliency", "text-conditioned", "entropy", "frequency",
        "RL policy", "schedule",
    ),
    "stage": (
        "before encoder", "inside encoder", "between encoder and LLM", "inside LLM", "at decoding",
        "across diffusion steps",
    ),
    "training": ("none", "adapters", "fine-tuned", "from scratch"),
    "goal": (
        "efficiency", "alignment", "hallucination/overthinking", "long context", "training stability",
        "interpretability", "privacy",
    ),
}  # fmt: skip
"""What each axis may say, in the paper's order."""


@dataclass(frozen=True)
class Reduction:
    """One method; `AXES` has what its axes may say."""

    name: str
    year: int | None
    venue: str | None
    modality: str
    operation: str
    signal: str
    stage: str
    training: str
    goal: str
    covered_by: str | None


@cache
def reductions() -> tuple[Reduction, ...]:
    """All methods, by name.

    Raises:
        ValueError: see `read_reductions`.
    """
    return read_reductions(Path(__file__).parent / "token_reduction.json")


def read_reductions(path: Path) -> tuple[Reduction, ...]:
    """The methods of one file, by name.

    Raises:
        ValueError: a record has a missing or unknown key or a value that its axis does not have, or two have one name.
    """
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    wanted = {f.name for f in fields(Reduction)}
    for row in rows:
        if set(row) != wanted:
            raise ValueError(f"method {row.get('name')!r}: keys must be {sorted(wanted)}, got {sorted(row)}")
        for axis, allowed in AXES.items():
            if row[axis] not in allowed:
                names = ", ".join(allowed)
                raise ValueError(f"method {row['name']!r}: {axis} must be one of {names}; got {row[axis]!r}")
    twice = [name for name, count in Counter(row["name"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"names must be unique, got {', '.join(twice)} twice")
    return tuple(sorted((Reduction(**row) for row in rows), key=lambda r: r.name.casefold()))


def find_reductions(*, covered: bool | None = None, **axes: str | None) -> list[Reduction]:
    """The methods for which every filter given holds, by name.

    Args:
        covered: whether a pass here does it.
        axes: `modality=`, `operation=`, `signal=`, `stage=`, `training=`, `goal=`.

    Raises:
        ValueError: there is no such axis, or it has no such value.
    """
    for axis, value in axes.items():
        if axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}; got {axis!r}")
        if value is not None and value not in AXES[axis]:
            raise ValueError(f"{axis} must be one of {', '.join(AXES[axis])}; got {value!r}")
    return [
        r
        for r in reductions()
        if covered in (None, r.covered_by is not None)
        and all(value in (None, getattr(r, axis)) for axis, value in axes.items())
    ]


def count_cells(found: Iterable[Reduction]) -> list[tuple[str, str, int, int]]:
    """For each cell that is not empty, in the order of `AXES`: modality, operation, methods, and those covered."""
    found = list(found)
    cells = []
    for modality in AXES["modality"]:
        for operation in AXES["operation"]:
            here = [r for r in found if (r.modality, r.operation) == (modality, operation)]
            if here:
                cells.append((modality, operation, len(here), sum(r.covered_by is not None for r in here)))
    return cells
