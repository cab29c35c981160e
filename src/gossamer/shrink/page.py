"""Self-contained report pages: pictures inline, styles in the page, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape

from gossamer.io import atomic_write
from gossamer.shrink.budget import BUDGET_UNITS
from gossamer.tasks.base import Figure, to_svg


def write_page(package: str, path: Path, **values: Any) -> None:
    """Writes the template `report.html` of `package`, filled with `values`."""
    env = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("gossamer.shrink")]),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["cost"] = _cost
    env.filters["sig"] = significant
    page = env.get_template("report.html").render(units=BUDGET_UNITS, **values)
    with atomic_write(path) as file:
        file.write(page)


def shown(figures: list[Figure]) -> list[dict[str, str]]:
    """A task's figures as a template takes them."""
    return [{"title": f.title, "caption": f.caption, "html": _inline(f)} for f in figures]


def inline_svg(plot: Any) -> str:
    """A drawn figure as an SVG element."""
    text = to_svg(plot).decode()
    return text[text.index("<svg") :]


def _inline(figure: Figure) -> str:
    if figure.kind == "svg":
        text = figure.data.decode()
        return text[text.index("<svg") :]
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(figure.data).decode()}">'


def significant(value: object, digits: int = 3) -> str:
    """A number in `digits` significant digits; a dash for what is none."""
    if not isinstance(value, int | float):
        return "–"
    if value and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _cost(value: object, kind: str) -> str:
    """A cost in its unit: `1.2 ms`, `0.3 M`."""
    if not isinstance(value, int | float):
        return "–"
    if kind in ("params", "macs"):
        return f"{value / 1e6:.3g} M"
    return f"{significant(value)} {BUDGET_UNITS[kind]}"
