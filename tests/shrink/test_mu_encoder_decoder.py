"""A decoder language model taught to be a cheaper encoder-decoder: cost, causality, learning, refusals, saving."""

import copy
import math

import pytest
import torch
from torch import Tensor

from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.models.mu import EncoderDecoder
from gossamer.shrink.base import Calibration, Unsupported, run_pass
from gossamer.shrink.passes.mu_encoder_decoder import student_settings
from gossamer.tasks import create_task
from shrink.loading import same_after_loading
from shrink.toys import encoder, learned, texts

WORDS, LENGTH = 24, 12


def phrases(count: int, seed: int) -> Tensor:
    """Texts in which, mostly, a word says which one follows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (count, LENGTH + 1), generator=generator)
    for t in range(1, LENGTH + 1):
        said = torch.rand(count, generator=generator) < 0.8
        ids[:, t] = torch.where(said, ids[:, t - 1] * 5 % 23 + 1, ids[:, t])
    return ids


def language(seconds: float = float("inf")) -> Calibration:
    splits = [
        Split((ids[:, :-1].clone(),), ids[:, 1:].clone())
        for ids in (phrases(n, i) for i, n in enumerate((1024, 128, 128)))
    ]
    # A last window that is filled up.
    splits[0].inputs[0][-1, 4:], splits[0].targets[-1, 4:] = 0, -100
    spec = {"vocab_size": WORDS, "max_len": LENGTH, "pad_id": 0}
    data = Dataset("language-modelling", *splits, spec, {})
    return Calibration(create_task(data.task, spec, data.meta), data, seconds)


def decoder(name: str = "llama", **changes):
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 3, "heads": 4, "hidden": 96, "vocab_size": WORDS, "max_len": LENGTH}
    model = create_model(name, **{**sizes, **changes}).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_student_is_a_language_model_of_the_share_asked_for(name, tmp_path):
    model, calibration = decoder(name), language()
    before = copy.deepcopy(model.state_dict())
    student, steps = run_pass("mu_encoder_decoder", model, calibration, keep=0.7, epochs=0)
    assert isinstance(student, EncoderDecoder)
    assert [s["step"] for s in steps] == ["mu_encoder_decoder.student"]
    ids = calibration.example(4)
    share = macs(student, ids).total / macs(model, ids).total
    assert 0.45 < share <= 0.7
    assert len(student.encoder) >= len(student.decoder)
    assert torch.equal(student.stem.words.weight, model.stem.words.weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        want = student(*ids)
        assert want.shape == (4, LENGTH, WORDS)
        later = ids[0].clone()
        later[:, 8:] = later[:, 8:] % (WORDS - 1) + 1
        torch.testing.assert_close(student(later)[:, :8], want[:, :8], atol=1e-5, rtol=1e-5)
    same_after_loading(student, ids, tmp_path)
    certificate = export_onnx(student, ids, tmp_path / "m.onnx", exporter="fast", second_inputs=ids[0][:1].repeat(3, 1))
    assert certificate.passed, certificate.reason
    assert (certificate.held, certificate.exporter) == ("batch", "fast"), certificate.reason


def test_less_left_is_a_cheaper_student():
    model, calibration = decoder(depth=6), language()
    ids, cost = calibration.example(), []
    for keep in (0.3, 0.5, 0.8):
        settings = student_settings(model, calibration, keep)
        cost.append(macs(create_model("mu-encoder-decoder-slm", **settings), ids).total / macs(model, ids).total)
        assert cost[-1] <= keep
    assert cost == sorted(set(cost))


def test_the_student_learns_from_its_teacher_in_both_parts_of_the_teaching():
    calibration = language()
    teacher = learned(decoder(), calibration, steps=80)
    untaught, _ = run_pass("mu_encoder_decoder", teacher, calibration, keep=0.7, epochs=0)
    taught, _ = run_pass("mu_encoder_decoder", teacher, calibration, keep=0.7, epochs=3, lr=3e-3)
    drawn, _ = run_pass("mu_encoder_decoder", teacher, calibration, keep=0.7, epochs=1, lr=3e-3, warm=0.0)
    guess = calibration.task.baseline(calibration.data.train, calibration.data.val)["perplexity"]
    scores = [calibration.score(m) for m in (untaught, taught, drawn)]
    assert all(math.isfinite(score) for score in scores)
    assert scores[1] < 0.6 * guess
    assert scores[2] < scores[0]


def test_it_keeps_to_its_time():
    calibration = language(seconds=0.5)
    student, _ = run_pass("mu_encoder_decoder", decoder(), calibration, keep=0.7, epochs=10_000)
    assert isinstance(student, EncoderDecoder)


def test_what_it_cannot_replace_it_says_and_leaves_as_it_was():
    for model, calibration, settings, message in (
        (encoder(), texts(), {}, "text-classification; only language models"),
        (decoder(depth=1), language(), {}, "no decoder language model of two blocks"),
        (decoder(), language(), {"keep": 0.05}, r"cheapest student of Isotropic costs 0\.\d\d"),
        (torch.nn.Embedding(WORDS, WORDS), language(), {}, "Embedding is no decoder language model"),
    ):
        before, kind = copy.deepcopy(model.state_dict()), type(model)
        with pytest.raises(Unsupported, match=message):
            run_pass("mu_encoder_decoder", model, calibration, **settings)
        assert type(model) is kind
        assert not getattr(model, "recipe", [])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for settings, message in (
        ({"warm": 2.0}, "warm and alpha"),
        ({"keep": 0}, "keep must be"),
        ({"epochs": -1}, "epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pass("mu_encoder_decoder", decoder(), language(), **settings)
