"""The mixer bench: figures that can be counted are right, what fails is told, training is equal for all."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer import __version__
from gossamer.bench import accuracy, bench_mixers
from gossamer.bench import mixers as bench
from gossamer.bench.accuracy import small_network
from gossamer.bench.block import heads_for, make_mixer
from gossamer.bench.plot import spread

NAMES = ["identity", "attention", "spatial_fc"]
DIM, GRID = 16, (8, 12)


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """No mixer is left out for its time: another process may take the processor for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CHEAP_S", 60.0)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("bench")
    return bench_mixers(GRID, DIM, mixers=[*NAMES, "sparse"], out=out, seconds=0.5, quiet=True), out


def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["mixers"]}


def test_grids_hold_a_sixteenth_a_quarter_and_all_of_the_tokens() -> None:
    assert bench.growing((56, 56)) == [(14, 14), (28, 28), (56, 56)]
    assert bench.growing((4096,)) == [(256,), (1024,), (4096,)]
    assert [a * b * c for a, b, c in bench.growing((16, 16, 16))] == [216, 1000, 4096]
    assert bench.growing((2, 2)) == [(1, 1), (2, 2)]


def test_heads_are_about_32_channels_and_even() -> None:
    assert [heads_for(dim) for dim in (32, 64, 96, 192, 384)] == [2, 2, 4, 6, 12]
    assert heads_for(7) == 1
    for name in ("attention", "kdgqa"):  # the second hands its heads on
        assert make_mixer(name, 96, (4, 4), heads_for(96)).heads == 4


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    assert bench.exponent([16, 64, 256], [3 * n**1.7 for n in (16, 64, 256)]) == pytest.approx(1.7)
    assert bench.exponent([16, 64], [1.0, 2.0]) is None


def test_multiply_adds_are_those_of_the_block_and_grow_as_the_mechanism_does(small) -> None:
    found = rows(small[0])
    for i, n in enumerate((6, 24, 96)):
        mlp = 8 * n * DIM**2
        attention = 4 * n * DIM**2 + 2 * n * n * DIM
        for name, own in (("identity", 0), ("attention", attention), ("spatial_fc", n * n * DIM)):
            figures = found[name]["sizes"][i]
            assert figures["tokens"] == n
            assert figures["macs"] == mlp + own, name


def test_every_figure_is_there_with_device_and_versions(small) -> None:
    results, out = small
    assert results == json.loads((out / "results.json").read_text())
    assert results["device"]["gossamer"] == __version__
    assert {"cpu", "threads", "torch"} <= results["device"].keys()
    assert results["grids"] == [[2, 3], [4, 6], [8, 12]]
    for row in results["mixers"]:
        assert row["exponent"] is not None
        for figures in row["sizes"]:
            took = figures["latency"]
            assert took["runs"] >= bench.MIN_RUNS
            assert took["low_ms"] <= figures["ms"] == took["median_ms"] <= took["high_ms"]
            assert figures["peak_mib"] >= 0
    assert rows(results)["spatial_fc"]["sizes"][-1]["parameters"] == 96**2
    at_last = [row["sizes"][-1]["ms"] for row in results["mixers"]]
    assert at_last == sorted(at_last)


def test_mixers_of_other_grids_are_listed_with_the_reason(small) -> None:
    assert small[0]["left_out"] == [{"name": "sparse", "why": "works on 1 grid axes, not 2"}]


def test_the_picture_stands_alone_and_names_every_mixer(small) -> None:
    picture = (small[1] / "mixers.svg").read_text()
    assert picture.startswith("<svg")
    assert "<script" not in picture
    assert 'href="http' not in picture
    for name in NAMES:
        assert name in picture


