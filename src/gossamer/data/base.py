"""What every reader gives: a data set in three splits, ready for tensors.

- a split holds raw items (uint8 pixels, token ids, window positions); making them model-ready is the task's work
- `spec` are the keywords a model builder takes, `meta` is everything JSON-able that a run must remember
- `problems` are faults that did not stop the reading; faults that do are a `DataError`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

TASKS = ("image-classification", "text-classification", "sentence-similarity", "language-modelling", "forecasting")


class DataError(ValueError):
    """The data cannot be used as they are; the message says where the fault lies and what to do."""


@dataclass
class Split:
    """Items of one split, all tensors indexed alike.

    Args:
        inputs: images `uint8 (n, c, h, w)`; text `int64 (n, len)`; series `int64 (n,)`, the window start rows.
        targets: class numbers `(n,)`; for series the first row to forecast `(n,)`; for language models the next tokens
            `(n, len)`.
        names: where each item came from (file, text), for the report.
        shared: tensors every item reads from; for series the standardised values and the calendar marks.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    names: list[str] | None = None
    shared: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor) -> Split:
        """The items at `index`, in that order."""
        names = None if self.names is None else [self.names[i] for i in index.tolist()]
        return Split(tuple(x[index] for x in self.inputs), self.targets[index], names, self.shared)


@dataclass
class Dataset:
    """A read data set.

    Args:
        task: one of `TASKS`.
        spec: keywords of a model builder: images `img_size, in_chans, num_classes`; text `vocab_size, max_len,
            num_classes, pad_id`; series `channels, seq_len, pred_len, freq, marks`.
        meta: JSON-able facts a run keeps: classes, mean and std, tokenizer, scaler, columns, split record.
        problems: faults that did not stop the reading, one line each.
        series: standardised values, for forecasting.
        marks: calendar features of each row of `series`.
    """

    task: str
    train: Split
    val: Split
    test: Split
    spec: dict[str, Any]
    meta: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    series: Float[Tensor, "rows channels"] | None = None
    marks: Float[Tensor, "rows features"] | None = None

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}


def check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def class_numbers(labels: list[str], classes: list[str]) -> Tensor:
    """Position of each label in `classes`, int64."""
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[label] for label in labels], dtype=torch.int64)


def class_names(labels: set[str]) -> list[str]:
    """Sorted class names; by value where all are whole numbers, so that 10 follows 9."""
    if all(label.lstrip("-").isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def listing(items: list[str], most: int = 8) -> str:
    """The first `most` items in words, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
