"""Bag of embeddings: the mean by hand, order seen in pairs only, padding never; and it learns."""

import pytest
import torch
import torch.nn.functional as F

from gossamer.models import create_model
from gossamer.models.bag_of_embeddings import pair_rows
from gossamer.models.registry import system

TINY = {"vocab_size": 40, "dim": 6, "num_classes": 3}


def test_logits_are_a_linear_layer_on_the_mean_of_words_and_pairs() -> None:
    model = create_model("bag_of_pairs", **TINY, buckets=50).eval()
    text = [3, 7, 7, 2, 0, 0]
    vectors = [model.words.weight[i] for i in text[:4]]
    vectors += [model.pairs.weight[(a * 1_000_003 + b) % 50] for a, b in ((3, 7), (7, 7), (7, 2))]
    want = model.logits(torch.stack(vectors).mean(0))
    torch.testing.assert_close(model(torch.tensor([text]))[0], want)


def test_the_largest_value_of_each_channel_stands_beside_the_mean() -> None:
    model = create_model("bag_of_words", **TINY, pool="both").eval()
    vectors = model.words.weight[torch.tensor([3, 7, 2])]
    want = model.logits(torch.cat((vectors.mean(0), vectors.amax(0))))
    torch.testing.assert_close(model(torch.tensor([[3, 7, 2, 0]]))[0], want)


@pytest.mark.parametrize("settings", [{}, {"buckets": 64}, {"pool": "both"}, {"hidden": 5}])
def test_padding_changes_nothing_and_a_text_of_padding_gives_numbers(settings: dict) -> None:
    model = create_model("bag_of_words", **TINY, **settings).eval()
    ids = torch.randint(1, 40, (4, 9))
    torch.testing.assert_close(model(F.pad(ids, (0, 5))), model(ids))
    assert model(torch.zeros(2, 4, dtype=torch.long)).isfinite().all()
    assert model(torch.ones(2, 1, dtype=torch.long)).shape == (2, 3)


def test_order_matters_to_pairs_and_not_to_words() -> None:
    ids = torch.arange(1, 10)[None]
    turned = ids.flip(1)
    words, pairs = (create_model("bag_of_words", **TINY, buckets=b).eval() for b in (0, 4096))
    torch.testing.assert_close(words(turned), words(ids))
    assert not torch.allclose(pairs(turned), pairs(ids), atol=1e-4)


def test_pairs_spread_over_the_buckets_and_know_which_came_first() -> None:
    ids = torch.randint(0, 8192, (1, 5000))
    rows = pair_rows(ids, 1024)
    counts = torch.bincount(rows[0], minlength=1024)
    assert counts.max() < 25
    assert pair_rows(torch.tensor([[5, 6]]), 2**15) != pair_rows(torch.tensor([[6, 5]]), 2**15)


def test_word_dropout_leaves_words_out_in_training_only() -> None:
    model = create_model("bag_of_words", **TINY, word_drop=0.5, drop=0.0)
    ids = torch.randint(1, 40, (2, 9))
    assert not torch.allclose(model.train()(ids), model(ids))
    model.eval()
    torch.testing.assert_close(model(ids), model(ids))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="pool"):
        create_model("bag_of_words", **TINY, pool="sum")
    with pytest.raises(ValueError, match="word_drop"):
        create_model("bag_of_words", **TINY, word_drop=1.0)


def test_it_learns_which_pair_of_words_occurs() -> None:
    """The class is whether 1 stands right before 2; both words are in every text."""
    ids = torch.randint(3, 40, (400, 8))
    target = torch.arange(400) % 2
    place = torch.randint(0, 7, (400,))
    rows = torch.arange(400)
    ids[rows, place] = torch.where(target == 1, 1, 2)
    ids[rows, place + 1] = torch.where(target == 1, 2, 1)

    def accuracy(buckets: int) -> float:
        torch.manual_seed(0)
        model = create_model("bag_of_words", vocab_size=40, dim=16, buckets=buckets, drop=0.0)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(40):
            loss = F.cross_entropy(model(ids[:300]), target[:300])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return (model.eval()(ids[300:]).argmax(-1) == target[300:]).float().mean().item()

    assert accuracy(4096) > 0.9
    assert accuracy(0) < 0.7


@pytest.mark.parametrize("size", ["xs", "s", "m", "l"])
def test_every_scale_builds(size: str) -> None:
    name, settings = system("bag-of-embeddings").scale(
        {"vocab_size": 90, "max_len": 12, "num_classes": 5, "pad_id": 3}, size
    )
    assert create_model(name, **settings)(torch.full((2, 12), 7)).shape == (2, 5)
