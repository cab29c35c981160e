"""Series: splits, windows, scaler, calendar, faults."""

import numpy as np
import pandas as pd
import pytest
import torch

from gossamer.data import DataError, read_dataset
from gossamer.data.series import calendar, following, freq_letter


def test_windows_count_and_lie_as_in_the_literature(write, hourly) -> None:
    data = read_dataset(write("s.csv", "\n".join(hourly(1000))), lookback=48, horizon=24)
    assert data.task == "forecasting"
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 700 - 48 - 24 + 1, "val": 77, "test": 177}
    # The first val window reads back over the border, the last ends with the last row of its split.
    assert data.val.inputs[0][0] == 700 - 48
    assert data.val.targets[0] == 700
    assert data.val.targets[-1] + 24 == 800
    assert data.test.targets[-1] + 24 == 1000
    assert data.spec == {"channels": 2, "seq_len": 48, "pred_len": 24, "freq": "h", "marks": 4}


def test_the_scaler_sees_the_training_rows_only(write, hourly) -> None:
    lines = hourly(1000)
    lines[950:] = [line.rsplit(",", 1)[0] + ",100000" for line in lines[950:]]
    data = read_dataset(write("s.csv", "\n".join(lines)))
    values = torch.tensor([[float(v) for v in line.split(",")[1:]] for line in lines[1:]], dtype=torch.float64)
    assert data.meta["mean"] == pytest.approx(values[:700].mean(0).tolist())
    assert data.meta["std"] == pytest.approx(values[:700].std(0, correction=0).tolist())
    back = data.series.double() * torch.tensor(data.meta["std"]) + torch.tensor(data.meta["mean"])
    assert torch.allclose(back, values, rtol=1e-5, atol=1e-3)


def test_ett_has_its_official_windows(shared_data) -> None:
    data = read_dataset(shared_data("ett/ETTh1.csv"))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 8640 - 96 - 96 + 1, "val": 2785, "test": 2785}
    assert data.meta["columns"] == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    frame = pd.read_csv(shared_data("ett/ETTh1.csv"))
    assert data.meta["mean"][-1] == pytest.approx(frame["OT"][:8640].mean())
    # Informer's official calendar features of 2016-07-01 00:00, a Friday, day 183 of its year.
    assert data.marks[0].tolist() == pytest.approx([-0.5, 4 / 6 - 0.5, -0.5, 182 / 365 - 0.5])
    one = read_dataset(shared_data("ett/ETTh1.csv"), features="S", lookback=720, horizon=24)
    assert one.meta["columns"] == ["OT"]
    assert len(one.train) == 8640 - 720 - 24 + 1
    assert len(one.test) == 2880 - 24 + 1


def test_one_target_column_is_forecast_alone(write, hourly) -> None:
    path = write("s.csv", "\n".join(hourly(400)))
    assert read_dataset(path, target="load").meta["columns"] == ["load"]
    with pytest.raises(DataError, match="no column 'cold'; the columns are when, load, heat"):
        read_dataset(path, target="cold")
    with pytest.raises(ValueError, match="features='S'"):
        read_dataset(path, target="load", features="M")


@pytest.mark.parametrize(
    ("freq", "letter", "width"),
    [("30s", "s", 6), ("15min", "t", 5), ("h", "h", 4), ("6h", "h", 4), ("D", "d", 3), ("B", "b", 3), ("W-TUE", "w", 2),
     ("7D", "w", 2), ("MS", "m", 1), ("ME", "m", 1), ("QS", "m", 1), ("YS", "m", 1)],
)  # fmt: skip
def test_every_frequency_is_inferred_and_has_its_calendar(write, freq, letter, width) -> None:
    stamps = pd.date_range("2001-02-01", periods=120, freq=freq)
    assert freq_letter(freq) == letter
    marks = calendar(stamps, freq)
    assert marks.shape == (120, width)
    assert marks.abs().max() <= 0.5 + 1e-6
    lines = ["ds,y"] + [f"{t},{np.sin(i)}" for i, t in enumerate(stamps)]
    data = read_dataset(write("s.csv", "\n".join(lines)))
    assert data.spec["freq"] == letter
    assert data.spec["marks"] == width
    assert list(following(stamps[-1], data.meta["freq"], 3)) == list(
        pd.date_range(stamps[-1], periods=4, freq=freq)[1:]
    )


