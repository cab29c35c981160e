"""Gossamer: efficient transformers built from shared parts and picked by budget on your own device.

The names below are found when they are first used, so that `import gossamer` loads nothing heavy.

- every floor is a module of its own (`gossamer.models`, `gossamer.fit`, `gossamer.measure`, ...)
- the names used most are here as well: `gossamer.create_model("swin_t")`
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "create_mixer": "gossamer.mixers",
    "create_model": "gossamer.models",
    "create_task": "gossamer.tasks",
    "export_onnx": "gossamer.io",
    "list_mixers": "gossamer.mixers",
    "list_models": "gossamer.models",
    "load": "gossamer.shrink.recipe",
    "load_official": "gossamer.models",
    "model_card": "gossamer.models",
    "read_dataset": "gossamer.data",
    "save": "gossamer.shrink.recipe",
}
_FLOORS = (
    "bench",
    "catalogue",
    "data",
    "fit",
    "io",
    "layers",
    "measure",
    "mixers",
    "models",
    "ops",
    "search",
    "shrink",
    "tasks",
    "train",
    "trunks",
)

__all__ = ["__version__", *_HOME, *_FLOORS]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _FLOORS:
        return import_module(f"gossamer.{name}")
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
