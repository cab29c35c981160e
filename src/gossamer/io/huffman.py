"""Huffman coding of small numbers: a stream of bytes, read back exactly.

Source: Huffman 1952, "A Method for the Construction of Minimum-Redundancy Codes"; Larmore and Hirschberg 1990, "A Fast
Algorithm for Optimal Length-Limited Huffman Codes" (package-merge).

- codes are canonical, so that their lengths are all that is stored of them; 15 bits at most, so that a table of 2^15
  entries decodes any of them in one look
- a stream is cut into pieces of 1024 numbers whose lengths stand in front (0.016 bits a number); all pieces are decoded
  side by side, so that a million numbers take some thousand operations of NumPy
- layout, little-endian: count (8 bytes), symbols (2 bytes), lengths (half a byte each), bits of each piece (2 bytes
  each), the codes, highest bit first
"""

from __future__ import annotations

import struct

import numpy as np
from jaxtyping import Int, UInt8

LONGEST = 15
PIECE = 1024
SYMBOLS = 256
_HEAD = struct.Struct("<QH")


def code_lengths(counts: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Bits of each symbol's code: of all prefix codes of at most 15 bits, the shortest in sum; 0 where it never comes.

    One symbol alone has a code of one bit.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    # Package-merge: at each depth coins of the symbols are merged with pairs of the depth below; a symbol's code is as
    # long as the number of depths that its coin is among the cheapest 2 (n - 1) of.
    coins: list[tuple[int, tuple[int, ...]]] = sorted((int(counts[s]), (int(s),)) for s in used)
    row = coins
    for _ in range(LONGEST - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2], strict=False)]
        row = sorted(coins + pairs, key=lambda coin: coin[0])
    for _, symbols in row[: 2 * (len(used) - 1)]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def _codes(lengths: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Canonical codes: shorter ones first, of equals the smaller symbol."""
    codes = np.zeros(len(lengths), dtype=np.int64)
    code, before = 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)):
        code <<= int(lengths[symbol]) - before
        codes[symbol], before = code, int(lengths[symbol])
        code += 1
    return codes


def huffman_encode(numbers: UInt8[np.ndarray, " n"]) -> bytes:
    """The stream of `numbers`."""
    counts = np.bincount(numbers, minlength=1)
    lengths = code_lengths(counts)
    codes = _codes(lengths).astype(np.uint16)
    each = lengths.astype(np.uint8)[numbers]
    ends = np.cumsum(each, dtype=np.int64)
    starts = ends - each
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    words = codes[numbers]
    for place in range(int(lengths.max(initial=0))):
        has = np.flatnonzero(each > place)
        bits[starts[has] + place] = (words[has] >> (each[has] - 1 - place)) & 1
    last = ends[np.minimum(np.arange(PIECE, len(numbers) + PIECE, PIECE), len(numbers)) - 1] if len(ends) else ends
    pieces = np.diff(last, prepend=0).astype("<u2")
    nibbles = np.pad(lengths.astype(np.uint8), (0, len(lengths) % 2)).reshape(-1, 2)
    table = (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8)
    head = _HEAD.pack(len(numbers), len(lengths))
    return b"".join((head, table.tobytes(), pieces.tobytes(), np.packbits(bits).tobytes()))


def huffman_decode(stream: bytes) -> tuple[UInt8[np.ndarray, " n"], int]:
    """The numbers at the start of `stream`, and the bytes they took.

    Raises:
        ValueError: it is no stream that `huffman_encode` wrote.
    """
    if len(stream) < _HEAD.size:
        raise ValueError(f"stream must hold at least {_HEAD.size} bytes, got {len(stream)}")
    count, symbols = _HEAD.unpack_from(stream)
    number = -(-count // PIECE)
    table, pieces = _HEAD.size + -(-symbols // 2), 2 * number
    if symbols > SYMBOLS or len(stream) < table + pieces or count > 8 * len(stream):
        raise ValueError(f"stream is cut off or damaged: {len(stream)} bytes for {count} numbers of {symbols} kinds")
    nibbles = np.frombuffer(stream, np.uint8, -(-symbols // 2), _HEAD.size)
    lengths = np.stack((nibbles & 15, nibbles >> 4), 1).reshape(-1)[:symbols].astype(np.int64)
    sizes = np.frombuffer(stream, "<u2", number, table).astype(np.int64)
    ends = np.cumsum(sizes)
    begin = table + pieces
    used = -(-int(ends[-1]) // 8) if number else 0
    if len(stream) < begin + used or float((0.5 ** lengths[lengths > 0]).sum()) > 1:
        raise ValueError(f"stream is cut off or damaged: {len(stream)} bytes, {begin + used} are needed")
    # What the next 15 bits begin with: the symbol in the low byte, the length of its code above.
    look = np.zeros(1 << LONGEST, dtype=np.uint16)
    for symbol, code in enumerate(_codes(lengths)):
        if lengths[symbol]:
            free = LONGEST - int(lengths[symbol])
            look[int(code) << free : (int(code) + 1) << free] = symbol | int(lengths[symbol]) << 8
    packed = np.frombuffer(stream, np.uint8, used, begin)
    wide = np.concatenate((packed, np.zeros(3, np.uint8))).astype(np.uint32)
    words = wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]
    place = ends - sizes
    found = np.zeros((PIECE, number), dtype=np.uint8)
    for i in range(min(PIECE, count)):
        # The last piece may be shorter than the others.
        live = number if i < (count - 1) % PIECE + 1 else number - 1
        at = np.minimum(place[:live], 8 * used)
        seen = look[(words[at >> 3] >> (24 - LONGEST - (at & 7)).astype(np.uint32)) & ((1 << LONGEST) - 1)]
        found[i, :live] = seen & 255
        place[:live] += seen >> 8
    if not np.array_equal(place, ends):
        raise ValueError("stream is damaged: the codes of a piece do not end where it says")
    return found.T.reshape(-1)[:count].copy(), begin + used


def entropy(numbers: UInt8[np.ndarray, " n"]) -> float:
    """Bits a number that no code by single numbers can fall below: `-sum p log2 p`."""
    counts = np.bincount(numbers)
    shares = counts[counts > 0] / max(1, len(numbers))
    return float(-(shares * np.log2(shares)).sum())


def code_bits(numbers: UInt8[np.ndarray, " n"]) -> float:
    """Bits a number of the codes alone, in the mean."""
    counts = np.bincount(numbers, minlength=1)
    return float((counts * code_lengths(counts)).sum() / max(1, len(numbers)))
