"""The contract of token mixers, and their registry.

A mixer maps `(b, *grid, c)` to the same shape. It lists in its `forward` the keywords it honours, of

- `mask (b, *grid)`: True for valid tokens; invalid ones are not read
- `context (b, m, e)`: what cross-attention reads
- `state`: the decoding cache (through `initial_state` and `step`)

and any other that is given is refused.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.settings import check_settings, is_a

HONOURED = ("mask", "context")


class Mixer(nn.Module):
    """Base of every registered token mixer.

    Args:
        dim: channels.
    """

    name: ClassVar[str] = ""
    grids: ClassVar[tuple[int, ...]] = ()
    causal_form: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def __call__(self, x: Float[Tensor, "b *grid c"], **given: Any) -> Float[Tensor, "b *grid c"]:
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in self.honours:
                allowed = ", ".join(sorted(self.honours)) or "no keyword"
                raise ValueError(f"mixer {self.name!r} cannot honour {name}=; it takes {allowed}")
        if self.grids and x.ndim - 2 not in self.grids:
            raise ValueError(f"mixer {self.name!r} works on {self.grids} grid axes, got input {tuple(x.shape)}")
        return super().__call__(x, **given)

    def initial_state(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """An empty decoding state; causal mixers override it."""
        raise ValueError(f"mixer {self.name!r} has no decoding form; use one of {list_mixers(causal=True)}")

    def step(self, x_t: Float[Tensor, "b c"], state: Any) -> tuple[Float[Tensor, "b c"], Any]:
        """Position t of the full causal pass, from its token and the state after t - 1."""
        raise ValueError(f"mixer {self.name!r} has no decoding form; use one of {list_mixers(causal=True)}")


_REGISTRY: dict[str, type[Mixer]] = {}


def register_mixer(name: str, *, grids: Sequence[int], causal: bool = False) -> Callable[[type], type]:
    """Registers a mixer class under `name`.

    Args:
        grids: numbers of grid axes it works on (1 sequences, 2 images, 3 volumes and video).
        causal: it has a causal form, built with `causal=True`, that decodes step by step.
    """

    def register(cls: type[Mixer]) -> type[Mixer]:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"mixer {name!r} is registered already, by {_REGISTRY[name].__module__}")
        cls.name, cls.grids, cls.causal_form = name, tuple(grids), causal
        cls.honours = frozenset(HONOURED) & frozenset(inspect.signature(cls.forward).parameters)
        _REGISTRY[name] = cls
        return cls

    return register


def _load_all() -> None:
    package = importlib.import_module("gossamer.mixers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"gossamer.mixers.{module.name}")


def list_mixers(*, grid_axes: int | None = None, causal: bool | None = None) -> list[str]:
    """Names of the registered mixers, those that work on `grid_axes` axes or have a causal form if asked."""
    _load_all()
    return sorted(
        name
        for name, cls in _REGISTRY.items()
        if (grid_axes is None or grid_axes in cls.grids) and (causal is None or cls.causal_form == causal)
    )


def mixer_class(name: str) -> type[Mixer]:
    """The class registered under `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in _REGISTRY:
        _load_all()
    if name not in _REGISTRY:
        raise ValueError(f"mixer must be one of {sorted(_REGISTRY)}, got {name!r}")
    return _REGISTRY[name]


def mixer_keywords(name: str) -> dict[str, inspect.Parameter]:
    """The keywords of the mixer registered under `name`, with those it hands on to the class it is made from.

    Raises:
        ValueError: no such mixer.
    """
    found: dict[str, inspect.Parameter] = {}
    for cls in mixer_class(name).__mro__:
        if "__init__" in vars(cls):
            own = inspect.signature(vars(cls)["__init__"], eval_str=True).parameters
            found = {key: p for key, p in own.items() if p.kind is p.KEYWORD_ONLY} | found
            if all(p.kind is not p.VAR_KEYWORD for p in own.values()):
                break
    return found


def options_for(name: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a block's settings that the mixer registered under `name` has too, as a setting of the same kind.

    Raises:
        ValueError: no such mixer.
    """
    known = mixer_keywords(name)
    return {key: value for key, value in offered.items() if key in known and is_a(value, known[key].annotation)}


def create_mixer(name: str, dim: int, *, grid: Sequence[int] | None = None, **options: Any) -> Mixer:
    """A mixer by name.

    Args:
        dim: channels.
        grid: size of the token grid, for the mechanisms whose tables are bound to one; others ignore it.
        options: keywords of the mechanism, the paper's defaults otherwise.

    Raises:
        ValueError: no such mixer, an option it does not have or that is out of its range, or no `grid` where it is
            needed.
    """
    known, axes = mixer_keywords(name), mixer_class(name).grids
    for option in options:
        if option not in known:
            raise ValueError(f"mixer {name!r} has no option {option!r}; it has {sorted(known)}")
    if grid is not None and len(grid) not in axes:
        raise ValueError(f"mixer {name!r} works on {axes} grid axes, got grid={tuple(grid)}")
    if "grid" in known:
        if grid is None and known["grid"].default is inspect.Parameter.empty:
            raise ValueError(f"mixer {name!r} is bound to a grid; give grid=(…)")
        if grid is not None:
            options["grid"] = tuple(grid)
    check_settings({**known, **inspect.signature(Mixer).parameters}, {"dim": dim, **options})
    return mixer_class(name)(dim, **options)
