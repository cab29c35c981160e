"""What the columns of a table are: times, numbers, texts or labels.

- a text column holds several words a cell, mostly different ones
- a label column holds few different short values
- a time column parses as dates, mostly different ones, or is a number with a telling name that parses as one
- a name (`label`, `text`, `date` and their like) decides where the values leave several columns possible
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gossamer.data.base import DataError, listing
from gossamer.data.tables import Table

LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "polarity", "emotion",
    "rating", "stars", "y", "tag", "type",
)  # fmt: skip
TEXT_NAMES = (
    "text", "sentence", "review", "content", "document", "message", "comment", "tweet", "utterance", "question",
    "body", "description", "article", "phrase", "headline", "title",
)  # fmt: skip
TIME_NAMES = ("date", "time", "datetime", "timestamp", "ds", "day", "month", "year", "epoch", "unix")
MOST_CLASSES = 200
SAMPLE = 2000  # rows looked at to tell a column's kind


@dataclass
class Column:
    """What is seen of one column: `kind` is time, number, text, label or other."""

    name: str
    kind: str
    distinct: int
    words: float

    def __str__(self) -> str:
        return f"{self.name!r} ({self.kind}, {self.distinct} different)"


def is_missing(values: pd.Series) -> np.ndarray:
    """Boolean `(rows,)`: empty cells, blanks and the usual words for nothing."""
    missing = values.isna().to_numpy(dtype=bool, copy=True)
    if values.dtype == object or pd.api.types.is_string_dtype(values):
        doubtful = np.flatnonzero(~np.isfinite(numbers(values)) & ~missing)
        cells = values.iloc[doubtful].tolist()
        missing[doubtful] = [isinstance(cell, str) and cell.strip().lower() in BLANKS for cell in cells]
    return missing


BLANKS = frozenset(("", "nan", "na", "n/a", "null", "none", "#n/a"))


def numbers(values: pd.Series) -> np.ndarray:
    """float64 `(rows,)`; NaN where a cell is no number."""
    if pd.api.types.is_bool_dtype(values):
        return np.full(len(values), np.nan)
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def times(values: pd.Series, name: str, day_first: bool = False) -> pd.Series:
    """The cells as timestamps without zone; NaT where a cell is none.

    Whole numbers are times only under a telling name: years, dates like 20240131, seconds or milliseconds since 1970.
    """
    nothing = pd.Series(pd.NaT, index=values.index, dtype="datetime64[ns]")
    if pd.api.types.is_datetime64_any_dtype(values):
        return values.dt.tz_localize(None) if getattr(values.dt, "tz", None) is not None else values
    plain = numbers(values)
    if np.isfinite(plain).mean() > 0.5:
        if not any(word in name.lower() for word in TIME_NAMES):
            return nothing
        size = np.nanmedian(np.abs(plain))
        steps = np.where(np.isfinite(plain) & (plain % 1 == 0), plain, -1).astype(np.int64)
        whole = pd.Series(steps, index=values.index)
        for low, high, form in ((1000, 3000, "%Y"), (190_001, 220_000, "%Y%m"), (1.9e7, 2.2e7, "%Y%m%d")):
            if low <= size < high:
                return pd.to_datetime(whole.astype(str), format=form, errors="coerce")
        for low, nanoseconds in ((1e17, 1), (1e14, 1e3), (1e11, 1e6), (1e8, 1e9)):
            if size >= low:
                return pd.to_datetime((whole * int(nanoseconds)).where(whole >= 0), errors="coerce")
        return nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas says when it cannot guess one format; it then reads cell by cell
        try:
            parsed = pd.to_datetime(values.astype(str), errors="coerce", dayfirst=day_first)
            if getattr(parsed.dt, "tz", None) is not None:
                parsed = parsed.dt.tz_localize(None)
        except (ValueError, TypeError, AttributeError):  # zones that differ from row to row
            parsed = pd.to_datetime(values.astype(str), errors="coerce", utc=True).dt.tz_localize(None)
    return parsed


def look(table: Table) -> list[Column]:
    """The kind of every column of a table."""
    return [describe(table.frame[name], str(name)) for name in table.frame.columns]


def describe(values: pd.Series, name: str) -> Column:
    rows = len(values)
    sample = values.iloc[np.linspace(0, rows - 1, min(rows, SAMPLE)).astype(int)]
    sample = sample[~is_missing(sample)]
    try:
        distinct = int(values.nunique())
    except TypeError:  # lists or objects in a JSON cell
        return Column(name, "other", rows, 0.0)
    if len(sample) == 0:
        return Column(name, "other", distinct, 0.0)
    strings = sample.astype(str)
    words = float(np.mean([len(cell.split()) for cell in strings]))
    few = 2 <= distinct <= min(MOST_CLASSES, max(2, rows // 3))
    short = float(strings.str.len().mean()) <= 40 and words <= 5
    numeric = np.isfinite(numbers(sample)).mean()
    # Parsing prose as dates is slow, so a few cells say whether the others are worth it.
    dated = any(
        times(sample.iloc[:20], name, day_first).notna().mean() > 0.5
        and times(sample, name, day_first).notna().mean() > 0.9
        for day_first in (False, True)
    )
    if dated and distinct > min(rows, SAMPLE) // 2:
        return Column(name, "time", distinct, words)
    if dated and numeric <= 0.5 and strings.str.contains(r"\d").mean() > 0.9:
        return Column(name, "other", distinct, words)  # the day of something, over and over
    if numeric > 0.5:
        plain_numbers = numbers(sample)
        whole = not (plain_numbers[np.isfinite(plain_numbers)] % 1).any()
        return Column(name, "label" if few and whole and distinct <= 50 else "number", distinct, words)
    if few and short and not (name.lower() in TEXT_NAMES and words >= 3):
        return Column(name, "label", distinct, words)
    wordy = words >= 2 or float(strings.str.len().mean()) >= 12 or name.lower() in TEXT_NAMES
    return Column(name, "text" if wordy else "other", distinct, words)


def pick(columns: list[Column], kinds: tuple[str, ...], names: tuple[str, ...]) -> list[Column]:
    """Columns of these kinds that are possible: the first of `names` among them if there is one, else all."""
    fit = [column for column in columns if column.kind in kinds]
    for name in names:
        for column in fit:
            if column.name.lower() == name:
                return [column]
    return fit


def text_and_label(table: Table, text: str | int | None, label: str | int | None) -> tuple[str, str]:
    """Names of the text column and the label column, as asked for or as seen.

    Raises:
        DataError: a column asked for is missing, or none or several columns are possible.
    """
    columns = look(table)
    seen = f"seen: {listing([str(c) for c in columns], 12)}"
    label = None if label is None else table.column(label)
    text = None if text is None else table.column(text)
    if text is None:
        found = [c for c in pick(columns, ("text",), TEXT_NAMES) if c.name != label]
        if not found:
            found = [c for c in columns if c.name != label and c.name.lower() in TEXT_NAMES]
        if len(found) != 1:
            what = "no column of texts" if not found else "several columns of texts"
            raise DataError(f"{table.path}: {what}; say which with text=COLUMN (--text-column); {seen}")
        text = found[0].name
    if label is None:
        found = [c for c in pick(columns, ("label",), LABEL_NAMES) if c.name != text]
        if not found:
            found = [c for c in columns if c.name != text and c.name.lower() in LABEL_NAMES[:5]]
        if len(found) != 1:
            what = "no column of labels" if not found else "several columns could be the label"
            raise DataError(f"{table.path}: {what}; say which with label=COLUMN (--label-column); {seen}")
        label = found[0].name
    if text == label:
        raise DataError(f"{table.path}: text and label are both column {text!r}")
    return text, label


def label_strings(table: Table, name: str) -> list[str]:
    """The labels as text; whole numbers without a decimal point.

    Raises:
        DataError: a cell without label, with its row.
    """
    values = table.frame[name]
    missing = values.isna().to_numpy(dtype=bool) | values.map(lambda v: isinstance(v, str) and not v.strip()).to_numpy(
        dtype=bool
    )
    if missing.any():
        row = int(missing.argmax())
        raise DataError(
            f"{table.where(row, name)}: the label is missing ({missing.sum()} such rows); fill in or remove the row"
        )
    return [plain(value) for value in values.tolist()]


def plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
