"""What the words MODEL and `--input` of a command mean: a module, and one sample of what it reads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.units import parse_shape

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["model_and_inputs"]

CLIP = 16
"""Frames of a clip where the user does not say."""


def model_and_inputs(name: str, shape: str | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model `name` built for inputs of `shape`, in evaluation mode, and one random sample, batch first.

    Args:
        name: a model's name, or a folder that holds a saved model (a run of `gossamer fit` among them).
        shape: `CxHxW` for images, `CxTxHxW` for clips, `N` tokens for text, `LxC` steps and channels for series; None
            takes the size the model has by itself.

    Raises:
        ValueError: no such model, or a shape of another kind than the model reads.
    """
    import torch

    from gossamer.models import create_model

    size = parse_shape(shape) if shape is not None else None
    folder = _saved(name)
    if folder is not None:
        from gossamer.shrink.recipe import load

        model = load(folder)
        config: Any = model.config
        settings = _settings(config)
    else:
        settings = _settings({"name": name})
        wanted = _overrides(settings, size)
        try:
            model = create_model(name, **wanted)
        except ValueError:
            if size is None or settings.get("pad") is not False:
                raise
            wanted["pad"] = True  # the form that takes images of any size
            model = create_model(name, **wanted)
        settings = _settings({"name": name, **wanted})
    torch.manual_seed(0)
    return model.eval(), _sample(settings, size)


def _saved(name: str) -> Path | None:
    for folder in (Path(name) / "model", Path(name)):
        if (folder / "config.json").is_file():
            return folder
    if "/" in name or name.startswith("."):
        raise ValueError(f"{name} is no folder of a saved model: there is no config.json in it")
    return None


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Every keyword of the builder with the value it has for this model."""
    from gossamer import catalogue
    from gossamer.models.registry import system

    entry = system(catalogue.find(config["name"]).slug)
    defaults = {k: p.default for k, p in inspect.signature(entry.build).parameters.items()}
    given = {k: v for k, v in config.items() if k in defaults}
    return {**defaults, **entry.variants.get(config["name"], {}), **given}


def _kind(settings: dict[str, Any]) -> str:
    # A builder of both image and text models takes text where a vocabulary is set, clips where `video` is.
    if settings.get("video"):
        return "video"
    for kind, key in (("text", "vocab_size"), ("image", "img_size"), ("series", "seq_len")):
        if settings.get(key):
            return kind
    raise ValueError(f"cannot tell what this model reads from its settings: {', '.join(settings)}")


def _overrides(settings: dict[str, Any], size: tuple[int, ...] | None) -> dict[str, Any]:
    """The settings that have to change for inputs of `size`."""
    if size is None:
        return {}
    kind = _kind(settings)
    axes = {
        "image": (3, "CxHxW, like 3x224x224"),
        "video": (4, "CxTxHxW, like 3x16x224x224"),
        "text": (1, "N tokens, like 128"),
        "series": (2, "LxC, like 96x7"),
    }
    count, words = axes[kind]
    if len(size) != count:
        raise ValueError(f"input must be {words}, for this {kind} model; got {'x'.join(map(str, size))}")
    if kind in ("image", "video"):
        wanted: dict[str, Any] = {"in_chans": size[0], "img_size": size[-2:]}
        same = {"in_chans": settings.get("in_chans"), "img_size": _pair(settings["img_size"])}
    elif kind == "text":
        wanted, same = {"max_len": size[0]}, {"max_len": settings.get("max_len")}
    else:
        wanted = {"seq_len": size[0], "channels": size[1]}
        same = {key: settings.get(key) for key in wanted}
    return {key: value for key, value in wanted.items() if key in settings and value != same[key]}


def _sample(settings: dict[str, Any], size: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    import torch

    from gossamer.layers.series import calendar_features

    kind = _kind(settings)
    if kind in ("image", "video"):
        frames = (CLIP,) if kind == "video" else ()
        return (torch.randn(1, *(size or (settings.get("in_chans", 3), *frames, *_pair(settings["img_size"])))),)
    if kind == "text":
        tokens = size[0] if size else settings["max_len"]
        # Token 0 is padding: a sample of it would measure masked work.
        return (torch.randint(1, settings["vocab_size"], (1, tokens)),)
    steps, channels = size or (settings["seq_len"], settings["channels"])
    marks = settings.get("marks") or calendar_features(settings.get("freq", "h"))
    # Between -0.5 and 0.5, as calendar features are; whole-number calendars read all of it as 0.
    calendar = torch.rand(1, steps + settings["pred_len"], marks) - 0.5
    return torch.randn(1, steps, channels), calendar


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)
