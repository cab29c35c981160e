"""A model as a folder: `config.json` (name and overrides), `recipe.json` (what shrinking changed), `model.safetensors`.

Loading, which replays the recipe, is `gossamer.shrink.recipe.load`: the steps belong to the shrinking passes.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gossamer.io import save_weights, write_json


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes `model`, made by `create_model` and perhaps shrunk, to `folder`.

    Raises:
        ValueError: the model has no `config`, so it could not be built again.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError("model has no config; only models made by create_model (or load) can be saved as a folder")
    folder = Path(folder)
    write_json(folder / "config.json", config)
    write_json(folder / "recipe.json", getattr(model, "recipe", []))
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder
