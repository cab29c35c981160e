"""Plain text for language models: windows of token ids, each with the token that follows at every place.

- splits are whole stretches of text, by position: nothing of what is tested lies between things trained on
- the tokenizer is byte-level, so that no token is ever unknown, and trained on the training text; little text gives
  hardly more than its bytes
- windows follow one another without overlap, so each token but the first of a split is foretold once
- what fills up the last window is `pad_id` among the inputs and `NOTHING` among the targets, which no loss counts
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.data.base import DataError, Dataset, Split
from gossamer.data.splits import digest
from gossamer.data.text import load_tokenizer, pad_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NOTHING = -100
WINDOW = 128  # tokens, where nothing else is asked for
HELD = 0.1  # of the text, for validation and as much for the test
PIECE = 1 << 16  # characters tokenised at a time


def language_dataset(
    texts: Mapping[str, list[str]],
    *,
    seed: int,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    max_len: int | None = None,
) -> Dataset:
    """The texts of each given split as one data set.

    Without a test split the validation split is the test, and without either both are taken from the end of training.

    Args:
        texts: by split; `train` must be there.
        seed: kept with the split record; splits by position leave nothing to chance.
        tokenizer: a `tokenizers` JSON file to use in place of a trained one.
        vocab_size: of the trained tokenizer; by default grown with the text, 512 to 8,192.
        max_len: tokens of a window, 128 by default, fewer where the text is short.

    Raises:
        DataError: no training split, or too little text to split.
        ValueError: `max_len` or `vocab_size` is too small.
    """
    if "train" not in texts:
        raise DataError(f"no training split: found only {', '.join(texts)}; name one train")
    if max_len is not None and max_len < 2:
        raise ValueError(f"max_len must be at least 2, got {max_len}")
    parts, how = _parts({name: "\n".join(given) for name, given in texts.items()})
    if tokenizer is not None:
        coder = load_tokenizer(Path(tokenizer))
    else:
        coder = train_byte_pairs(parts["train"], vocab_size)
    pad_id = pad_token(coder)
    tokens = {name: token_stream(coder, text) for name, text in parts.items()}
    shortest = min(len(ids) for ids in tokens.values())
    if shortest < 3:
        sizes = ", ".join(f"{name} {len(ids)}" for name, ids in tokens.items())
        raise DataError(f"too little text to split: tokens are {sizes}; three in each are the least")
    # Some eight windows in the smallest split, if it can be had.
    max_len = max_len or max(2, min(WINDOW, shortest // 8))
    splits = {}
    for name, ids in tokens.items():
        inputs, targets = windows(ids, max_len, pad_id)
        splits[name] = Split((inputs,), targets)
    meta = {
        "tokenizer": coder.to_str(),
        "max_len": max_len,
        "pad_id": pad_id,
        "tokens": {name: len(ids) for name, ids in tokens.items()},
        "split": {
            "seed": seed,
            "how": how,
            "sizes": {name: len(split) for name, split in splits.items()},
            "hash": f"{digest(chr(0).join(parts[name] for name in ('train', 'val', 'test')).encode()) % 2**64:016x}",
        },
    }
    spec = {"vocab_size": coder.get_vocab_size(), "max_len": max_len, "pad_id": pad_id}
    return Dataset("language-modelling", splits["train"], splits["val"], splits["test"], spec, meta)


def _parts(texts: dict[str, str]) -> tuple[dict[str, str], str]:
    """Train, val and test, and in words where they come from."""
    train = texts["train"]
    if "val" in texts and "test" in texts:
        return {name: texts[name] for name in ("train", "val", "test")}, "train, val and test as given"
    if "val" in texts or "test" in texts:
        held, named = ("val", "the given validation text is the test") if "val" in texts else ("test", "test as given")
        at = _cut(train, 1 - HELD)
        parts = {"train": train[:at], "val": train[at:], "test": texts[held]}
        return parts, f"{named}; the last tenth of train is val"
    first, second = _cut(train, 1 - 2 * HELD), _cut(train, 1 - HELD)
    parts = {"train": train[:first], "val": train[first:second], "test": train[second:]}
    return parts, "by position: four fifths train, a tenth val, the last tenth test"


def _cut(text: str, share: float) -> int:
    """The end of the line, or else of the word, at about `share` of a text."""
    at = round(len(text) * share)
    for mark in "\n ":
        found = text.find(mark, at, at + len(text) // 50)
        if found >= 0:
            return found + 1
    return at


def train_byte_pairs(text: str, vocab_size: int | None = None) -> Tokenizer:
    """A byte-level tokenizer with merges learned from `text`; 0 is padding.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size is None:
        vocab_size = min(8192, max(512, len(text) // 100))
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (bytes and padding), got {vocab_size}")
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    how = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    coder.train_from_iterator(_pieces(text), how)
    return coder


def token_stream(coder: Tokenizer, text: str) -> np.ndarray:
    """All token ids of a text, without the tokens a tokenizer puts around one."""
    encoded = coder.encode_batch(_pieces(text), add_special_tokens=False)
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(e.ids, dtype=np.int64) for e in encoded)])


def _pieces(text: str) -> list[str]:
    """A text in pieces that end where a line does, if lines are of bearable length."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
        pieces.append(text[start:end])
        start = end
    return pieces


def windows(ids: np.ndarray, length: int, pad_id: int) -> tuple[Int[Tensor, "n len"], Int[Tensor, "n len"]]:
    """A stream of tokens in rows of `length`, and the token that follows each."""
    count = -(-(len(ids) - 1) // length)
    inputs = np.full(count * length, pad_id, dtype=np.int64)
    targets = np.full(count * length, NOTHING, dtype=np.int64)
    inputs[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
    return torch.from_numpy(inputs).view(count, length), torch.from_numpy(targets).view(count, length)
