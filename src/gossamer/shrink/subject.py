"""What the user brings: a model in any of the forms they have it in, and data read the way that model wants them.

- a run folder of `gossamer train` or `gossamer fit`, or a folder of `gossamer.save`
- a name, with the authors' checkpoint as weights
- a folder of Hugging Face transformers, or a timm model as an object: the same function built of our parts
- any other `nn.Module`: kept as it is; passes that need our parts say so
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import catalogue
from gossamer.data import Dataset, read_dataset
from gossamer.data.base import Split, listing
from gossamer.data.builtin import BUILTINS
from gossamer.data.images import image_meta, luma
from gossamer.data.read import UnknownOption
from gossamer.io import read_json
from gossamer.models import create_model, load_official
from gossamer.models.folder import built_by_name
from gossamer.models.registry import config_of, system
from gossamer.models.timm import from_timm
from gossamer.models.transformers import is_transformers_folder, preprocessing, read_transformers
from gossamer.shrink.recipe import load, replay
from gossamer.tasks import create_task
from gossamer.tasks.base import Task

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
LOOKED_AT = 32  # training images by which a normalisation is chosen
BETTER = 0.1  # by this share of the loss, and of all answers, another than the data's own has to be


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
        pixels: mean and std of images it may have been trained with, where that is not known.
    """

    name: str
    model: nn.Module
    origin: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    pixels: tuple[list[float], list[float]] = IMAGENET


