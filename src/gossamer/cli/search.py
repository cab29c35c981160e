"""`gossamer search efficientformer DATA`: a network shape for this device's own latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gossamer.cli.options import AsJson, Data, Seed
from gossamer.cli.show import print_json, print_table
from gossamer.cli.units import parse_budget, parse_duration, short

app = typer.Typer(help="Search network shapes by latencies measured on this device.", no_args_is_help=True)


@app.callback()
def _searches() -> None:
    pass


@app.command("efficientformer")
def efficientformer(
    data: Data,
    budget: Annotated[str, typer.Option(help="Latency of the exported network, like latency=2ms.")],
    out: Annotated[Path, typer.Option(help="Folder of the search; the same one goes on where it was.")],
    time: Annotated[str, typer.Option(help="Wall-clock time for everything, like 20m.")] = "20m",
    size: Annotated[Literal["xs", "s", "m", "l"], typer.Option(help="Size of the supernet.")] = "m",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Latency-driven slimming: train a supernet, take out what saves most for least, train what is left."""
    limits = parse_budget(budget)
    if set(limits) != {"latency"}:
        raise ValueError(f"budget must be a latency alone, like latency=2ms; got {budget!r}")
    seconds = parse_duration(time)

    from gossamer.search import slim_efficientformer

    result = slim_efficientformer(
        data,
        latency_ms=limits["latency"],
        seconds=seconds,
        out=out,
        size=size,
        seed=seed,
        tell=(lambda text: None) if as_json else typer.echo,
    )
    if as_json:
        print_json(result)
        return
    rows = [(m["move"], f"{m['ms']:.3f}", f"{m['saved_ms']:.3f}", f"{m['drop']:.4f}") for m in result["moves"]]
    print_table(("move", "latency ms", "saved ms", "rise of the loss"), rows, numbers=("latency ms", "saved ms"))
    shape = result["config"]
    typer.echo(
        f"\nwidths {shape['widths']}, depths {shape['depths']}, {shape['attention_blocks']} attention blocks: "
        f"{short(result['params'])} parameters, {short(result['macs'])} MACs\n"
        f"latency  {result['measured_ms']:.3f} ms measured, {result['predicted_ms']:.3f} ms by the table\n"
        f"test     accuracy {result['test']['accuracy']:.4f}  (validation {result['val']['accuracy']:.4f})\n"
        f"written to {out}"
    )
