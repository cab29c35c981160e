"""The techniques that make transformers lighter, as data: what the surveys list, and what of it is built here.

Source: Fournier et al. 2021, "A Practical Survey on Faster and Lighter Transformers"; Chitty-Venkata et al. 2023, "A
Survey of Techniques for Optimizing Transformer Inference"; Goel et al. 2020, "A Survey of Methods for Low-Power Deep
Learning and Computer Vision"; Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models".

- one record a technique in `techniques.json`; `by` names what does it here, as `kind:name` or a command; empty where
  nothing does. The same holds for each method of the literature under it
- headings are the surveys'; representatives are partly from general knowledge of the field
- `recommend` are the surveys' rules; it runs nothing. What a technique brings on a device is measured by
  `gossamer shrink --explain`
- `STAGES` is the order in which techniques are put to work: what one starts from, then what is taken out, then what
  wins the loss back, then number formats, then files
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

TRAINING = ("none", "short", "full")
PHASES = ("inference", "training")
STAGES = ("search", "prune", "distil", "quantise", "export")
# Families without a stage may come anywhere before the quantisation.
STAGE_OF = {
    "architecture search": "search",
    "other mixing": "search",
    "joining": "search",
    "structured pruning": "prune",
    "depth": "prune",
    "sparsity": "prune",
    "factorisation": "prune",
    "token reduction": "prune",
    "early exit": "prune",
    "teaching": "distil",
    "quantisation": "quantise",
    "hardware": "export",
}
# A text of up to so many tokens spends little on attention between them.
FEW_TOKENS = 512
# How each kind of `by` is run.
_RUN = {
    "pass": 'run_pass("{}", model, calibration)',
    "mixer": 'create_mixer("{}", dim)',
    "model": 'create_model("{}")',
    "search": "gossamer search {}",
    "step": 'apply(model, {{"step": "{}"}})',
    "trunk": "gossamer.trunks.{}",
}
_COMMANDS = {
    "int8": "gossamer shrink --recipe bert_cpu_int8",
    "export": "gossamer export",
    "train": "gossamer train",
    "fit": "gossamer fit",
    "shrink": "gossamer shrink --explain",
}


@dataclass(frozen=True)
class Technique:
    """One way to make a transformer lighter.

    Args:
        family: heading it stands under.
        subfamily: what sort of it.
        surveys: slugs of the systems (surveys) that list it.
        reduces: costs it can lower.
        exact: the answers stay the same.
        training: what it needs of it: `none`, `short` (recovery of a trained model), `full` (a new model).
        causal: whether it can serve a decoder.
        complexity: its cost in words: n tokens, c channels, d of a head, L layers, k kept or near, r the rank.
        by: what does it here: `pass:NAME`, `mixer:NAME`, `model:NAME`, `search:NAME`, `step:NAME`, `trunk:NAME`, or a
            command.
        examples: methods of the literature, each with what does that very one here, or nothing.
        when: where it pays, in words.
    """

    name: str
    family: str
    subfamily: str
    surveys: tuple[str, ...]
    reduces: tuple[str, ...]
    exact: bool
    training: str
    causal: bool
    complexity: str
    by: tuple[str, ...]
    examples: Mapping[str, str]
    when: str

    @property
    def covered(self) -> bool:
        return bool(self.by)

    def passes(self) -> list[str]:
        """Names of the shrinking passes that do it."""
        return [name.removeprefix("pass:") for name in self.by if name.startswith("pass:")]

    def run(self) -> list[str]:
        """How to run it here: a call of Python or a command for each of `by`."""
        parts = [name.partition(":") for name in self.by]
        return [_RUN[kind].format(name) if colon else _COMMANDS[kind] for kind, colon, name in parts]


@dataclass(frozen=True)
class Proposal:
    """A technique that the surveys' rules propose, why, and how it is run here."""

    technique: Technique
    reason: str
    run: tuple[str, ...]


@cache
def techniques() -> tuple[Technique, ...]:
    """All techniques, in the order of their families.

    Raises:
        ValueError: a record has a missing or unknown key, or a value that is not allowed.
    """
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "techniques.json").read_text(encoding="utf-8"))
    return tuple(_read(row) for row in rows)