def test_sequences_are_benched_on_a_grid_of_one_axis(tmp_path: Path) -> None:
    results = bench_mixers(
        (64,), DIM, mixers=["attention", "spatial_fc", "window"], out=tmp_path, seconds=0.5, quiet=True
    )
    assert results["grids"] == [[4], [16], [64]]
    assert {len(row["sizes"]) for row in results["mixers"]} == {3}
    assert len(results["mixers"]) == 3


def test_a_mixer_that_fails_is_told_in_its_own_words_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 4:
                raise RuntimeError("too many rows\nand a second line")
            return x

    def make(name: str, *args: Any) -> nn.Module:
        if name == "pool":
            raise ValueError("no such width")
        return Fails() if name == "window" else make_mixer(name, *args)

    monkeypatch.setattr(bench, "make_mixer", make)
    results = bench_mixers((8, 8), DIM, mixers=["identity", "pool", "window"], out=tmp_path, seconds=0.5, quiet=True)
    assert results["left_out"] == [{"name": "pool", "why": "at 2x2: no such width"}]
    found = rows(results)
    assert found["window"]["why"] == "at 8x8: too many rows"
    assert [figures["tokens"] for figures in found["window"]["sizes"]] == [4, 16]
    assert found["window"]["exponent"] is None
    assert [row["name"] for row in results["mixers"]] == ["identity", "window"]


def test_a_call_that_may_not_end_or_not_fit_is_not_made() -> None:
    assert bench._too_much([], 10**9, 1.0) == ""
    assert bench._too_much([{"tokens": 16, "ms": 1.0, "peak_mib": 1.0}], 64, 1.0) == ""
    assert "may take 160 s a call" in bench._too_much([{"tokens": 16, "ms": 1e4, "peak_mib": 1.0}], 64, 60.0)
    assert "may need 16384.0 GiB" in bench._too_much([{"tokens": 16, "ms": 1.0, "peak_mib": 2.0**20}], 64, 60.0)


def test_networks_differ_in_their_mixers_alone() -> None:
    spec = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10}
    one, two = (small_network(name, spec, 3) for name in ("attention", "pool"))
    assert [block.mixer.name for block in one.blocks] == ["attention"] * len(two.blocks)
    shared = {k: v for k, v in two.state_dict().items() if ".mixer." not in k}
    assert shared.keys() == {k for k in one.state_dict() if ".mixer." not in k}
    assert all(torch.equal(one.state_dict()[k], v) for k, v in shared.items())
    again = small_network("attention", spec, 3).state_dict()
    assert all(torch.equal(again[k], v) for k, v in one.state_dict().items())
    # No class token: attention, too, is given the map and the mean of all tokens is scored.
    assert one.features(torch.zeros(1, 1, 8, 8))[0].shape[1:3] == (8, 8)


def test_all_are_trained_equally_long_on_the_same_data_and_a_seed_repeats_it(tmp_path: Path) -> None:
    def run(*names: str) -> dict[str, Any]:
        out = tmp_path / names[0]
        return bench_mixers((4, 4), DIM, mixers=names, train="digits", epochs=1, seconds=0.5, out=out, quiet=True)

    both, alone = run("depthwise", "identity"), run("identity")
    assert both["train"]["steps"] == both["train"]["images"] // both["train"]["settings"]["batch_size"]
    assert both["train"]["epochs"] == 1
    found = rows(both)
    # What looks at no neighbours tells digits by single pixels; what does learns more from as many steps.
    assert found["depthwise"]["accuracy"] > found["identity"]["accuracy"]
    assert found["identity"]["accuracy"] == rows(alone)["identity"]["accuracy"]
    assert found["identity"]["loss"] == rows(alone)["identity"]["loss"]
    assert min(row["network_ms"] for row in found.values()) > 0
    assert "test accuracy" in (tmp_path / "depthwise" / "mixers.svg").read_text()


