"""Recipes: the steps that changed a model's architecture, as JSON, replayed when it is loaded.

A step is `{"step": name, …}` with plain values. Nothing is pickled: the model is built by name, the steps are applied
to it, and then the weights fit.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from torch import nn

from gossamer.io import load_weights, read_json
from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.prune import Prunable
from gossamer.models import create_model
from gossamer.models.folder import save
from gossamer.shrink import passes

__all__ = ["apply", "check_recipe", "load", "note", "read_recipe", "register_step", "replay", "save"]

Stepper = Callable[[nn.Module, dict[str, Any]], None]
_STEPS: dict[str, Stepper] = {}


def load(source: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model in a folder that `save` wrote (or in the `model` folder of a run, or a Hub repository), in eval mode.

    Args:
        model: for one that was not made by `create_model`: the module as its own code builds it, before shrinking. It
            is copied, the recipe is replayed on the copy and the weights are loaded into it.

    Raises:
        ValueError: it is none of these, or the files do not belong together.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or str(source).count("/") != 1:
            raise ValueError(f"no model folder at {source}; give a folder with config.json or a Hub name owner/name")
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    if not (folder / "recipe.json").exists() and (folder / "model" / "recipe.json").exists():
        folder = folder / "model"
    if model is not None:
        model = copy.deepcopy(model)
    else:
        if not (folder / "config.json").exists() and (folder / "recipe.json").exists():
            raise ValueError(
                f"{folder} holds weights of a module of your own; give load(folder, model=…) as you built it"
            )
        model = create_model(**read_json(folder / "config.json"))
    recipe = folder / "recipe.json"
    if recipe.exists():
        replay(model, read_json(recipe))
    model.load_state_dict(load_weights(folder / "model.safetensors"))
    return model.eval()


def read_recipe(path: str | Path) -> list[dict[str, Any]]:
    """Passes with their settings from a YAML file: a list of `{pass: name, setting: value, …}`.

    Raises:
        ValueError: no such file, or no such list in it.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Any) -> None:
    """Raises a ValueError where a recipe is no list of passes with settings."""
    if not isinstance(recipe, list) or not recipe:
        raise ValueError(f"recipe must be a list of passes, got {type(recipe).__name__}")
    for entry in recipe:
        if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
            raise ValueError(f"each line of a recipe must be like {{pass: optin, keep: 0.6}}, got {entry!r}")


def register_step(name: str) -> Callable[[Stepper], Stepper]:
    """Registers a function that carries out the steps called `name` on a model, in place."""

    def register(run: Stepper) -> Stepper:
        _STEPS[name] = run
        return run

    return register


def apply(model: nn.Module, step: dict[str, Any]) -> nn.Module:
    """Carries out one step on `model`, in place, and notes it in `model.recipe`.

    Raises:
        ValueError: no such step, or it does not fit the model.
    """
    name = step.get("step")
    if name not in _STEPS:
        # Steps are registered by the files of their passes.
        for found in pkgutil.iter_modules(passes.__path__):
            importlib.import_module(f"{passes.__name__}.{found.name}")
    if name not in _STEPS:
        raise ValueError(f"step must be one of {sorted(_STEPS)}, got {name!r}")
    _STEPS[name](model, step)
    note(model, step)
    return model


def note(model: nn.Module, step: dict[str, Any]) -> None:
    """Notes a step that was carried out already."""
    setattr(model, "recipe", [*getattr(model, "recipe", []), step])  # noqa: B010 (a plain attribute of a module)


def replay(model: nn.Module, recipe: list[dict[str, Any]]) -> nn.Module:
    """Carries out all steps of `recipe` in order."""
    for step in recipe:
        apply(model, step)
    return model


@register_step("prune")
def _prune(model: nn.Module, step: dict[str, Any]) -> None:
    part = model.get_submodule(step["part"])
    if not isinstance(part, Prunable):
        raise ValueError(f"{step['part']} ({type(part).__name__}) states no pruning rule")
    index = torch.tensor(step["keep"], dtype=torch.long)
    width = part.widths()[step["axis"]]
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= width:
        raise ValueError(f"keep must hold members of 0 … {width - 1} of {step['part']}.{step['axis']}")
    part.keep(step["axis"], index)


@register_step("fold_batch_norm")
def _fold(model: nn.Module, step: dict[str, Any]) -> None:
    fold_batch_norm(model)
