"""What the user brings: a model in any of the forms they have it in, and data read the way that model wants them.

- a run folder of `gossamer train` or `gossamer fit`, or a folder of `gossamer.save`
- a name, with the authors' checkpoint as weights
- a folder of Hugging Face transformers, or a timm model as an object: the same function built of our parts
- any other `nn.Module`: kept as it is; passes that need our parts say so
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import catalogue
from gossamer.data import Dataset, read_dataset
from gossamer.data.base import Split
from gossamer.data.builtin import BUILTINS
from gossamer.io import read_json
from gossamer.models import create_model, load_official
from gossamer.models.registry import system
from gossamer.models.timm import from_timm
from gossamer.models.transformers import is_transformers_folder, preprocessing, read_transformers
from gossamer.shrink.recipe import load


@dataclass
class Subject:
    """A model to be shrunk.

    Args:
        name: what reports call it.
        model: in eval mode.
        origin: `gossamer`, `transformers`, `timm` or `module`.
        options: keywords of `read_dataset` that make the data fit the model.
        meta: facts that replace those of the data: mean and std of images, class names in the model's order.
        trained: whether its answers mean something already; a body without a head for the task is trained first.
    """

    name: str
    model: nn.Module
    origin: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    trained: bool = True


def open_subject(model: str | Path | nn.Module, weights: str | Path | None = None) -> Subject:
    """The model a user means; see the head of this file.

    Raises:
        ValueError: nothing of this name, a name without weights, or a folder that cannot be read.
    """
    if isinstance(model, nn.Module):
        known = getattr(model, "config", None)
        if isinstance(known, dict) and "name" in known:
            return Subject(known["name"], model.eval(), "gossamer", _reading(known))
        try:
            ours = from_timm(model)
        except ValueError:  # of a known class, with a setting our parts do not have: it stays what it is
            ours = None
        if ours is not None:
            return Subject(type(model).__name__, ours, "timm", _reading(getattr(ours, "config", {})))
        if not hasattr(model, "recipe"):
            model.recipe = []  # type: ignore[assignment]
        return Subject(type(model).__name__, model.eval(), "module")
    folder = Path(model)
    if folder.is_dir():
        return _from_folder(folder)
    name = str(model)
    if "/" in name or name.startswith("."):
        raise ValueError(f"no model folder at {name}")
    if weights is None:
        catalogue.find(name)  # says which names are near, if there is none
        raise ValueError(
            f"{name} by name alone has no trained weights; give --weights FILE (the authors' checkpoint), or the "
            f"folder of a run: gossamer train {name} DATA --out DIR"
        )
    built = load_official(create_model(name), weights).eval()
    return Subject(name, built, "gossamer", _reading({"name": name}))


def _from_folder(folder: Path) -> Subject:
    if is_transformers_folder(folder):
        built = read_transformers(folder)
        wants = preprocessing(folder)
        meta: dict[str, Any] = {k: wants.pop(k) for k in ("mean", "std", "classes") if k in wants}
        return Subject(folder.resolve().name, built, "transformers", wants, meta)
    built = load(folder)
    config: dict[str, Any] = getattr(built, "config", {})
    subject = Subject(folder.resolve().name, built, "gossamer", _reading(config))
    if (folder / "run.json").exists():
        asked = read_json(folder / "run.json").get("options") or {}
        subject.options = {**asked, **subject.options}
    if (folder / "task.json").exists():
        task = read_json(folder / "task.json")
        subject.meta = {k: task["meta"][k] for k in ("mean", "std", "classes") if k in task["meta"]}
        if "tokenizer" in task["meta"]:
            file = Path(tempfile.mkdtemp(prefix="gossamer-")) / "tokenizer.json"
            file.write_text(task["meta"]["tokenizer"], encoding="utf-8")
            subject.options |= {"tokenizer": str(file)}
    return subject


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Every keyword of a model's builder with the value it has."""
    entry = system(catalogue.find(config["name"]).slug)
    defaults = {k: p.default for k, p in inspect.signature(entry.build).parameters.items()}
    return {**defaults, **entry.variants.get(config["name"], {}), **{k: v for k, v in config.items() if k in defaults}}