def test_short_series_get_a_shorter_lookback_and_horizon(write, hourly) -> None:
    data = read_dataset(write("s.csv", "\n".join(hourly(144))))
    assert data.spec["pred_len"] == 8
    assert 1 < data.spec["seq_len"] < 96
    assert all(len(split) for split in data.splits.values())


def test_too_few_rows_for_what_was_asked_are_told(write, hourly) -> None:
    path = write("s.csv", "\n".join(hourly(200)))
    with pytest.raises(DataError, match=r"too few rows for lookback=96 and horizon=96"):
        read_dataset(path, lookback=96, horizon=96)
    with pytest.raises(DataError, match="too few"):
        read_dataset(write("t.csv", "\n".join(hourly(6))))


@pytest.mark.parametrize(
    ("cell", "what"), [("", "missing"), ("NaN", "missing"), ("abc", "'abc', not a number"), ("inf", "'inf'")]
)
def test_a_bad_value_is_told_with_row_and_column(write, hourly, cell, what) -> None:
    lines = hourly(200)
    lines[57] = lines[57].rsplit(",", 1)[0] + f",{cell}"
    with pytest.raises(DataError, match=rf"s\.csv: row 57 \(line 58\), column 'heat': the value is {what}"):
        read_dataset(write("s.csv", "\n".join(lines)))


def test_a_nan_in_parquet_is_told(tmp_path, hourly, write) -> None:
    frame = pd.read_csv(write("s.csv", "\n".join(hourly(200))), parse_dates=["when"])
    frame.loc[56, "heat"] = np.nan
    frame.to_parquet(tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s\.parquet: row 57, column 'heat': the value is missing"):
        read_dataset(tmp_path / "s.parquet")


def swap(lines: list[str]) -> None:
    lines[40], lines[41] = lines[41], lines[40]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.insert(41, lines[40]), r"row 41 \(line 42\).*occurs twice"),
        (lambda lines: lines.pop(40), r"row 40 \(line 41\).*0 days 02:00:00.*0 days 01:00:00 is usual"),
        (swap, r"row 41 \(line 42\).*comes after"),
        (lambda lines: lines.__setitem__(slice(1, None), lines[:0:-1]), "late to early"),
        (lambda lines: lines.__setitem__(40, "yesterday" + lines[40][19:]), r"row 40 .*'yesterday' is not a time"),
    ],
)
def test_times_that_are_not_regular_are_told_with_their_row(write, hourly, change, message) -> None:
    lines = hourly(200)
    change(lines)
    with pytest.raises(DataError, match=message):
        read_dataset(write("s.csv", "\n".join(lines)))


def test_a_ragged_row_in_a_series_is_told_with_its_line(write, hourly) -> None:
    lines = hourly(200)
    lines[30] += ",7"
    with pytest.raises(DataError, match="line 31 has 4 cells where 3 are expected"):
        read_dataset(write("s.csv", "\n".join(lines)))


def test_a_column_of_words_is_left_out_and_told(write, hourly) -> None:
    lines = [line + (",station" if i == 0 else ",north east") for i, line in enumerate(hourly(200))]
    data = read_dataset(write("s.csv", "\n".join(lines)), task="forecasting")
    assert data.meta["columns"] == ["load", "heat"]
    assert any("'station' holds no numbers" in line for line in data.problems)


def test_days_before_months_are_understood(write) -> None:
    stamps = pd.date_range("2024-01-01", periods=150, freq="D")
    lines = ["date,y"] + [f"{t:%d/%m/%Y},{i % 7}" for i, t in enumerate(stamps)]
    data = read_dataset(write("s.csv", "\n".join(lines)))
    assert data.meta["freq"] == "D"
    assert data.meta["first"].startswith("2024-01-01")


def test_files_that_follow_in_time_keep_their_borders(write, hourly) -> None:
    lines = hourly(400)
    for name, part in (("train", lines[1:281]), ("val", lines[281:321]), ("test", lines[321:])):
        path = write(f"d/{name}.csv", "\n".join([lines[0], *part]))
    data = read_dataset(path.parent, lookback=24, horizon=12)
    assert data.meta["borders"] == [280, 320, 400]
