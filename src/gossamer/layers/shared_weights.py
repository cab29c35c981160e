"""Shared weights: a matrix of few distinct numbers, stored as a codebook and Huffman-coded indices.

Source: Han et al. 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
Huffman Coding".

- `k_means` finds the numbers, from evenly spaced ones on (the paper's linear start, which keeps the large weights)
- `Codebook` is the form they learn in: the gradient of a shared number is the sum of those of its weights
- `Shared` is how they are stored: one array of bytes. Where zeros are many, only the others are stored, each with the
  number of zeros before it; both streams are Huffman-coded. The shorter of the two forms is taken
- decoded once, when loaded; what is computed is the product of ever
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from gossamer.io.huffman import SYMBOLS, huffman_decode, huffman_encode
from gossamer.layers.coded import Parts

FAR = 255  # zeros that one step passes over at most; with the number itself 256 places
_HEAD = struct.Struct("<BH")
PLAIN, GAPS = 0, 1


def k_means(values: Float[Tensor, " n"], count: int, rounds: int = 40) -> Float[Tensor, " k"]:
    """`count` numbers, ascending, near which all of `values` lie: Lloyd's algorithm from evenly spaced ones on.

    Exact for one dimension: the values are sorted once, and each round costs `count` searches. A number that no value
    is nearest to stays where it is.
    """
    ordered = values.detach().double().sort().values
    sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    centres = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64, device=values.device)
    for _ in range(rounds):
        cuts = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), len(ordered))))
        size = edges.diff()
        means = sums[edges].diff() / size.clamp(min=1)
        moved = torch.where(size > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.to(values)


def nearest(values: Float[Tensor, ...], centres: Float[Tensor, " k"]) -> Int[Tensor, ...]:
    """Which of the ascending `centres` is nearest to each value."""
    return torch.searchsorted((centres[1:] + centres[:-1]) / 2, values.detach().contiguous())


class _Look(torch.autograd.Function):
    """`book[codes]`; the gradient of an entry is the sum over its members."""

    @staticmethod
    def forward(ctx: Any, book: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.size = len(book)
        return book[codes.int()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        summed = torch.bincount(codes.flatten().int(), grads[0].flatten(), minlength=ctx.size)
        return summed.to(grads[0]), None


class Codebook(nn.Module):
    """A parametrisation: the weight is `(0, centres)[codes]`, and the centres learn.

    Args:
        weight: where it starts; zeros stay zero.
        count: centres, 255 at most.
    """

    codes: Tensor

    def __init__(self, weight: Float[Tensor, ...], count: int) -> None:
        super().__init__()
        weight = weight.detach()
        kept = weight != 0
        some = weight[kept] if kept.any() else weight.flatten()[:1]
        centres = k_means(some, count)
        codes = (nearest(weight, centres) + 1) * kept
        self.centres = nn.Parameter(centres)
        self.register_buffer("codes", codes.to(torch.uint8), persistent=False)

    def forward(self, original: Tensor) -> Float[Tensor, ...]:
        book = torch.cat((self.centres.new_zeros(1), self.centres))
        return _Look.apply(book, self.codes)


class Shared:
    """Codes by a codebook, Huffman-coded; see the head of this file. Nothing to set: the weight says it all."""

    names: ClassVar[tuple[str, ...]] = ("shared",)

    def parts(self, value: Float[Tensor, ...]) -> Parts:
        """One array: form (1 byte), entries (2 bytes), entries in float32, then the streams.

        Raises:
            ValueError: more than 256 distinct numbers, zero counted.
        """
        numbers = value.detach().cpu().float().numpy().reshape(-1)
        book, codes = np.unique(numbers, return_inverse=True)
        # Zero is always entry 0, so that gaps can be told from numbers.
        book = np.concatenate(([0.0], book[book != 0])).astype("<f4")
        if len(book) > SYMBOLS:
            raise ValueError(f"value must have at most {SYMBOLS - 1} distinct numbers beside zero, got {len(book) - 1}")
        codes = np.searchsorted(book[1:], numbers).astype(np.int64) + 1
        codes[numbers == 0] = 0
        plain = huffman_encode(codes.astype(np.uint8))
        found = [_HEAD.pack(PLAIN, len(book)) + book.tobytes() + plain]
        if (codes == 0).any() and (codes != 0).any():
            steps, kept = _gaps(codes)
            streams = huffman_encode(steps) + huffman_encode(kept)
            found.append(_HEAD.pack(GAPS, len(book)) + book.tobytes() + streams)
        return {"shared": torch.frombuffer(bytearray(min(found, key=len)), dtype=torch.uint8)}

    def value(self, parts: Parts, shape: torch.Size) -> Float[Tensor, ...]:
        """The weight of that shape.

        Raises:
            ValueError: the bytes are damaged or of another size.
        """
        stream = parts["shared"].cpu().contiguous().numpy().tobytes()
        if len(stream) < _HEAD.size:
            raise ValueError(f"{len(stream)} bytes hold no codebook")
        form, entries = _HEAD.unpack_from(stream)
        begin = _HEAD.size + 4 * entries
        if len(stream) < begin or form not in (PLAIN, GAPS) or not 0 < entries <= SYMBOLS:
            raise ValueError(f"{len(stream)} bytes hold no codebook of {entries} numbers")
        book = np.frombuffer(stream, "<f4", entries, _HEAD.size)
        codes, used = huffman_decode(stream[begin:])
        if form == GAPS:
            kept, _ = huffman_decode(stream[begin + used :])
            codes = _spread(codes, kept, shape.numel())
        if len(codes) != shape.numel() or int(codes.max(initial=0)) >= entries:
            raise ValueError(f"{len(codes)} codes of {entries} numbers do not make {tuple(shape)}")
        return torch.from_numpy(book[codes]).view(shape)


def _gaps(codes: Int[np.ndarray, " n"]) -> tuple[UInt8[np.ndarray, " m"], UInt8[np.ndarray, " m"]]:
    """Zeros before each number, and the numbers; a 0 among them only takes a further step in a long row of zeros."""
    places = np.flatnonzero(codes)
    zeros = np.diff(places, prepend=-1) - 1
    more = zeros // (FAR + 1)
    last = np.cumsum(more + 1) - 1
    steps = np.full(int(last[-1]) + 1, FAR, dtype=np.uint8)
    kept = np.zeros(len(steps), dtype=np.uint8)
    steps[last], kept[last] = zeros % (FAR + 1), codes[places]
    return steps, kept


def _spread(steps: UInt8[np.ndarray, " m"], kept: UInt8[np.ndarray, " k"], count: int) -> UInt8[np.ndarray, " n"]:
    places = np.cumsum(steps.astype(np.int64) + 1) - 1
    if len(steps) != len(kept) or (len(places) and places[-1] >= count):
        raise ValueError(f"{len(steps)} steps and {len(kept)} numbers do not make {count} weights")
    codes = np.zeros(count, dtype=np.uint8)
    codes[places] = kept
    return codes
