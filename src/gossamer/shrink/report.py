"""`report.html` of a shrink: before and after, every step and trial, the front, what was rolled back and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.shrink.page import inline_svg, shown, write_page
from gossamer.tasks.base import Figure, new_plot


def write_report(results: dict[str, Any], figures: list[Figure], path: Path) -> None:
    """Writes the page for `results` (as in `results.json`) and the task's figures on the test data."""
    rolled = [p for p in results["points"] if p["status"] == "rolled back"]
    write_page(
        "gossamer.shrink",
        path,
        r=results,
        figures=shown(figures),
        front=inline_svg(_front(results)) if results["points"] else "",
        rolled=rolled,
        sensitivity=next((s for p in results["points"] if (s := p["certificate"].get("sensitivity"))), {}),
    )


def _front(results: dict[str, Any]) -> Any:
    """Metric against latency: trials before training in grey, files with their intervals, and the front."""
    plot, axes = new_plot(8.2, 4.4)
    axis = axes[0, 0]
    for trial in results["trials"]:
        if trial["val"] is not None:
            axis.plot(trial["cost"]["latency"], trial["val"], "o", color="#b9bfc7", ms=4, zorder=1)
    labels = []
    for p in results["points"]:
        if p["val"] is None:
            continue
        x, (low, high) = p["cost"]["latency"], p["interval"]
        winner, first = p["status"] == "winner", p["name"] == "as it came"
        colour = "#c8553d" if winner else "#b9bfc7" if p["status"] == "rolled back" else "#1f5fa8"
        axis.errorbar(
            x,
            p["val"],
            xerr=[[max(0.0, x - low)], [max(0.0, high - x)]],
            fmt=("*" if first else "D" if "int8" in p["form"] else "o"),
            color=colour,
            ms=10 if winner or first else 6,
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
        labels.append((p["val"], x, f"{p['name']} {p['form']}" + (" (winner)" if winner else ""), colour))
    _label(axis, labels)
    best = sorted((p["cost"]["latency"], p["val"]) for p in results["points"] if p["status"] in ("front", "winner"))
    if len(best) > 1:
        axis.step(*zip(*best, strict=True), where="post", color="#1f5fa8", lw=1, alpha=0.5, zorder=2)
    if limit := results["budget"].get("latency"):
        axis.axvline(limit, color="#333", ls="--", lw=1)
        axis.annotate(
            f"budget {limit:.3g} ms", (limit, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
            textcoords="offset points", fontsize=7.5, color="#333",
        )  # fmt: skip
    axis.set_xlabel("latency of one sample, ms")
    axis.set_ylabel(f"validation {results['metric']}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return plot


def _label(axis: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Labels right of the picture in the order of their points, joined to them: none lies on another."""
    if not labels:
        return
    for place, (y, x, text, colour) in enumerate(sorted(labels, reverse=True)):
        height = 1 - (place + 0.5) / len(labels)
        axis.annotate(
            text,
            (x, y),
            xytext=(1.02, height),
            textcoords="axes fraction",
            fontsize=7,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.5},
            annotation_clip=False,
        )
