"""`gossamer bench models`: score cards of models side by side, and which of them another one dominates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import AsJson, Seed, Tokenizer
from gossamer.cli.show import print_json, print_table
from gossamer.cli.subject import model_and_inputs
from gossamer.cli.units import parse_duration, short

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["command"]


def command(
    names: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Names of models, runs, and folders of saved models.")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Data whose test part says how good each is; saved models only.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option("--input", help="Input sizes with commas between, like 3x32x32,3x224x224.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits that the device computes in, for energy: 32, 16, 8 or 4.")] = 32,
    costs: Annotated[
        str | None, typer.Option(help="pJ of the device, for energy: mac=4.6,dram=160,sram=1.25 (the last two a byte).")
    ] = None,
    time: Annotated[str, typer.Option(help="Wall-clock time for timing, like 10s.")] = "10s",
    out: Annotated[Path, typer.Option(help="Folder for results.json and models.svg.")] = Path("runs/models"),
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score cards: accuracy, parameters, bytes, multiply-adds, activations, latency and energy of each model."""
    from gossamer.bench.score import DTYPES, bench_models

    seconds = parse_duration(time)
    if bits not in DTYPES:
        raise ValueError(f"bits must be one of {', '.join(map(str, DTYPES))}; got {bits}")
    if data is not None and sizes is not None:
        raise ValueError("give --input or --data: with data, the inputs are those that each model reads of them")
    models: dict[str, tuple[nn.Module, Tensor | tuple[Tensor, ...]]] = {}
    accuracies: dict[str, float | None] = {}
    metric = "accuracy"
    for name in dict.fromkeys(names):
        if data is not None:
            models[name], accuracies[name], metric = _judged(name, data, tokenizer, seed)
            continue
        for size in [None] if sizes is None else [s.strip() for s in sizes.split(",")]:
            models[name if size is None else f"{name} {size}"] = model_and_inputs(name, size)
    results = bench_models(
        models,
        accuracies,
        out=out,
        metric=metric,
        bits=bits,
        costs=None if costs is None else _costs(costs, DTYPES[bits]),
        seconds=seconds,
    )
    if as_json:
        print_json(results)
    else:
        _print(results)


def _judged(
    name: str, source: str, tokenizer: str | None, seed: int
) -> tuple[tuple[nn.Module, tuple[Tensor, ...]], float, str]:
    """A saved model with a sample of the data as it reads them, and how good it is on their test part."""
    from gossamer.shrink.subject import open_subject, read_for
    from gossamer.tasks import create_task
    from gossamer.train.trainer import model_outputs

    subject = open_subject(name)
    read = read_for(subject, source, task=None, seed=seed, options={"tokenizer": tokenizer})
    task = create_task(read.task, read.spec, read.meta)
    value = float(task.metrics(*model_outputs(subject.model, task, read.test))[task.metric])
    words = task.metric if task.maximise else f"-{task.metric}"
    return (subject.model, task.example(read.train)), value if task.maximise else -value, words


def _costs(text: str, dtype: str) -> Any:
    from gossamer.measure import EnergyCosts

    given = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    try:
        values = {key: float(value) for key, value in given.items()}
    except ValueError:
        values = {}
    if set(values) != {"mac", "dram", "sram"}:
        raise ValueError(f"costs must be like mac=4.6,dram=160,sram=1.25; got {text!r}")
    return EnergyCosts.exactly({dtype: values["mac"]}, dram=values["dram"], sram=values["sram"])


def _print(results: dict[str, Any]) -> None:
    device = results["device"]
    typer.echo(f"one input, batch 1, on {device['cpu']}, {device['threads']} threads, torch {device['torch']}\n")
    scored = any(row["accuracy"] is not None for row in results["models"])
    columns = ["model", *([results["metric"]] if scored else []), "params", "MB", "MACs", "activations MB", "ms", "mJ"]
    by_name = {row["name"]: row for row in results["models"]}
    order = [*results["front"], *(name for name in by_name if name not in results["front"])]
    kept = [_cells(by_name[name], scored) for name in order if not by_name[name]["dominated_by"]]
    print_table(columns, kept, numbers=columns[1:])
    typer.echo(f"mJ: an estimate, computing in {results['models'][0]['bits']} bits; ranges in results.json")
    left = [(name, by_name[name]["dominated_by"]) for name in order if by_name[name]["dominated_by"]]
    if left:
        typer.echo("")
        print_table(("dominated", "by"), left)
    typer.echo(f"\nwritten to {results['folder']}")


def _cells(row: dict[str, Any], scored: bool) -> list[str]:
    cells = [row["name"]]
    if scored:
        cells.append("-" if row["accuracy"] is None else f"{row['accuracy']:.4f}")
    cells += [short(row["parameters"]), f"{row['bytes'] / 1e6:.3g}", short(row["macs"])]
    cells += [f"{row['peak_activations'] / 1e6:.3g}", "-" if row["latency_ms"] is None else f"{row['latency_ms']:.3g}"]
    return [*cells, f"{row['energy_mj']:.3g}"]
