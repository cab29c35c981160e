import math

import pytest
import torch
from jaxtyping import config

from gossamer.ops import series as s


def draw(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def same(fast, slow, inputs):
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    out = torch.randn_like(slow)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, out, retain_graph=True),
        torch.autograd.grad(slow, inputs, out, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [1, 4, 30, s.MATRIX_STEPS + 1])  # matrix products, and pooling
@pytest.mark.parametrize("k", [1, 3, 25])
def test_decomposition_equals_the_mean_over_a_series_continued_by_its_ends(n, k):
    x = draw(2, n, 3)
    for fast, slow in zip(s.decompose(x, k), s.decompose_reference(x, k), strict=True):
        same(fast, slow, (x,))


def test_season_and_trend_sum_to_the_series_and_a_constant_has_no_season():
    x = torch.randn(2, 50, 3)
    seasonal, trend = s.decompose(x, 25)
    torch.testing.assert_close(seasonal + trend, x, atol=1e-6, rtol=0)
    constant, _ = s.decompose(torch.full((1, 40, 2), 0.1), 25)
    assert float(constant.abs().max()) < 1e-6
    line, _ = s.decompose(torch.arange(40.0)[None, :, None], 5)
    assert float(line[:, 2:-2].abs().max()) < 1e-5  # a straight line is all trend
    assert float(line[:, :2].abs().max()) > 0.1  # except at its ends


@pytest.mark.parametrize("n", [1, 24, 25, s.MATRIX_STEPS + 1])  # matrix products, and FFT
def test_delay_scores_equal_the_direct_sum(n):
    q, k = draw(2, n, 6), draw(2, n, 6)
    same(s.delay_scores(q, k), s.delay_scores_reference(q, k), (q, k))


@pytest.mark.parametrize("n", [24, 25, s.MATRIX_STEPS + 9])  # matrix product, matrix product, FFT
@pytest.mark.parametrize("shared", [False, True])
def test_aggregation_equals_rolling_the_series_delay_by_delay(n, shared):
    v, scores = draw(3, n, 4), draw(3, n)
    same(
        s.aggregate_delays(v, scores, 5, shared=shared),
        s.aggregate_delays_reference(v, scores, 5, shared=shared),
        (v, scores),
    )


def test_shared_and_own_delays_agree_for_one_sample_and_differ_for_several():
    v, scores = torch.randn(3, 40, 4), torch.randn(3, 40)
    one = [s.aggregate_delays(v[:1], scores[:1], 4, shared=x) for x in (True, False)]
    assert torch.equal(*one)
    several = [s.aggregate_delays(v, scores, 4, shared=x) for x in (True, False)]
    assert not torch.allclose(*several)


def test_the_best_delays_of_a_sinusoid_are_multiples_of_its_period():
    wave = torch.sin(torch.arange(96) * (2 * math.pi / 12))[None, :, None]
    best = s.delay_scores(wave, wave).topk(8).indices
    assert sorted(best[0].tolist()) == list(range(0, 96, 12))
    again = s.aggregate_delays(wave, s.delay_scores(wave, wave), 8)
    torch.testing.assert_close(again, wave, atol=1e-5, rtol=0)


def test_even_windows_and_impossible_numbers_of_delays_are_refused():
    x = torch.randn(1, 8, 2)
    with pytest.raises(ValueError, match="k must be odd and positive, got 4"):
        s.decompose(x, 4)
    for k in (0, 9):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.8 \(steps\), got {k}"):
            s.aggregate_delays(x, torch.randn(1, 8), k)


class AutoCorrelation(torch.nn.Module):
    def forward(self, q, k, v):
        seasonal, trend = s.decompose(s.aggregate_delays(v, s.delay_scores(q, k), 4), 5)
        return seasonal, trend


@pytest.fixture
def symbolic_sizes():
    """A symbolic size is no `int`, so the run-time check of annotations is off while a graph is traced."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_an_exported_graph_serves_every_length(tmp_path, symbolic_sizes):
    ort = pytest.importorskip("onnxruntime")
    inputs = tuple(torch.randn(2, 24, 3) for _ in range(3))
    n = torch.export.Dim("n", min=8, max=512)
    torch.onnx.export(
        AutoCorrelation().eval(),
        inputs,
        tmp_path / "s.onnx",
        dynamo=True,
        dynamic_shapes=({1: n},) * 3,
        verbose=False,
    )
    session = ort.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    for length in (24, 37):
        inputs = tuple(torch.randn(2, length, 3) for _ in range(3))
        out = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
        for one, two in zip(out, AutoCorrelation()(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), two, atol=1e-4, rtol=1e-5)


def test_autocast_leaves_sums_over_time_as_precise_as_their_input():
    x = torch.randn(2, 48, 8) + 100
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(s.decompose(x, 25), s.decompose_reference(x, 25), atol=1e-4, rtol=1e-5)
        assert s.delay_scores(x, x).dtype == torch.float32
