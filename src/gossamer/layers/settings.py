"""Settings of builders, held to their annotations: a wrong one ends in a sentence that names it.

- a whole number is at least 1, unless its default says that 0 means something, or it is one of those known to
- dropout is a share below 1, every other number is finite, ratios are positive
- a sequence is empty only where its default is
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_DROPS = re.compile(r"(^|_)drop(_path)?$")
_RATIOS = re.compile(r"(^|_)ratios?$")
# Counts of what need not be there, though by default it is. Numbers of words and layers are not counts.
_FROM_ZERO = {
    *("attention_blocks", "conv", "depths", "extra", "global_tokens", "label_len", "last", "local_stages", "marks"),
    *("num_classes", "random", "split", "stem", "stripes"),
}


def check_settings(known: Mapping[str, inspect.Parameter], settings: Mapping[str, Any]) -> None:
    """Refuses the first of `settings` that is not what its parameter is annotated to be.

    Args:
        known: parameters by name, their annotations as objects.

    Raises:
        ValueError: a setting of another kind, or out of range; the message names it and says what is allowed.
    """
    for name, value in settings.items():
        if name not in known:
            continue
        hint, default = known[name].annotation, known[name].default
        if not is_a(value, hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {value!r}")
        if isinstance(value, list | tuple) and not value and default != ():
            raise ValueError(f"{name} must have an entry at least, got {value!r}")
        whole = "int" in str(hint) and "float" not in str(hint)
        least = 0 if name in _FROM_ZERO or 0 in _numbers(default) else 1
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {value!r}")
            if whole and number < least and not name.endswith(("_id", "_layers")):
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
            if _DROPS.search(name) and not 0 <= number < 1:
                raise ValueError(f"{name} must be in 0..1, and below 1, got {value!r}")
            if _RATIOS.search(name) and number <= 0:
                raise ValueError(f"{name} must be positive, got {value!r}")


def _numbers(value: Any) -> list[Any]:
    """The numbers of a setting: itself, or its entries."""
    entries = value if isinstance(value, list | tuple) else (value,)
    return [v for v in entries if isinstance(v, Real) and not isinstance(v, bool)]


def is_a(value: Any, hint: Any) -> bool:
    """Whether a setting is what an annotation says; what is no number, name or sequence is let through."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(is_a(value, arg) for arg in args)
    if kind is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint is int or hint is float:
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if kind is Callable:
        return callable(value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind is tuple and Ellipsis not in args:
        return isinstance(value, Sequence) and len(value) == len(args) and all(map(is_a, value, args))
    if kind in (Sequence, tuple):
        return isinstance(value, Sequence) and not isinstance(value, str) and all(is_a(v, args[0]) for v in value)
    return True


def _words(hint: Any) -> str:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_words(arg) for arg in args)
    if kind is Literal:
        return " or ".join(map(str, args))
    if kind is tuple and Ellipsis not in args:
        return f"{len(args)} entries, each {_words(args[0])}"
    if kind in (Sequence, tuple):
        return f"a sequence, each {_words(args[0])}"
    if kind is Callable:
        return "a function"
    if kind in (dict, Mapping):
        return "a mapping"
    plain = {int: "a whole number", float: "a number", bool: "True or False", str: "a name", NoneType: "None"}
    return plain.get(hint, "settings of their own")
