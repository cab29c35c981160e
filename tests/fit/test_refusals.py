"""Wrong calls and bad data end in one line and exit code 2, before anything is measured or trained."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer.cli import app
from gossamer.fit import FitOptions
from gossamer.fit import run as module


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def begun(*_: Any) -> None:
        raise AssertionError("the fit went on")

    monkeypatch.setattr(module._Run, "go", begun)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


def refused(tmp_path: Path, *words: str | Path) -> str:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["fit", *map(str, words), "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.rstrip("\n").splitlines()
    errors = [line for line in last if line.startswith("error: ")]
    assert len(errors) == 1
    assert last[-1] == errors[0]
    assert "Traceback" not in result.stderr
    assert not (out / "results.json").exists()
    return errors[0]


def series(rows: int, **cells: str) -> str:
    lines = [f"2024-01-{1 + i // 24:02} {i % 24:02}:00:00,{i % 24},{i % 7}" for i in range(rows)]
    for row, line in cells.items():
        lines[int(row[1:])] = line
    return "\n".join(["date,load,tide", *lines]) + "\n"


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(tmp_path, tmp_path / "none")


def test_a_missing_number_in_a_series_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "gap.csv").write_text(series(600, r300="2024-01-13 12:00:00,,3"))
    said = refused(tmp_path, tmp_path / "gap.csv")
    assert "load" in said
    assert "302" in said  # the line in the file


def test_an_empty_class_is_named(tmp_path: Path, png: bytes) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    for i in range(4):
        (tmp_path / "pets" / "cat" / f"{i}.png").write_bytes(png)
    assert "dog holds no images" in refused(tmp_path, tmp_path / "pets")


def test_an_archive_member_outside_its_folder_is_refused_and_not_written(tmp_path: Path, png: bytes) -> None:
    with tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as archive:
        for name in ("train/cat/0.png", "../escaped.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png)
            archive.addfile(member, io.BytesIO(png))
    assert "escaped.png" in refused(tmp_path, tmp_path / "pets.tar.gz")
    assert not list(tmp_path.rglob("escaped.png"))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,stars\n" + "good film indeed,5\nbad film indeed,1\n" * 30)
    said = refused(tmp_path, tmp_path / "reviews.csv", "--label-column", "mood")
    assert "mood" in said
    assert "stars" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digits", "--time", "5s"], "time must be at least 20s"),
        (["digits", "--time", "soon"], "90s, 3m or 1h30m"),
        (["digits", "--budget", "latency=5"], "latency=5ms"),
        (["digits", "--budget", "speed=5ms"], "speed=5ms"),
        (["digits", "--budget", "size=0MB"], "positive"),
        (["digits", "--task", "painting"], "painting"),
        (["toy-images", "--task", "forecasting"], "forecasting"),
        (["digits", "--join", "somewhere"], "not both"),
        ([], "either DATA or --join"),
        (["--join", "nowhere"], "no run to join at nowhere"),
    ],
)
def test_a_call_that_makes_no_sense_says_what_would(tmp_path: Path, words: list[str], says: str) -> None:
    assert says in refused(tmp_path, *words)


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(FitOptions(data="digits", seed=1).identity()))
    assert "another seed" in refused(tmp_path, "digits")


@pytest.fixture
def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()
