"""Checks of shapes at run time that cost little: a call like one that was checked before is not checked again.

jaxtyping's decorator looks at arguments and result of every call, which is a third of the time of a test that trains.
What it finds depends on the kinds, types and sizes of what goes in and comes out, and on whole numbers and words, which
may be sizes or choices. Where all of that came before in the same function, it would find the same.
"""

import functools
import re
import threading
import types
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any

import jaxtyping
import numpy as np
import torch

check = jaxtyping.jaxtyped
LONGEST = 32  # things in a container; longer ones are looked at each time
PLAIN = (int, bool, str, types.NoneType)
ARRAYS = (torch.Tensor, torch.nn.Parameter, np.ndarray)
READ = re.compile(r"\{[^}]*[.[(]")


class Unknown(Exception):
    """What a check would look at is not told by a few properties."""


def form(thing: Any) -> Hashable:
    """All that a check of `thing` looks at.

    Raises:
        Unknown: it is long, a container of another kind, or a tensor of a tracer, whose sizes may be symbols.
    """
    kind = type(thing)
    if kind in ARRAYS:
        return kind, thing.dtype, thing.shape
    if kind in PLAIN or isinstance(thing, type):
        return kind, thing
    if kind in (list, dict) or isinstance(thing, tuple):
        if len(thing) > LONGEST:
            raise Unknown
        return kind, *map(form, thing.items() if kind is dict else thing)
    if isinstance(thing, (torch.Tensor, Sequence, Set, Mapping)):
        raise Unknown
    return kind


def once(fn: Any, typechecker: Callable[..., Any]) -> Any:
    """`fn` with jaxtyping's checks around it where a call's form is new.

    Shapes that are read from an object (`{self.size}`) are not told by the form: those are checked at each call.
    """
    if not isinstance(fn, types.FunctionType) or any(READ.search(str(a)) for a in fn.__annotations__.values()):
        return check(fn, typechecker=typechecker)
    seen: set[Hashable] = set()
    answer = threading.local()

    @functools.cache
    def whole() -> Callable[..., Any]:
        return check(fn, typechecker=typechecker)

    @functools.cache
    def result_alone() -> Callable[..., Any]:
        def given(*_: Any, **__: Any) -> Any:
            return answer.out

        # Annotations are read in the names of where `fn` was written.
        like = types.FunctionType(given.__code__, fn.__globals__, fn.__name__, None, given.__closure__)
        return check(functools.update_wrapper(like, fn), typechecker=typechecker)

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        try:
            key = tuple(map(form, args)), tuple((k, form(v)) for k, v in kwargs.items())
            known = key in seen
        except (Unknown, TypeError):  # TypeError: cannot be hashed
            return whole()(*args, **kwargs)
        out = fn(*args, **kwargs) if known else whole()(*args, **kwargs)
        try:
            pair = key, form(out)
            if known and pair not in seen:
                raise Unknown
            seen.update((key, pair))
        except (Unknown, TypeError):
            if known:
                answer.out = out
                result_alone()(*args, **kwargs)
        return out

    return checked


def install() -> None:
    """Lets the import hook of jaxtyping put these checks around what it loads from now on."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(once, typechecker=typechecker)
