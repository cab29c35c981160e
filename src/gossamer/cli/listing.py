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
    reductions: Annotated[bool, typer.Option("--reductions", help="Token-reduction methods of papers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all systems, those not built yet included."""
    from gossamer import catalogue

    if reductions:
        return _reductions(text, as_json)
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


def _reductions(text: str | None, as_json: bool) -> None:
    from gossamer.catalogue.token_reduction import AXES, count_cells, find_reductions

    found = [r for r in find_reductions() if (text or "").casefold() in r.name.casefold()]
    if as_json:
        return print_json(found)
    names = ("name", "year", "venue", *AXES, "covered_by")
    print_table(names, [[getattr(r, name) for name in names] for r in found], numbers=("year",))
    print_table(("modality", "operation", "methods", "covered"), count_cells(found), numbers=("methods", "covered"))


def _range(values: Iterable[float | None], unit: float) -> str:
    known = sorted({v for v in values if v is not None})
    if not known:
        return "-"
    ends = [short(v * unit) for v in (known[0], known[-1])]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)
