"""What makes two calls the same run, what a budget says, and what the terminal is told at the end."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.fit import FitOptions, FitResult, fit
from gossamer.shrink.budget import excess, over_budget

CALL: dict[str, Any] = {"data": "digits", "budget": {"latency": 1.0}, "seconds": 60.0, "seed": 3}


def test_the_same_call_has_the_same_folder_and_any_other_call_another() -> None:
    assert FitOptions(**CALL).folder() == FitOptions(**CALL).folder()
    assert FitOptions(**CALL).folder().parts[0] == "runs"
    others = [
        {"data": "toy-images"},
        {"budget": {"latency": 2.0}},
        {"budget": {"latency": 1.0, "size": 1.0}},
        {"seconds": 61.0},
        {"seed": 4},
        {"task": "image-classification"},
        {"storage": "sqlite:///study.db"},
        {"options": {"horizon": 24}},
    ]
    folders = {FitOptions(**{**CALL, **other}).folder() for other in others} | {FitOptions(**CALL).folder()}
    assert len(folders) == len(others) + 1


def test_where_a_run_lies_and_how_much_it_says_are_not_part_of_what_was_asked(tmp_path: Path) -> None:
    here = FitOptions(**CALL, out=tmp_path, quiet=True)
    assert here.identity() == FitOptions(**CALL).identity()
    assert here.folder() == tmp_path


@pytest.mark.parametrize(
    ("data", "stem"), [("/a/b/my pictures.tar.xz", "my-pictures"), ("owner/name", "name"), ("../../etc", "etc")]
)
def test_the_folder_is_named_after_the_data_and_stays_below_runs(data: str, stem: str) -> None:
    folder = FitOptions(data=data).folder()
    assert folder.parent == Path("runs")
    assert folder.name.rpartition("-")[0] == stem


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"budget": {"speed": 1.0}}, "latency, memory, size, params, macs; got 'speed'"),
        ({"budget": {"latency": 0.0}}, "budget latency must be positive, got 0"),
        ({"budget": {"latency": -1.0}}, "budget latency must be positive, got -1"),
        ({"seconds": 19.0}, "time must be at least 20s, got 19s"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name_and_value(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FitOptions(**{**CALL, **wrong})


def test_another_call_on_the_folder_of_a_run_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    asked = FitOptions(**CALL, out=tmp_path / "run")
    asked.folder().mkdir()
    (asked.folder() / "run.json").write_text(json.dumps(asked.identity()))
    other = FitOptions(**{**CALL, "seed": 4, "budget": {"latency": 2.0}}, out=asked.out, quiet=True)
    with pytest.raises(ValueError, match="another budget, seed; give --out another folder"):
        fit(other)
    assert [file.name for file in asked.folder().iterdir()] == ["run.json"]


def test_a_finished_run_answers_the_same_call_at_once(tmp_path: Path) -> None:
    asked = FitOptions(**{**CALL, "data": "no-such-data"}, out=tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(asked.identity()))
    (tmp_path / "results.json").write_text('{"meets_budget": true, "note": "kept"}')
    assert fit(asked).results["note"] == "kept"


def test_excess_is_the_largest_share_of_a_limit_and_unknown_costs_do_not_count() -> None:
    budget = {"latency": 2.0, "size": 10.0, "memory": 1.0}
    assert excess({"latency": 1.0, "size": 8.0, "memory": None}, budget) == 0.8
    assert excess({"latency": 5.0, "size": 8.0}, budget) == 2.5
    assert excess({"latency": 5.0}, {}) == 0.0


def test_over_budget_names_each_cost_with_its_unit_and_limit() -> None:
    cost: dict[str, float | None] = {"latency": 6.25, "size": 1.0, "params": 2.5e6, "memory": None}
    budget = {"latency": 5.0, "size": 1.0, "params": 1e6, "memory": 1.0}
    assert over_budget(cost, budget) == "latency 6.25ms > 5ms, params 2,500,000 > 1,000,000"
    assert over_budget(cost, {"size": 2.0}) == ""


def results(**other: Any) -> dict[str, Any]:
    cost = {"latency": 0.5, "size": 1.25, "params": 12345, "macs": 6.5e6}
    winner = {"name": "swin-xs", "form": "int8", "val": 0.875, "test": {"accuracy": 0.8125}, "cost": cost}
    return {
        "winner": winner,
        "closest": None,
        "candidates": [],
        "metric": "accuracy",
        "budget": {"latency": 1.0},
        "meets_budget": True,
        "seconds": 58.0,
        "asked_seconds": 60.0,
    } | other


def test_the_summary_tells_the_winner_its_test_figure_its_cost_and_where_the_report_lies() -> None:
    text = FitResult(results(), Path("runs/x")).summary()
    for words in ("swin-xs (int8)", "accuracy 0.8125", "validation 0.8750", "0.500 ms", "12,345", "6.5 MMACs"):
        assert words in text
    assert "58 s of 60 s" in text
    assert "runs/x/report.html" in text
    assert "NOT" not in text


def test_the_summary_of_a_run_over_its_budget_says_so_and_names_the_closest() -> None:
    text = FitResult(results(meets_budget=False, budget={"latency": 0.25}), Path("x")).summary()
    assert "NOT met: latency 0.5ms > 0.25ms" in text
    closest = {"name": "gam-xs", "cost": {"latency": 0.5}, "why": ""}
    text = FitResult(
        results(winner=None, closest=closest, meets_budget=False, budget={"latency": 0.25}), Path("x")
    ).summary()
    assert text.startswith("nothing meets the budget; the closest is gam-xs: latency 0.5ms > 0.25ms")
    text = FitResult(results(winner=None, closest=None, meets_budget=False), Path("x")).summary()
    assert text.startswith("nothing meets the budget; no candidate could be measured\n")
    unmeasured = [{"status": "left out"}, {"status": "not measured"}, {"status": "not measured"}]
    text = FitResult(results(winner=None, closest=None, meets_budget=False, candidates=unmeasured), Path("x")).summary()
    assert "2 candidates were not measured in the time given" in text
