"""Recipes: the steps that changed a model's architecture, as JSON, replayed when it is loaded.

A step is `{"step": name, …}` with plain values. Nothing is pickled: the model is built by name, the steps are applied
to it, and then the weights fit.

The user's recipes are one floor above: passes with settings, in the order of `STAGES` (joining, then what takes parts
out, then teaching, then number formats). They are read from YAML files; those in `recipes/` are found by name.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from torch import nn

from gossamer.catalogue.techniques import STAGE_OF, STAGES
from gossamer.io import load_weights, read_json
from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.prune import Prunable
from gossamer.models import create_model
from gossamer.models.folder import built_by_name, save
from gossamer.shrink import base, passes

__all__ = [
    "apply",
    "as_written",
    "check_recipe",
    "load",
    "note",
    "presets",
    "read_recipe",
    "register_step",
    "replay",
    "restore",
    "save",
]

RECIPES = Path(__file__).parent / "recipes"
ORDERS = ("stages", "free")

Stepper = Callable[[nn.Module, dict[str, Any]], None]
_STEPS: dict[str, Stepper] = {}


def load(source: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model in a folder that `save` wrote (or in the `model` folder of a run, or a Hub repository), in eval mode.

    Args:
        model: for one that was not made by `create_model`: the module as its own code builds it, before shrinking. It
            is copied, the recipe is replayed on the copy (what its own `recipe` has of it already is not done again)
            and the weights are loaded into it.

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
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or not isinstance(config.get("name"), str):
            raise ValueError(f"{folder / 'config.json'} names no model of Gossamer; it must hold name and overrides")
        model = create_model(**config)
    recipe = folder / "recipe.json"
    if recipe.exists():
        steps, done = read_json(recipe), json.loads(json.dumps(getattr(model, "recipe", [])))
        replay(model, steps[len(done) :] if steps[: len(done)] == done else steps)
    try:
        model.load_state_dict(load_weights(folder / "model.safetensors"))
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{folder}: the weights do not fit the model that config and recipe make: {words}") from error
    return model.eval()


def restore(source: Path, origin: nn.Module) -> nn.Module:
    """The model that `save` wrote to `source` after passes on `origin`."""
    return load(source, None if built_by_name(origin) else origin)


def presets() -> list[str]:
    """Names of the recipes that come with Gossamer."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(source: str | Path) -> Any:
    """The recipe in a YAML file, or one of `presets()` by name; see `check_recipe` for its form.

    Raises:
        ValueError: no such file or name, or no recipe in it.
    """
    path = RECIPES / f"{source}.yaml" if str(source) in presets() else Path(source)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"no such file: {source}; recipes by name are {', '.join(presets())}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from None
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Any) -> list[dict[str, Any]]:
    """The lines of a recipe: `[{"pass": name, setting: value, …}, …]`, or `{"order": "free", "passes": [...]}`.

    Stages follow each other as in `gossamer.catalogue.techniques.STAGES`: a pass may not stand behind one of a later
    stage. Exact rewrites and `recover` have no stage, but nothing stands behind `int8`, which is a form of the file.
    With `order: free` any order is taken, and the answer is for the one who asked for it.

    Raises:
        ValueError: it is no recipe, a pass is unknown, or the order is wrong.
    """
    order = "stages"
    if isinstance(recipe, dict):
        if set(recipe) != {"order", "passes"} or recipe["order"] not in ORDERS:
            raise ValueError(
                f"a recipe that is no list must be like {{order: free, passes: [...]}} with order one of "
                f"{', '.join(ORDERS)}; got {recipe!r}"
            )
        order, recipe = recipe["order"], recipe["passes"]
    if not isinstance(recipe, list):
        raise ValueError(f"recipe must be a list of passes, got {type(recipe).__name__}")
    reached = ("", 0)
    for entry in recipe:
        if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
            raise ValueError(f"each line of a recipe must be like {{pass: optin, keep: 0.6}}, got {entry!r}")
        name = entry["pass"]
        stage = _stage(name)
        if order == "free":
            continue
        if reached[0] == "int8" or (stage is not None and STAGES.index(stage) < reached[1]):
            raise ValueError(
                f"recipe has {name!r} behind {reached[0]!r}; the order is {' -> '.join(STAGES)} "
                f"({_kinds()}; recover before int8). To have it otherwise: {{order: free, passes: [...]}}"
            )
        if stage is not None:
            reached = (name, STAGES.index(stage))
    return recipe


def as_written(recipe: list[dict[str, Any]]) -> Any:
    """`recipe` in the form in which `check_recipe` takes it back."""
    try:
        return check_recipe(recipe)
    except ValueError:
        return {"order": "free", "passes": recipe}


def _stage(name: str) -> str | None:
    """The stage of a pass, None for what may stand anywhere before int8.

    Raises:
        ValueError: there is no such pass.
    """
    if name == "recover":
        return None
    if name == "int8":
        return "quantise"
    try:
        return STAGE_OF.get(base.find_pass(name).family)
    except ValueError as error:
        raise ValueError(f"{error}; a recipe also takes recover and int8, in the order {' -> '.join(STAGES)}") from None


def _kinds() -> str:
    families = {p.family for p in base.passes().values()}
    kinds = {s: [f for f in STAGE_OF if STAGE_OF[f] == s and f in families] for s in STAGES}
    return "; ".join(f"{s}: {', '.join(k)}" for s, k in kinds.items() if k)


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
