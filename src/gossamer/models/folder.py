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

    A model that was made otherwise but shrunk here is written without `config.json`: its weights and recipe are then
    loaded into one built anew by its own code.

    Raises:
        ValueError: the model was neither made by `create_model` nor shrunk, so there is no way to build it again.
    """
    folder = Path(folder)
    if isinstance(getattr(model, "config", None), dict) or not hasattr(model, "recipe"):
        write_json(folder / "config.json", config_of(model))
    write_json(folder / "recipe.json", getattr(model, "recipe", []))
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder
