"""What is considered, in which order, and why a candidate is left out; nothing is trained or timed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gossamer.data import Dataset, read_dataset
from gossamer.data.builtin import toy_images
from gossamer.fit import candidates as module
from gossamer.fit.candidates import Candidate, enumerate_candidates, measure_candidates, prior
from gossamer.tasks import create_task

TASK = "image-classification"


def candidate(name: str, *, macs: float = 1e7, step_s: float = 0.1, batch: int = 50) -> Candidate:
    return Candidate(name, name.split("-")[0], name, cost={"latency": 1.0, "macs": macs}, step_s=step_s, batch=batch)


def test_with_time_enough_more_work_a_sample_is_tried_first_and_with_little_time_less() -> None:
    small, large = candidate("a-s", macs=1e7, step_s=0.05), candidate("a-l", macs=1e8, step_s=0.5)
    hour, minute = 3600.0, 20.0
    assert prior(large, TASK, 1000, hour) > prior(small, TASK, 1000, hour)
    assert prior(small, TASK, 1000, minute) > prior(large, TASK, 1000, minute)


def test_more_data_in_the_same_time_favours_the_quick() -> None:
    small, large = candidate("a-s", macs=1e7, step_s=0.05), candidate("a-l", macs=1e8, step_s=0.5)
    gap = [prior(large, TASK, n, 600.0) - prior(small, TASK, n, 600.0) for n in (1_000, 10_000, 100_000)]
    assert gap == sorted(gap, reverse=True)
    assert gap[0] > 0 > gap[-1]


def test_what_was_not_measured_comes_last() -> None:
    assert prior(Candidate("a-s", "a", "a"), TASK, 100, 60.0) == -math.inf


@pytest.mark.parametrize(
    "kept",
    [
        Candidate(
            "swin-s",
            "swin",
            "swin_t",
            {"img_size": [8, 8]},
            {"latency": 1.5, "memory": None},
            {"size": 0.5},
            interval=(1.4, 1.6),
            step_s=0.25,
            batch=64,
            prior=3.0,
            status="int8",
            why="latency",
        ),
        Candidate("swin-l", "swin", "swin_t"),
    ],
)
def test_a_candidate_is_the_same_after_json(kept: Candidate) -> None:
    back = Candidate.from_dict(json.loads(json.dumps(kept.to_dict(), allow_nan=False)))
    assert back.to_dict() == kept.to_dict()
    assert back.interval == kept.interval
    assert math.isnan(back.step_s) == math.isnan(kept.step_s)


@pytest.mark.parametrize("source", ["toy-images", "toy-text", "toy-series"])
def test_every_task_has_several_families_scaled_to_its_data_and_no_model_twice(source: str) -> None:
    data = read_dataset(source)
    found = enumerate_candidates(data)
    assert len({c.system for c in found}) >= 3
    assert len({c.name for c in found}) == len(found)
    made = [(c.model, json.dumps(c.options, sort_keys=True)) for c in found]
    assert len(set(made)) == len(made)
    smallest = min(found, key=lambda c: module.SIZES.index(c.name.rsplit("-", 1)[1]))
    (x, *rest), _ = create_task(data.task, data.spec, data.meta).batch(
        data.train, data.train.targets.new_tensor([0, 1])
    )
    assert len(smallest.build().eval()(x, *rest)) == 2


@pytest.fixture
def small() -> Dataset:
    return toy_images(rows=80)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Dataset) -> Any:
    """`measure_candidates` on made-up costs: `{name: (latency, params, int8 latency or None)}`."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    task = create_task(small.task, small.spec, small.meta)
    asked: dict[str, list[str]] = {"float": [], "int8": []}

    def run(costs: dict[str, tuple[float, float, float | None]], budget: dict[str, float], stop: Any = lambda: False):
        def float_cost(c: Candidate, *_: Any, **__: Any) -> dict[str, Any]:
            asked["float"].append(c.name)
            if c.name not in costs:
                raise RuntimeError("no such operator\nin a long story")
            latency, params, _ = costs[c.name]
            cost = {"latency": latency, "memory": None, "size": params / 1e6, "params": params, "macs": 1e7 * latency}
            return {"cost": cost, "interval": (latency, latency), "step_s": 0.01, "export_s": 0.1}

        def int8_cost(c: Candidate, *_: Any) -> dict[str, Any]:
            asked["int8"].append(c.name)
            latency = costs[c.name][2]
            return {} if latency is None else {**c.cost, "latency": latency}

        monkeypatch.setattr(module, "_measure", float_cost)
        monkeypatch.setattr(module, "_int8_cost", int8_cost)
        given = [Candidate(name, name.split("-")[0], name) for name in [*costs, "broken-s"]]
        found = measure_candidates(given, task, small, budget, train_s=60.0, batch_size=16, stop=stop)
        return found, asked

    return run