def _read(row: dict[str, Any]) -> Technique:
    wanted = {f.name for f in fields(Technique)}
    if set(row) != wanted:
        raise ValueError(f"technique {row.get('name')!r}: keys must be {sorted(wanted)}, got {sorted(row)}")
    if row["training"] not in TRAINING:
        raise ValueError(f"technique {row['name']!r}: training must be one of {TRAINING}, got {row['training']!r}")
    for by in (*row["by"], *filter(None, row["examples"].values())):
        kind, colon, _ = by.partition(":")
        if kind not in (_RUN if colon else _COMMANDS):
            allowed = ", ".join([*(f"{k}:NAME" for k in _RUN), *_COMMANDS])
            raise ValueError(f"technique {row['name']!r}: by must be one of {allowed}; got {by!r}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Technique(**values)


def find_techniques(
    *,
    family: str | None = None,
    survey: str | None = None,
    reduces: str | None = None,
    training: str | None = None,
    covered: bool | None = None,
    text: str | None = None,
) -> list[Technique]:
    """Techniques for which every filter given holds, in a fixed order.

    Args:
        text: found in a technique's name, subfamily or one of its methods, in any case.

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
        if value is not None:
            _check(name, value, allowed[name])
    return [
        t
        for t in everything
        if family in (None, t.family)
        and (survey is None or survey in t.surveys)
        and (reduces is None or reduces in t.reduces)
        and training in (None, t.training)
        and covered in (None, t.covered)
        and (text is None or any(text.lower() in words.lower() for words in (t.name, t.subfamily, *t.examples)))
    ]


def counts(rows: Iterable[Technique] | None = None) -> dict[str, int]:
    """How many techniques and methods of the literature there are, and how many of each are built here."""
    found = list(techniques() if rows is None else rows)
    methods: dict[str, str] = {}
    for t in found:
        for name, by in t.examples.items():
            methods[name] = methods.get(name) or by
    return {
        "techniques": len(found),
        "techniques_built": sum(t.covered for t in found),
        "methods": len(methods),
        "methods_built": sum(bool(by) for by in methods.values()),
    }


def conflict(a: Technique, b: Technique) -> str:
    """Why `a` and `b` cannot serve one model, or nothing: the compatibility matrix, entry by entry."""
    if a == b:
        return ""
    families, names = {a.family, b.family}, {a.name, b.name}
    if families == {"other mixing"} and "heads" not in (a.subfamily, b.subfamily):
        return "both take the place of the attention"
    if families == {"quantisation"} and "mixed precision" not in (a.subfamily, b.subfamily):
        return "" if a.by == b.by else "a weight has one number format"
    if "early exit" in families and "operator fusion and tiling" in names:
        return "a file with one fixed graph runs all layers"
    if names == {"gradient checkpointing", "reversible layers"}:
        return "reversible layers keep nothing that a checkpoint could save"
    later = next((t for t in (a, b) if not t.causal), None)
    if later is not None and "key/value reuse" in names:
        return f"{later.name} looks at later tokens, which a decoder has not written yet"
    return ""


def objection(t: Technique, *, decoder: bool) -> str:
    """Why `t` cannot serve such a model, or nothing."""
    return "it looks at later tokens, and this model is a decoder" if decoder and not t.causal else ""


def few_tokens(t: Technique, tokens: int) -> bool:
    """Whether `t` saves work between tokens where there is little, since there are few of them."""
    return t.family == "other mixing" and 0 < tokens <= FEW_TOKENS


def recommend(
    *,
    tokens: int,
    decoder: bool = False,
    phase: str = "inference",
    retrain: str = "short",
    exact: bool = False,
    reduces: str | None = None,
) -> list[Proposal]:
    """What the surveys propose that is built here, best first; the same question has the same answer.

    General methods come before those that change the attention where there are at most 512 tokens, and after them
    where there are more.

    Args:
        tokens: a model reads at once.
        decoder: each token may see earlier ones only.
        phase: what is to become cheaper, `inference` or `training`.
        retrain: the most training there may be: `none`, `short` or `full`.
        exact: the answers must stay the same.
        reduces: the cost that matters most.

    Raises:
        ValueError: a constraint has a value that is not known.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    _check("phase", phase, PHASES)
    _check("retrain", retrain, TRAINING)
    if reduces is not None:
        _check("reduces", reduces, {r for t in techniques() for r in t.reduces})
    found = []
    for t in techniques():
        costs = [r for r in t.reduces if r.startswith("training") == (phase == "training")]
        if not t.covered or not costs or (reduces is not None and reduces not in t.reduces):
            continue
        if (exact and not t.exact) or TRAINING.index(t.training) > TRAINING.index(retrain):
            continue
        if objection(t, decoder=decoder):
            continue
        words = [f"lowers {', '.join(costs)}", "exact" if t.exact else "approximate"]
        words.append({"none": "no training", "short": "a short training", "full": "a new model"}[t.training])
        words.append(f"only {tokens} tokens, so attention is a small part" if few_tokens(t, tokens) else t.when)
        found.append(Proposal(t, "; ".join(words), tuple(t.run())))
    # A stable sort: what is alike stays in the order of the families.
    found.sort(
        key=lambda p: (
            (p.technique.family == "other mixing") == (tokens <= FEW_TOKENS),
            TRAINING.index(p.technique.training),
        )
    )
    return found


def _check(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(sorted(allowed))}; got {value!r}")
