"""`gossamer predict`: the exported model of a run on new inputs of the same kind, by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gossamer.io import read_json
from gossamer.shrink.artefacts import ExportedModel
from gossamer.tasks import create_task


def predict(run: str | Path, inputs: list[str]) -> list[dict[str, Any]]:
    """One answer an input: a class with its probability, or a forecast.

    Args:
        run: folder of a finished fit.
        inputs: image files, texts (or text files), or CSV files with the last steps of a series.

    Raises:
        ValueError: the folder holds no finished run, or an input cannot be read.
    """
    folder = Path(run)
    if not (folder / "model.onnx").exists() or not (folder / "task.json").exists():
        raise ValueError(f"{folder} holds no finished fit: model.onnx and task.json are not both there")
    kept = read_json(folder / "task.json")
    task = create_task(kept["task"], kept["spec"], kept["meta"])
    model = ExportedModel(folder / "model.onnx")
    with torch.no_grad():
        return task.describe(model(*task.read(inputs)))
