"""The techniques that make transformers lighter, as data: what the surveys list, and what of it is built here.

Source: Fournier et al. 2021, "A Practical Survey on Faster and Lighter Transformers"; Chitty-Venkata et al. 2023, "A
Survey of Techniques for Optimizing Transformer Inference"; Goel et al. 2020, "A Survey of Methods for Low-Power Deep
Learning and Computer Vision"; Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models".

- one record a technique in `techniques.json`; `by` names what does it here, as `kind:name` or a command; empty where
  nothing does
- headings are the surveys'; representatives are partly from general knowledge of the field
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

TRAINING = ("none", "short", "full")


@dataclass(frozen=True)
class Technique:
    """One way to make a transformer lighter.

    Args:
        family: heading it stands under.
        surveys: slugs of the systems (surveys) that list it.
        reduces: costs it can lower.
        exact: the answers stay the same.
        training: what it needs of it: `none`, `short` (recovery of a trained model), `full` (a new model).
        causal: whether it can serve a decoder.
        by: what does it here: `pass:NAME`, `mixer:NAME`, `model:NAME`, `search:NAME`, `step:NAME`, or a command.
        examples: methods of the literature.
        when: where it pays, in words.
    """

    name: str
    family: str
    surveys: tuple[str, ...]
    reduces: tuple[str, ...]
    exact: bool
    training: str
    causal: bool
    by: tuple[str, ...]
    examples: tuple[str, ...]
    when: str

    @property
    def covered(self) -> bool:
        return bool(self.by)

    def passes(self) -> list[str]:
        """Names of the shrinking passes that do it."""
        return [name.removeprefix("pass:") for name in self.by if name.startswith("pass:")]


@cache
def techniques() -> tuple[Technique, ...]:
    """All techniques, in the order of their families.

    Raises:
        ValueError: a record has a missing or unknown key, or a value that is not allowed.
    """
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "techniques.json").read_text(encoding="utf-8"))
    wanted = {f.name for f in fields(Technique)}
    found = []
    for row in rows:
        if set(row) != wanted:
            raise ValueError(f"technique {row.get('name')!r}: keys must be {sorted(wanted)}, got {sorted(row)}")
        if row["training"] not in TRAINING:
            raise ValueError(f"technique {row['name']!r}: training must be one of {TRAINING}, got {row['training']!r}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        found.append(Technique(**values))
    return tuple(found)


def find_techniques(
    *,
    family: str | None = None,
    survey: str | None = None,
    reduces: str | None = None,
    training: str | None = None,
    covered: bool | None = None,
) -> list[Technique]:
    """Techniques for which every filter given holds, in a fixed order.

    Raises:
        ValueError: a filter has a value that no technique has.
    """
    everything = techniques()
    allowed = {
        "family": {t.family for t in everything},
        "survey": {s for t in everything for s in t.surveys},
        "reduces": {r for t in everything for r in t.reduces},
        "training": set(TRAINING),
    }
    for name, value in (("family", family), ("survey", survey), ("reduces", reduces), ("training", training)):
        if value is not None and value not in allowed[name]:
            raise ValueError(f"{name} must be one of {', '.join(sorted(allowed[name]))}; got {value!r}")
    return [
        t
        for t in everything
        if family in (None, t.family)
        and (survey is None or survey in t.surveys)
        and (reduces is None or reduces in t.reduces)
        and training in (None, t.training)
        and covered in (None, t.covered)
    ]
