"""CSV, TSV, Parquet and JSON lines: what a cell, a row and a column are, and where a fault lies."""

import pandas as pd
import pytest

from gossamer.data import DataError
from gossamer.data.columns import look
from gossamer.data.tables import read_table


def kinds(table) -> dict[str, str]:
    return {column.name: column.kind for column in look(table)}


def test_tsv_without_header_is_taken_literally_quotes_and_all(write) -> None:
    path = write("x.tsv", 'say "hi" now\t1\n" open quote here\t0\nplain and simple\t1\n')
    table = read_table(path)
    assert not table.header
    assert table.frame["column 1"].tolist() == ['say "hi" now', '" open quote here', "plain and simple"]


def test_quoted_tsv_with_tabs_and_lines_inside_cells_is_understood(write) -> None:
    table = read_table(write("x.tsv", 'text\tlabel\n"one\ttwo"\ta\n"three\nfour"\tb\nfive\ta\n'))
    assert table.frame["text"].tolist() == ["one\ttwo", "three\nfour", "five"]
    assert table.lines.tolist() == [2, 3, 5]


@pytest.mark.parametrize("mark", [",", ";", "|", "\t"])
def test_the_separator_of_a_csv_is_seen(write, mark) -> None:
    table = read_table(write("x.csv", f"a{mark}b\n1{mark}x y\n2{mark}z w\n"))
    assert list(table.frame.columns) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("text,label\ngood one,pos\nbad one,neg\nnice one,pos\n", True),
        ("good one,pos\nbad one,neg\nnice one,pos\n", False),
        ("good one,1\nbad one,0\n", False),
        ("date,0,1\n2024-01-01,3,4\n2024-01-02,5,6\n", True),
        ("2024-01-01,3,4\n2024-01-02,5,6\n", False),
    ],
)
def test_a_header_is_told_from_a_row(write, text, header) -> None:
    assert read_table(write("x.csv", text)).header is header


@pytest.mark.parametrize("row", ["too,many,cells", "few"])
def test_a_ragged_row_is_told_with_its_line(write, row) -> None:
    path = write("x.csv", f"text,label\na b,1\nc d,0\n{row}\ne f,1\n")
    with pytest.raises(DataError, match=r"x\.csv: line 4 has \d cells where 2 are expected"):
        read_table(path)


def test_an_unclosed_quote_is_told_with_its_line(write) -> None:
    with pytest.raises(DataError, match=r"line 3"):
        read_table(write("x.csv", 'text,label\na,1\n"never closed,0\nb,1\n'))


def test_bytes_that_are_not_utf8_are_told_with_their_line_and_can_be_given_an_encoding(write) -> None:
    path = write("x.csv", "text,label\nplain,1\ncaf\xe9,0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 3 is not utf-8 text .*0xe9.*encoding="):
        read_table(path)
    assert read_table(path, encoding="latin-1").frame["text"].tolist() == ["plain", "café"]


def test_binary_content_is_told(write) -> None:
    with pytest.raises(DataError, match="binary content"):
        read_table(write("x.csv", b"PK\x03\x04\x00\x00\x00text"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_told(write, content) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        read_table(write("x.csv", content))


def test_a_header_without_rows_is_told(write) -> None:
    with pytest.raises(DataError, match="a header and no rows"):
        read_table(write("x.csv", "text,label\n"), header=True)


def test_a_column_name_used_twice_is_told(write) -> None:
    with pytest.raises(DataError, match="'a' twice"):
        read_table(write("x.csv", "a,a\nx y,z\nv w,z\n"))


def test_json_lines_are_read_and_a_broken_line_is_told(write) -> None:
    good = '{"text": "a b", "label": 1}\n\n{"text": "c d", "label": 0}\n'
    assert read_table(write("x.jsonl", good)).frame["label"].tolist() == [1, 0]
    with pytest.raises(DataError, match="line 4: not JSON"):
        read_table(write("y.jsonl", good + '{"text": \n'))
    with pytest.raises(DataError, match="line 1 is not an object"):
        read_table(write("z.jsonl", "[1, 2]\n"))


def test_a_string_of_json_may_hold_other_ends_of_lines(write) -> None:
    good = '{"text": "one\u2028two", "label": 1}\n\n{"text": "three\x85", "label": 0}\n'
    table = read_table(write("x.jsonl", good))
    assert table.frame["text"].tolist() == ["one\u2028two", "three\x85"]
    assert table.lines.tolist() == [1, 3]


def test_parquet_is_read_and_a_broken_one_is_told(write, tmp_path) -> None:
    pd.DataFrame({"text": ["a b", "c d"], "label": [1, 0]}).to_parquet(tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").frame["label"].tolist() == [1, 0]
    with pytest.raises(DataError, match=r"y\.parquet: not a readable Parquet file"):
        read_table(write("y.parquet", b"PAR1 and junk"))


def test_columns_are_told_apart_by_what_they_hold(write) -> None:
    lines = ["id,when,words,kind,price"]
    lines += [
        f"{i},2024-01-{i % 28 + 1:02} {i // 28:02}:00,some words number {i},k{i % 3},{i * 1.5}" for i in range(90)
    ]
    found = kinds(read_table(write("x.csv", "\n".join(lines))))
    assert found == {"id": "number", "when": "time", "words": "text", "kind": "label", "price": "number"}


@pytest.mark.parametrize(
    "stamps",
    [
        [f"{year}" for year in range(1950, 1990)],
        [f"{19900101 + day}" for day in range(20)],
        [f"{1_700_000_000 + 3600 * i}" for i in range(40)],
        [f"{1_700_000_000_000 + 3_600_000 * i}" for i in range(40)],
        [f"{day:02}/03/2024" for day in range(1, 30)],
        [f"2024-03-01T{hour:02}:00:00+01:00" for hour in range(24)],
    ],
)
def test_times_of_many_forms_are_times_under_a_telling_name(write, stamps) -> None:
    rows = "\n".join(f"{stamp},{i}.5" for i, stamp in enumerate(stamps))
    assert kinds(read_table(write("x.csv", f"timestamp,value\n{rows}\n")))["timestamp"] == "time"
