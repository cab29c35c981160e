"""Language modelling: the loss, sums in place of scores, perplexity, and what is told of a text."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.data import DataError, Dataset, read_dataset
from gossamer.data.language import NOTHING
from gossamer.models import create_model
from gossamer.tasks import create_task, list_tasks
from gossamer.train import Settings, Trainer
from gossamer.train.trainer import model_outputs


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    text = "".join(f"{i % 3} little foxes and {i % 5} big dogs went out. " for i in range(600))
    (tmp_path / "a.txt").write_text(text)
    return read_dataset(tmp_path / "a.txt", vocab_size=300, max_len=16)


def make(data: Dataset):
    return create_task(data.task, data.spec, data.meta)


def example(task) -> tuple[Tensor, Tensor]:
    """Scores of two windows of 5, and targets of which the last three do not count."""
    target = torch.randint(0, 300, (2, 5))
    target[1, 2:] = NOTHING
    return torch.randn(2, 5, 300), target


def test_the_task_is_listed() -> None:
    assert "language-modelling" in list_tasks()


def test_the_loss_is_the_mean_over_tokens_that_count(data: Dataset) -> None:
    output, target = example(None)
    keep = target != NOTHING
    want = F.cross_entropy(output[keep], target[keep])
    torch.testing.assert_close(make(data).loss(output, target), want)
    output[~keep] = 1e4
    torch.testing.assert_close(make(data).loss(output, target), want)


def test_sums_of_windows_give_the_numbers_that_whole_scores_give(data: Dataset) -> None:
    task, (output, target) = make(data), example(None)
    keep = target != NOTHING
    output[0, 1, target[0, 1]] += 30
    nll = float(F.cross_entropy(output[keep].double(), target[keep]))
    right = float((output.argmax(-1) == target)[keep].double().mean())
    sums, counts = task.reduce(output, target)
    assert sums.shape == (2, 2)
    assert counts.tolist() == [5, 2]
    for found in (task.metrics(sums, counts), task.metrics(output, target)):
        assert found == pytest.approx({"perplexity": math.exp(nll), "nll": nll, "accuracy": right}, rel=1e-5)
    assert right > 0
    assert task.details(sums, counts)["tokens"] == 7
    assert len(task.figures(sums, counts, data.test)) == 1


def test_a_split_is_answered_batch_by_batch_and_only_sums_are_kept(data: Dataset) -> None:
    task, model = make(data), create_model("gpt2", dim=16, depth=1, heads=2, **data.spec)
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    output, target = model_outputs(model, task, data.test, batch_size=3)
    assert output.shape == (len(data.test), 2)
    assert all(shape[0] <= 3 and shape[1:] == (16, data.spec["vocab_size"]) for shape in seen)
    with torch.no_grad():
        scores = model.eval()(data.test.inputs[0])
    want = F.cross_entropy(scores.flatten(0, 1), data.test.targets.flatten(), ignore_index=NOTHING)
    assert task.metrics(output, target)["nll"] == pytest.approx(float(want), rel=1e-4)


def test_large_vocabularies_are_answered_in_smaller_batches() -> None:
    task = create_task("language-modelling", {"vocab_size": 50257, "max_len": 1024, "pad_id": 0}, {})
    assert task.most_at_once * 50257 * 1024 < 2**27
    assert task.most_at_once >= 1


def test_the_baseline_is_the_frequency_of_tokens(data: Dataset) -> None:
    found = make(data).baseline(data.train, data.test)
    seen = data.train.targets[data.train.targets != NOTHING]
    words = data.spec["vocab_size"]
    chance = (torch.bincount(seen, minlength=words).double() + 1) / (len(seen) + words)
    true = data.test.targets[data.test.targets != NOTHING]
    assert found["nll"] == pytest.approx(float(-chance[true].log().mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((true == chance.argmax()).double().mean()))


def test_teaching_is_the_divergence_of_next_tokens_and_vanishes_on_agreement(data: Dataset) -> None:
    task, taught = make(data), torch.randn(2, 5, 30)
    own = torch.randn(2, 5, 30, requires_grad=True)
    assert task.teaching(taught, taught).item() == pytest.approx(0, abs=1e-6)
    p, q = taught.softmax(-1), own.softmax(-1)
    torch.testing.assert_close(task.teaching(own, taught), (p * (p / q).log()).sum(-1).mean())
    gradient = torch.autograd.grad(task.teaching(own, taught), own)[0]
    assert task.teaching(own - gradient, taught) < task.teaching(own, taught)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_small_model_learns_a_text_far_beyond_the_baseline(data: Dataset, name: str) -> None:
    sizes = {"dim": 32, "depth": 2, "heads": 2} | ({"hidden": 64} if name == "llama" else {"drop": 0.0})
    task, model = make(data), create_model(name, **sizes, **data.spec)
    settings = Settings(lr=1e-2, batch_size=32, strength=0.0, warmup=5, precision="float32", ema=0.0)
    trainer = Trainer(model, task, data, settings)
    trainer.train(steps=60)
    assert trainer.evaluate(data.test)["perplexity"] < 0.25 * task.baseline(data.train, data.test)["perplexity"]


class Echo(nn.Module):
    """Says that the next token is the one before, surely."""

    def forward(self, ids: Tensor) -> Tensor:
        return 20 * F.one_hot(ids, 300).float()


def test_a_text_is_told_its_perplexity_and_what_may_follow(data: Dataset, tmp_path: Path) -> None:
    task = make(data)
    (tmp_path / "lines.txt").write_text("foxes and dogs\nxxxxxxxx\n")
    (ids,) = task.read([str(tmp_path / "lines.txt"), "x", "and " * 100])
    assert ids.shape == (4, 16)
    said = task.describe(Echo()(ids))
    assert [row["input"] for row in said][:3] == ["foxes and dogs", "xxxxxxxx", "x"]
    assert said[1]["perplexity"] == pytest.approx(1.0, abs=1e-3)
    assert said[1]["next"][0][0] == "x"
    assert said[1]["next"][0][1] > 0.99
    assert said[0]["perplexity"] > 1000
    assert said[2]["perplexity"] is None
    assert said[3]["tokens"] == 16
    for bad in ([], [""], [str(tmp_path / "none.txt")]):
        with pytest.raises(DataError):
            task.read(bad)
