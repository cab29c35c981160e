"""Score cards: every figure is the one it says, and what another row beats by every measure is not shown."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gossamer
from gossamer.bench.score import FRONT, Score, bench_models, compare, dominates, front, score, with_front
from gossamer.cli import app
from gossamer.measure import EnergyCosts, activations, macs, weight_bytes
from gossamer.shrink.base import run_pass
from shrink.toys import digits, learned, vision


def card(name: str, accuracy: float | None, stored: int, peak: int, ms: float | None, mj: float) -> Score:
    return Score(name, accuracy, 1, stored, 1, peak, ms, mj, (mj, mj), "")


def test_a_card_holds_the_counted_figures_and_energy_by_its_formula():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(1, 3, 6, 6)
    costs = EnergyCosts.exactly({"float32": 2.0, "int8": 0.5}, dram=100.0, sram=1.0)
    found = score(net, x, accuracy=0.9, costs=costs, seconds=0.05)
    held = activations(net, x)
    assert found.macs == macs(net, x).total == 8 * 27 * 36 + 8 * 36 * 5
    assert (found.accuracy, found.bytes, found.peak_activations) == (0.9, weight_bytes(net), held.peak)
    assert found.latency_ms > 0
    moved = weight_bytes(net) + 4 * (3 * 36 + 5)
    assert found.energy_mj == pytest.approx((2.0 * found.macs + 100 * moved + 2 * held.written) * 1e-9)
    small = score(net, x, costs=costs, bits=8, seconds=0)
    assert small.latency_ms is None
    assert small.energy_mj == pytest.approx((0.5 * found.macs + 25 * moved + 0.5 * held.written) * 1e-9)
    assert score(net, x, seconds=0).energy_range[1] > score(net, x, seconds=0).energy_range[0]
    with pytest.raises(ValueError, match="bits must be one of"):
        score(net, x, bits=7)


def test_stored_codes_make_the_card_of_a_vit_smaller_and_its_energy_less():
    calibration = digits()
    net = vision().eval()
    low, _ = run_pass("low_bits", net, calibration, kind="ternary", steps=0)
    x = calibration.example()
    before, after = compare({"floats": (net, x), "ternary": (low, x)}, seconds=0)
    assert after.bytes < 0.4 * before.bytes
    assert after.energy_mj < before.energy_mj
    assert (after.macs, after.peak_activations) == (before.macs, before.peak_activations)


def test_the_front_has_exactly_the_rows_that_nothing_dominates():
    torch.manual_seed(0)
    values = torch.randint(0, 4, (60, 5)).tolist()
    rows = with_front(
        [card(str(i), *map(float, v[:1]), v[1], v[2], float(v[3]), float(v[4])) for i, v in enumerate(values)]
    )

    def worse(a, b):  # a is nowhere better than b and somewhere worse, by brute force on (accuracy, …)
        signed = [(-a[0], -b[0]), *zip(a[1:], b[1:], strict=True)]
        return all(p >= q for p, q in signed) and any(p > q for p, q in signed)

    want = {str(i) for i, v in enumerate(values) if not any(worse(v, w) for w in values)}
    assert {row.name for row in front(rows)} == want
    assert 0 < len(want) < 60
    for row in rows:
        if row.dominated_by:
            assert dominates(rows[int(row.dominated_by)], row)
    # What one of them lacks says nothing; equal rows stay both.
    pair = with_front([card("a", None, 5, 5, 1.0, 5.0), card("b", 0.9, 5, 5, None, 5.0)])
    assert len(front(pair)) == 2
    assert len(FRONT) == 5


def test_the_command_shows_the_front_and_writes_table_and_chart(tmp_path: Path):
    calibration = digits()
    good = learned(vision(), calibration, steps=60)
    worse = vision(dim=64, depth=3)
    for name, net in (("good", good), ("worse", worse.eval())):
        gossamer.save(net, tmp_path / name / "model")
    words = ["bench", "models", str(tmp_path / "good"), str(tmp_path / "worse"), "--data", "digits", "--time", "1s"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line]
    assert ["dominated", "by"] in lines
    assert [str(tmp_path / "worse"), str(tmp_path / "good")] in lines
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["front"] == [str(tmp_path / "good")]
    accuracy = {Path(row["name"]).name: row["accuracy"] for row in kept["models"]}
    assert accuracy["good"] > accuracy["worse"] + 0.3
    assert all("estimate" in row["formula"] for row in kept["models"])
    chart = (tmp_path / "out" / "models.svg").read_text()
    assert chart.startswith("<svg")
    assert "worse" in chart
    named = CliRunner().invoke(
        app, ["bench", "models", "vit_tiny_patch16_224", "--input", "3x32x32,3x48x48", "--time", "0.2s", "--json",
              "--out", str(tmp_path / "named"), "--costs", "mac=1,dram=0,sram=0"],
    )  # fmt: skip
    assert named.exit_code == 0, named.output
    rows = json.loads(named.stdout)["models"]
    assert [row["input"] for row in rows] == [[[1, 3, 32, 32]], [[1, 3, 48, 48]]]
    assert rows[1]["macs"] > 2 * rows[0]["macs"]
    assert rows[0]["energy_mj"] == pytest.approx(rows[0]["macs"] * 1e-9)


def test_what_is_counted_is_written_alike_in_every_run(tmp_path: Path):
    files = []
    for run in ("one", "two"):
        torch.manual_seed(0)
        nets = {"vit": (vision(), torch.randn(1, 1, 8, 8)), "linear": (nn.Linear(4, 4), torch.randn(1, 4))}
        bench_models(nets, {"vit": 0.9, "linear": 0.4}, out=tmp_path / run, seconds=0)
        text = (tmp_path / run / "results.json").read_text()
        files.append(text.replace(str(tmp_path / run), "here"))
    assert files[0] == files[1]
    rows = json.loads(files[0])["models"]
    assert [row["name"] for row in rows] == ["vit", "linear"]
    assert all(row["latency_ms"] is None for row in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("swim",), "swim"),
        (("vit_tiny_patch16_224", "--bits", "5"), "bits must be one of"),
        (("vit_tiny_patch16_224", "--costs", "mac=1"), "costs must be like"),
        (("vit_tiny_patch16_224", "--costs", "mac=-1,dram=1,sram=1"), "at least 0 pJ"),
        (("x", "--data", "digits", "--input", "3x8x8"), "give --input or --data"),
        (("vit_tiny_patch16_224", "--data", "digits"), "no trained weights"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(words, says, tmp_path: Path):
    result = CliRunner().invoke(app, ["bench", "models", *words, "--time", "0.1s", "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_chart_without_data_has_latency_in_place_of_accuracy(tmp_path: Path):
    nets = {"a": (nn.Linear(4, 4), torch.randn(1, 4)), "b": (nn.Linear(4, 400), torch.randn(1, 4))}
    results = bench_models(nets, out=tmp_path, seconds=0.05)
    assert "latency of one input" in (tmp_path / "models.svg").read_text()
    assert "b" not in results["front"] or results["models"][1]["dominated_by"] == ""
