"""`gossamer bench mixers`: token mixers measured against each other on this device; `bench models` is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli import bench_models
from gossamer.cli.options import AsJson, Seed
from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import parse_duration, parse_positive, short

app = typer.Typer(help="Suites that compare many things side by side.", no_args_is_help=True)


@app.callback()
def _suites() -> None:
    pass


app.command("models")(bench_models.command)


@app.command("mixers")
def mixers(
    grid: Annotated[str, typer.Option(help="The largest token grid: 4096, 56x56 or 8x14x14.")] = "56x56",
    dim: Annotated[int, typer.Option(help="Channels.", min=1)] = 96,
    names: Annotated[
        str | None, typer.Option("--mixers", help="Names with commas between; all that are registered if not given.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images to train the same small network on with each mixer.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training data; what the time allows if not given.", min=1)
    ] = None,
    time: Annotated[str, typer.Option(help="Wall-clock time for everything, like 10m.")] = "10m",
    out: Annotated[Path | None, typer.Option(help="Folder for results.json and mixers.svg; one under runs/.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure every token mixer in the same block: time, memory and multiply-adds, at growing grids."""
    sizes = tuple(parse_positive(part, "grid") for part in grid.lower().split("x"))
    seconds = parse_duration(time)
    chosen = [name.strip() for name in names.split(",") if name.strip()] if names is not None else None

    from gossamer.bench import bench_mixers

    results = bench_mixers(
        sizes,
        dim,
        mixers=chosen,
        train=train,
        out=out,
        seconds=seconds,
        epochs=epochs,
        seed=seed,
        quiet=as_json,
    )
    if as_json:
        print_json(results)
    else:
        _print(results)


def _print(results: dict[str, Any]) -> None:
    device, grids = results["device"], results["grids"]
    shapes = ["x".join(map(str, grid)) for grid in grids]
    typer.echo(
        f"one block of {results['dim']} channels, {results['heads']} heads, batch 1, {results['dtype']}, on "
        f"{device['cpu']}, {device['threads']} threads, torch {device['torch']}\n"
    )
    columns = ["mixer", "params", *(f"{shape} ms" for shape in shapes), "exponent", "MACs", "peak MiB"]
    trained = results["train"]
    numbers = columns[1:]
    if trained:
        columns += ["network ms", "accuracy"]
        numbers = columns[1:]
    rows = []
    for row in results["mixers"]:
        by_grid = {tuple(s["grid"]): s for s in row["sizes"]}
        last = row["sizes"][-1]
        cells = [row["name"], short(last["parameters"])]
        cells += [f"{by_grid[tuple(g)]['ms']:.3g}" if tuple(g) in by_grid else "-" for g in grids]
        cells.append("-" if row["exponent"] is None else f"{row['exponent']:.2f}")
        cells += [short(last["macs"]), short(last["peak_mib"])]
        if trained:
            accuracy = row["accuracy"]
            cells.append("-" if accuracy is None else f"{row['network_ms']:.3g}")
            cells.append("-" if accuracy is None else f"{accuracy:.4f} ±{row['error']:.4f}")
        rows.append(cells)
    print_table(columns, rows, numbers=numbers)
    typer.echo(
        "exponent: of the block's time against tokens; MACs and peak memory of the block, at the largest grid run"
    )
    if trained:
        typer.echo(
            f"accuracy: {trained['epochs']:.3g} epochs ({trained['steps']} steps) of {trained['images']} images of "
            f"{trained['data']}, {trained['tested']} test images"
        )
    reasons = [(row["name"], row[key]) for row in results["mixers"] for key in ("why", "train_why") if row.get(key)]
    reasons += [(row["name"], row["why"]) for row in results["left_out"]]
    if reasons:
        typer.echo("")
        print_table(("not run", "why"), reasons, cut=("why",))
    typer.echo(f"\nwritten to {results['folder']}")