def _reading(config: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(config) if "name" in config else {}
    if settings.get("vocab_size"):
        return {}
    if settings.get("img_size"):
        side = settings["img_size"]
        return {"image_size": side if isinstance(side, int) else tuple(side)}
    if settings.get("seq_len"):
        return {"lookback": settings["seq_len"], "horizon": settings["pred_len"]}
    return {}


def read_for(subject: Subject, source: str, *, task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    """The data as the subject reads them; a head for their classes is put on it where it has none.

    Raises:
        ValueError: the data do not fit the model: another number of classes or channels, or no tokenizer.
    """
    wanted = {**subject.options, **{k: v for k, v in options.items() if v is not None}}
    most = wanted.pop("most_tokens", None)
    if source in BUILTINS:
        wanted.pop("image_size", None)  # built-in images come in one size
    data = read_dataset(source, task=task, seed=seed, **wanted)
    if most is not None and data.spec.get("max_len", 0) > most:
        data = read_dataset(source, task=task, seed=seed, **{**wanted, "max_len": most})
    _named_alike(data, subject.meta.get("classes"))
    data.meta |= {k: v for k, v in subject.meta.items() if k in ("mean", "std") and k in data.meta}
    config = getattr(subject.model, "config", None)
    settings = settings_of(config) if isinstance(config, dict) and "name" in config else {}
    for key, what in (("vocab_size", "texts"), ("img_size", "images"), ("seq_len", "series")):
        if key in data.spec and settings and not settings.get(key):
            raise ValueError(f"{source} are {what}, which {subject.name} does not read")
    if "vocab_size" in data.spec and settings.get("vocab_size") and "tokenizer" not in wanted:
        raise ValueError("the model reads tokens and came without its tokenizer; give --tokenizer FILE")
    if "vocab_size" in data.spec and settings.get("vocab_size", 1 << 62) < data.spec["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {data.spec['vocab_size']} tokens, the model knows {settings['vocab_size']}"
        )
    if "in_chans" in data.spec and settings.get("in_chans", data.spec["in_chans"]) != data.spec["in_chans"]:
        raise ValueError(f"the model reads {settings['in_chans']} channels, the images have {data.spec['in_chans']}")
    if "img_size" in data.spec and settings.get("img_size"):
        side = settings["img_size"]
        size = (side, side) if isinstance(side, int) else tuple(side)
        if size != tuple(data.spec["img_size"]):
            raise ValueError(f"the model reads images of {size}, the data are {tuple(data.spec['img_size'])}")
    if "pad_id" in data.spec and "pad_id" in settings:
        _pad_alike(data, settings["pad_id"])
    classes = data.spec.get("num_classes")
    if classes and "num_classes" in settings and settings["num_classes"] != classes:
        if settings["num_classes"]:
            raise ValueError(f"the model has {settings['num_classes']} classes, the data have {classes}")
        subject.model = with_head(subject.model, classes)
        subject.trained = False
    return data


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """A model of ours that ends in vectors, with an untrained classifier on top."""
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    name = config.pop("name")
    if "classifier" in settings_of({"name": name}):
        config["classifier"] = "linear"
    made = create_model(name, **{**config, "num_classes": classes})
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    made.load_state_dict({**made.state_dict(), **state})
    return made.eval()


def _named_alike(data: Dataset, classes: list[str] | None) -> None:
    """Puts the data's classes into the order of the model's, where both have the same names."""
    here = data.meta.get("classes")
    if not classes or not here or here == classes or sorted(map(str.lower, here)) != sorted(map(str.lower, classes)):
        return
    place = {name.lower(): i for i, name in enumerate(classes)}
    order = torch.tensor([place[name.lower()] for name in here])
    for split in data.splits.values():
        split.targets = order[split.targets]
    data.meta["classes"] = list(classes)


def _pad_alike(data: Dataset, pad_id: int) -> None:
    """The model's own padding id in place of the tokenizer's, where they differ."""
    old = data.spec["pad_id"]
    if old == pad_id:
        return

    def padded(split: Split) -> None:
        ids = split.inputs[0]
        # Padding is what stands at the end: an id inside a text is a word.
        tail = (ids.flip(-1) == old).cumprod(-1).flip(-1).bool()
        split.inputs = (ids.masked_fill(tail, pad_id), *split.inputs[1:])

    for split in data.splits.values():
        padded(split)
    data.spec["pad_id"] = data.meta["pad_id"] = pad_id
