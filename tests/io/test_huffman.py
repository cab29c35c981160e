"""Huffman: as short as the entropy allows, read back exactly, and damage is seen."""

import time

import numpy as np
import pytest

from gossamer.io.huffman import LONGEST, code_bits, code_lengths, entropy, huffman_decode, huffman_encode


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    fibonacci = [1, 1]
    while len(fibonacci) < 24:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    return {
        "even": rng.integers(0, 256, 5000).astype(np.uint8),
        "peaked": np.clip(rng.normal(16, 3, 4097), 0, 31).astype(np.uint8),
        "nearly one": (rng.random(3000) < 0.002).astype(np.uint8),
        "one": np.full(1500, 7, np.uint8),
        "few": np.array([3, 200, 3], np.uint8),
        "long codes": rng.permutation(np.repeat(np.arange(24), fibonacci)).astype(np.uint8),
        "whole pieces": rng.integers(0, 5, 2048).astype(np.uint8),
        "nothing": np.zeros(0, np.uint8),
    }


@pytest.mark.parametrize("name", samples())
def test_size_is_between_the_entropy_and_a_bit_more_and_decoding_is_exact(name):
    numbers = samples()[name]
    stream = huffman_encode(numbers)
    found, used = huffman_decode(stream + b"more")
    assert np.array_equal(found, numbers)
    assert used == len(stream)
    bits = code_bits(numbers)
    if len(numbers):
        assert entropy(numbers) - 1e-9 <= bits <= entropy(numbers) + 1
    # Head, half a byte a symbol, 16 bits a piece, the codes.
    symbols = int(numbers.max(initial=0)) + 1
    pieces = -(-len(numbers) // 1024)
    assert len(stream) == 10 + -(-symbols // 2) + 2 * pieces + int(np.ceil(round(bits * len(numbers)) / 8))


def test_lengths_are_the_best_of_all_prefix_codes_and_none_is_longer_than_the_table():
    counts = np.array([5, 9, 12, 13, 16, 45])
    assert code_lengths(counts).tolist() == [4, 4, 3, 3, 3, 1]
    doubling = 2 ** np.arange(30)
    lengths = code_lengths(doubling)
    assert lengths.max() == LONGEST
    assert (0.5**lengths).sum() == 1.0
    assert code_lengths(np.array([0, 4, 0])).tolist() == [0, 1, 0]


def test_a_million_numbers_are_coded_side_by_side():
    numbers = np.clip(np.random.default_rng(1).normal(16, 4, 10**6), 0, 31).astype(np.uint8)
    stream = huffman_encode(numbers)
    begun = time.process_time()
    assert np.array_equal(huffman_decode(stream)[0], numbers)
    print(f"{time.process_time() - begun:.2f} s")


def test_damage_is_a_value_error():
    numbers = samples()["peaked"]
    stream = huffman_encode(numbers)
    for broken in (stream[:5], stream[:40], stream[:-30], stream[:10] + b"\x11" * 16 + stream[26:]):
        with pytest.raises(ValueError, match="stream"):
            huffman_decode(broken)
