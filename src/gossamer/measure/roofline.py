"""The roofline: what a device must take at least, by its products and by its memory.

`time >= max(MACs / peak, bytes / bandwidth)`; the two are alike at the intensity `peak / bandwidth` MACs a byte.

Source: Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for Multicore Architectures"; the
traffic of tiled attention is that of Dao et al. 2022, "FlashAttention", with its queries in whole rows.

- a bound, not a forecast: nothing is in it of caches other than the one buffer, of launches, of what is not a product
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

Bound = Literal["products", "memory"]


@dataclass(frozen=True)
class Work:
    """Multiply-adds, and bytes read from and written to main memory."""

    macs: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Multiply-adds a byte."""
        return self.macs / self.bytes

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.bytes + other.bytes)


@dataclass(frozen=True)
class Roofline:
    """A device; by default a desktop CPU of eight cores.

    Args:
        peak: multiply-adds a second.
        bandwidth: bytes a second.
        buffer: bytes of the memory on the chip that tiles of attention are held in.

    Raises:
        ValueError: a figure is not positive.
    """

    peak: float = 4e11
    bandwidth: float = 4e10
    buffer: float = 2**20

    def __post_init__(self) -> None:
        for name in ("peak", "bandwidth", "buffer"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def ridge(self) -> float:
        """The intensity from which on products are what is waited for."""
        return self.peak / self.bandwidth

    def seconds(self, work: Work) -> float:
        return max(work.macs / self.peak, work.bytes / self.bandwidth)

    def bound(self, work: Work) -> Bound:
        return "products" if work.macs / self.peak >= work.bytes / self.bandwidth else "memory"


def product(rows: int, inputs: int, outputs: int, size: float = 4) -> Work:
    """`Y (rows, outputs) = X (rows, inputs) W`, of `size` bytes a number, each read or written once."""
    numbers = rows * inputs + inputs * outputs + rows * outputs
    return Work(rows * inputs * outputs, numbers * size)


def attention(
    queries: int, keys: int, width: int, *, heads: int = 1, size: float = 4, buffer: float | None = None
) -> Work:
    """Scores and sums of values of `heads` heads of `width` channels.

    Args:
        buffer: bytes on the chip: scores never leave it, and keys and values are read once for each run of queries
            that it holds with its answers; None writes and reads the scores, and reads them again for their softmax.
    """
    macs = 2 * heads * queries * keys * width
    if buffer is None:
        numbers = 2 * queries * width + 2 * keys * width + 4 * queries * keys
    else:
        # Queries, answers, and keys and values of the same run.
        held = max(1, int(buffer / (4 * width * size)))
        numbers = 2 * queries * width + 2 * keys * width * ceil(queries / held)
    return Work(macs, heads * numbers * size)


def decoder(
    tokens: int,
    cached: int = 0,
    *,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int | None = None,
    vocab_size: int = 50257,
    size: float = 4,
    buffer: float | None = 2**20,
) -> Work:
    """A decoder that reads `tokens` after `cached` ones; the sizes of GPT-2 by default.

    One token after many is a step of decoding; all of a text after none is its first reading.
    """
    hidden = 4 * dim if hidden is None else hidden
    block = product(tokens, dim, 3 * dim, size) + product(tokens, dim, dim, size)
    block += product(tokens, dim, hidden, size) + product(tokens, hidden, dim, size)
    block += attention(tokens, cached + tokens, dim // heads, heads=heads, size=size, buffer=buffer)
    answer = product(1, dim, vocab_size, size)
    return Work(depth * block.macs + answer.macs, depth * block.bytes + answer.bytes)
