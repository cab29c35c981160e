"""Auto-Correlation: a series is read at the delays at which it resembles itself."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import measure
from gossamer.mixers.auto_correlation import AutoCorrelation


def open_mixer(dim: int = 8, *, bare: bool = False, **options) -> AutoCorrelation:
    """One whose last product is the identity; `bare`: so are those of queries, keys and values."""
    mixer = AutoCorrelation(dim, heads=2, **options).double()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(dim))
        mixer.proj.bias.zero_()
        if bare:
            mixer.qkv.weight.copy_(torch.eye(dim).repeat(3, 1))
            mixer.qkv.bias.zero_()
    return mixer


def by_delay(q: Tensor, k: Tensor, v: Tensor, count: int, shared: bool) -> Tensor:
    """The mechanism written out: scores delay by delay, then the sum of rolled copies."""
    n = q.shape[1]
    scores = torch.stack([(q * k.roll(tau, 1)).sum(1).mean(-1) for tau in range(n)], 1)
    samples = []
    for b in range(len(q)):
        best = (scores.mean(0) if shared else scores[b]).topk(count).indices
        weights = scores[b, best].softmax(0)
        samples.append(sum(w * v[b].roll(-int(tau), 0) for w, tau in zip(weights, best, strict=True)))
    return torch.stack(samples)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n", [24, 25])
def test_it_is_the_weighted_sum_of_copies_at_the_best_delays(n: int, training: bool) -> None:
    mixer = open_mixer(factor=2).train(training)
    x = torch.randn(3, n, 8, dtype=torch.double)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    want = by_delay(q, k, v, int(2 * math.log(n)), shared=training)
    torch.testing.assert_close(mixer(x), want)


def test_both_forms_agree_for_one_sample_and_differ_for_several() -> None:
    mixer = open_mixer(factor=1)
    x = torch.randn(4, 30, 8, dtype=torch.double)
    torch.testing.assert_close(mixer.train()(x[:1]), mixer.eval()(x[:1]))
    assert not torch.allclose(mixer.train()(x), mixer.eval()(x))


def test_a_periodic_series_is_given_back_because_its_delays_are_its_periods() -> None:
    wave = torch.sin(torch.arange(96, dtype=torch.double) * (2 * math.pi / 12))[None, :, None].expand(1, -1, 8)
    mixer = open_mixer(bare=True, factor=1)
    assert mixer.delays(96) == 4
    torch.testing.assert_close(mixer(wave), wave)
    # copies a period apart agree on the wave and not on the noise; small values keep the weights of the copies alike
    noisy = 0.1 * (wave + 0.3 * torch.randn(1, 96, 8, dtype=torch.double))
    left = (mixer(noisy) - 0.1 * wave).square().sum().detach()
    assert float(left) < 0.5 * float((noisy - 0.1 * wave).square().sum())


@pytest.mark.parametrize("steps", [9, 20, 31])
def test_a_context_is_cut_or_continued_by_zeros_to_the_length_of_the_series(steps: int) -> None:
    mixer = open_mixer(factor=1).eval()
    x, context = torch.randn(2, 20, 8, dtype=torch.double), torch.randn(2, steps, 8, dtype=torch.double)
    inner = mixer.qkv.weight.shape[0] // 3
    q = x @ mixer.qkv.weight[:inner].T + mixer.qkv.bias[:inner]
    kv = torch.zeros(2, 20, 2 * inner, dtype=torch.double)
    known = (context @ mixer.qkv.weight[inner:].T + mixer.qkv.bias[inner:])[:, :20]
    kv[:, : known.shape[1]] = known
    k, v = kv.chunk(2, -1)
    torch.testing.assert_close(mixer(x, context=context), by_delay(q, k, v, 2, shared=False))


def test_heads_only_group_channels() -> None:
    one, four = AutoCorrelation(8, heads=1), AutoCorrelation(8, heads=4)
    four.load_state_dict(one.state_dict())
    x = torch.randn(2, 24, 8)
    torch.testing.assert_close(one(x), four(x))
    four.keep("heads", torch.tensor([0, 2]))
    assert four.widths() == {"heads": 2}
    assert four(x).shape == x.shape
    assert sum(p.numel() for p in four.parameters()) == 8 * 12 + 12 + 4 * 8 + 8


def test_long_series_are_correlated_by_fft_so_products_grow_linearly() -> None:
    with torch.device("meta"):
        mixer = AutoCorrelation(16, heads=2)
        products = [measure.macs(mixer, (torch.empty(1, n, 16),)) for n in (1024, 8192)]
    assert products[1].total == 8 * products[0].total == 8 * 4 * 1024 * 16 * 16
    assert "_fft_r2c" in products[0].uncounted


def test_half_precision_finds_the_same_delays() -> None:
    mixer = AutoCorrelation(64, heads=2, factor=1).eval()
    x = torch.randn(2, 48, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = mixer(x)
    torch.testing.assert_close(half.float(), mixer(x), atol=0.02, rtol=0.05)


def test_numbers_of_delays_that_cannot_be_are_refused() -> None:
    for factor, n, count in ((0.1, 96, 0), (4, 4, 5), (1, 1, 0)):
        with pytest.raises(ValueError, match=rf"factor={factor}, n={n} give {count}"):
            AutoCorrelation(8, heads=2, factor=factor)(torch.randn(1, n, 8))
    with pytest.raises(ValueError, match="heads must divide dim"):
        AutoCorrelation(8, heads=3)