def test_a_stopped_call_leaves_what_it_measured_and_the_same_call_goes_on(tmp_path: Path, monkeypatch) -> None:
    names = ["depthwise", "identity"]
    words: dict[str, Any] = {"mixers": names, "train": "digits", "epochs": 1, "out": tmp_path, "quiet": True}
    words["seconds"] = 5.0
    timed: list[tuple[int, ...]] = []
    trained: list[str] = []
    measure, trainer = bench._measure, accuracy._trainer

    def stopped_at(grid: tuple[int, ...] | None, network: str | None) -> None:
        def measured(rows: Any, size: tuple[int, ...], dim: int, heads: int, share: float, *rest: Any) -> None:
            if size == grid:
                raise KeyboardInterrupt
            timed.append(size)
            measure(rows, size, dim, heads, 0.1, *rest)

        def training(name: str, *rest: Any) -> Any:
            if name == network and (tmp_path / "results.json").exists() and content()["train"] is not None:
                raise KeyboardInterrupt
            trained.append(name)
            return trainer(name, *rest)

        monkeypatch.setattr(bench, "_measure", measured)
        monkeypatch.setattr(accuracy, "_trainer", training)

    def content() -> dict[str, Any]:
        return json.loads((tmp_path / "results.json").read_text())

    stopped_at((4, 4), None)
    with pytest.raises(KeyboardInterrupt):
        bench_mixers((8, 8), DIM, **words)
    assert not content()["complete"]
    assert {len(row["sizes"]) for row in content()["mixers"]} == {1}
    first = {name: row["sizes"][0] for name, row in rows(content()).items()}

    stopped_at(None, "identity")
    with pytest.raises(KeyboardInterrupt):
        bench_mixers((8, 8), DIM, **words)
    half = content()
    assert not half["complete"]
    assert rows(half)["depthwise"]["accuracy"] > 0.1
    assert "accuracy" not in rows(half)["identity"]

    trained.clear()
    stopped_at(None, None)
    results = bench_mixers((8, 8), DIM, **words)
    assert results["complete"]
    assert timed == [(2, 2), (4, 4), (8, 8)]
    assert trained == ["identity"]
    assert {name: row["sizes"][0] for name, row in rows(results).items()} == first
    assert rows(results)["depthwise"]["accuracy"] == rows(half)["depthwise"]["accuracy"]
    assert results["train"] == half["train"]
    assert results["seconds"] > half["seconds"]
    assert min(row["network_ms"] for row in rows(results).values()) > 0

    # Stopped before it was drawn, it only draws.
    (tmp_path / "results.json").write_text(json.dumps({**results, "complete": False}))
    (tmp_path / "mixers.svg").unlink()
    bench_mixers((8, 8), DIM, **words)
    assert timed == [(2, 2), (4, 4), (8, 8)]
    assert trained == ["identity"]
    assert (tmp_path / "mixers.svg").exists()

    # A finished bench is run anew.
    stopped_at((2, 2), None)
    with pytest.raises(KeyboardInterrupt):
        bench_mixers((8, 8), DIM, **words)


def test_names_beside_the_picture_keep_apart_in_their_order() -> None:
    heights = [0.1, 0.1, 0.11, 0.5, 0.99, 1.0]
    placed = spread(heights)
    gaps = [b - a for a, b in pairwise(placed)]
    assert min(gaps) >= 0.04 - 1e-9
    assert max(placed) <= 1
    assert placed[3] == 0.5
    assert spread([]) == []


@pytest.mark.parametrize(
    ("grid", "options", "says"),
    [
        ((4, 4), {"mixers": ["pol"]}, "'pol'"),
        ((2, 2, 2, 2), {}, "one to three"),
        ((), {}, "one to three"),
        ((0, 4), {}, "positive"),
        ((16,), {"train": "digits"}, "two axes"),
        ((4, 4), {"train": "toy-text"}, "toy-text is for text-classification"),
    ],
)
def test_what_cannot_be_benched_is_refused(tmp_path: Path, grid, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        bench_mixers(grid, DIM, out=tmp_path, seconds=0.5, quiet=True, **options)
