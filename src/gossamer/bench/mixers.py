"""Every mixer in the same block, at growing grids: time, memory, multiply-adds, and how time grows with tokens.

- the block is `x + mixer(norm(x))`, `x + mlp(norm(x))` with a hidden width of four times the channels; only the mixer
  changes, so the row of `identity` is what all others pay on top of
- grids hold 1/16, 1/4 and all of the tokens asked for; at each, all mixers are timed interleaved
- `exponent` is the slope of log time on log tokens over these grids: about 1 where cost is linear, towards 2 for full
  attention; the block's linear parts and the overhead of small grids pull it down
- before a mixer is timed it is called twice; one that fails, that may need more memory than there is, or whose calls
  would not leave time for the others is listed with the reason
- what was measured is written after each grid and each training; the same call takes up what a stopped one left
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.progress import BarColumn, Progress, TextColumn
from torch import nn

from gossamer import __version__
from gossamer.bench.accuracy import compare_accuracy, read_images
from gossamer.bench.block import heads_for, make_mixer, reason
from gossamer.bench.plot import draw
from gossamer.io import atomic_write, write_json
from gossamer.layers import Block, Mlp
from gossamer.measure import device_info, latency, macs, parameters, peak_memory
from gossamer.mixers import list_mixers, mixer_class

SHARES = (16, 4, 1)  # the grids hold 1/16, 1/4 and all of the tokens
MIN_RUNS = 5
CALLS = 2 + MIN_RUNS  # that a timing takes even when its time is over: set-up, a round of warm-up, counted runs
LEAST_S = 0.1  # of timing at a grid, however little time is left
CHEAP_S = 2.0  # nothing is left out where a call, or the timing of all, takes no longer
TIMING = 0.35  # share of the time that goes to timing where networks are trained too
MIB = 2**20

Note = Callable[[str], None]


@dataclass
class _Subject:
    """A mixer at one grid, called and found to work."""

    name: str
    block: nn.Module
    x: torch.Tensor
    seconds: float
    row: dict[str, Any]


def bench_mixers(
    grid: Sequence[int],
    dim: int,
    *,
    mixers: Sequence[str] | None = None,
    train: str | None = None,
    out: str | Path | None = None,
    seconds: float = 600.0,
    epochs: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measures token mixers against each other on `grid` and smaller ones.

    Args:
        grid: the largest token grid: one axis for sequences, two for images, three for volumes.
        dim: channels.
        mixers: names, all that are registered by default.
        train: images to train a small network with each mixer on; anything `read_dataset` takes.
        out: folder for `results.json` and `mixers.svg`; by default one under `runs/` named after grid and channels.
            The unfinished results of the same call in it are taken up.
        seconds: wall-clock time for everything.
        epochs: passes over the training data; as many as the time allows by default, the same for all.
        seed: weights, inputs, order of the training data.
        quiet: show no progress.

    Returns:
        What `results.json` holds: `mixers`, fastest first, with `sizes` (figures at each grid), `exponent` and
        `accuracy`; `left_out` with the reason; `train`; `complete`; `asked`; `device` and versions.

    Raises:
        ValueError: an unknown mixer, a grid of no or more than three axes, sizes below 1, or training on what are no
            images.
    """
    grid = tuple(grid)
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid must be one to three positive sizes, got {grid}")
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    if train is not None and len(grid) != 2:
        raise ValueError(f"train= compares mixers of images, on a grid of two axes; got grid={grid}")
    began = time.perf_counter()
    data = read_images(train, seed) if train is not None else None
    names = list(dict.fromkeys(mixers)) if mixers is not None else list_mixers()
    rows: dict[str, dict[str, Any]] = {}
    unfit = []
    for name in names:
        axes = mixer_class(name).grids
        if len(grid) in axes:
            rows[name] = {"name": name, "sizes": [], "why": ""}
        else:
            words = " or ".join(map(str, axes))
            unfit.append({"name": name, "why": f"works on {words} grid axes, not {len(grid)}"})
    folder = Path(out) if out is not None else Path("runs") / f"mixers-{words_of(grid)}-{dim}"
    heads = heads_for(dim)
    grids = growing(grid)
    results: dict[str, Any] = {
        "command": "bench mixers",
        "complete": False,
        "asked": {"mixers": names, "train": train, "epochs": epochs, "seconds": seconds},
        "grid": list(grid),
        "grids": [list(size) for size in grids],
        "dim": dim,
        "heads": heads,
        "batch": 1,
        "dtype": "float32",
        "seed": seed,
        "train": None,
        "device": {**device_info(), "gossamer": __version__},
        "folder": str(folder),
    }
    earlier = _left_by_a_stopped_call(folder / "results.json", results)
    if earlier is not None:
        began -= earlier["seconds"]
        results["train"] = earlier["train"]
        for row in earlier["mixers"] + earlier["left_out"]:
            if row["name"] in rows:
                rows[row["name"]] |= row

    def keep(complete: bool = False) -> None:
        ran = [row for row in rows.values() if row["sizes"]]
        for row in ran:
            row["exponent"] = exponent([s["tokens"] for s in row["sizes"]], [s["ms"] for s in row["sizes"]])
        ran.sort(key=lambda row: (-row["sizes"][-1]["tokens"], row["sizes"][-1]["ms"]))
        failed = [{"name": row["name"], "why": row["why"]} for row in rows.values() if not row["sizes"]]
        spent = round(time.perf_counter() - began, 1)
        results.update(complete=complete, seconds=spent, mixers=ran, left_out=unfit + failed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", results)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task("mixers", total=len(grids) + (train is not None), note="")

        def note(text: str) -> None:
            bar.update(task, note=text)

        timing = seconds * (TIMING if data is not None else 0.95)
        done = {tuple(figures["grid"]) for row in rows.values() for figures in row["sizes"]}
        for i, size in enumerate(grids):
            if size not in done:
                # Later grids hold four times the tokens: each gets twice the time of the one before.
                left = began + timing - time.perf_counter()
                share = max(LEAST_S, left * 2**i / sum(2**k for k in range(i, len(grids))))
                _measure(rows, size, dim, heads, share, seed, note)
                keep()
            bar.advance(task)
        if data is not None:

            def keep_training(how: dict[str, Any]) -> None:
                results["train"] = {"data": train, **how}
                keep()

            compare_accuracy(
                {name: row for name, row in rows.items() if row["sizes"]},
                data,
                results["train"],
                seconds=began + seconds - time.perf_counter(),
                epochs=epochs,
                seed=seed,
                note=note,
                keep=keep_training,
            )
            bar.advance(task)
    keep()
    if results["mixers"]:
        with atomic_write(folder / "mixers.svg") as file:
            file.write(draw(results))
    keep(complete=True)
    return json.loads(json.dumps(results))


def _left_by_a_stopped_call(path: Path, results: dict[str, Any]) -> dict[str, Any] | None:
    """What is at `path` if it was left unfinished by a call like this one, on this device."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = all(found.get(key) == results[key] for key in ("complete", "asked", "grid", "dim", "seed", "device"))
    return found if same else None


def growing(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Grids of 1/16, 1/4 and all of the tokens, of the same shape; fewer where a grid is too small to tell apart."""
    sizes = [tuple(max(1, round(n * share ** (-1 / len(grid)))) for n in grid) for share in SHARES]
    return list(dict.fromkeys(sizes))


def exponent(tokens: Sequence[int], ms: Sequence[float]) -> float | None:
    """`p` of `time = a * tokens^p`, by least squares on logarithms; None for fewer than three sizes."""
    if len(set(tokens)) < 3:
        return None
    return float(np.polyfit(np.log(tokens), np.log(ms), 1)[0])


def words_of(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


def _measure(
    rows: dict[str, dict[str, Any]],
    grid: tuple[int, ...],
    dim: int,
    heads: int,
    seconds: float,
    seed: int,
    note: Note,
) -> None:
    """Adds to each row its figures at `grid`, or says why there are none."""
    end = time.perf_counter() + seconds
    subjects = []
    for row in rows.values():
        if row["why"]:
            continue
        note(f"{row['name']} at {words_of(grid)}")
        row["why"] = _too_much(row["sizes"], prod(grid), end - time.perf_counter())
        if row["why"]:
            continue
        try:
            subjects.append(_call(row["name"], grid, dim, heads, seed))
        except Exception as error:  # whatever a mixer cannot do shows in its own words
            row["why"] = f"at {words_of(grid)}: {reason(error)}"
    left = max(LEAST_S, end - time.perf_counter())
    subjects.sort(key=lambda s: s.seconds)
    timed: dict[str, _Subject] = {}
    spent = 0.0
    for s in subjects:
        spent += CALLS * s.seconds
        if timed and spent > max(left, CHEAP_S):
            why = f"a call takes {s.seconds:.2g} s, and there were {left:.0f} s to time all; give more --time"
            rows[s.name]["why"] = f"at {words_of(grid)}: {why}"
        else:
            timed[s.name] = s
    if not timed:
        return
    note(f"timing {len(timed)} mixers at {words_of(grid)}")
    with torch.inference_mode():
        forms = {name: (lambda s=s: s.block(s.x)) for name, s in timed.items()}
        found = latency(forms, budget_s=left, min_runs=MIN_RUNS)
    for name, s in timed.items():
        took = found[name]
        rows[name]["sizes"].append({**s.row, "ms": took.median_ms, "latency": took.to_dict()})


def _too_much(sizes: list[dict[str, Any]], tokens: int, seconds: float) -> str:
    """Why a mixer should not be called on so many tokens, judged by the last grid and quadratic growth; or nothing."""
    if not sizes:
        return ""
    last = sizes[-1]
    growth = (tokens / last["tokens"]) ** 2
    free = psutil.virtual_memory().available / MIB
    if last["peak_mib"] * growth > 0.8 * free:
        return f"may need {last['peak_mib'] * growth / 1024:.1f} GiB on {tokens} tokens; {free / 1024:.1f} GiB are free"
    if last["ms"] / 1e3 * growth > max(seconds, CHEAP_S):
        return f"may take {last['ms'] / 1e3 * growth:.0f} s a call on {tokens} tokens; give more --time"
    return ""


def _call(name: str, grid: tuple[int, ...], dim: int, heads: int, seed: int) -> _Subject:
    """The mixer in its block, called once for its memory and once for its time."""
    torch.manual_seed(seed)
    block = Block(dim, make_mixer(name, dim, grid, heads), Mlp(dim, 4 * dim)).eval()
    x = torch.randn(1, *grid, dim)
    with torch.inference_mode():
        # A first call may compile; it is the one whose memory is seen, since later ones reuse what it took.
        memory = peak_memory(lambda: block(x))
        start = time.perf_counter()
        block(x)
        took = time.perf_counter() - start
    row = {
        "grid": list(grid),
        "tokens": prod(grid),
        "parameters": parameters(block.mixer),
        "macs": _macs(block, x),
        "peak_mib": memory.mib,
    }
    return _Subject(name, block, x, took, row)


def _macs(block: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of the block; on the meta device, where nothing is computed, if the mixer looks at no values."""
    try:
        return macs(copy.deepcopy(block).to("meta"), x).total
    except Exception:  # data-dependent control flow fails there in any number of ways
        return macs(block, x).total
