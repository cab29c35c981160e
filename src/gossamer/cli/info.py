"""`gossamer info NAME`: what is known of one system, and what is built of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import short


def command(
    name: Annotated[str, typer.Argument(help="A system or one of its variants, e.g. swin or swin_t.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a system: the paper, its published figures, what is built and how it differs."""
    from gossamer import catalogue

    system = catalogue.find(name)
    notes = _docstring(system.module) if system.status != "planned" else None
    if as_json:
        variant = name if name in system.variants or catalogue.published(name) else None
        print_json(
            {
                "system": system,
                "variant": variant,
                "published": catalogue.published(name),
                "notes": notes,
            }
        )
        return
    arxiv = f" · arXiv {system.arxiv}" if system.arxiv else ""
    typer.echo(f"{system.title}\n{system.year}{arxiv}\n")
    for label, value in (
        ("name", system.slug),
        ("kind", system.kind),
        ("task", system.task),
        ("status", f"{system.status}{f' in {system.module}' if notes is not None else ''}"),
        ("our tasks", ", ".join(system.tasks)),
        ("variants", ", ".join(system.variants)),
        ("mixers", ", ".join(system.mixers)),
        ("passes", ", ".join(system.passes)),
        ("official code", f"{system.repo or 'none'} (licence: {system.licence})"),
        ("facts from", _EVIDENCE.get(system.evidence, system.evidence)),
    ):
        if value:
            typer.echo(f"{label:14} {value}")
    if system.published:
        typer.echo("")
        print_table(
            ("published", "params", "MACs", "input", "headline"),
            [
                (
                    ("> " if row.name == name else "  ") + row.name,
                    short(row.params_m and row.params_m * 1e6),
                    short(row.macs_g and row.macs_g * 1e9),
                    "x".join(map(str, row.input)) if isinstance(row.input, list) else row.input,
                    row.headline,
                )
                for row in system.published
            ],
            numbers=("params", "MACs"),
            cut=("headline",),
        )
        for note in dict.fromkeys(row.note for row in system.published if row.note):
            typer.echo(f"  {note}")
    if notes:
        typer.echo(f"\n{notes}")


_EVIDENCE = {
    "code": "the authors' code",
    "docs": "second-hand sources",
    "memory": "general knowledge (check before relying on it)",
}


def _docstring(module: str | None) -> str | None:
    """The head of a model file, read as text: importing it would load torch."""
    if module is None:
        return None
    path = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
