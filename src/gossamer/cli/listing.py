"""`gossamer list`: every system Gossamer covers, built or not, with its published figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import short


def command(
    task: Annotated[str | None, typer.Option(help="Only systems for this task.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, e.g. backbone or token-mixer.")] = None,
    text: Annotated[str | None, typer.Option(help="Only systems whose name or title holds this.")] = None,
    status: Annotated[str | None, typer.Option(help="planned, built or reconstruction.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all systems, those not built yet included."""
    from gossamer import catalogue

    found = catalogue.search(task=task, kind=kind, text=text, status=status)
    if as_json:
        print_json(found)
        return
    print_table(
        ("name", "system", "kind", "year", "status", "variants", "params", "MACs"),
        [
            (
                s.slug,
                s.title,
                s.kind,
                s.year,
                s.status,
                len(s.variants),
                _range((row.params_m for row in s.published), 1e6),
                _range((row.macs_g for row in s.published), 1e9),
            )
            for s in found
        ],
        numbers=("variants", "params", "MACs"),
        cut=("system",),
    )
    built = sum(s.status != "planned" for s in found)
    typer.echo(f"{len(found)} systems, {built} built; params and MACs are published figures")


def _range(values: Iterable[float | None], unit: float) -> str:
    known = sorted({v for v in values if v is not None})
    if not known:
        return "-"
    ends = [short(v * unit) for v in (known[0], known[-1])]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)
