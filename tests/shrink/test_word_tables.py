"""Tables of words in two factors: the best there are for the texts at hand, tied heads included."""

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers.words import LowRankWordHead, LowRankWords
from gossamer.measure import macs, parameters
from gossamer.models import create_model
from gossamer.shrink.base import Unsupported, run_pass
from shrink.loading import same_after_loading
from shrink.toys import LENGTH, WORDS, digits, encoder, learned, texts, vision

VOCAB = 60


def decoder(kind="gpt2", **settings):
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "hidden": 48, "vocab_size": VOCAB, "max_len": LENGTH}
    more = {"drop": 0.0} if kind == "gpt2" else {"kv_heads": 2}
    net = create_model(kind, **{**sizes, **more, **settings}).eval()
    nn.init.normal_(net.stem.words.weight)
    return net


def shares(calibration, rows):
    """How often each word comes, and once more; counted one by one."""
    counts = torch.ones(rows, dtype=torch.float64)
    for sample in calibration.data.train.inputs[0].tolist():
        for word in sample:
            counts[word] += word != 0
    return counts / counts.sum()


def test_it_is_the_best_affine_form_of_that_rank_for_the_words_as_often_as_they_come():
    net, calibration = encoder().eval(), texts()
    table = net.stem.words.weight.detach().double()
    low, steps = run_pass("word_tables", net, calibration, keep=0.5)
    rank = steps[0]["rank"]
    p = shares(calibration, WORDS)
    centred = (table - (p[:, None] * table).sum(0)) * p.sqrt()[:, None]
    best = torch.linalg.svdvals(centred)[rank:].square().sum()
    error = (p[:, None] * (low.stem.words.weight.double() - table).square()).sum()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-9)
    # The same rank fitted to all words alike is worse on the texts.
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    plain = left[:, :rank] * values[:rank] @ right[:rank]
    assert error < 0.9 * (p[:, None] * (plain - table).square()).sum()


@pytest.mark.parametrize("keep", [0.7, 0.4, 0.2])
def test_numbers_left_are_the_share_asked_for(keep):
    net, calibration = encoder(vocab_size=500, dim=64, heads=4).eval(), texts()
    low, steps = run_pass("word_tables", net, calibration, keep=keep)
    now = parameters(low.stem.words)
    assert now == steps[0]["rank"] * (500 + 64) + 64
    assert 0.8 * keep * 500 * 64 < now <= keep * 500 * 64
    assert parameters(net) - parameters(low) == 500 * 64 - now
    same, none = run_pass("word_tables", net, calibration, keep=1.0)
    assert none == []
    assert torch.equal(same(*calibration.example(3)), net(*calibration.example(3)))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "tinyllama_1_1b", "smollm_135m"])
def test_a_table_of_low_rank_loses_nothing(kind):
    calibration = texts()
    net = encoder(vocab_size=VOCAB).eval() if kind == "bert" else decoder(kind)
    with torch.no_grad():
        net.stem.words.weight.copy_(torch.randn(VOCAB, 4) @ torch.randn(4, 32) + torch.randn(32))
    low, steps = run_pass("word_tables", net, calibration, keep=0.4)
    assert steps[0]["rank"] >= 4
    tied = kind in ("gpt2", "smollm_135m")
    assert steps[0]["heads"] == (["head"] if tied else [])
    assert isinstance(low.head, LowRankWordHead) == tied
    x = calibration.example(5)
    with torch.no_grad():
        torch.testing.assert_close(low(*x), net(*x), atol=2e-4, rtol=1e-4)


def test_a_tied_head_scores_by_the_same_words_and_is_cheaper():
    net, calibration = decoder(), texts()
    low, _ = run_pass("word_tables", net, calibration, keep=0.3)
    assert low.head.words is low.stem.words
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(low.head(x), x @ low.stem.words.weight.T, atol=1e-4, rtol=1e-4)
    ids = calibration.example()
    assert parameters(low) == parameters(net) - VOCAB * 32 + parameters(low.stem.words)
    assert macs(low, ids).total < macs(net, ids).total


@pytest.mark.parametrize("kind", ["bert", "gpt2", "tinyllama_1_1b"])
def test_it_loads_in_a_fresh_process_and_exports(kind, tmp_path):
    calibration = texts()
    net = encoder().eval() if kind == "bert" else decoder(kind)
    low, _ = run_pass("word_tables", net, calibration, keep=0.4)
    x = calibration.example(3)
    same_after_loading(low, x, tmp_path)
    assert export_onnx(low, x, tmp_path / "m.onnx", exporter="fast").passed


def test_a_trained_classifier_keeps_its_score_after_a_short_recovery():
    calibration = texts()
    net = learned(encoder(), calibration, steps=120)
    dense = calibration.score(net)
    low, _ = run_pass("word_tables", net, calibration, keep=0.4)
    with torch.no_grad():
        low_random = LowRankWords(WORDS, low.stem.words.up.in_features, 32)
        fitted, low.stem.words = low.stem.words, low_random
        random = calibration.score(low)
        low.stem.words = fitted
    assert calibration.score(low) > random
    learned(low, calibration, steps=60, lr=1e-3)
    assert calibration.score(low) > dense - 2


def test_what_it_cannot_handle_is_left_as_it_was():
    with pytest.raises(Unsupported, match="reads no table of words"):
        run_pass("word_tables", vision().eval(), digits())
    with pytest.raises(Unsupported, match="would be smaller"):
        run_pass("word_tables", encoder().eval(), texts(), keep=0.01)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(WORDS, 32)
            self.out = nn.Linear(32, WORDS)
            self.out.weight = self.words.weight

        def forward(self, ids):
            return self.out(self.words(ids).mean(1))

    net = Own().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    from gossamer.shrink.passes.word_tables import word_tables

    with pytest.raises(Unsupported, match=r"out \(Linear\) reads the table of words words too"):
        word_tables(net, texts(), keep=0.4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not getattr(net, "recipe", [])
    with pytest.raises(ValueError, match="keep must be in"):
        word_tables(net, texts(), keep=0)
