"""What a user writes becomes base units, or a message that says what is allowed."""

import pytest

from gossamer.cli.units import parse_budget, parse_duration, parse_settings, parse_shape, parse_shares, short


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("latency=5ms", {"latency": 5.0}),
        ("latency=0.5s", {"latency": 500.0}),
        ("latency=250us", {"latency": 0.25}),
        ("latency=.5ms", {"latency": 0.5}),
        ("memory=100MiB", {"memory": 100.0}),
        ("memory=1GiB", {"memory": 1024.0}),
        ("memory=1MB", {"memory": 1e6 / 2**20}),
        ("size=2MB", {"size": 2.0}),
        ("size=500kb", {"size": 0.5}),
        ("params=1M,macs=50M", {"params": 1e6, "macs": 50e6}),
        ("params=250000", {"params": 250000.0}),
        ("macs=1e6", {"macs": 1e6}),
        (" latency = 5 ms , size = 2 MB ", {"latency": 5.0, "size": 2.0}),
    ],
)
def test_a_budget_is_read_in_base_units(text: str, budget: dict[str, float]) -> None:
    assert parse_budget(text) == pytest.approx(budget)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency=5", "latency=5ms"),
        ("latency=5parsecs", "us, ms, s"),
        ("latency=-5ms", "latency"),
        ("latency=0ms", "positive"),
        ("latency=nanms", "latency"),
        ("latency=infms", "latency"),
        ("latency=1e999s", "positive"),
        ("latency=", "latency"),
        ("latency", "latency=5ms"),
        ("", "latency=5ms"),
        ("speed=5ms", "'speed=5ms'"),
        ("latency=5ms,", "got ''"),
        ("latency=5ms,latency=6ms", "twice"),
        ("macs=60%", "macs=50M"),
        ("size=2MiBs", "size=2MB"),
        ("params=1,000,000", "'000'"),
    ],
)
def test_a_bad_budget_is_told_precisely(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="budget") as caught:
        parse_budget(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("3m", 180), ("1h", 3600), ("1h30m", 5400), ("1.5h", 5400), ("2m30s", 150), (" 10M ", 600)],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "m", "0s", "-3m", "3 minutes", "1m1h", "1..5h", "1.2.3m", "nan", "3d"])
def test_a_bad_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration must be written like"):
        parse_duration(text)


def test_a_shape_is_whole_numbers_with_x_between() -> None:
    assert parse_shape("3x224x224") == (3, 224, 224)
    assert parse_shape("3X32X32") == (3, 32, 32)
    assert parse_shape("128") == (128,)


@pytest.mark.parametrize("text", ["", "3x", "x3", "3x0x3", "3x-1", "3,224,224", "3x22.4", "²x3"])
def test_a_bad_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="like 3x224x224"):
        parse_shape(text)


def test_numbers_are_shortened_to_three_digits() -> None:
    assert [short(n) for n in (None, 0, 12, 999, 1000, 999_999, 5_717_416, 17.58e9)] == [
        "-", "0", "12", "999", "1K", "1M", "5.72M", "17.6G",
    ]  # fmt: skip


def test_settings_are_read_as_yaml_and_named_once():
    assert parse_settings(["dim=64", "depths=[2, 2]", "pad=true"]) == {"dim": 64, "depths": [2, 2], "pad": True}
    for words in (["dim"], ["dim=1", "dim=2"], ["a b=1"], ["dim=[1"]):
        with pytest.raises(ValueError, match="--set"):
            parse_settings(words)


def test_shares_stand_beside_figures():
    assert parse_shares("latency=70%, size=5MB") == ({"size": 5.0}, {"latency": pytest.approx(0.7)})
    for text, words in (("latency=70%,latency=5ms", "twice"), ("speed=4%", "must name"), ("latency=x%", "latency=70%")):
        with pytest.raises(ValueError, match=words):
            parse_shares(text)
