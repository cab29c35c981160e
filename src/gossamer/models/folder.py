"""A model as a folder: `config.json` (name and overrides), `recipe.json` (what shrinking changed), `model.safetensors`.

Loading, which replays the recipe, is `gossamer.shrink.recipe.load`: the steps belong to the shrinking passes.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gossamer.io import save_weights, write_json
from gossamer.models.registry import config_of


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes `model`, made by `create_model` and perhaps shrunk, to `folder`.

    Raises:
        ValueError: the model was not made by `create_model`, so it could not be built again.
    """
    folder = Path(folder)
    write_json(folder / "config.json", config_of(model))
    write_json(folder / "recipe.json", getattr(model, "recipe", []))
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder
