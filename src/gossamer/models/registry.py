"""Systems by name: variants, building, official weights.

A model file registers one builder with its named variants. The catalogue says which file holds a name, so nothing
is imported before it is asked for.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer import catalogue
from gossamer.io import read_checkpoint
from gossamer.layers.conv import hold_channels_last
from gossamer.layers.settings import check_settings

Rules = Sequence[tuple[str, str | None]]
State = dict[str, Tensor]


@dataclass(frozen=True)
class SystemEntry:
    """A registered system.

    Args:
        slug: its name in the catalogue.
        build: keywords to module.
        variants: published name to keywords.
        tasks: names of the tasks it can be trained for.
        rules: `(pattern, replacement)` from official keys to ours, applied in order; None drops the key.
        convert: `(model, state) -> state` for the tensors that change shape.
        scale: `(spec, size) -> (variant, keywords) | None`, a small model of this family for the data at hand.
        training: the authors' learning settings, keywords of `gossamer.train.Settings` with `epochs` and `schedule`.
    """

    slug: str
    build: Callable[..., nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...] = ()
    rules: Rules = ()
    convert: Callable[[nn.Module, State], State] | None = None
    scale: Callable[[dict[str, Any], str], tuple[str, dict[str, Any]] | None] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    doc: str = field(default="", repr=False)


_SYSTEMS: dict[str, SystemEntry] = {}


def register_system(
    slug: str,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str] = (),
    rules: Rules = (),
    convert: Callable[[nn.Module, State], State] | None = None,
    scale: Callable[[dict[str, Any], str], tuple[str, dict[str, Any]] | None] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Registers a builder as the system `slug`; see `SystemEntry` for the arguments."""

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        doc = inspect.getdoc(inspect.getmodule(build)) or ""
        _SYSTEMS[slug] = SystemEntry(
            slug, build, dict(variants), tuple(tasks), tuple(rules), convert, scale, dict(training or {}), doc
        )
        return build

    return register


def system(slug: str) -> SystemEntry:
    """The registered system `slug`, its file imported if need be.

    Raises:
        ValueError: the catalogue has no such system, or it is not built yet.
    """
    if slug not in _SYSTEMS:
        entry = catalogue.find(slug)
        if entry.module is None or entry.status == "planned":
            raise ValueError(f"system {entry.slug!r} is in the catalogue but not built yet (status {entry.status})")
        importlib.import_module(entry.module)
    if slug not in _SYSTEMS:
        raise ValueError(f"{slug!r} is no model by name: it is the work of {catalogue.find(slug).module}")
    return _SYSTEMS[slug]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model `name`, a published variant or a system's slug, with any size overridden.

    The result carries `config` (name and overrides: all that is needed to build it again).

    Raises:
        ValueError: no such name, or an override the builder does not take or that is out of its range.
    """
    entry = system(catalogue.find(name).slug)
    if name != entry.slug and name not in entry.variants:
        raise ValueError(f"{name} is published but not built; {entry.slug} has {', '.join(entry.variants)}")
    settings = {**entry.variants.get(name, {}), **{k: _tuples(v) for k, v in overrides.items()}}
    known = inspect.signature(entry.build, eval_str=True).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    check_settings(known, settings)
    model = entry.build(**settings)
    hold_channels_last(model)
    model.config = {"name": name, **overrides}  # type: ignore[assignment]
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """Name and overrides of a model that `create_model` made.

    Raises:
        ValueError: it was made otherwise.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict) or "name" not in config:
        raise ValueError(f"{type(model).__name__} was not made by create_model: it has no config")
    return config


def list_models(*, task: str | None = None) -> list[str]:
    """Names of all variants that can be built, those for `task` if given."""
    return [
        name
        for entry in catalogue.systems()
        if entry.status != "planned" and (task is None or task in entry.tasks)
        for name in entry.variants
    ]


def model_card(name: str) -> dict[str, Any]:
    """What is known of a model: system, paper, published figures, differences from the official code."""
    entry = catalogue.find(name)
    published = catalogue.published(name)
    card: dict[str, Any] = {**vars(entry), "published_here": vars(published) if published else None}
    if entry.status != "planned" and entry.variants:
        card["about"] = system(entry.slug).doc
    return card


def load_official(model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Loads the authors' released weights into `model`, strictly.

    Args:
        checkpoint: the released file, or its tensors.

    Raises:
        ValueError: keys are missing or left over, or shapes differ; the message lists them.
    """
    name = config_of(model)["name"]
    entry = system(catalogue.find(name).slug)
    raw = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    state = rename(raw, entry.rules)
    if entry.convert is not None:
        state = entry.convert(model, state)
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        report = [
            f"{len(keys)} {what}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
            for what, keys in (("missing", missing), ("left over", extra), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"checkpoint does not fit {name}: " + "; ".join(report))
    model.load_state_dict(state)
    return model


def rename(state: Mapping[str, Tensor], rules: Rules) -> State:
    """`state` with official keys turned into ours by `rules`."""
    renamed: State = {}
    for key, value in state.items():
        new: str | None = key
        for pattern, replacement in rules:
            if new is None:
                break
            if replacement is None:
                new = None if re.search(pattern, new) else new
            else:
                new = re.sub(pattern, replacement, new)
        if new is not None:
            renamed[new] = value
    return renamed


def _tuples(value: Any) -> Any:
    """Lists as tuples: settings that have been through JSON are as they were."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
