"""Autoformer: equal to the authors' code in both forms, keeps trend and season apart, learns what has periods."""

import pytest
import torch

from forecasters import SPECS, Toy, equals_official, exports, manifest_fits, refuses, scales
from gossamer import catalogue, measure
from gossamer.layers.series import Season, SeasonalNorm
from gossamer.models import create_model
from gossamer.models.registry import system
from official import manifest

TINY = {"channels": 3, "seq_len": 25, "label_len": 11, "pred_len": 14, "d_model": 16, "n_heads": 4, "d_ff": 32}
OFFICIAL = {
    "autoformer": {"moving_avg": 7, "d_layers": 2},
    "autoformer_train": {"moving_avg": 7, "dropout": 0.0},
    "autoformer_long": {"moving_avg": 25, "factor": 1, "seq_len": 36, "label_len": 12, "pred_len": 8},
    "autoformer_tables": {"moving_avg": 5, "factor": 2, "embed": "fixed"},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_autoformer_equals_official_in_training_and_in_eval_mode(name: str) -> None:
    equals_official(name, "autoformer", {**TINY, **OFFICIAL[name]})


def test_every_official_checkpoint_of_autoformer_fits_to_the_last_parameter() -> None:
    for name in manifest("autoformer"):
        manifest_fits("autoformer", name)


@pytest.mark.parametrize(
    "name", ["autoformer_ettm2_96", "autoformer_ecl_96", "autoformer_traffic_96", "autoformer_ili_24"]
)
def test_parameters_are_those_published(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(catalogue.published(name).params_m, rel=0.001)


def test_an_untaught_decoder_continues_the_mean_of_the_series() -> None:
    model = create_model("autoformer", **TINY).eval()
    for p in (*model.head.proj.parameters(), *(b.trend.weight for b in model.decoder.blocks)):
        torch.nn.init.zeros_(p)
    x = torch.randn(2, 25, 3)
    y = model(x, torch.randn(2, 39, 4))
    torch.testing.assert_close(y, x.mean(1, keepdim=True).expand(-1, 14, -1))


def test_a_level_goes_through_the_trend_alone() -> None:
    # the season of a constant is zero, and the seasonal norm leaves no mean over time
    assert float(Season(5)(torch.full((1, 20, 4), 3.0)).abs().max()) < 1e-5
    seasonal = SeasonalNorm(8)(torch.randn(2, 20, 8) + 4).detach()
    assert float(seasonal.mean(1).abs().max()) < 1e-5


def test_delays_are_shared_by_the_batch_in_training_and_each_samples_own_in_eval_mode() -> None:
    model = create_model("autoformer", **TINY, factor=1, dropout=0.0).double()
    x, marks = torch.randn(4, 25, 3).double(), torch.randn(4, 39, 4).double()
    alone = torch.cat([model.train()(x[i : i + 1], marks[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model.eval()(x, marks), alone)
    assert not torch.allclose(model.train()(x, marks), alone)


def test_autoformer_learns_trend_and_periods_better_than_informer_and_than_repeating() -> None:
    toy = Toy(trend=2.0)
    sizes = {"channels": 2, "pred_len": 24, "d_model": 32, "n_heads": 4, "d_ff": 64, "e_layers": 1}
    error = toy.train(create_model("autoformer", **sizes), 120)
    assert error < 0.5 * toy.repeat_error()
    assert error < toy.train(create_model("informer", **sizes, sampling="fixed"), 120)


def test_products_are_counted_without_weights() -> None:
    x, marks = torch.empty(1, 96, 7), torch.empty(1, 192, 4)
    with torch.device("meta"):
        model = create_model("autoformer_etth1_96")
    # products of tokens by weights alone: two encoder layers, and a decoder layer over half the known steps and 96 more
    dim, known, steps = 512, 96, 144
    mlp, square = 2 * dim * 2048, dim * dim
    least = 2 * known * (4 * square + mlp) + steps * (6 * square + mlp) + known * 2 * square
    assert 1.0 < measure.macs(model, (x, marks)).total / least < 1.2


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
@pytest.mark.parametrize("spec", SPECS)
def test_small_autoformers_for_any_series_learn(spec: dict, size: str) -> None:
    scales("autoformer", spec, size)


def test_there_is_no_autoformer_for_a_series_of_one_step() -> None:
    spec = {"channels": 1, "seq_len": 1, "pred_len": 1, "freq": "d", "marks": 3}
    assert system("autoformer").scale(spec, "xs") is None


def test_an_exported_autoformer_agrees_for_every_batch_size(tmp_path) -> None:
    exports(create_model("autoformer", **TINY, moving_avg=7), tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    refuses("moving_avg must be odd", "autoformer", moving_avg=24)
    refuses("must be in 1..n; factor=0.1, n=96 give 0", "autoformer", factor=0.1)
    refuses("must be in 1..n; factor=40, n=96 give 182", "autoformer", factor=40)
    refuses("heads must divide dim", "autoformer", d_model=30, n_heads=4)
    refuses("label_len must be in 0..96", "autoformer", label_len=97)
