"""Which file wins, what becomes of the others, and what counts as noise."""

import math
from typing import Any

import pytest

from gossamer.data.builtin import toy_images, toy_series
from gossamer.fit.race import base_settings
from gossamer.shrink.artefacts import Point, choose, metric_noise
from gossamer.tasks import create_task


def point(name: str, val: float, latency: float, **other: Any) -> Point:
    size = other.pop("size", 1.0)
    return Point(name, "float32", f"{name}.onnx", val, {"latency": latency, "size": size}, (latency, latency), **other)


def status(points: list[Point]) -> dict[str, str]:
    return {p.name: p.status for p in points}


def test_the_winner_is_the_fastest_that_cannot_be_told_from_the_best() -> None:
    points = [point("best", 0.90, 4.0), point("near", 0.89, 2.0), point("far", 0.80, 1.0)]
    winner, closest = choose(points, {"latency": 5.0}, maximise=True, noise=0.02)
    assert winner is not None
    assert (winner.name, closest) == ("near", None)
    assert status(points) == {"best": "front", "near": "winner", "far": "front"}


def test_without_noise_the_best_wins_however_slow_within_the_budget() -> None:
    points = [point("best", 0.90, 4.9), point("near", 0.89, 2.0)]
    winner, _ = choose(points, {"latency": 5.0}, maximise=True, noise=0.0)
    assert winner is points[0]


def test_what_cannot_be_told_from_the_best_may_be_preferred_where_less_was_done_to_it() -> None:
    recipe = {"recipe": [{"pass": "optin"}, {"pass": "recover"}]}
    points = [
        point("trained", 0.90, 2.0, certificate=recipe),
        point("slower", 0.89, 4.0),
        point("as it came", 0.89, 3.0),
    ]
    winner, _ = choose(points, {"latency": 5.0}, maximise=True, noise=0.02, prefer="least changed")
    assert winner is points[2]
    winner, _ = choose(points, {"latency": 5.0}, maximise=True, noise=0.005, prefer="least changed")
    assert winner is points[0]


def test_an_error_is_better_when_it_is_smaller() -> None:
    points = [point("good", 0.30, 4.0), point("as-good", 0.301, 1.0), point("bad", 0.5, 0.5)]
    winner, _ = choose(points, {}, maximise=False, noise=0.005)
    assert winner is points[1]
    assert status(points)["bad"] == "front"


def test_a_file_over_any_limit_cannot_win_and_the_words_say_by_how_much() -> None:
    points = [point("slow", 0.99, 9.0, why="no faster form"), point("large", 0.98, 1.0, size=3.0), point("ok", 0.5, 1)]
    winner, _ = choose(points, {"latency": 5.0, "size": 2.0}, maximise=True, noise=0.01)
    assert winner is points[2]
    assert status(points) == {"slow": "over budget", "large": "over budget", "ok": "winner"}
    assert points[0].why == "no faster form; latency 9ms > 5ms"
    assert points[1].why == "size 3MB > 2MB"


def test_what_another_file_beats_in_both_is_dominated_and_ties_are_not() -> None:
    points = [point("a", 0.9, 1.0), point("worse", 0.8, 2.0), point("twin", 0.9, 1.0), point("slower", 0.9, 1.5)]
    choose(points, {}, maximise=True, noise=0.0)
    assert status(points) == {"a": "winner", "worse": "dominated", "twin": "front", "slower": "dominated"}


def test_a_rolled_back_file_neither_wins_nor_dominates() -> None:
    points = [point("back", 0.99, 0.1, status="rolled back", why="int8 is slower"), point("kept", 0.9, 1.0)]
    winner, _ = choose(points, {"latency": 5.0}, maximise=True, noise=0.0)
    assert winner is points[1]
    assert status(points) == {"back": "rolled back", "kept": "winner"}
    assert points[0].why == "int8 is slower"


def test_if_nothing_fits_the_closest_to_the_budget_is_named_and_nothing_wins() -> None:
    points = [point("best", 0.9, 4.0), point("closest", 0.5, 2.0), point("back", 0.1, 0.1, status="rolled back")]
    winner, closest = choose(points, {"latency": 1.0}, maximise=True, noise=0.0)
    assert winner is None
    assert closest is points[1]
    assert "winner" not in status(points).values()


def test_if_every_file_was_rolled_back_there_is_neither_winner_nor_closest() -> None:
    assert choose([point("a", 0.9, 1.0, status="rolled back")], {}, maximise=True, noise=0.0) == (None, None)


def test_noise_of_an_accuracy_is_one_standard_error_of_the_best() -> None:
    data = toy_images(rows=40)
    task = create_task(data.task, data.spec, data.meta)
    assert metric_noise(task, [0.5, 0.75], 1000) == pytest.approx(math.sqrt(0.75 * 0.25 / 1000))
    assert 0 < metric_noise(task, [1.0], 1000) < 0.001
    assert metric_noise(task, [], 0) > 0


def test_noise_of_an_error_is_a_share_of_the_smallest() -> None:
    data = toy_series(rows=600)
    task = create_task(data.task, data.spec, data.meta)
    assert metric_noise(task, [0.4, 0.2], 100) == pytest.approx(0.001)


def test_forecasters_are_trained_without_augmentation_and_few_samples_in_small_batches() -> None:
    few, many, series = toy_images(rows=60), toy_images(rows=6000), toy_series(rows=600)
    assert base_settings(few, 0).batch_size == 32 < base_settings(many, 0).batch_size
    assert base_settings(series, 0).strength == 0
    assert base_settings(many, 7).seed == 7


def test_the_noise_of_a_rank_correlation_is_its_standard_error() -> None:
    task = create_task("sentence-similarity", {"vocab_size": 9, "max_len": 4, "pad_id": 0}, {"range": [0, 5]})
    assert metric_noise(task, [80.0, 60.0], 577) == pytest.approx(100 * 0.36 / 24)
