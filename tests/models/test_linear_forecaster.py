"""Linear forecaster: one map of time for the trend and one for the season, and the level of a window left out."""

import pytest
import torch

from forecasters import SPECS, Toy, exports, refuses, scales
from gossamer.models import create_model
from gossamer.models.registry import system

SIZES = {"channels": 3, "seq_len": 12, "pred_len": 5, "moving_avg": 5}


def filled(**settings) -> torch.nn.Module:
    model = create_model("linear_forecaster", **{**SIZES, **settings}).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize("individual", [False, True])
def test_each_variable_is_mapped_through_its_trend_and_its_season(individual: bool) -> None:
    model = filled(individual=individual, anchor="none")
    x = torch.randn(2, 12, 3, dtype=torch.double)
    y = model(x)
    for b in range(2):
        for c in range(3):
            series, own = x[b, :, c], c if individual else 0
            near = [[min(max(s, 0), 11) for s in range(t - 2, t + 3)] for t in range(12)]
            trend = torch.stack([series[steps].mean() for steps in near])
            want = model.trend[own] @ trend + model.season[own] @ (series - trend) + model.bias[own]
            torch.testing.assert_close(y[b, :, c], want)


@pytest.mark.parametrize("anchor", ["last", "mean"])
def test_a_forecast_moves_with_the_level_of_its_window(anchor: str) -> None:
    x = torch.randn(2, 12, 3, dtype=torch.double)
    model = filled(anchor=anchor)
    torch.testing.assert_close(model(x + 7), model(x) + 7)
    plain = filled(anchor="none")
    assert not torch.allclose(plain(x + 7), plain(x) + 7)


def test_it_starts_as_the_forecast_that_nothing_changes() -> None:
    x = torch.randn(2, 12, 3)
    assert torch.equal(create_model("linear_forecaster", **SIZES)(x), x[:, -1:].expand(-1, 5, -1))


def test_variables_are_not_mixed() -> None:
    for individual in (False, True):
        x = torch.randn(1, 12, 3, dtype=torch.double, requires_grad=True)
        (grad,) = torch.autograd.grad(filled(individual=individual)(x)[..., 0].sum(), x)
        assert float(grad[..., 0].abs().min()) > 0
        assert float(grad[..., 1:].abs().max()) == 0


def test_it_learns_two_sinusoids_and_a_trend() -> None:
    toy = Toy(trend=2.0)
    model = create_model("linear_forecaster", channels=2, seq_len=96, pred_len=24)
    assert toy.train(model, 200, lr=1e-3) < 0.1 * toy.repeat_error()


def test_test_error_on_etth1_is_below_0_40_within_two_epochs(shared_data) -> None:
    data = pytest.importorskip("gossamer.data").read_dataset(shared_data("ett/ETTh1.csv"))
    steps = torch.arange(96 + 96)

    def windows(split, index):
        rows = split.inputs[0][index][:, None] + steps
        return data.series[rows][:, :96], data.series[rows][:, 96:]

    model = create_model("linear_forecaster", **data.spec)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        for index in torch.randperm(len(data.train)).split(32):
            x, y = windows(data.train, index)
            loss = (model(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        x, y = windows(data.test, torch.arange(len(data.test)))
        assert len(x) == 2785
        assert float((model(x) - y).square().mean()) < 0.40


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", ["xs", "s"])
def test_linear_forecasters_for_any_series_learn(spec: dict, size: str) -> None:
    if size == "s" and spec["channels"] == 1:
        assert system("linear-forecaster").scale(spec, size) is None
    else:
        scales("linear-forecaster", spec, size)


def test_there_is_no_large_linear_forecaster() -> None:
    assert system("linear-forecaster").scale(SPECS[0], "m") is None


def test_an_exported_linear_forecaster_agrees_for_every_batch_size(tmp_path) -> None:
    exports(filled().float(), tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    refuses("moving_avg must be odd", "linear_forecaster", moving_avg=4)
    refuses("must be at least 1", "linear_forecaster", pred_len=0)
    with pytest.raises(ValueError, match=r"x must have 12 steps \(seq_len\); got 11"):
        create_model("linear_forecaster", **SIZES)(torch.randn(1, 11, 3))
