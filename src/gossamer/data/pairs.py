"""Pairs of sentences with a score of how alike they are, as in STS-B: tables to token ids.

- pairs that share sentences are not parted when a split is taken from training, unless nearly all hang together
- both sentences are tokenised alike, by the model's own tokenizer where it has one
- scores are scaled to 0 … 1 by the range of the training data; metrics do not depend on it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from gossamer.data.base import DataError, Dataset, Split, listing
from gossamer.data.columns import look, numbers
from gossamer.data.splits import digest, make_plan, split_record
from gossamer.data.tables import Table
from gossamer.data.text import length_for, load_tokenizer, pad_token, padded, text_cells, tokenised, train_tokenizer

LARGEST = 0.1  # of the pairs, that one chain of shared sentences may hold; with larger ones no fair split is left
BINS = 5  # of the scores, so that splits have the same share of each


def pair_dataset(
    tables: Mapping[str, list[Table]],
    *,
    seed: int,
    tokenizer: str | Path | None = None,
    max_len: int | None = None,
) -> Dataset:
    """The tables of each given split as one data set of sentence pairs.

    Args:
        tables: by split; `train` must be there.
        seed: of the splits we make.
        tokenizer: a `tokenizers` JSON file to use in place of a trained one.
        max_len: tokens of a sentence; by default covers 99 % of the training sentences, at most 512.

    Raises:
        DataError: not two columns of texts and one of numbers, or a missing or empty cell.
    """
    if "train" not in tables:
        raise DataError(f"no training split: found only {', '.join(tables)}; name one train")
    first, second, score = pair_columns(tables["train"][0])
    texts: dict[str, list[tuple[str, str]]] = {}
    scores: dict[str, np.ndarray] = {}
    for name, parts in tables.items():
        left, right = (
            [cell for table in parts for cell in text_cells(table, table.column(c))] for c in (first, second)
        )
        texts[name] = list(zip(left, right, strict=True))
        scores[name] = np.concatenate([_numbers(table, table.column(score)) for table in parts])
    low, high = float(scores["train"].min()), float(scores["train"].max())
    if low == high:
        raise DataError(f"{tables['train'][0].path}: column {score!r} holds one value only, {low:g}")
    bins = {
        name: np.clip((BINS * (v - low) / (high - low)).astype(np.int64), 0, BINS - 1) for name, v in scores.items()
    }
    keys = {
        name: np.array([digest("\n".join(pair).encode()) for pair in pairs], dtype=np.int64)
        for name, pairs in texts.items()
    }
    # Pairs that share a sentence stay together, or a held-out pair would be half known.
    groups = {name: families(pairs) for name, pairs in texts.items()}
    parted = np.bincount(groups["train"]).max() <= LARGEST * len(groups["train"])
    plan = make_plan(bins, groups if parted else keys, seed)
    parts_of = {name: [texts[given][i] for i in index] for name, (given, index) in plan.parts.items()}
    flat = {name: [text for pair in pairs for text in pair] for name, pairs in parts_of.items()}
    coder = load_tokenizer(Path(tokenizer)) if tokenizer is not None else train_tokenizer(flat["train"], flat["val"])
    pad_id = pad_token(coder)
    if max_len is None:
        max_len = length_for(tokenised(coder, flat["train"], pad_id))
    splits = {}
    for name, (given, index) in plan.parts.items():
        ids = padded(tokenised(coder, flat[name], pad_id, max_len), max_len, pad_id).view(-1, 2, max_len)
        targets = torch.from_numpy((scores[given][index] - low) / (high - low)).float()
        splits[name] = Split((ids,), targets, [f"{a} | {b}" for a, b in parts_of[name]])
    meta = {
        "columns": [first, second, score],
        "range": [low, high],
        "tokenizer": coder.to_str(),
        "max_len": max_len,
        "pad_id": pad_id,
        "split": split_record(plan, keys, seed),
    }
    spec = {"vocab_size": coder.get_vocab_size(), "max_len": max_len, "pad_id": pad_id}
    return Dataset("sentence-similarity", splits["train"], splits["val"], splits["test"], spec, meta)


def families(pairs: list[tuple[str, str]]) -> np.ndarray:
    """int64 `(n,)`: the same number for pairs that a chain of shared sentences connects."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known: dict[str, int] = {}
    ends = np.array([[known.setdefault(text, len(known)) for text in pair] for pair in pairs], dtype=np.int64)
    links = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(known), len(known)))
    return connected_components(links, directed=False)[1][ends[:, 0]].astype(np.int64)


def pair_columns(table: Table) -> tuple[str, str, str]:
    """Names of the two columns of texts and the one of scores.

    Raises:
        DataError: they cannot be told.
    """
    columns = look(table)
    texts = [c.name for c in columns if c.kind == "text"]
    scores = [c.name for c in columns if c.name not in texts and np.isfinite(numbers(table.frame[c.name])).mean() > 0.5]
    if len(texts) != 2 or len(scores) != 1:
        seen = listing([str(c) for c in columns], 12)
        raise DataError(f"{table.path}: sentence pairs need two columns of texts and one of scores; seen: {seen}")
    return texts[0], texts[1], scores[0]


def _numbers(table: Table, column: str) -> np.ndarray:
    values = numbers(table.frame[column])
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{table.where(int(bad[0]), column)}: the score is missing ({len(bad)} such rows)")
    return values