def open_subject(model: str | Path | nn.Module, weights: str | Path | None = None) -> Subject:
    """The model a user means; see the head of this file.

    Raises:
        ValueError: nothing of this name, a name without weights, or a folder that cannot be read.
    """
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError(f"weights are for a model given by name, got a {type(model).__name__}; load them into it")
        if next(model.parameters(), None) is None:
            raise ValueError(f"model must have weights, {type(model).__name__} has none")
        if built_by_name(model):
            known = config_of(model)
            return Subject(known["name"], model.eval(), "gossamer", _reading(known))
        said: Any = getattr(model, "pretrained_cfg", None)  # of timm's models
        said = said if isinstance(said, dict) else {}
        pixels = (list(said["mean"]), list(said["std"])) if {"mean", "std"} <= set(said) else IMAGENET
        try:
            ours = from_timm(model)
        except ValueError:  # of a known class, with a setting our parts do not have: it stays what it is
            ours = None
        if ours is not None:
            wants = _reading(getattr(ours, "config", {}))
            return Subject(type(model).__name__, ours, "timm", wants, pixels=pixels)
        if not hasattr(model, "recipe"):
            model.recipe = []  # type: ignore[assignment]
        wants = {"image_size": tuple(said["input_size"][1:])} if said.get("fixed_input_size") else {}
        return Subject(type(model).__name__, model.eval(), "module", wants, pixels=pixels)
    folder = Path(model)
    if folder.is_dir():
        if weights is not None:
            raise ValueError(f"weights are for a model given by name, got the folder {folder}, which has its own")
        return _from_folder(folder)
    name = str(model)
    if folder.exists():
        raise ValueError(f"model must be a folder or a name, {name} is a file; the authors' checkpoint goes to weights")
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
    known = ("config.json", "recipe.json")
    if not any((place / name).exists() for place in (folder, folder / "model") for name in known):
        raise ValueError(
            f"{folder} holds no model: no config.json; give the folder of a run, of gossamer.save or of Hugging Face "
            "transformers"
        )
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
        ValueError: the data do not fit the model: another task, another number of classes, or no tokenizer.
    """
    settings = settings_of(config_of(subject.model)) if built_by_name(subject.model) else {}
    asked = {k: v for k, v in options.items() if v is not None}
    wanted = {**subject.options, **asked}
    limits = (wanted.pop("most_tokens", None), settings.get("max_len"))
    most = min((limit for limit in limits if limit), default=None)
    if source in BUILTINS:
        wanted.pop("image_size", None)  # built-in images come in one size
    try:
        data = read_dataset(source, task=task, seed=seed, **wanted)
    except UnknownOption:
        # The model wants images and these are texts, or the like; read as they are, they say what they are.
        data = read_dataset(source, task=task, seed=seed, **asked)
    _check_kind(subject, settings, data, source)
    if most is not None and data.spec.get("max_len", 0) > most:
        data = read_dataset(source, task=task, seed=seed, **{**wanted, "max_len": most})
    if "vocab_size" in data.spec and settings.get("vocab_size"):
        if "tokenizer" not in wanted:
            raise ValueError("the model reads tokens and came without its tokenizer; give --tokenizer FILE")
        if settings["vocab_size"] < data.spec["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {data.spec['vocab_size']} tokens, the model knows {settings['vocab_size']}"
            )
    if "in_chans" in data.spec:
        first = next((m.in_channels for m in subject.model.modules() if isinstance(m, nn.Conv2d)), None)
        _colours_alike(data, settings.get("in_chans", first))
        channels = data.spec["in_chans"]
        if settings.get("in_chans", channels) != channels:
            raise ValueError(f"the model reads {settings['in_chans']} channels, the images have {channels}")
        said = {k: v for k, v in subject.meta.items() if k in ("mean", "std")}
        data.meta |= {k: list(v) * channels if len(v) == 1 else list(v) for k, v in said.items()}
    if "img_size" in data.spec and settings.get("img_size"):
        side = settings["img_size"]
        size = (side, side) if isinstance(side, int) else tuple(side)
        if size != tuple(data.spec["img_size"]):
            raise ValueError(f"the model reads images of {size}, the data are {tuple(data.spec['img_size'])}")
    if "pad_id" in data.spec and "pad_id" in settings:
        _pad_alike(data, settings["pad_id"])
    if settings.get("num_classes", 1):
        _named_alike(data, subject.meta.get("classes"))
    classes = data.spec.get("num_classes")
    if classes and "num_classes" in settings and settings["num_classes"] != classes:
        if settings["num_classes"]:
            named = f" ({listing(subject.meta['classes'])})" if "classes" in subject.meta else ""
            raise ValueError(
                f"the model has {settings['num_classes']} classes{named}, the data have {classes} "
                f"({listing(data.meta['classes'])})"
            )
        subject.model = with_head(subject.model, classes)
        subject.trained = False
    if "img_size" in data.spec and subject.trained and not {"mean", "std"} <= set(subject.meta):
        _pixels_as_trained(subject, data)
    return data


def _check_kind(subject: Subject, settings: dict[str, Any], data: Dataset, source: str) -> None:
    """Refuses data of another kind than a model of ours reads or answers."""
    for key, what in (("vocab_size", "texts"), ("img_size", "images"), ("seq_len", "series")):
        if key in data.spec and settings and not settings.get(key):
            raise ValueError(f"{source} are {what}, which {subject.name} does not read")
    if not settings:
        return
    name = config_of(subject.model)["name"]
    known = system(catalogue.find(name).slug).tasks
    words = "language-modelling"
    if known and (words not in known if data.task == words else set(known) == {words}):
        raise ValueError(f"{source} is read for {data.task}; {subject.name} ({name}) is for {', '.join(known)}")
    if data.task == "sentence-similarity" and settings.get("num_classes"):
        raise ValueError(
            f"{source} is read for sentence-similarity, which is judged by vectors; {subject.name} answers with "
            f"{settings['num_classes']} classes"
        )


@torch.no_grad()
def _pixels_as_trained(subject: Subject, data: Dataset) -> None:
    """Normalises images as the model knows them best, where nothing says how it was trained.

    Tried are the data's own mean and deviation, those of `subject.pixels`, and none. Another than the data's own must
    have a lower loss and more right answers on training images, by a share of `BETTER`.
    """
    channels = data.spec["in_chans"]
    index = torch.linspace(0, len(data.train) - 1, min(LOOKED_AT, len(data.train))).long()
    own = (data.meta["mean"], data.meta["std"])
    named, plain = subject.pixels, ([0.0] * channels, [1.0] * channels)
    found = []
    for mean, std in (own, named, plain):
        if len(mean) != channels:
            continue
        task = create_task(data.task, data.spec, {**data.meta, "mean": mean, "std": std})
        inputs, target = task.batch(data.train, index)
        try:
            said = task.metrics(subject.model.eval()(*inputs), target)
        except Exception:  # what is wrong with it, `check_answers` says
            return
        found.append((said["nll"], said["accuracy"], mean, std))
    loss, right, *_ = found[0]
    best = min(found)
    if best[0] < (1 - BETTER) * loss and best[1] > right + BETTER:
        data.meta |= {"mean": list(best[2]), "std": list(best[3])}
        data.problems.append(
            f"images are normalised by mean {data.meta['mean']} and deviation {data.meta['std']}, which the model "
            f"knows better than the data's own: {best[1]:.0%} instead of {right:.0%} of {len(index)} training images"
        )


def check_answers(subject: Subject, task: Task, data: Dataset) -> None:
    """Asks the model about two training items: whether it can read them, and answers what the task is judged by.

    Raises:
        ValueError: it cannot, or gives something else; the message says what came and what is wanted.
    """
    inputs, target = task.batch(data.train, torch.arange(min(2, len(data.train))))
    given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {_sizes(x.shape)}" for x in inputs)
    try:
        with torch.no_grad():
            answer = subject.model.eval()(*inputs)
    except Exception as error:  # the module may be anybody's
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"model {subject.name} cannot be asked about {data.task} data, which it is given by position as {given}: "
            f"{type(error).__name__}: {first}"
        ) from error
    wanted = task.answer_shape(inputs, target)
    if not isinstance(answer, Tensor):
        raise ValueError(
            f"model must answer with one tensor {_sizes(wanted)}, {subject.name} gives a {type(answer).__name__}; "
            "put it into a module that picks the tensor (a model of transformers: give the folder of save_pretrained)"
        )
    if len(answer.shape) != len(wanted) or any(w not in (None, n) for n, w in zip(answer.shape, wanted, strict=True)):
        raise ValueError(
            f"model must answer {data.task} of {given} with {_sizes(wanted)}, {subject.name} gives "
            f"{_sizes(answer.shape)}"
        )
    if not torch.isfinite(answer).all():
        raise ValueError(f"model {subject.name} answers with NaN or infinity")


def _sizes(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """A model of ours that ends in vectors, with an untrained classifier on top."""
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    name = config.pop("name")
    if "classifier" in settings_of({"name": name}):
        config["classifier"] = "linear"
    made = replay(create_model(name, **{**config, "num_classes": classes}), getattr(model, "recipe", []))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    made.load_state_dict({**made.state_dict(), **state})
    return made.eval()


def _named_alike(data: Dataset, classes: list[str] | None) -> None:
    """The model's classes in place of the data's, where it knows all of their names; else a word on which are which."""
    here = data.meta.get("classes")
    if not classes or not here or here == classes:
        return
    place = {name.lower(): i for i, name in enumerate(classes)}
    found = [place.get(name.lower()) for name in here]
    if None not in found and len(set(found)) == len(here) and len(place) == len(classes):
        order = torch.tensor(found)
        for split in data.splits.values():
            split.targets = order[split.targets]
        data.meta["classes"] = list(classes)
        data.spec["num_classes"] = len(classes)
    elif len(here) == len(classes):
        data.problems.append(
            f"the model's classes {listing(classes)} have other names than the data's {listing(here)}; they are taken "
            "for each other in this order"
        )


def _colours_alike(data: Dataset, channels: int | None) -> None:
    """Grey images as three equal channels for a model of colours, and colours as luma for one of grey."""
    if {channels, data.spec["in_chans"]} != {1, 3}:
        return
    for split in data.splits.values():
        x = split.inputs[0]
        # A view: batches are made of it one by one.
        split.inputs = (x.expand(-1, 3, -1, -1) if channels == 3 else luma(x), *split.inputs[1:])
    data.spec["in_chans"] = channels
    data.meta |= image_meta(data.train, data.meta["classes"], data.meta["flip"])


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
