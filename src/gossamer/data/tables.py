"""CSV, TSV, Parquet and JSON lines as columns of text, with the place of every cell known.

- CSV and TSV are read as text; what a column means is decided by the reader of the task
- TSV is taken literally, quotes and all, unless only quoting makes its rows equally long
- a first row counts as header where a word stands above numbers or dates, and else unless one of its cells is a number
  or recurs further down its column
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.data.base import DataError, listing

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")


@dataclass
class Table:
    """Columns of one file. Text files give strings; Parquet and JSON keep their types.

    Args:
        path: the file, for messages.
        frame: the columns.
        header: whether the column names were in the file; else they are `column 1`, `column 2`, …
        lines: the line of the file each row starts at, for text files.
    """

    path: Path
    frame: pd.DataFrame
    header: bool = True
    lines: np.ndarray | None = None

    def where(self, row: int, column: str | None = None) -> str:
        """`file: row 3 (line 4), column 'x'`, for messages; rows count from 1."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"{self.path}: row {row + 1}{line}" + ("" if column is None else f", column {column!r}")

    def column(self, asked: str | int) -> str:
        """The name of the column asked for: by name, or by number from 1 where there is no header.

        Raises:
            DataError: there is no such column.
        """
        names = list(self.frame.columns)
        if asked in names:
            return str(asked)
        if str(asked).isdecimal() and not self.header and 1 <= int(asked) <= len(names):
            return str(names[int(asked) - 1])
        raise DataError(f"{self.path}: no column {asked!r}; the columns are {listing([str(n) for n in names], 20)}")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_text(path: Path, encoding: str | None = None) -> str:
    """The whole file as text.

    Raises:
        DataError: an empty file, binary content, or bytes that are not in the encoding.
    """
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    if encoding is None:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        if encoding == "utf-8-sig" and b"\0" in data[:65536]:
            raise DataError(f"{path}: binary content where text is expected; the file is damaged or misnamed")
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        at = getattr(error, "start", 0)
        raise DataError(
            f"{path}: line {data[:at].count(10) + 1} is not {encoding.removesuffix('-sig')} text "
            f"(byte 0x{data[at]:02x} at position {at}); save the file as UTF-8, or say encoding='latin-1' or the like"
        ) from error


def read_table(path: Path, *, encoding: str | None = None, header: bool | None = None) -> Table:
    """One table file.

    Args:
        path: CSV, TSV, Parquet, JSON lines, or a JSON list of objects.
        encoding: of text files; UTF-8 by default.
        header: whether the first row of a CSV or TSV names the columns; by default it is seen from the rows.

    Raises:
        DataError: the file cannot be read; the message names the line.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return read_delimited(path, read_text(path, encoding), header)
    if kind == ".parquet":
        return read_parquet(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        return read_json(path, read_text(path, encoding))
    raise DataError(f"{path}: unknown extension {kind!r}; known are {', '.join(TABLES)}")


def read_delimited(path: Path, text: str, header: bool | None) -> Table:
    import pandas as pd

    rows, lines = split_rows(path, text)
    if header is None:
        header = has_header(rows)
    width = len(rows[0])
    names = [cell.strip() for cell in rows[0]] if header else [f"column {i + 1}" for i in range(width)]
    if header and len(set(names)) < width:
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: line {lines[0]} names the column {twice!r} twice; rename one")
    if header:
        rows, lines = rows[1:], lines[1:]
    if not rows:
        raise DataError(f"{path}: a header and no rows")
    columns = zip(*rows, strict=True)
    frame = pd.DataFrame({name: np.array(column, dtype=object) for name, column in zip(names, columns, strict=True)})
    return Table(path, frame, header, np.array(lines))


def split_rows(path: Path, text: str) -> tuple[list[list[str]], list[int]]:
    """All rows as cells, with the line each starts at.

    Raises:
        DataError: a row longer or shorter than the first, with its line.
    """
    tried: list[tuple[list[list[str]], list[int]]] = []
    if path.suffix.lower() == ".tsv":
        ways = [("\t", False)] + ([("\t", True)] if '"' in text else [])
    else:
        ways = [(delimiter(text), '"' in text)]
    for mark, quoted in ways:
        rows, lines = cut(path, text, mark, quoted)
        if all(len(row) == len(rows[0]) for row in rows):
            return rows, lines
        tried.append((rows, lines))
    rows, lines = tried[0]
    widths = [len(row) for row in rows]
    usual = max(set(widths), key=widths.count)
    at = next(i for i, n in enumerate(widths) if n != usual)
    raise DataError(
        f"{path}: line {lines[at]} has {widths[at]} cells where {usual} are expected; mend the row, or quote cells "
        "that hold the separator"
    )


def cut(path: Path, text: str, mark: str, quoted: bool) -> tuple[list[list[str]], list[int]]:
    if not quoted:
        pairs = [(i, line) for i, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
        return [line.split(mark) for _, line in pairs], [i for i, _ in pairs]
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    start = 1
    limit = csv.field_size_limit(2**30)
    try:
        for row in reader:
            if row and any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {start}: {error}; a quote is not closed, or not doubled in a cell") from error
    finally:
        csv.field_size_limit(limit)
    return rows, lines


def delimiter(text: str) -> str:
    """The separator that cuts the first lines most evenly: comma, semicolon, tab or bar."""
    sample = [line for line in text[:20_000].splitlines()[:20] if line.strip()]
    counts = {mark: [len(next(csv.reader([line], delimiter=mark))) for line in sample] for mark in ",;\t|"}
    even = {mark: n[0] for mark, n in counts.items() if n[0] > 1 and len(set(n)) == 1}
    return max(even, key=lambda mark: even[mark]) if even else ","


def has_header(rows: list[list[str]]) -> bool:
    """True where a word stands above numbers or dates; else False where a cell is a number or a value of its column."""
    first, rest = rows[0], rows[1:2001]
    if not rest:
        return False
    for i, cell in enumerate(first):
        below = [row[i].strip() for row in rest if row[i].strip()]
        digits = sum(value.lstrip("+-.")[:1].isdigit() for value in below)
        if cell.strip() and not any(c.isdigit() for c in cell) and digits > 0.9 * max(1, len(below)):
            return True
    if any(is_number(cell) for cell in first):
        return False
    if len(first) > 1 and any(len(cell) > 100 for cell in first):
        return False
    return not any(cell in {row[i] for row in rest} for i, cell in enumerate(first) if cell.strip())


def read_parquet(path: Path) -> Table:
    import pandas as pd
    import pyarrow

    try:
        frame = pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    if frame.index.name is not None:
        frame = frame.reset_index()
    if frame.empty:
        raise DataError(f"{path}: no rows")
    frame.columns = [str(name) for name in frame.columns]
    return Table(path, frame)


def read_json(path: Path, text: str) -> Table:
    import pandas as pd

    records: list[Any] = []
    lines: list[int] = []
    if path.suffix.lower() == ".json" and text.lstrip()[:1] == "[":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from error
    else:
        # Not `splitlines`: a string of JSON may hold other ends of lines (U+2028) as they are.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number}: not JSON ({error.msg}); one object a line") from error
            lines.append(number)
    for i, record in enumerate(records):
        place = f"line {lines[i]}" if lines else f"entry {i + 1}"
        if not isinstance(record, dict):
            raise DataError(f"{path}: {place} is not an object with named values")
    if not records:
        raise DataError(f"{path}: no rows")
    return Table(path, pd.DataFrame.from_records(records), lines=np.array(lines) if lines else None)
