"""Text classification: rows of a table to token ids, by a tokenizer trained on the training split.

- lower-cased words by default, byte-pair pieces where too many held-out words would be unknown: on SST-2 (6,228
  training texts, 9 % unknown words) whole words serve a bag-of-embeddings classifier better than any pieces
- 0 is padding, 1 an unknown token; nothing is added in front or behind: class tokens are a model's own business
- the tokenizer is JSON inside `meta`, so a run can be used on new text without its data
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gossamer.data.base import DataError, Dataset, Split, class_names, class_numbers, listing
from gossamer.data.columns import label_strings, plain, text_and_label
from gossamer.data.splits import digest, duplicate_problems, make_plan, split_record
from gossamer.data.tables import Table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 512
MOST_UNKNOWN = 0.12


def text_dataset(
    tables: Mapping[str, list[Table]],
    *,
    seed: int,
    text: str | int | None = None,
    label: str | int | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    max_len: int | None = None,
) -> Dataset:
    """The tables of each given split as one data set.

    Args:
        tables: by split; `train` must be there.
        seed: of the splits we make.
        text: column of the texts; by default seen from the data.
        label: column of the labels; by default seen from the data.
        tokenizer: a `tokenizers` JSON file to use in place of a trained one.
        vocab_size: of the trained tokenizer; by default grown with the data, at most 16,384.
        max_len: tokens; by default covers 99 % of the training texts, at most 512.

    Raises:
        DataError: a missing column or cell, an empty text, a label unknown to training, one class only.
    """
    if "train" not in tables:
        raise DataError(f"no training split: found only {', '.join(tables)}; name one train")
    text, label = text_and_label(tables["train"][0], text, label)
    texts: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for name, parts in tables.items():
        texts[name] = [cell for table in parts for cell in text_cells(table, table.column(text))]
        labels[name] = [cell for table in parts for cell in label_strings(table, table.column(label))]
    classes = class_names(set(labels["train"]))
    check_labels(tables, labels, label, classes)
    numbers = {name: class_numbers(values, classes).numpy() for name, values in labels.items()}
    keys = {name: np.array([digest(t.encode()) for t in values], dtype=np.int64) for name, values in texts.items()}
    plan = make_plan(numbers, keys, seed)

    parts_of = {name: [texts[given][i] for i in index] for name, (given, index) in plan.parts.items()}
    if tokenizer is None:
        coder = train_tokenizer(parts_of["train"], parts_of["val"], vocab_size)
    else:
        coder = load_tokenizer(Path(tokenizer))
    pad_id = pad_token(coder)
    tokens = {name: tokenised(coder, part, pad_id) for name, part in parts_of.items()}
    lengths = [len(row) for row in tokens["train"]]
    if max_len is None:
        max_len = length_for(tokens["train"])
    if coder.post_processor is not None:
        tokens = {name: tokenised(coder, part, pad_id, max_len) for name, part in parts_of.items()}
    splits = {}
    for name, (given, index) in plan.parts.items():
        ids = padded(tokens[name], max_len, pad_id)
        splits[name] = Split((ids,), torch.from_numpy(numbers[given][index].astype(np.int64)), parts_of[name])
    meta = {
        "classes": classes,
        "text": text,
        "label": label,
        "tokenizer": coder.to_str(),
        "max_len": max_len,
        "pad_id": pad_id,
        "unk_id": coder.token_to_id("[UNK]"),
        "split": split_record(plan, keys, seed),
    }
    spec = {
        "vocab_size": coder.get_vocab_size(),
        "max_len": max_len,
        "num_classes": len(classes),
        "pad_id": pad_id,
    }
    problems = duplicate_problems(numbers, keys, classes)
    if cut := sum(n > max_len for n in lengths):
        problems.append(f"{cut} of {len(lengths)} training texts are longer than {max_len} tokens and are cut")
    return Dataset("text-classification", splits["train"], splits["val"], splits["test"], spec, meta, problems)


def text_cells(table: Table, column: str) -> list[str]:
    """The texts of one table.

    Raises:
        DataError: a missing or empty text, with its row.
    """
    values = table.frame[column].tolist()
    bad = [i for i, v in enumerate(values) if v is None or v != v or not str(v).strip()]
    if bad:
        others = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise DataError(f"{table.where(bad[0], column)}: the text is empty{others}; fill in or remove the row")
    return [str(v).strip() for v in values]


def check_labels(
    tables: Mapping[str, list[Table]], labels: Mapping[str, list[str]], column: str, classes: list[str]
) -> None:
    """DataError for one class only, labels that are no classes, and labels unknown to training."""
    path, rows = tables["train"][0].path, len(labels["train"])
    if len(classes) < 2:
        raise DataError(f"{path}: column {column!r} holds one class only, {classes[0]!r}; two or more are needed")
    if len(classes) > max(20, rows // 2):
        raise DataError(
            f"{path}: column {column!r} has {len(classes)} different values in {rows} rows, too many to be classes; "
            "say which column is the label with label=COLUMN (--label-column)"
        )
    known = set(classes)
    for name in labels:
        for table in tables[name]:
            cells = [plain(v) for v in table.frame[table.column(column)].tolist()]
            row = next((i for i, cell in enumerate(cells) if cell not in known), None)
            if row is not None:
                raise DataError(
                    f"{table.where(row, column)}: label {cells[row]!r} is never seen in training; known are "
                    f"{listing(classes)}; correct it, or add training rows of this class"
                )


def train_tokenizer(texts: list[str], held: list[str], vocab_size: int | None = None) -> Tokenizer:
    """A lower-casing tokenizer of training `texts`: whole words, or byte-pair pieces where words are not enough.

    Words seen twice or more make the vocabulary. If more than `MOST_UNKNOWN` of the words of the `held` texts are not
    in it (rich inflection, compounds, slips of the pen, little data), rare words are cut into pieces instead.
    The vocabulary is at most `vocab_size`: by default 8,192, and 16,384 from 50,000 texts on.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]"]
    size = vocab_size or (8192 if len(texts) < 50_000 else 16_384)
    words = pre_tokenizers.BertPreTokenizer()
    # A mark at the start of each word, not "##" inside: trainers with a prefix break ties by chance.
    marked = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(prepend_scheme="always")])
    ways: list[tuple[Any, Any, Any]] = [
        (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, words),
        (models.BPE(unk_token="[UNK]", fuse_unk=True), trainers.BpeTrainer, marked),
    ]
    for model, trainer, cut in ways:
        coder = Tokenizer(model)
        coder.normalizer = normalizers.BertNormalizer(lowercase=True)
        coder.pre_tokenizer = cut
        how = trainer(vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False)
        coder.train_from_iterator(texts, how, length=len(texts))
        ids = np.array([i for e in coder.encode_batch(held[:5000]) for i in e.ids])
        if np.mean(ids == coder.token_to_id("[UNK]")) <= MOST_UNKNOWN:
            break
    return coder


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a JSON file of the `tokenizers` library.

    Raises:
        DataError: no such file, or no such content.
    """
    from tokenizers import Tokenizer

    try:
        coder = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for anything it cannot parse
        raise DataError(f"tokenizer {path}: not a tokenizer JSON file ({error})") from error
    coder.no_padding()
    coder.no_truncation()
    return coder


def tokenised(coder: Tokenizer, texts: list[str], pad_id: int, longest: int | None = None) -> list[np.ndarray]:
    """Token ids of each text; a text without any token becomes one unknown token.

    With `longest`, texts are cut inside the tokens a tokenizer puts in front and behind, which stay.
    """
    unknown = coder.token_to_id("[UNK]")
    nothing = [pad_id + 1 if unknown is None else unknown]
    rows = []
    if longest is not None:
        coder.enable_truncation(longest)
    for start in range(0, len(texts), 4096):
        for encoding in coder.encode_batch(texts[start : start + 4096]):
            rows.append(np.array(encoding.ids or nothing, dtype=np.int32))
    coder.no_truncation()
    return rows


def pad_token(coder: Tokenizer) -> int:
    """The id that stands for no word: the tokenizer's padding token, else 0."""
    found = (coder.token_to_id(name) for name in ("[PAD]", "<pad>", "<|pad|>"))
    return next((i for i in found if i is not None), 0)


def length_for(rows: list[np.ndarray], most: int = LONGEST) -> int:
    """Tokens, a multiple of 8, that 99 % of the texts are within; at most `most`."""
    return min(most, max(8, 8 * int(np.ceil(np.percentile([len(row) for row in rows], 99) / 8))))


def padded(rows: list[np.ndarray], max_len: int, pad_id: int) -> Int[Tensor, "n len"]:
    """Ids cut at `max_len` and filled with `pad_id`."""
    ids = np.full((len(rows), max_len), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row[:max_len]
    return torch.from_numpy(ids)


def encode(coder: Tokenizer, texts: list[str], max_len: int, pad_id: int) -> Int[Tensor, "n len"]:
    """Token ids of texts, cut at `max_len` and filled with `pad_id`."""
    return padded(tokenised(coder, texts, pad_id, max_len), max_len, pad_id)
