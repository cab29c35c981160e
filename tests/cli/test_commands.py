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


class Answer:
    """What a fit answers, without the work."""

    def __init__(self, meets_budget: bool) -> None:
        self.meets_budget = meets_budget

    def summary(self) -> str:
        return "winner swin-xs"

    def to_dict(self) -> dict[str, Any]:
        return {"winner": "swin-xs"}


@pytest.mark.parametrize(("meets", "code"), [(True, 0), (False, 3)])
def test_fit_hands_over_base_units_and_has_a_code_for_nothing_fits(
    run: Run, monkeypatch: pytest.MonkeyPatch, meets: bool, code: int
) -> None:
    import gossamer.fit

    asked = []
    monkeypatch.setattr(gossamer.fit, "fit", lambda options: asked.append(options) or Answer(meets))
    words = ("fit", "load.csv", "--budget", "latency=2s,params=1M", "--time", "1h30m", "--out", "r", "--seed", "7")
    result = run(*words, "--horizon", "24", "--target", "OT", "--time-column", "when", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"winner": "swin-xs"}
    (options,) = asked
    assert options.data == "load.csv"
    assert options.budget == {"latency": 2000.0, "params": 1e6}
    assert options.seconds == 5400
    assert (options.out, options.seed, options.quiet) == (Path("r"), 7, True)
    assert options.options == {"horizon": 24, "target": "OT", "time": "when"}


def test_predict_prints_classes_in_words_and_forecasts_as_csv(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gossamer.fit

    rows: list[dict[str, Any]] = [
        {"input": "a.png", "class": "cat", "probability": 0.75, "top": {"cat": 0.75, "dog": 0.25}},
        {"input": "b.csv", "forecast": [{"date": "1", "OT": 1.23456789}, {"date": "2", "OT": 2.0}]},
    ]
    monkeypatch.setattr(gossamer.fit, "predict", lambda folder, inputs: rows)
    words = ("predict", str(tmp_path), "a.png", "b.csv")
    assert run(*words).stdout == "a.png: cat 75.0% (dog 25.0%)\n# b.csv\ndate,OT\n1,1.23457\n2,2\n"
    assert json.loads(run(*words, "--json").stdout) == rows
