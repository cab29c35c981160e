"""Sentence similarity: cosines of pairs, judged by rank, taught by their whole table."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from gossamer.data import Dataset, read_dataset
from gossamer.tasks import create_task


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    rows = [f"the cat {i} sleeps well,a dog of {i % 9} barks{' well' * (i % 4)},{i % 4}.5" for i in range(80)]
    (tmp_path / "pairs.csv").write_text("\n".join(["one,two,score", *rows]) + "\n")
    return read_dataset(tmp_path / "pairs.csv")


def make(data: Dataset):
    return create_task(data.task, data.spec, data.meta)


def test_a_batch_holds_the_sentences_of_a_pair_one_behind_the_other(data: Dataset) -> None:
    task, index = make(data), torch.tensor([3, 0, 5])
    (ids,), scores = task.batch(data.train, index)
    assert torch.equal(ids[::2], data.train.inputs[0][index, 0])
    assert torch.equal(ids[1::2], data.train.inputs[0][index, 1])
    assert torch.equal(scores, data.train.targets[index])
    (cut,), _ = task.batch(data.train, index, train=True)
    assert torch.equal(cut, ids[:, : cut.shape[1]])
    assert torch.equal(task.example(data.train, 1)[0], data.train.inputs[0][0, :1])


def test_metrics_are_scipys_correlations_of_cosines_and_scores(data: Dataset) -> None:
    vectors, scores = torch.randn(40, 6), torch.rand(20)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    found = make(data).metrics(vectors, scores)
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(cosines, scores.numpy()).statistic, abs=1e-4)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(cosines, scores.numpy())[0, 1], abs=1e-3)
    assert make(data).metrics(vectors, torch.full((20,), 0.5)) == {"spearman": 0.0, "pearson": 0.0}


def test_pairs_whose_cosine_is_the_score_have_no_loss_and_the_best_metric(data: Dataset) -> None:
    task, scores = make(data), torch.linspace(0, 1, 9)
    angle = scores.arccos()
    first = torch.stack((torch.ones(9), torch.zeros(9)), -1)
    vectors = torch.stack((first, 3 * torch.stack((angle.cos(), angle.sin()), -1)), 1).flatten(0, 1)
    assert float(task.loss(vectors, scores)) == pytest.approx(0, abs=1e-10)
    assert task.metrics(vectors, scores)["spearman"] == pytest.approx(100)
    assert float(task.loss(vectors, scores.flip(0))) > 0.1


def test_teaching_vanishes_on_agreement_whatever_the_width_and_pulls_towards_the_teacher(data: Dataset) -> None:
    task, taught = make(data), torch.randn(6, 8)
    turned = 2 * F.pad(taught, (0, 3)) @ torch.linalg.qr(torch.randn(11, 11)).Q
    assert float(task.teaching(turned, taught)) == pytest.approx(0, abs=1e-10)
    own = torch.randn(6, 4, requires_grad=True)
    before = task.teaching(own, taught)
    gradient = torch.autograd.grad(before, own)[0]
    assert before.item() > 0.01
    assert task.teaching(own - 0.5 * gradient, taught) < before


def test_the_baseline_ranks_pairs_by_the_tokens_they_share(data: Dataset) -> None:
    task = make(data)
    ids = torch.zeros(4, 2, 4, dtype=torch.long)
    ids[:, 0] = torch.tensor([5, 6, 7, 8])
    for i, row in enumerate(([1, 2, 3, 4], [5, 2, 3, 4], [5, 6, 3, 0], [8, 7, 6, 5])):
        ids[i, 1] = torch.tensor(row)
    split = data.train.take(torch.arange(4))
    split.inputs, split.targets = (ids,), torch.tensor([0.0, 0.3, 0.6, 1.0])
    assert task.baseline(data.train, split)["spearman"] == pytest.approx(100)


def test_texts_are_told_their_vector_and_the_cosine_with_the_one_before(data: Dataset) -> None:
    task = make(data)
    task.read(["the cat sleeps", "a dog barks"])
    said = task.describe(torch.tensor([[3.0, 4.0], [4.0, 3.0]]))
    assert [row["input"] for row in said] == ["the cat sleeps", "a dog barks"]
    assert "cosine_with_previous" not in said[0]
    assert said[1]["cosine_with_previous"] == pytest.approx(0.96)
    assert said[0]["vector"] == [3.0, 4.0]


def test_a_table_of_pairs_is_read_sentence_by_sentence(data: Dataset, tmp_path: Path) -> None:
    task = make(data)
    (ids,) = task.read([str(tmp_path / "pairs.csv")])
    assert len(ids) == 160
    assert task.names[:2] == ["the cat 0 sleeps well", "a dog of 0 barks"]


def test_details_and_figures_are_of_all_fifths_of_the_scores(data: Dataset) -> None:
    vectors, scores = torch.randn(40, 6), torch.linspace(0, 1, 20)
    cosines = F.cosine_similarity(vectors[::2], vectors[1::2])
    means = make(data).details(vectors, scores)["mean_cosine_by_fifth"]
    assert means[0] == pytest.approx(float(cosines[:4].mean()), abs=1e-5)
    assert len(means) == 5
    assert make(data).figures(vectors, scores, data.test)[0].kind == "svg"
