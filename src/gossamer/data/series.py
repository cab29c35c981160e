"""Forecasting: a table with a time column to standardised values, calendar marks and windows.

Source: Zhou et al. 2020, "Informer", section 5 and its data loader: splits, scaler, windows and calendar features are
the ones the forecasting literature reports on.

- ETTh1, ETTh2, ETTm1, ETTm2 by file name: 12, 4 and 4 months of 30 days; others 70, 10 and 20 % by time
- mean and deviation of the training rows only
- a window is known by the row its forecast starts at, so models with other lookbacks predict the same targets; those
  of val and test read back over their border, and none is dropped
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.data.base import DataError, Dataset, Split, check_option, listing
from gossamer.data.columns import is_missing, look, numbers, times
from gossamer.data.tables import Table

LOOKBACK = HORIZON = 96
HOURS = 30 * 24  # rows of one ETTh month
ETT = {"etth1": 1, "etth2": 1, "ettm1": 4, "ettm2": 4}  # rows an hour

# Calendar features by frequency letter, each scaled to [-0.5, 0.5]: attribute, smallest value, span.
CALENDAR = {
    "second": ("second", 0, 59),
    "minute": ("minute", 0, 59),
    "hour": ("hour", 0, 23),
    "weekday": ("dayofweek", 0, 6),
    "day": ("day", 1, 30),
    "yearday": ("dayofyear", 1, 365),
    "week": ("week", 1, 52),
    "month": ("month", 1, 11),
}
FEATURES = {
    "s": ("second", "minute", "hour", "weekday", "day", "yearday"),
    "t": ("minute", "hour", "weekday", "day", "yearday"),
    "h": ("hour", "weekday", "day", "yearday"),
    "d": ("weekday", "day", "yearday"),
    "b": ("weekday", "day", "yearday"),
    "w": ("day", "week"),
    "m": ("month",),
}


def series_dataset(
    tables: Mapping[str, list[Table]],
    *,
    seed: int = 0,
    time: str | int | None = None,
    target: str | int | None = None,
    features: str | None = None,
    lookback: int | None = None,
    horizon: int | None = None,
) -> Dataset:
    """The rows of a series as forecasting windows.

    Args:
        tables: one file, or train, val and test files that follow each other in time.
        seed: recorded only; series are split by time.
        time: the time column; by default the one that parses as times.
        target: the column to forecast from its own past alone; by default every numeric column is forecast.
        features: `"M"`, all columns, or `"S"`, only `target` (by default `OT` or the last column).
        lookback: rows a model may see; 96, or less where the series is short.
        horizon: rows to forecast; 96, or less where the series is short.

    Raises:
        DataError: a cell that is no number or no time, times that are not regular, too few rows.
    """
    order = [name for name in ("train", "val", "test") if name in tables]
    parts = [table for name in order for table in tables[name]]
    table = parts[0]
    time = time_column(table) if time is None else table.column(time)
    features = check_features(features, target)
    names, problems = value_columns(table, time)
    if features == "S":
        asked = ("OT" if "OT" in names else names[-1]) if target is None else table.column(target)
        if asked not in names:
            raise DataError(
                f"{table.path}: column {asked!r} holds no numbers; the numeric columns are {listing(names)}"
            )
        names = [asked]
    blocks = [read_series(part, time, names) for part in parts]
    stamps = pd.DatetimeIndex(np.concatenate([block[0].to_numpy() for block in blocks]))
    values = np.concatenate([block[1] for block in blocks])
    freq = regular(parts, stamps)
    rows = len(values)
    given = [sum(len(t.frame) for t in tables[name]) for name in order]
    train, val, test, how = borders(table.path, rows, given if len(order) == 3 else None, problems)
    lookback, horizon = window_sizes(table.path, train, val, test, lookback, horizon)

    mean, std = values[:train].mean(0), values[:train].std(0)
    for name, spread in zip(names, std, strict=True):
        if spread == 0:
            problems.append(f"column {name!r} is constant in the training rows")
    std = np.where(std == 0, 1.0, std)
    series = torch.from_numpy(((values - mean) / std).astype(np.float32))
    marks = calendar(stamps, freq)
    edges = {"train": (lookback, train), "val": (train, train + val), "test": (train + val, train + val + test)}
    splits = {}
    for name, (first, end) in edges.items():
        starts = torch.arange(first, end - horizon + 1)
        splits[name] = Split((starts - lookback,), starts, None, (series, marks))
    sizes = {name: len(split) for name, split in splits.items()}
    fingerprint = hashlib.sha256(values.tobytes() + repr((train, val, lookback, horizon)).encode()).hexdigest()[:32]
    meta = {
        "time": time,
        "columns": names,
        "features": features,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "freq": freq,
        "first": stamps[0].isoformat(),
        "rows": rows,
        "lookback": lookback,
        "borders": [train, train + val, train + val + test],
        "split": {"seed": seed, "how": how, "sizes": sizes, "hash": fingerprint},
    }
    spec = {
        "channels": len(names),
        "seq_len": lookback,
        "pred_len": horizon,
        "freq": freq_letter(freq),
        "marks": marks.shape[1],
    }
    return Dataset("forecasting", splits["train"], splits["val"], splits["test"], spec, meta, problems, series, marks)


def check_features(features: str | None, target: str | int | None) -> str:
    if features is None:
        return "M" if target is None else "S"
    check_option("features", features, ("M", "S"))
    if features == "M" and target is not None:
        raise ValueError(f"target={target!r} needs features='S'; with features='M' every column is forecast")
    return features


def time_column(table: Table) -> str:
    """The one column that holds times.

    Raises:
        DataError: none or several.
    """
    columns = look(table)
    found = [c.name for c in columns if c.kind == "time"]
    if len(found) == 1:
        return found[0]
    named = [c.name for c in columns if c.name.lower() in ("date", "time", "datetime", "timestamp", "ds")]
    if len(named) == 1:
        return named[0]
    what = "several columns of times" if found else "no column of times"
    seen = listing([str(c) for c in columns], 12)
    raise DataError(f"{table.path}: {what}; say which with time=COLUMN (--time-column); seen: {seen}")


def value_columns(table: Table, time: str) -> tuple[list[str], list[str]]:
    """Numeric columns, and a problem for each column that is left out because it holds text."""
    names, problems = [], []
    for name in map(str, table.frame.columns):
        if name == time:
            continue
        cells = table.frame[name]
        some = cells.iloc[np.linspace(0, len(cells) - 1, min(len(cells), 2000)).astype(int)]
        some = some[~is_missing(some)]
        if len(some) and np.isfinite(numbers(some)).mean() < 0.5:
            problems.append(f"column {name!r} holds no numbers and is left out")
        else:
            names.append(name)
    if not names:
        raise DataError(f"{table.path}: no column of numbers beside the time column {time!r}")
    return names, problems


def read_series(table: Table, time: str, names: list[str]) -> tuple[pd.DatetimeIndex, np.ndarray]:
    """Times `(rows,)` and values `(rows, columns)` of one table.

    Raises:
        DataError: a missing column, a cell that is no number or no time, times that fall or repeat; with its row.
    """
    columns = []
    for name in names:
        cells = table.frame[table.column(name)]
        column = numbers(cells)
        if not np.isfinite(column).all():
            row = int((~np.isfinite(column)).argmax())
            cell = cells.iloc[row]
            what = "is missing (NaN)" if is_missing(cells.iloc[row : row + 1])[0] else f"is {str(cell)!r}, not a number"
            count = int((~np.isfinite(column)).sum())
            more = f" ({count} such cells in this column)" if count > 1 else ""
            raise DataError(f"{table.where(row, name)}: the value {what}{more}; fill in or remove it before training")
        columns.append(column)
    cells = table.frame[table.column(time)]
    stamps = times(cells, time)
    if stamps.isna().any() or not regular_step(pd.DatetimeIndex(stamps)):
        other = times(cells, time, day_first=True)
        if other.notna().all() and regular_step(pd.DatetimeIndex(other)):
            stamps = other
    if stamps.isna().any():
        row = int(stamps.isna().to_numpy().argmax())
        raise DataError(f"{table.where(row, time)}: {str(cells.iloc[row])!r} is not a time; correct or remove the row")
    index = pd.DatetimeIndex(stamps)
    step = np.diff(index.to_numpy())
    if len(step) and (step <= np.timedelta64(0)).any():
        if (step < np.timedelta64(0)).all():
            raise DataError(f"{table.where(1, time)}: the rows run from late to early; sort the file by time")
        row = int((step <= np.timedelta64(0)).argmax()) + 1
        if index[:row].isin([index[row]]).any():
            raise DataError(
                f"{table.where(row, time)}: the time {index[row]} occurs twice; keep one row for each time (several "
                "series below each other belong in columns or in files of their own)"
            )
        raise DataError(
            f"{table.where(row, time)}: {index[row]} comes after {index[row - 1]} in the file; sort the file by time"
        )
    return index, np.stack(columns, axis=1)


def regular_step(index: pd.DatetimeIndex) -> str | None:
    """The frequency as pandas names it, or None."""
    if len(index) < 3 or not index.is_monotonic_increasing or not index.is_unique:
        return None
    return pd.infer_freq(index)


def regular(tables: list[Table], stamps: pd.DatetimeIndex) -> str:
    """The frequency of the whole series.

    Raises:
        DataError: too few rows, or a step unlike the others, with its row.
    """
    path = tables[0].path
    if len(stamps) < 10:
        raise DataError(f"{path}: {len(stamps)} rows are too few for a series; 10 is the least")
    freq = regular_step(stamps)
    if freq is not None:
        return freq
    step = np.diff(stamps.to_numpy())
    sizes, counts = np.unique(step, return_counts=True)
    usual = sizes[counts.argmax()]
    odd = step != usual
    row = int(odd.argmax()) + 1
    local = row
    for table in tables:
        if local < len(table.frame):
            break
        local -= len(table.frame)
    raise DataError(
        f"{table.where(local)}: the time steps from {stamps[row - 1]} to {stamps[row]} "
        f"({pd.Timedelta(step[row - 1])}) where {pd.Timedelta(usual)} is usual ({int(odd.sum())} such rows); fill the "
        "gaps or resample to a regular step"
    )


def borders(path: Path, rows: int, given: list[int] | None, problems: list[str]) -> tuple[int, int, int, str]:
    """Rows of train, val and test, and how they were found."""
    if given is not None:
        return given[0], given[1], given[2], "train, val and test files as given"
    ett = ETT.get(path.stem.lower())
    if ett is not None:
        month = HOURS * ett
        if rows >= 20 * month:
            if rows > 20 * month:
                problems.append(f"{rows - 20 * month} rows after the 20 published months are not used")
            return 12 * month, 4 * month, 4 * month, "12, 4 and 4 months, as published for ETT"
        problems.append(f"named like {path.stem} but only {rows} rows long: split 70, 10 and 20 % by time")
    train, test = int(rows * 0.7), int(rows * 0.2)
    return train, rows - train - test, test, "70, 10 and 20 % by time"


def window_sizes(
    path: Path, train: int, val: int, test: int, lookback: int | None, horizon: int | None
) -> tuple[int, int]:
    """Lookback and horizon, as asked for or as the series allows.

    Raises:
        DataError: a split holds not one window.
    """
    for name, value in (("lookback", lookback), ("horizon", horizon)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 row, got {value}")
    least = min(val, test)
    if horizon is None:
        horizon = (
            HORIZON if least >= HORIZON + HORIZON // 3 and train >= 4 * HORIZON else max(1, min(HORIZON, least // 2))
        )
    if lookback is None:
        lookback = max(1, min(LOOKBACK, (train - horizon) // 2))
    if train < lookback + horizon or least < horizon:
        raise DataError(
            f"{path}: too few rows for lookback={lookback} and horizon={horizon}: train has {train} rows, "
            f"val {val} and test {test}; train needs lookback + horizon = {lookback + horizon}, val and test "
            f"{horizon} each; give more rows or a smaller lookback or horizon"
        )
    return lookback, horizon


def freq_letter(freq: str) -> str:
    """The calendar table a pandas frequency belongs to: one of s, t, h, d, b, w, m."""
    offset = pd.tseries.frequencies.to_offset(freq)
    name = type(offset).__name__
    if isinstance(offset, pd.offsets.Day):
        return "w" if offset.n % 7 == 0 else "d"
    if isinstance(offset, pd.offsets.Tick):
        length = pd.Timedelta(offset)
        for letter, unit in (("d", "1D"), ("h", "1h"), ("t", "1min")):
            if length >= pd.Timedelta(unit):
                return letter
        return "s"
    if name == "BusinessHour":
        return "h"
    if "Business" in name and "Day" in name:
        return "b"
    return "w" if name == "Week" else "m"


def calendar(stamps: pd.DatetimeIndex, freq: str) -> Float[Tensor, "rows features"]:
    """`(value - smallest) / span - 0.5` of each calendar feature the frequency has."""
    columns = []
    for feature in FEATURES[freq_letter(freq)]:
        attribute, low, span = CALENDAR[feature]
        values = stamps.isocalendar()["week"] if attribute == "week" else getattr(stamps, attribute)
        columns.append((np.asarray(values, dtype=np.float64) - low) / span - 0.5)
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def following(last: pd.Timestamp, freq: str, count: int) -> pd.DatetimeIndex:
    """The `count` times after `last`."""
    return pd.date_range(last, periods=count + 1, freq=freq)[1:]
