"""`report.html`: one self-contained page, readable at a glance, with nothing fetched from anywhere.

- pictures are inline SVG and PNG, styles are in the page, there is no script
- everything shown is in `results.json`; the page computes nothing new
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.shrink.page import inline_svg, shown, write_page
from gossamer.tasks.base import Figure, new_plot

FORM_MARKERS = {"float32": "o", "int8": "D", "shrunk float32": "s", "shrunk int8": "^"}
COLOURS = ("#1f5fa8", "#c8553d", "#3b8b5d", "#8a5fb0", "#b8860b", "#4a8fa0", "#a04a7a", "#666666")


def write_report(results: dict[str, Any], figures: list[Figure], path: Path) -> None:
    """Writes the page for `results` (as in `results.json`) and the task's test figures."""
    pictures = {
        "front": inline_svg(_front(results)) if results["points"] else "",
        "curves": inline_svg(_curves(results)) if results["trials"] else "",
    }
    write_page("gossamer.fit", path, r=results, figures=shown(figures), pictures=pictures, rows=_rows(results))


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a candidate: what it costs, how far it got, what became of it."""
    best: dict[str, dict[str, Any]] = {}
    sign = 1 if results["maximise"] else -1
    tried: dict[str, int] = {}
    for trial in results["trials"]:
        name = trial["params"].get("candidate")
        tried[name] = tried.get(name, 0) + 1
        if trial.get("value") is not None and (name not in best or sign * trial["value"] > sign * best[name]["value"]):
            best[name] = trial
    finalists = {f["name"]: f for f in results["finalists"]}
    rows = []
    for c in results["candidates"]:
        name = c["name"]
        if name in finalists:
            fate = f"finished: {results['metric']} {finalists[name]['val']:.4f} on validation"
        elif name in best:
            fate = best[name].get("why") or "raced to the last rung, others were better"
        elif name in tried:
            fate = "tried, nothing learnt"
        elif c["status"] in ("ready", "int8"):
            fate = "fits; there was no time to try it"
        else:
            fate = c["why"] or c["status"]
        value = finalists[name]["val"] if name in finalists else best.get(name, {}).get("value")
        rows.append({**c, "value": value, "fate": fate, "tried": tried.get(name, 0)})
    return rows


def _front(results: dict[str, Any]) -> Any:
    """Metric against latency: candidates at their race value, files with their intervals, and the front."""
    plot, axes = new_plot(8.2, 4.4)
    axis = axes[0, 0]
    finished = {p["name"] for p in results["points"]}
    for row in _rows(results):
        if row["value"] is not None and row["cost"] and row["name"] not in finished:
            axis.plot(row["cost"]["latency"], row["value"], "o", color="#b9bfc7", ms=5, zorder=1)
            axis.annotate(
                row["name"],
                (row["cost"]["latency"], row["value"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=6.5,
                color="#8b929b",
            )
    for place, p in enumerate(results["points"]):
        x, (low, high) = p["cost"]["latency"], p["interval"]
        winner = p["status"] == "winner"
        colour = "#c8553d" if winner else "#b9bfc7" if p["status"] == "rolled back" else "#1f5fa8"
        axis.errorbar(
            x,
            p["val"],
            xerr=[[max(0.0, x - low)], [max(0.0, high - x)]],
            yerr=results["noise"],
            fmt=FORM_MARKERS.get(p["form"], "o"),
            color=colour,
            ms=9 if winner else 6,
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
        words = {"textcoords": "offset points", "fontsize": 7.5, "color": colour}
        label = f"{p['name']} {p['form']}" + (" (winner)" if winner else "")
        axis.annotate(label, (x, p["val"]), xytext=(6, (7, -12, 16, -21)[place % 4]), **words)
    best = sorted((p["cost"]["latency"], p["val"]) for p in results["points"] if p["status"] in ("front", "winner"))
    if len(best) > 1:
        axis.step(*zip(*best, strict=True), where="post", color="#1f5fa8", lw=1, alpha=0.5, zorder=2)
    limit = results["budget"].get("latency")
    if limit:
        axis.axvline(limit, color="#333", ls="--", lw=1)
        axis.annotate(
            f"budget {limit:g} ms", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -10),
            textcoords="offset points", fontsize=7.5, ha="right", color="#333",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.set_xlabel("latency of one sample, ms (log scale)")
    axis.set_ylabel(f"validation {results['metric']}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return plot


def _curves(results: dict[str, Any]) -> Any:
    """Left: the race, validation metric against seconds of training. Right: the finish."""
    plot, axes = new_plot(8.2, 3.2, 1, 2)
    race, end = axes[0]
    names = list(dict.fromkeys(t["params"].get("candidate") for t in results["trials"]))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    labelled: set[str] = set()
    for trial in results["trials"]:
        points = [(p["seconds"], p["value"]) for p in trial.get("curve", []) if p["value"] is not None]
        if points:
            name = trial["params"]["candidate"]
            label = None if name in labelled or len(labelled) >= 8 else name
            labelled.add(name)
            xs, ys = zip(*points, strict=True)
            race.plot(xs, ys, "o-", ms=3, lw=1, color=colour[name], label=label)
    race.set_title("race", fontsize=9)
    for i, f in enumerate(results["finalists"]):
        points = [(p["seconds"], p["value"]) for p in f["curve"] if p["value"] is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            end.plot(xs, ys, "o-", ms=3, lw=1.2, color=COLOURS[i % len(COLOURS)], label=f["name"])
    end.set_title("finish", fontsize=9)
    for axis in (race, end):
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(f"validation {results['metric']}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6.5, frameon=False)
    return plot