def test_candidates_are_ready_or_fit_as_int8_or_are_left_out_with_the_reason(measured: Any) -> None:
    costs = {
        "fast-s": (1.0, 1e5, None),
        "slow-s": (3.0, 1e5, 1.5),
        "slower-s": (3.5, 1e5, 2.5),
        "stuck-s": (3.0, 1e5, None),
        "endless-l": (99.0, 1e5, 1.0),
        "many-l": (3.0, 9e6, 1.0),
    }
    found, asked = measured(costs, {"latency": 2.0, "params": 1e6})
    by = {c.name: c for c in found}
    assert {n: c.status for n, c in by.items()} == {
        "fast-s": "ready",
        "slow-s": "int8",
        "slower-s": "left out",
        "stuck-s": "left out",
        "endless-l": "left out",
        "many-l": "left out",
        "broken-s": "left out",
    }
    assert by["slower-s"].why == "latency 2.5ms > 2ms even as int8"
    assert by["stuck-s"].why == "latency 3ms > 2ms even as int8"
    assert by["endless-l"].why == "latency 99ms > 2ms"
    assert by["many-l"].why == "latency 3ms > 2ms, params 9,000,000 > 1,000,000"
    assert by["broken-s"].why == "RuntimeError: no such operator"
    # int8 cannot mend parameters, nor a latency far beyond its reach: it is not even tried.
    assert asked["int8"] == ["slow-s", "slower-s", "stuck-s"]
    assert [c.status for c in found[:2]] == ["ready", "int8"]


def test_small_sizes_of_quick_learners_are_measured_first_and_the_rest_not_once_time_is_over(measured: Any) -> None:
    costs = {"a-l": (1.0, 1.0, None), "a-xs": (1.0, 1.0, None), "b-xs": (1.0, 1.0, None)}
    calls = iter([False, False, True, True, True])
    found, asked = measured(costs, {}, stop=lambda: next(calls))
    assert asked["float"] == ["a-xs", "b-xs"]
    left = {c.name: c.why for c in found if c.status == "not measured"}
    assert left == dict.fromkeys(("a-l", "broken-s"), "the time for measuring was over")


def test_a_family_that_lags_is_measured_after_larger_sizes_of_those_that_do_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "first_minutes", lambda: {TASK: {"quick": 0.0, "slow": 1.5 * module.LAG}})
    listed = [Candidate(f"{s}-{size}", s, s) for s in ("slow", "quick", "unknown") for size in ("m", "s", "xs")]
    order = [c.name for c in module._promising_first(listed, TASK)]
    assert order[:4] == ["quick-xs", "quick-s", "slow-xs", "unknown-xs"]
    assert order[-1] == "unknown-m"


def test_a_cost_once_measured_on_this_device_is_not_measured_again(measured: Any) -> None:
    _, asked = measured({"a-s": (1.0, 1.0, None)}, {})
    again, _ = measured({"a-s": (5.0, 1.0, None)}, {})
    assert asked["float"].count("a-s") == 1
    assert next(c for c in again if c.name == "a-s").cost["latency"] == 1.0
