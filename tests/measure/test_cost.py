"""Latency, memory, device, table, energy and the report that gathers them."""

import gc
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.measure import (
    Latency,
    LatencyTable,
    device_info,
    device_key,
    distinguishable,
    energy_estimate,
    latency,
    measure_model,
    memory,
    peak_memory,
    timing,
)


def test_latency_tells_slow_from_quick_and_not_a_thing_from_itself():
    def wait(ms):
        return lambda: time.sleep(ms / 1e3)

    result = latency({"one": wait(2), "other": wait(8), "same": wait(2)}, budget_s=0.6)
    assert result["one"].median_ms >= 2
    assert distinguishable(result["one"], result["other"])
    assert not distinguishable(result["one"], result["one"])
    for figure in result.values():
        assert figure.low_ms <= figure.median_ms <= figure.high_ms
        assert figure.p10_ms <= figure.median_ms <= figure.p90_ms
        assert figure.runs >= 10
        assert figure.threads == torch.get_num_threads()


def test_forms_run_interleaved_without_collection_and_with_the_threads_asked_for():
    calls = []
    before = torch.get_num_threads()

    def form(name):
        def call():
            calls.append(name)
            assert not gc.isenabled()
            assert torch.get_num_threads() == 1

        return call

    result = latency({"a": form("a"), "b": form("b")}, budget_s=0.05, threads=1)
    assert all({calls[i], calls[i + 1]} == {"a", "b"} for i in range(0, len(calls), 2))
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # neighbours change
    assert result["a"].runs == result["b"].runs
    assert gc.isenabled()
    assert torch.get_num_threads() == before


def test_minimum_of_runs_outlives_the_budget():
    result = latency({"slow": lambda: time.sleep(0.01)}, budget_s=0.001, min_runs=4)
    assert result["slow"].runs == 4


def test_interval_is_wider_where_neighbours_in_time_are_alike():
    draw = np.random.default_rng(0)
    slow_drift = np.repeat(draw.normal(10, 1, 20), 20)
    shuffled = draw.permutation(slow_drift)
    low, high = timing._interval(slow_drift)
    narrow_low, narrow_high = timing._interval(shuffled)
    assert high - low > 2 * (narrow_high - narrow_low)


def test_near_medians_are_the_same_however_narrow_their_intervals():
    def exact(ms):
        return Latency(ms, ms, ms, 0.0, ms, ms, 100, 10, True, 1)

    assert not distinguishable(exact(1.0), exact(1.005))
    assert distinguishable(exact(1.0), exact(1.02))


@pytest.mark.parametrize("bad", [{"forms": {}}, {"budget_s": 0}, {"min_runs": 0}])
def test_latency_refuses_senseless_arguments(bad):
    arguments = {"forms": {"a": lambda: None}, **bad}
    with pytest.raises(ValueError, match="must"):
        latency(**arguments)


def test_peak_memory_sees_what_was_given_back_before_the_end():
    def call():
        # More at its peak than at its end, in two blocks of 64 MiB.
        first = torch.ones(2**24)
        second = first * 2
        del first
        return float(second[0])

    figure = peak_memory(call)
    assert 120 < figure.mib < 160
    assert figure.method
    again = peak_memory(call)
    assert 120 < again.mib < 160


def test_peak_memory_is_sampled_where_the_kernel_keeps_no_mark(monkeypatch):
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    kept = []

    def call():
        kept.append(torch.ones(2**24))
        time.sleep(0.02)

    figure = peak_memory(call)
    assert 60 < figure.mib < 100
    assert "sampled" in figure.method


def test_device_is_described_and_its_key_does_not_hang_on_threads():
    before, key = torch.get_num_threads(), device_key()
    torch.set_num_threads(before + 1)
    try:
        assert device_info()["threads"] == before + 1
        assert device_key() == key
    finally:
        torch.set_num_threads(before)
    info = device_info()
    assert info["torch"] == torch.__version__
    assert info["cpu"]
    assert json.loads(json.dumps(info)) == info


def test_table_outlives_the_process_joins_writers_and_survives_damage(monkeypatch, tmp_path):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    one, other = LatencyTable(), LatencyTable()
    one.put("a", {"median_ms": 1.5})
    other.put("b", 2)
    assert one.path == tmp_path / "latency" / f"{device_key()}.json"
    again = LatencyTable()
    assert again.get("a") == {"median_ms": 1.5}
    assert again.get("b") == 2
    assert again.get("c") is None
    assert len(again) == 2
    one.path.write_text('{"a": ')
    broken = LatencyTable()
    assert len(broken) == 0
    broken.put("d", 4)
    assert LatencyTable().get("d") == 4
    assert [p.name for p in one.path.parent.iterdir()] == [one.path.name]


def test_energy_follows_its_formula_and_calls_itself_an_estimate():
    energy = energy_estimate(10**9, 4 * 10**6)
    assert energy.mj == pytest.approx(4.6 + 0.64)
    assert "estimate" in energy.formula
    assert energy_estimate(10**9, 0, "int8").mj == pytest.approx(0.23)
    with pytest.raises(ValueError, match="float32"):
        energy_estimate(1, 1, "float64")


def test_report_holds_every_figure_and_the_reason_where_a_form_fails():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).train()

    def broken(args):
        raise RuntimeError("no such kernel\nmore")

    seen = []

    def extra(args):
        seen.append(tuple(args[0].shape))
        return lambda: None

    result = measure_model(
        model,
        torch.randn(1, 4),
        batches=(1, 3),
        extra_forms={"onnx": extra, "broken": broken},
        budget_s=0.1,
        per_layer=True,
    )
    assert json.loads(json.dumps(result)) == result
    assert result["parameters"] == 4 * 8 + 8 + 8 * 2 + 2
    assert result["macs"] == result["macs_second"] == 4 * 8 + 8 * 2
    assert result["size_mb"] == pytest.approx(result["parameters"] * 4e-6)
    assert seen == [(1, 4), (3, 4)]
    rows = {(row["form"], row["batch"]): row for row in result["latency"]}
    assert set(rows) == {(form, batch) for form in ("eager", "onnx", "broken") for batch in (1, 3)}
    assert rows["eager", 3]["median_ms"] > 0
    assert rows["broken", 1]["error"] == "RuntimeError: no such kernel"
    assert [(row["name"], row["macs"]) for row in result["layers"]] == [("", 48), ("0", 32), ("1", 0), ("2", 16)]
    assert model.training


def test_report_refuses_unknown_forms_and_unequal_batches():
    model = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="forms"):
        measure_model(model, torch.randn(1, 2), forms=("jit",))
    with pytest.raises(ValueError, match="batch size"):
        measure_model(model, (torch.randn(1, 2), torch.randn(2, 2)))
    with pytest.raises(ValueError, match="positive"):
        measure_model(model, torch.randn(1, 2), batches=(0,))
