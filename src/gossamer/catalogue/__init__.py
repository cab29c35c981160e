"""The catalogue: every system Gossamer covers as data, with its published figures.

One JSON file a system in `systems/`; reading all of them loads neither torch nor anything heavy.

- a system of the literature (`paper` true) is listed from the first day: `status` says what there is of it
- published figures live here and nowhere else; measured ones come from a command
- `module` and `variants` are how a model is found by name without importing every model file
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["STATUSES", "Published", "System", "find", "published", "search", "systems"]

STATUSES = ("planned", "built", "reconstruction")
"""`planned`: not built yet; `built`: equal to the authors' method; `reconstruction`: built from
second-hand facts where the paper's own could not be read, claiming no more than it shows."""


@dataclass(frozen=True)
class Published:
    """What the authors (or a count on their code, see `note`) say of one named variant."""

    name: str
    params_m: float | None
    macs_g: float | None
    input: list[int] | str | None
    headline: str
    note: str


@dataclass(frozen=True)
class System:
    """One system: the paper's facts, what is built of it, and its published figures.

    Args:
        slug: name of the system, of its file here and (with `_` for `-`) of its model file.
        id: number of its card; None for systems that are not from a card.
        paper: one of the papers Gossamer covers; False for baselines of our own choosing.
        title, year, arxiv: the paper.
        kind: what sort of thing it is (`backbone`, `token-mixer`, `compression`, `survey`, ...).
        task: what it is for, in the paper's words.
        repo: the authors' repository.
        licence: the licence of that repository.
        evidence: what its card was written from: `code`, `docs` or `memory`.
        status: one of `STATUSES`.
        module: the module that builds it; None while there is none.
        tasks: names of our tasks it can be trained on.
        published: figures of its named variants.
        variants: names that `create_model` takes.
        mixers: names that `create_mixer` takes and that come from this system.
        passes: names of shrinking passes that come from it (`gossamer shrink --recipe`).
    """

    slug: str
    id: int | None
    paper: bool
    title: str
    year: int
    arxiv: str | None
    kind: str
    task: str
    repo: str | None
    licence: str
    evidence: str
    status: str
    module: str | None
    tasks: list[str]
    published: list[Published]
    variants: list[str]
    mixers: list[str]
    passes: list[str] = field(default_factory=list)


def read_system(path: Path) -> System:
    """Read one file of `systems/`.

    Raises:
        ValueError: a key is missing or unknown, the file's name is not its slug, or the status is none of
            `STATUSES`.
    """
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = {f.name for f in fields(System)}
    if set(data) | {"passes"} != wanted:
        missing, unknown = sorted(wanted - set(data)), sorted(set(data) - wanted)
        raise ValueError(f"{path.name}: missing keys {missing}, unknown keys {unknown}")
    if data["slug"] != path.stem:
        raise ValueError(f"{path.name}: slug is {data['slug']!r}, the file's name says {path.stem!r}")
    if data["status"] not in STATUSES:
        raise ValueError(f"{path.name}: status must be one of {STATUSES}, got {data['status']!r}")
    return System(**{**data, "published": [_figures(path, row) for row in data["published"]]})


def _figures(path: Path, row: dict[str, Any]) -> Published:
    # JSON writes 28.0 as 28 as well; the figures are floats either way.
    numbers = {k: None if row.get(k) is None else float(row[k]) for k in ("params_m", "macs_g")}
    try:
        return Published(**{**row, **numbers})
    except TypeError as error:
        raise ValueError(f"{path.name}: published: {error}") from error


@cache
def systems() -> tuple[System, ...]:
    """All systems, by slug."""
    folder = Path(__file__).parent / "systems"
    return tuple(read_system(path) for path in sorted(folder.glob("*.json")))


@cache
def _names() -> dict[str, System]:
    """Every name a system answers to; a slug wins over a variant, a variant over a published one."""
    names: dict[str, System] = {}
    for kind in (_slugs, lambda s: s.variants, lambda s: (row.name for row in s.published)):
        for system in systems():
            for name in kind(system):
                names.setdefault(name, system)
    return names


def _slugs(system: System) -> Iterator[str]:
    yield system.slug
    yield system.slug.replace("-", "_")


def find(name: str) -> System:
    """The system called `name`: its slug (`-` or `_`) or the name of one of its variants.

    Raises:
        ValueError: there is none; close names are listed.
    """
    names = _names()
    if name in names:
        return names[name]
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    hint = f"close: {', '.join(close)}" if close else "`gossamer list` shows all"
    raise ValueError(f"no system or model is called {name!r}; {hint}")


def search(
    *,
    task: str | None = None,
    kind: str | None = None,
    text: str | None = None,
    status: str | None = None,
) -> list[System]:
    """The systems that fit every filter given.

    Args:
        task: one of our task names, or words of the paper's own (`"pose"`, `"language modelling"`).
        kind: exact kind.
        text: found in slug, title, task, authors' repository or a variant's name, in any case.
        status: exact status.

    Raises:
        ValueError: no system has that kind, or `status` is none of `STATUSES`.
    """
    kinds = sorted({s.kind for s in systems()})
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; got {kind!r}")
    if status is not None and status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}; got {status!r}")
    return [
        s
        for s in systems()
        if (kind is None or s.kind == kind)
        and (status is None or s.status == status)
        and (task is None or any(_plain(task) in _plain(words) for words in (*s.tasks, s.task)))
        and (text is None or _plain(text) in _plain(_text(s)))
    ]


def published(variant: str) -> Published | None:
    """The published figures of one named variant, or None where there are none."""
    system = _names().get(variant)
    rows = system.published if system else []
    return next((row for row in rows if row.name == variant), None)


def _text(system: System) -> str:
    names = [*system.variants, *(row.name for row in system.published), *system.mixers, *system.passes]
    return " ".join([system.slug, system.title, system.task, system.repo or "", *names])


def _plain(text: str) -> str:
    # Cards write `language-modeling` and `language modelling`; a user should find both.
    return text.lower().replace("-", " ").replace("_", " ").replace("modelling", "modeling")
