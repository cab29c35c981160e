"""A mixer by name, made the same way for every comparison."""

from __future__ import annotations

from math import log

from gossamer.mixers import Mixer, create_mixer, options_for

HEAD_WIDTH = 32


def heads_for(dim: int) -> int:
    """Heads of about 32 channels; an even number where one divides, since some mechanisms part them in halves."""
    even = [h for h in range(2, dim + 1, 2) if dim % h == 0]
    return min(even or [1], key=lambda h: abs(log(dim / h / HEAD_WIDTH)))


def make_mixer(name: str, dim: int, grid: tuple[int, ...], heads: int) -> Mixer:
    """The mixer with its paper's defaults but for `heads`, bound to `grid` where it is bound to one."""
    return create_mixer(name, dim, grid=grid, **options_for(name, {"heads": heads, "axes": len(grid)}))


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
