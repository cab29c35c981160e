"""`mixers.svg`: time against tokens, a line a mixer; beside it accuracy against latency where networks were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.tasks.base import new_plot, to_svg

COLOURS = ("#1f5fa8", "#c8553d", "#3b8b5d", "#8a5fb0", "#b8860b", "#4a8fa0", "#a04a7a", "#666666")


def draw(results: dict[str, Any]) -> str:
    """The picture of `results` (as in `results.json`), self-contained."""
    rows = results["mixers"]
    trained = [row for row in rows if row.get("accuracy") is not None]
    height = max(4.4, 0.6 + 0.135 * len(rows))
    plot, axes = new_plot(12.0 if trained else 7.6, height, 1, 2 if trained else 1)
    colour = {row["name"]: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}
    _growth(axes[0, 0], results, colour)
    if trained:
        _worth(axes[0, 1], results["train"], trained, colour)
    text = to_svg(plot).decode()
    return text[text.index("<svg") :]


def _growth(axis: Any, results: dict[str, Any], colour: dict[str, str]) -> None:
    lines = []
    for row in results["mixers"]:
        tokens = [s["tokens"] for s in row["sizes"]]
        ms = [s["ms"] for s in row["sizes"]]
        axis.plot(tokens, ms, "o-", ms=3, lw=1, color=colour[row["name"]])
        power = "" if row["exponent"] is None else f"  {row['exponent']:.2f}"
        lines.append((tokens[-1], ms[-1], row["name"] + power, colour[row["name"]]))
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain(axis, results["grids"])
    axis.set_xlabel("tokens (log scale)")
    axis.set_ylabel("block, batch 1: ms (log scale)")
    axis.set_title("time against tokens; the number is the exponent", fontsize=9)
    _beside(axis, lines)


def _worth(axis: Any, train: dict[str, Any], rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    points = []
    for row in rows:
        x, y = row["network_ms"], row["accuracy"]
        axis.errorbar(x, y, yerr=row["error"], fmt="o", ms=4, elinewidth=0.8, color=colour[row["name"]])
        points.append((x, y, row["name"], colour[row["name"]]))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.set_xlabel("small network, one image: ms (log scale)")
    axis.set_ylabel("test accuracy, with one standard error")
    axis.set_title(f"trained on {train['images']:,} images, {train['epochs']:.3g} times", fontsize=9)
    _beside(axis, points)


def _plain(axis: Any, grids: Sequence[Sequence[int]]) -> None:
    from math import prod

    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xticks([prod(g) for g in grids], ["x".join(map(str, g)) for g in grids])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter("{x:g}")


def _beside(axis: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names to the right of the axes, each as near its point's height as the others leave room, joined by a line."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    shown = sorted((axis.transAxes.inverted().transform(axis.transData.transform(p[:2]))[1], p) for p in points)
    for (_, (x, y, text, colour)), height in zip(shown, spread([h for h, _ in shown]), strict=True):
        axis.annotate(
            text, (x, y), xytext=(1.04, height), textcoords="axes fraction", fontsize=6.5, color=colour,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: list[float]) -> list[float]:
    """Ascending heights in [0, 1], moved as little as it takes to keep them apart."""
    if not heights:
        return []
    gap = min(0.04, 1 / len(heights))
    low: list[float] = []
    for height in heights:
        low.append(max(height, low[-1] + gap) if low else max(height, 0.0))
    top = 1.0
    for i in reversed(range(len(low))):
        low[i] = min(low[i], top)
        top = low[i] - gap
    return low
