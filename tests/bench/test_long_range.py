"""Long sequences: the tasks are what they say, the table is measured, and the verdict follows from it alone."""

import importlib.util
import json
from pathlib import Path
from random import Random
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "long_range.py"
    spec = importlib.util.spec_from_file_location("benchmark_long_range", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def value(ids: list[int]) -> int:
    """Reads one list, or digit, off the front."""
    first = ids.pop(0)
    if first <= 10:
        return first - 1
    values = []
    while ids[0] != 16:
        values.append(value(ids))
    ids.pop(0)
    return (max(values), min(values), sorted(values)[len(values) // 2], sum(values) % 10)[first - 12]


def test_the_answers_of_the_tasks_are_those_of_their_texts(benchmark: ModuleType) -> None:
    for seed in range(30):
        ids, answer = benchmark.listops(100, Random(seed))
        assert len(ids) <= 100
        assert value(list(ids)) == answer
        ids, answer = benchmark.retrieval(64, Random(seed))
        keys = [[i for i in half if 30 <= i < 40] for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
        assert (keys[0] == keys[1]) == bool(answer)
    agree = 0
    for seed in range(100):  # words are drawn one by one, so a few texts go against their answer
        ids, answer = benchmark.text(400, Random(seed))
        words = bytes(i - 1 for i in ids).decode().split()
        good, bad = (sum(word in known for word in words) for known in (benchmark.GOOD, benchmark.BAD))
        agree += (good > bad) == bool(answer)
    assert 85 <= agree <= 100


def rows(**cost: tuple[float, float]) -> list[dict]:
    return [
        {"mixer": name, "task": "listops", "tokens": 64, "ms": ms, "peak_mib": mib, "why": ""}
        for name, (ms, mib) in cost.items()
    ]


def test_a_verdict_says_what_was_found_and_not_what_was_expected(benchmark: ModuleType) -> None:
    as_said = benchmark.verdicts(rows(attention=(9, 9), linear=(1, 5), linformer=(2, 1)))
    assert [(v["here"], v["reproduced"]) for v in as_said] == [("linear", True), ("linformer", True)]
    contrary = benchmark.verdicts(rows(attention=(1, 2), linear=(3, 1), linformer=(2, 5)))
    assert [(v["here"], v["kind"], v["reproduced"]) for v in contrary] == [
        ("attention", "full", False),
        ("linear", "kernel", False),
    ]
    # A task that one of them did not run says nothing.
    broken = rows(attention=(9, 9), linear=(1, 5))
    broken[1]["why"] = "no time was left"
    assert benchmark.verdicts(broken) == []


def test_a_small_run_prints_its_table_and_whether_the_claims_hold_here(
    benchmark: ModuleType, monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "long_range.json")
    monkeypatch.setattr(benchmark, "TESTED", 16)
    names = ["attention", "longformer", "linformer", "linear"]
    small = f"--mixers {' '.join(names)} --tasks retrieval --lengths 64 --steps 1 --dim 16 --depth 1 --heads 2"
    monkeypatch.setattr("sys.argv", ["long_range.py", *small.split()])
    benchmark.main()
    found = json.loads((tmp_path / "long_range.json").read_text())
    assert {row["mixer"] for row in found["rows"]} == set(names)
    for row in found["rows"]:
        assert not row["why"], row
        assert min(row["ms"], row["peak_mib"], row["macs"]) >= 0
        assert 0 <= row["accuracy"] <= 1
    macs = {row["mixer"]: row["macs"] for row in found["rows"]}
    assert macs["linear"] < macs["attention"]
    printed = capsys.readouterr().out
    for verdict in found["verdicts"]:
        word = "reproduced" if verdict["reproduced"] else "NOT reproduced"
        assert f"{verdict['said']}: {word}; at 64 tokens it is {verdict['here']}" in printed
    assert len(found["verdicts"]) == 2
