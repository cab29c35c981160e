"""A model as a folder: `config.json` (name and overrides), `recipe.json` (what shrinking changed), `model.safetensors`.

Loading, which replays the recipe, is `gossamer.shrink.recipe.load`: the steps belong to the shrinking passes.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gossamer import catalogue
from gossamer.io import save_weights, write_json
from gossamer.models.registry import config_of


def built_by_name(model: nn.Module) -> bool:
    """Whether `create_model` can build this model again; a module's own `config` may be anything else."""
    config = getattr(model, "config", None)
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        return False
    try:
        catalogue.find(config["name"])
    except ValueError:
        return False
    return True


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes `model`, made by `create_model` and perhaps shrunk, to `folder`.

    A model that was made otherwise but shrunk here is written without `config.json`: its weights and recipe are then
    loaded into one built anew by its own code.

    Raises:
        ValueError: the model was neither made by `create_model` nor shrunk, so there is no way to build it again.
    """
    folder = Path(folder)
    if built_by_name(model) or not hasattr(model, "recipe"):
        write_json(folder / "config.json", config_of(model))
    write_json(folder / "recipe.json", getattr(model, "recipe", []))
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder
