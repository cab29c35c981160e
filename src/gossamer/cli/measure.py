"""`gossamer measure MODEL`: what a model costs on this device, beside what was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import AsJson, InputSize
from gossamer.cli.show import print_json, print_table
from gossamer.cli.subject import model_and_inputs
from gossamer.cli.units import parse_duration, parse_positive, short

if TYPE_CHECKING:
    from torch import Tensor, nn

MakeForm = Callable[[tuple["Tensor", ...]], Callable[[], object]]

FORMS = ("eager", "compiled", "onnx")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or the folder of a saved one.")],
    size: InputSize = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to time, with commas between.")] = "1,16",
    forms: Annotated[str, typer.Option(help="What to time, of eager, compiled, onnx.")] = ",".join(FORMS),
    time: Annotated[str, typer.Option(help="Timing for each batch size, all forms together.")] = "3s",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Add a row for each module.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure parameters, MACs, latency, memory, size and energy of a model on this device."""
    batches = [parse_positive(part, "batch") for part in batch.split(",")]
    seconds = parse_duration(time)
    wanted = [form.strip() for form in forms.split(",")]
    if not set(wanted) <= set(FORMS):
        raise ValueError(f"forms must be among {', '.join(FORMS)}; got {forms!r}")

    from gossamer import catalogue
    from gossamer.measure import measure_model

    module, inputs = model_and_inputs(model, size)
    with TemporaryDirectory() as folder:
        result = measure_model(
            module,
            inputs,
            batches=batches,
            forms=[form for form in wanted if form != "onnx"],
            extra_forms={"onnx": _onnx(module, inputs, Path(folder) / "model.onnx")} if "onnx" in wanted else None,
            budget_s=seconds,
            per_layer=per_layer,
        )
    result = {"model": model, "published": catalogue.published(model), **result}
    if as_json:
        print_json(result)
    else:
        _print(result)


def _onnx(module: nn.Module, sample: tuple[Tensor, ...], path: Path) -> MakeForm:
    """ONNX Runtime as a form to time: what `gossamer export` writes, exported when first asked for."""
    names = [f"input_{i}" for i in range(len(sample))]

    def make(inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        from gossamer.io import export_onnx, onnx_session

        if not path.exists():
            certificate = export_onnx(module, sample, path, input_names=names)
            if not certificate.passed:
                raise ValueError(certificate.reason)
        session = onnx_session(path)
        used = {node.name for node in session.get_inputs()}  # an input the model does not read is left out
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True) if name in used}
        return lambda: session.run(None, feed)

    return make


def _print(result: dict[str, Any]) -> None:
    published, device = result["published"], result["device"]
    shape = ", ".join("x".join(map(str, s[1:])) for s in result["input"])
    typer.echo(f"{result['model']} on {device['cpu']}, {device['threads']} threads, input {shape}, {result['dtype']}")
    typer.echo(f"torch {device['torch']}, onnxruntime {device['onnxruntime']}, {device['os']}\n")
    params = published and published.params_m and published.params_m * 1e6
    macs = published and published.macs_g and published.macs_g * 1e9
    rows = [
        ("parameters", short(result["parameters"], 4), short(params, 4)),
        ("MACs", short(result["macs"], 4), short(macs, 4)),
        ("MACs, second counter", short(result["macs_second"], 4), ""),
        ("size", f"{result['size_mb']:.3g} MB", ""),
        ("peak memory", f"{result['peak_memory']['mib']:.3g} MiB", ""),
        ("energy (estimate)", f"{result['energy']['mj']:.3g} mJ", ""),
    ]
    print_table(("", "measured", "published"), rows, numbers=("measured", "published"))
    if published:
        size = "x".join(map(str, published.input)) if isinstance(published.input, list) else published.input
        typer.echo(
            f"published at input {size}: {published.headline}" + (f" ({published.note})" if published.note else "")
        )
    if result["macs_warning"]:
        typer.echo(f"warning: {result['macs_warning']}")
    if result["macs_uncounted"]:
        typer.echo(f"not counted as MACs: {', '.join(result['macs_uncounted'])}")
    typer.echo("")
    print_table(
        ("form", "batch", "median ms", "95 % interval", "p10-p90", "runs", "per sample ms"),
        [
            (
                row["form"],
                row["batch"],
                f"{row['median_ms']:.4g}",
                f"{row['low_ms']:.4g} to {row['high_ms']:.4g}",
                f"{row['p10_ms']:.4g} to {row['p90_ms']:.4g}",
                row["runs"],
                f"{row['median_ms'] / row['batch']:.4g}",
            )
            for row in result["latency"]
            if "error" not in row
        ],
        numbers=("batch", "median ms", "runs", "per sample ms"),
    )
    for row in result["latency"]:
        if "error" in row:
            typer.echo(f"{row['form']} at batch {row['batch']} failed: {row['error']}")
    typer.echo(result["energy"]["formula"])
    if "layers" in result:
        typer.echo("")
        print_table(
            ("module", "type", "params", "MACs"),
            [
                (row["name"] or "(all)", row["type"], short(row["parameters"]), short(row["macs"]))
                for row in result["layers"]
            ],
            numbers=("params", "MACs"),
            cut=("module",),
        )
