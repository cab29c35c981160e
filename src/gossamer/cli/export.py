"""`gossamer export MODEL`: an ONNX file with its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gossamer.cli.options import AsJson, InputSize
from gossamer.cli.show import print_json
from gossamer.cli.subject import model_and_inputs


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or the folder of a saved one.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    size: InputSize = None,
    dynamic: Annotated[
        Literal["batch", "size", "none"], typer.Option(help="What may vary when the file is run.")
    ] = "batch",
    weights: Annotated[
        Path | None, typer.Option(help="The authors' released weights to load first; random ones otherwise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, run the file, and say how it compares."""
    from gossamer.io import export_onnx

    module, inputs = model_and_inputs(model, size)
    if weights is not None:
        from gossamer.models import load_official

        load_official(module, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    certificate = export_onnx(module, inputs, out, dynamic=None if dynamic == "none" else dynamic).to_dict()
    if as_json:
        print_json(certificate)
    else:
        _print(certificate)
    if not certificate["passed"]:
        raise typer.Exit(1)


def _print(certificate: dict[str, Any]) -> None:
    shapes = " and ".join("+".join("x".join(map(str, one)) for one in shape) for shape in certificate["shapes"])
    lines = {
        "file": f"{certificate['path']} ({certificate['size_mb']:.3g} MB, opset {certificate['opset']})",
        "certificate": "passed" if certificate["passed"] else "NOT passed",
        "dynamic": f"{certificate['held'] or 'none'} (asked for: {certificate['requested'] or 'none'})",
        "run at": shapes,
        "difference": f"{certificate['max_abs']:.2g} at most, {certificate['max_rel']:.2g} of the largest output",
        "because": certificate["reason"],
        "warnings": "; ".join(certificate["warnings"]),
        "versions": ", ".join(f"{name} {version}" for name, version in certificate["versions"].items()),
    }
    for label, value in lines.items():
        if value:
            typer.echo(f"{label:12} {value}")
