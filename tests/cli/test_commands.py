"""The commands say what they know, as a table or as JSON, and refuse what they cannot do in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer import catalogue
from gossamer.cli import app
from gossamer.cli.show import print_json

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    return lambda *words: CliRunner().invoke(app, list(words))


def assert_one_line(result: Any, says: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_help_names_every_command(run: Run) -> None:
    text = run("--help").output
    for name in ("fit", "advise", "predict", "list", "info", "measure", "train", "export"):
        assert f" {name} " in text
        assert run(name, "--help").exit_code == 0


def test_list_shows_every_paper_with_its_status(run: Run) -> None:
    result = run("list")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    for system in catalogue.systems():
        assert system.status in rows[system.slug]


def test_list_as_json_is_the_catalogue(run: Run) -> None:
    rows = json.loads(run("list", "--json").stdout)
    assert [row["slug"] for row in rows] == [s.slug for s in catalogue.systems()]
    assert rows[0].keys() >= {"slug", "title", "kind", "year", "status", "variants", "published"}


def test_list_filters(run: Run) -> None:
    rows = json.loads(run("list", "--kind", "backbone", "--text", "SWIN", "--json").stdout)
    assert {row["slug"] for row in rows} == {"swin", "cswin"}
    rows = json.loads(run("list", "--task", "forecasting", "--json").stdout)
    assert {"informer", "autoformer"} <= {row["slug"] for row in rows}
    assert json.loads(run("list", "--text", "no such words", "--json").stdout) == []


def test_list_refuses_a_kind_that_does_not_exist(run: Run) -> None:
    assert_one_line(run("list", "--kind", "backbones"), "'backbones'")


def test_info_shows_published_figures_and_marks_the_variant_asked_for(run: Run) -> None:
    lines = run("info", "swin_t").stdout.splitlines()
    (marked,) = [line for line in lines if line.startswith("> ")]
    assert marked.split()[:5] == [">", "swin_t", "28.3M", "4.49G", "3x224x224"]


def test_info_as_json_carries_the_figures(run: Run) -> None:
    data = json.loads(run("info", "swin_t", "--json").stdout)
    assert data["system"]["slug"] == "swin"
    assert data["variant"] == "swin_t"
    assert data["published"]["params_m"] == 28.29


def test_info_of_an_unknown_name_offers_close_ones(run: Run) -> None:
    assert_one_line(run("info", "swinn_t"), "swin_t")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("lisst",), "No such command 'lisst'"),
        (("list", "--colour"), "No such option: --colour"),
        (("--colour",), "No such option: --colour"),
        (("info",), "Missing argument"),
        (("fit",), "DATA or --join"),
        (("fit", "x", "--join", "y"), "DATA or --join"),
        (("fit", "x", "--budget", "latency=5"), "latency=5ms"),
        (("fit", "x", "--budget", "speed=5"), "'speed=5'"),
        (("fit", "x", "--time", "3"), "3m or 1h30m"),
        (("fit", "x", "--horizon", "0"), "--horizon"),
        (("advise", "x", "--budget", "size=2"), "size=2MB"),
        (("predict", "no/such/run", "x.png"), "no such run folder: no/such/run"),
        (("measure", "swin_t", "--batch", "1,0"), "batch"),
        (("measure", "swin_t", "--forms", "fast"), "eager, compiled, onnx"),
        (("measure", "swinn_t"), "swin_t"),
        (("measure", "./nowhere"), "./nowhere"),
        (("export", "swin_t", "--out", "x.onnx", "--dynamic", "all"), "--dynamic"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(run: Run, words: tuple[str, ...], says: str) -> None:
    assert_one_line(run(*words), says)


@pytest.mark.parametrize("words", [("--debug", "info", "swinn_t"), ("info", "swinn_t", "--debug")])
def test_debug_anywhere_shows_the_error_itself(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert isinstance(result.exception, ValueError)
    assert "swin_t" in str(result.exception)


def test_version_is_told(run: Run) -> None:
    import gossamer

    assert run("--version").stdout == f"gossamer {gossamer.__version__}\n"


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), 3: (1, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x", "3": [1, None]}
