"""Informer: equal to the authors' code, halves its series, answers alike only where its samples are fixed."""

import pytest
import torch

from forecasters import SPECS, Toy, equals_official, exports, manifest_fits, refuses, scales
from gossamer import catalogue
from gossamer.models import create_model
from official import manifest

TINY = {"channels": 3, "seq_len": 25, "label_len": 11, "pred_len": 14, "d_model": 16, "n_heads": 4, "d_ff": 32}
OFFICIAL = {
    "informer": {"factor": 2, "e_layers": 2, "d_layers": 2},
    "informer_train": {"factor": 2, "dropout": 0.0},
    "informer_tables": {"factor": 3, "freq": "t", "embed": "learned", "distil": False, "mix": False},
    "informer_full": {"attn": "full"},
    "informer_stack": {"factor": 1, "e_layers": (3, 2, 1)},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_informer_equals_official_given_the_same_random_state(name: str) -> None:
    equals_official(name, "informer", {**TINY, **OFFICIAL[name]})


def test_every_official_checkpoint_of_informer_fits_to_the_last_parameter() -> None:
    for name in manifest("informer"):
        manifest_fits("informer", name)


@pytest.mark.parametrize(
    "name", ["informer_etth1_m_p24", "informer_etth1_m_p720", "informer_etth1_s_p24", "informer_stack_321"]
)
def test_parameters_are_those_published(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(catalogue.published(name).params_m, rel=0.001)


@pytest.mark.parametrize(("steps", "left"), [(96, 48), (97, 49)])
def test_distilling_halves_the_series_between_encoder_layers(steps: int, left: int) -> None:
    model = create_model("informer", **{**TINY, "seq_len": steps, "e_layers": 2}).eval()
    assert model.encode(torch.randn(1, steps, 3), torch.randn(1, steps, 4)).shape == (1, left, 16)
    whole = create_model("informer", **{**TINY, "seq_len": steps, "e_layers": 2, "distil": False}).eval()
    assert whole.encode(torch.randn(1, steps, 3), torch.randn(1, steps, 4)).shape == (1, steps, 16)


def test_replica_i_of_a_stack_reads_only_the_last_part_of_the_series() -> None:
    model = create_model("informer", **{**TINY, "seq_len": 24, "e_layers": (1, 1, 1), "attn": "full"}).eval()
    x, marks = torch.randn(1, 24, 3), torch.randn(1, 24, 4)
    other = x.clone()
    other[:, 6:11] += 1  # out of reach of the last 12 steps, whose first sees step 11 through its convolution
    one, two = model.encode(x, marks), model.encode(other, marks)
    assert one.shape == (1, 24 + 12 + 6, 16)
    assert not torch.allclose(one[:, :24], two[:, :24])
    torch.testing.assert_close(one[:, 24:], two[:, 24:])


def test_a_pass_is_random_unless_the_generator_or_the_sampling_is_fixed() -> None:
    x, marks = torch.randn(2, 25, 3), torch.randn(2, 39, 4)
    drawn = create_model("informer", **TINY, factor=1).eval()
    passes = []
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(seed)
        passes.append(drawn(x, marks))
    assert torch.equal(passes[0], passes[1])
    assert any(not torch.allclose(passes[0], other) for other in passes[2:])
    fixed = create_model("informer", **TINY, factor=1, sampling="fixed").eval()
    fixed.load_state_dict(drawn.state_dict())
    torch.testing.assert_close(fixed(x, marks), fixed(x, marks), atol=0, rtol=0)
    again = create_model("informer", **TINY, factor=1, sampling="fixed").eval()
    again.load_state_dict(drawn.state_dict())
    assert torch.equal(fixed(x, marks), again(x, marks))


def test_the_decoder_starts_from_the_last_known_steps_and_zeros() -> None:
    model = create_model("informer", **TINY, sampling="fixed").eval()
    x, marks = torch.randn(2, 25, 3), torch.randn(2, 39, 4)
    start = torch.cat((x[:, 14:], torch.zeros(2, 14, 3)), 1)
    torch.testing.assert_close(model(x, marks), model.forecast(x, marks[:, :25], start, marks[:, 14:]))
    ones = torch.cat((x[:, 14:], torch.ones(2, 14, 3)), 1)
    assert not torch.allclose(model(x, marks), model.forecast(x, marks[:, :25], ones, marks[:, 14:]))


def test_the_calendar_of_the_horizon_is_read() -> None:
    model = create_model("informer", **TINY, sampling="fixed").eval()
    x, marks = torch.randn(1, 25, 3), torch.randn(1, 39, 4)
    other = marks.clone()
    other[:, -1] += 1
    assert not torch.allclose(model(x, marks), model(x, other))


def test_informer_learns_two_sinusoids_better_than_repeating_the_last_value() -> None:
    toy = Toy()
    model = create_model("informer", channels=2, d_model=32, n_heads=4, d_ff=64, e_layers=1, sampling="fixed")
    assert toy.train(model, 120) < 0.5 * toy.repeat_error()


def test_any_mixer_of_sequences_can_stand_in_the_attention() -> None:
    x, marks = torch.randn(1, 25, 3), torch.randn(1, 39, 4)
    for name in ("pool", "auto_correlation"):
        assert create_model("informer", **{**TINY, "n_heads": 8}, attn=name)(x, marks).shape == (1, 14, 3)


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
@pytest.mark.parametrize("spec", SPECS)
def test_small_informers_for_any_series_learn_and_answer_alike_twice(spec: dict, size: str) -> None:
    model = scales("informer", spec, size).eval()
    x = torch.randn(1, spec["seq_len"], spec["channels"])
    marks = torch.zeros(1, spec["seq_len"] + spec["pred_len"], spec["marks"])
    assert torch.equal(model(x, marks), model(x, marks))


def test_an_exported_informer_agrees_for_every_batch_size(tmp_path) -> None:
    exports(create_model("informer", **TINY, factor=1, sampling="fixed"), tmp_path)


def test_what_does_not_fit_is_refused() -> None:
    refuses("heads must divide dim", "informer", d_model=30, n_heads=4)
    refuses("label_len must be in 0..96", "informer", label_len=97)
    refuses("at least 1", "informer", pred_len=0)
    refuses("freq must be one of", "informer", freq="x")
    refuses("reads 4 integer columns; got marks=3", "informer", embed="fixed", marks=3)
    refuses("e_layers must be positive", "informer", seq_len=3, e_layers=(3, 2, 1))
    refuses("mixer must be one of", "informer", attn="none such")
    model = create_model("informer", **TINY)
    with pytest.raises(ValueError, match="x must have 25 steps and marks 39"):
        model(torch.randn(1, 24, 3), torch.randn(1, 39, 4))
    with pytest.raises(ValueError, match="marks must have 4 calendar features"):
        model(torch.randn(1, 25, 3), torch.randn(1, 39, 5))
