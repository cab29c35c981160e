"""ProbSparse attention: few queries attend, chosen by peaked scores on sampled keys; the others take the mean value."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import measure
from gossamer.mixers import create_mixer, prob_sparse
from gossamer.mixers.prob_sparse import ProbSparse, sampled_scores


def open_mixer(dim: int = 8, **options) -> ProbSparse:
    """One whose output is the joined heads themselves: the last product is the identity."""
    mixer = ProbSparse(dim, heads=2, **options).double()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(dim))
        mixer.proj.bias.zero_()
    return mixer


def parts(mixer: ProbSparse, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Full attention, values, and the output of the mixer, head by head `(b, h, n, d)`."""
    q, k, v = mixer.project(x)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mixer.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    y = mixer(x).unflatten(-1, (2, -1)).transpose(1, 2)
    return scores.softmax(-1) @ v, v, y


@pytest.mark.parametrize("causal", [False, True])
def test_kept_queries_attend_fully_and_the_others_take_mean_or_running_sum(causal: bool) -> None:
    n = 40
    mixer = open_mixer(factor=1, causal=causal)
    full, v, y = parts(mixer, torch.randn(3, n, 8, dtype=torch.double))
    others = v.cumsum(2) if causal else v.mean(2, keepdim=True).expand_as(v)
    attends = (y - full).abs().amax(-1) < 1e-9
    rests = (y - others).abs().amax(-1) < 1e-9
    assert bool((attends | rests).all())
    # ceil(ln 40) = 4 queries; the first row of a causal pass may be both
    kept = (~rests).sum(-1)
    assert bool(((kept == 4) | (causal & (kept == 3))).all())


@pytest.mark.parametrize("causal", [False, True])
def test_with_all_queries_kept_it_is_full_attention(causal: bool) -> None:
    for options in ({"factor": 20}, {"factor": None}):
        mixer = open_mixer(causal=causal, **options)
        full, _, y = parts(mixer, torch.randn(2, 40, 8, dtype=torch.double))
        torch.testing.assert_close(y, full)
    attention = create_mixer("attention", 8, heads=2, causal=causal).double()
    attention.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 7, 8, dtype=torch.double)
    torch.testing.assert_close(mixer(x), attention(x))


@pytest.mark.parametrize("measured", ["official", "mean"])
def test_the_most_peaked_queries_are_kept(measured: str) -> None:
    n, kept = 30, 4
    mixer = open_mixer(factor=1, sampling="fixed", grid=(n,), measure=measured)
    q, k, _ = mixer.project(torch.randn(2, n, 8, dtype=torch.double))
    chosen = mixer._peaked(q, k)
    for b in range(2):
        for h in range(2):
            peaks = []
            for i in range(n):
                s = torch.stack([q[b, h, i] @ k[b, h, j] for j in mixer.table[i].tolist()])
                peaks.append(float(s.max() - s.sum() / (n if measured == "official" else kept)))
            best = sorted(range(n), key=lambda i: -peaks[i])[:kept]
            assert sorted(chosen[b, h].tolist()) == sorted(best)


def test_mix_reads_heads_and_time_as_one_axis_as_the_official_decoder_does() -> None:
    plain, mixed = open_mixer(factor=None), open_mixer(factor=None, mix=True)
    mixed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 8, dtype=torch.double)
    heads = plain(x).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(mixed(x), heads.reshape(2, 6, 8))
    sparse, mixed = (open_mixer(factor=1, sampling="fixed", grid=(30,), mix=m) for m in (False, True))
    mixed.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 30, 8, dtype=torch.double)
    torch.testing.assert_close(mixed(x), sparse(x).unflatten(-1, (2, 4)).transpose(1, 2).reshape(2, 30, 8))


def test_reading_sampled_keys_one_by_one_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 3, 50, 4), torch.randn(2, 3, 50, 4)
    table = torch.randint(50, (50, 7))
    dense = sampled_scores(q, k, table)
    monkeypatch.setattr(prob_sparse, "DENSE_TOKENS", 0)
    monkeypatch.setattr(prob_sparse, "GATHERED", 2000)  # several parts, the last one short
    torch.testing.assert_close(sampled_scores(q, k, table), dense)
    torch.testing.assert_close(dense[1, 2, 3, 4], q[1, 2, 3] @ k[1, 2, table[3, 4]])


def test_products_grow_like_n_log_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prob_sparse, "DENSE_TOKENS", 0)

    def products(n: int, factor: int | None) -> int:
        with torch.device("meta"):
            mixer, x = ProbSparse(16, heads=2, factor=factor), torch.empty(1, n, 16)
        return measure.macs(mixer, (x,)).total - 4 * n * 16 * 16

    kept = 5 * math.ceil(math.log(1024))
    assert products(1024, 5) == 1024 * kept * 16 + 2 * kept * 1024 * 16
    assert products(4096, 5) / products(1024, 5) < 6
    assert products(4096, None) / products(1024, None) == 16


def test_a_causal_pass_does_not_read_later_tokens_where_all_queries_are_kept() -> None:
    mixer = open_mixer(factor=20, causal=True)
    x = torch.randn(1, 12, 8, dtype=torch.double)
    other = x.clone()
    other[:, 8:] += 1
    torch.testing.assert_close(mixer(x)[:, :8], mixer(other)[:, :8])


def test_gradients_reach_queries_keys_and_values() -> None:
    mixer = ProbSparse(8, heads=2, factor=1, causal=True, mix=True)
    mixer(torch.randn(2, 30, 8)).square().sum().backward()
    for part in mixer.qkv.weight.grad.chunk(3):
        assert float(part.abs().sum()) > 0


def test_a_grid_is_read_as_one_sequence() -> None:
    mixer = create_mixer("prob_sparse", 8, grid=(4, 6), heads=2, factor=1, sampling="fixed")
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(mixer(x), mixer(x.flatten(1, 2)).view(x.shape))


def test_heads_that_are_cut_are_those_that_no_longer_count() -> None:
    mixer = open_mixer(factor=1, sampling="fixed", grid=(30,))
    x = torch.randn(2, 30, 8, dtype=torch.double)
    with torch.no_grad():
        mixer.proj.weight[:, :4] = 0
    want = mixer(x)
    assert mixer.importance("heads")[0] == 0
    mixer.keep("heads", torch.tensor([1]))
    torch.testing.assert_close(mixer(x), want)


def test_what_does_not_fit_is_refused() -> None:
    for match, options in (
        ("factor must be at least 1 or None, got 0", {"factor": 0}),
        ("give grid=", {"sampling": "fixed"}),
        ("heads must divide dim", {"heads": 3}),
    ):
        with pytest.raises(ValueError, match=match):
            ProbSparse(8, **{"heads": 2, **options})
    with pytest.raises(ValueError, match="fixed for 30 tokens; got 31"):
        open_mixer(sampling="fixed", grid=(30,), factor=1)(torch.randn(1, 31, 8).double())
    with pytest.raises(ValueError, match="cannot honour mask="):
        ProbSparse(8, heads=2)(torch.randn(1, 5, 8), mask=torch.ones(1, 5, dtype=torch.bool))
