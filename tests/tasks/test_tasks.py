"""Tasks: what a batch holds, what augmentation changes, what is counted, told and drawn."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gossamer.data import DataError, Dataset, Split, read_dataset
from gossamer.tasks import create_task, list_tasks
from gossamer.tasks.base import Figure
from gossamer.tasks.image_classification import jittered, mixed, shifted, with_holes


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return read_dataset("digits")


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return read_dataset("toy-text", rows=400)


@pytest.fixture(scope="module")
def series() -> Dataset:
    return read_dataset("toy-series", rows=1200, lookback=48, horizon=24)


def make(data: Dataset):
    return create_task(data.task, data.spec, data.meta)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_tasks_are_listed_and_an_unknown_one_is_refused() -> None:
    assert list_tasks() == [
        "image-classification",
        "text-classification",
        "sentence-similarity",
        "language-modelling",
        "forecasting",
    ]
    with pytest.raises(ValueError, match=r"task must be one of image-classification.*got 'sorting'"):
        create_task("sorting", {}, {})


# --- images


def test_an_image_batch_is_normalised_and_channels_last_in_memory() -> None:
    data = read_dataset("toy-images", rows=300)
    task = make(data)
    index = torch.tensor([5, 0, 7])
    (x,), y = task.batch(data.train, index)
    raw = data.train.inputs[0][index].double() / 255
    mean, std = (torch.tensor(data.meta[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(x.double(), (raw - mean) / std, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, data.train.targets[index])
    (every,), _ = task.batch(data.train, torch.arange(len(data.train)))
    assert every.mean((0, 2, 3)).abs().max() < 0.01
    assert (every.std((0, 2, 3)) - 1).abs().max() < 0.01


def test_strength_zero_and_evaluation_change_nothing(digits) -> None:
    task, index = make(digits), torch.arange(20)
    plain = task.batch(digits.train, index)[0][0]
    assert torch.equal(task.batch(digits.train, index, train=True, strength=0.0)[0][0], plain)
    assert torch.equal(task.batch(digits.train, index, train=False, strength=1.0)[0][0], plain)
    assert not torch.equal(task.batch(digits.train, index, train=True, strength=0.3)[0][0], plain)


def test_augmentation_leaves_the_data_alone_and_repeats_with_the_generator(digits) -> None:
    task, index = make(digits), torch.arange(40)
    before = digits.train.inputs[0].clone()
    one = task.batch(digits.train, index, train=True, strength=0.9, generator=seed(3))
    two = task.batch(digits.train, index, train=True, strength=0.9, generator=seed(3))
    other = task.batch(digits.train, index, train=True, strength=0.9, generator=seed(4))
    assert torch.equal(one[0][0], two[0][0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0][0], other[0][0])
    assert torch.equal(digits.train.inputs[0], before)


def test_mirrored_images_appear_only_where_the_data_allow_them(digits) -> None:
    for flip in (True, False):
        task = create_task(digits.task, digits.spec, {**digits.meta, "flip": flip})
        index = torch.zeros(200, dtype=torch.int64)
        (x,), _ = task.batch(digits.train, index, train=True, strength=1e-6, generator=seed(0))
        plain = task.batch(digits.train, index[:1])[0][0][0]
        mirrored = sum(torch.allclose(image, plain.flip(-1), atol=1e-4) for image in x)
        upright = sum(torch.allclose(image, plain, atol=1e-4) for image in x)
        assert mirrored + upright == 200
        assert (70 < mirrored < 130) if flip else mirrored == 0


def test_a_shifted_image_is_a_window_of_the_padded_one() -> None:
    x = torch.arange(1, 1 + 2 * 16 * 24 * 3).remainder(251).add(1).byte().view(2, 16, 24, 3)
    y = shifted(x, 0.5, seed(1))
    padded = torch.nn.functional.pad(x, (0, 0, 3, 3, 2, 2))
    for image, whole in zip(y, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(7) if torch.equal(image, whole[i : i + 16, j : j + 24])]
        assert len(found) == 1
    shifts = {tuple(shifted(x[:1], 0.5, seed(s))[0, 8, 12].tolist()) for s in range(30)}
    assert len(shifts) > 10


def test_jitter_is_one_affine_map_an_image_within_its_bounds() -> None:
    x = torch.randn(50, 6, 6, 3, generator=seed(0))
    y = jittered(x, 0.5, seed(1))
    for a, b in zip(x, y, strict=True):
        slope, shift = np.polyfit(a.flatten().numpy(), b.flatten().numpy(), 1)
        assert 0.8 <= slope <= 1.2
        assert abs(shift) <= 0.2
        assert torch.allclose(a * slope + shift, b, atol=1e-4)


def test_holes_are_one_rectangle_of_the_right_size() -> None:
    x = torch.ones(200, 32, 32, 3)
    y = with_holes(x, 0.5, seed(0))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    lost = (y[..., 0] == 0).sum((1, 2))
    assert lost.max() == 64  # 8 x 8
    assert torch.equal(y[..., 0], y[..., 2])
    rows = (y[..., 0] == 0).any(2).sum(1) * (y[..., 0] == 0).any(1).sum(1)
    assert torch.equal(rows, lost)


def test_mixed_targets_are_the_shares_of_the_mixed_images() -> None:
    target = torch.arange(8)
    x = torch.nn.functional.one_hot(target, 8).float().view(8, 1, 1, 8).expand(8, 20, 20, 8)
    seen = set()
    for s in range(12):
        y, soft = mixed(x, target, 8, seed(s))
        # Channel k is 1 where an image comes from class k, so its mean is the share of class k.
        assert torch.allclose(y.mean((1, 2)), soft, atol=1e-5)
        assert torch.allclose(soft.sum(1), torch.ones(8))
        seen.add(bool(((y == 0) | (y == 1)).all()))
    assert seen == {True, False}  # both cutmix and mixup came up


def test_batches_are_mixed_only_above_half_strength(digits) -> None:
    task, index = make(digits), torch.arange(16)
    for strength, wanted in ((0.5, 0), (1.0, 30)):
        soft = sum(
            task.batch(digits.train, index, train=True, strength=strength, generator=seed(s))[1].ndim == 2
            for s in range(30)
        )
        assert soft == wanted
    _, target = task.batch(digits.train, index, train=True, strength=1.0, generator=seed(0))
    assert math.isfinite(float(task.loss(torch.randn(16, 10), target, smoothing=0.1)))


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_strength_outside_its_range_is_refused(digits, strength) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
        make(digits).batch(digits.train, torch.arange(2), train=True, strength=strength)


def test_a_linear_model_learns_the_digits_from_batches(digits) -> None:
    """Normalised pixels, targets and loss belong together: a linear classifier passes 90 %."""
    task = make(digits)
    model = torch.nn.Linear(64, 10)
    best = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(150):
        index = torch.randint(len(digits.train), (128,), generator=seed(step))
        (x,), y = task.batch(digits.train, index, train=True, strength=0.02, generator=seed(step))
        best.zero_grad()
        task.loss(model(x.flatten(1)), y).backward()
        best.step()
    (x,), y = task.batch(digits.test, torch.arange(len(digits.test)))
    reached = task.metrics(model(x.flatten(1)).detach(), y)["accuracy"]
    assert reached > 0.9
    assert reached > 3 * task.baseline(digits.train, digits.test)["accuracy"]


def test_image_files_of_any_size_are_read_for_prediction(digits, tmp_path) -> None:
    task = make(digits)
    stored = digits.test.inputs[0][3, 0].numpy()
    Image.fromarray(stored).save(tmp_path / "same.png")
    Image.fromarray(stored).convert("RGB").resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    (x,) = task.read([str(tmp_path / "same.png"), str(tmp_path / "large.png")])
    (expected,), _ = task.batch(digits.test, torch.tensor([3]))
    assert torch.allclose(x[:1], expected, atol=1e-6)
    assert torch.allclose(x[1:], expected, atol=0.8)  # smoothed at the edges
    rows = task.describe(torch.eye(10)[[7, 2]] * 9)
    assert [row["class"] for row in rows] == ["7", "2"]
    assert rows[0]["input"].endswith("same.png")
    assert 0.99 < rows[0]["probability"] < 1
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        task.read([str(tmp_path / "gone.png")])
    (tmp_path / "junk.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.png: not a readable image"):
        task.read([str(tmp_path / "junk.png")])


# --- classification


def test_metrics_agree_with_scikit_learn(digits) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, recall_score

    task = make(digits)
    output, target = torch.randn(300, 10, generator=seed(0)), torch.randint(10, (300,), generator=seed(1))
    guess, found = output.argmax(1), task.metrics(output, target)
    assert found["accuracy"] == pytest.approx(accuracy_score(target, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(target, guess, average="macro"))
    assert found["nll"] == pytest.approx(log_loss(target, output.softmax(1).double()), rel=1e-4)
    tables = task.details(output, target)
    assert tables["confusion"] == confusion_matrix(target, guess).tolist()
    recalls = [row["recall"] for row in tables["per_class"]]
    assert recalls == pytest.approx(recall_score(target, guess, average=None).tolist())


def test_a_class_that_never_occurs_has_no_recall(digits) -> None:
    task = make(digits)
    rows = task.details(torch.eye(10)[:2], torch.tensor([0, 1]))["per_class"]
    assert rows[0]["recall"] == 1
    assert rows[9]["recall"] is None
    assert task.metrics(torch.eye(10)[:2], torch.tensor([0, 1]))["macro_f1"] == 1


def is_svg(figure: Figure) -> bool:
    return figure.kind == "svg" and ElementTree.fromstring(figure.data).tag.endswith("svg")


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_pictures_show_confusion_and_examples_right_and_wrong(digits, texts, right) -> None:
    for data in (digits, texts):
        task, split = make(data), data.test.take(torch.arange(40))
        k = len(data.meta["classes"])
        guess = torch.where(torch.arange(40) < 40 * right, split.targets, (split.targets + 1) % k)
        figures = task.figures(torch.nn.functional.one_hot(guess, k) * 4.0, split.targets, split)
        titles = ["Confusion matrix"] + ["Told right"] * (right > 0) + ["Told wrong"] * (right < 1)
        assert [figure.title for figure in figures] == titles
        assert all(is_svg(figure) for figure in figures)


def test_texts_in_pictures_stay_letters_whatever_they_hold(texts) -> None:
    strange = ["costs $5 & <b>more</b> $6", "日本語のテキスト", ""]
    split = Split((texts.test.inputs[0][:3],), torch.tensor([0, 1, 0]), strange)
    figures = make(texts).figures(torch.tensor([[3.0, 0], [0, 3.0], [3.0, 0]]), split.targets, split)
    drawn = "".join(ElementTree.fromstring(figures[1].data).itertext())
    assert "costs $5 & <b>more</b> $6" in drawn
    assert "日本語のテキスト" in drawn


# --- text


def test_a_text_batch_is_cut_at_its_longest_text_in_training_only(texts) -> None:
    task = make(texts)
    ids = torch.zeros(4, 40, dtype=torch.int64)
    for row, length in enumerate((3, 11, 5, 33)):
        ids[row, :length] = 7
    split = Split((ids,), torch.tensor([0, 1, 0, 1]))
    assert task.batch(split, torch.tensor([0, 1, 2]), train=True)[0][0].shape == (3, 16)
    assert task.batch(split, torch.tensor([0, 3]), train=True)[0][0].shape == (2, 40)
    assert task.batch(split, torch.tensor([0, 1, 2]))[0][0].shape == (3, 40)


def test_word_dropout_makes_the_right_share_unknown_and_never_touches_padding(texts) -> None:
    task, split = make(texts), texts.train
    index = torch.arange(len(split))
    (ids,), _ = task.batch(split, index, train=True, strength=0.5, generator=seed(0))
    plain = split.inputs[0][:, : ids.shape[1]]
    assert torch.equal(ids == 0, plain == 0)
    changed = ids != plain
    assert (ids[changed] == texts.meta["unk_id"]).all()
    assert float(changed[plain > 1].float().mean()) == pytest.approx(0.15, abs=0.02)


def test_texts_are_read_from_strings_and_files_alike(texts, tmp_path) -> None:
    task = make(texts)
    names = texts.test.names[:3]
    (tmp_path / "t.txt").write_text("\n".join(names) + "\n")
    pd.DataFrame({"text": names, "label": ["liked"] * 3}).to_csv(tmp_path / "t.csv", index=False)
    expected = texts.test.inputs[0][:3]
    assert torch.equal(task.read(names)[0], expected)
    assert torch.equal(task.read([str(tmp_path / "t.txt")])[0], expected)
    assert torch.equal(task.read([str(tmp_path / "t.csv")])[0], expected)
    rows = task.describe(torch.tensor([[0.0, 1], [2, 0], [0, 3]]))
    assert [row["input"] for row in rows] == names
    assert [row["class"] for row in rows] == ["liked", "disliked", "liked"]
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        task.read(["none.csv"])


# --- series


def test_a_series_batch_holds_past_marks_and_future(series) -> None:
    task, index = make(series), torch.tensor([3, 0])
    (x, marks), y = task.batch(series.test, index)
    first = int(series.test.targets[3])
    assert torch.equal(x[0], series.series[first - 48 : first])
    assert torch.equal(y[0], series.series[first : first + 24])
    assert torch.equal(marks[0], series.marks[first - 48 : first + 24])
    assert torch.equal(series.test.inputs[0] + 48, series.test.targets)


def test_a_shorter_lookback_predicts_the_same_targets(series) -> None:
    short = create_task(series.task, {**series.spec, "seq_len": 20}, series.meta)
    index = torch.arange(10)
    (x, marks), y = make(series).batch(series.val, index)
    (x20, marks20), y20 = short.batch(series.val, index)
    assert torch.equal(y, y20)
    assert torch.equal(x[:, -20:], x20)
    assert torch.equal(marks[:, -44:], marks20)
    with pytest.raises(ValueError, match="seq_len must be at most the lookback of the data, 48"):
        create_task(series.task, {**series.spec, "seq_len": 49}, series.meta)


def test_scaling_a_window_scales_its_target_alike(series) -> None:
    task, index = make(series), torch.arange(30)
    (_, _), plain = task.batch(series.train, index)
    (_, _), y = task.batch(series.train, index, train=True, strength=1.0, generator=seed(0))
    ratio = (y / plain).flatten(1)
    assert ratio.std(1).max() < 1e-4
    assert 0.8 <= float(ratio.min()) < 0.95 < 1.05 < float(ratio.max()) <= 1.2


def test_the_baseline_repeats_the_last_value(series) -> None:
    task = make(series)
    index = torch.arange(len(series.test))
    (x, _), y = task.batch(series.test, index)
    expected = task.metrics(x[:, -1:].expand_as(y), y)
    assert task.baseline(series.train, series.test) == pytest.approx(expected, rel=1e-5)


def test_repeating_the_last_value_has_its_known_error_on_etth1(shared_data) -> None:
    data = read_dataset(shared_data("ett/ETTh1.csv"))
    # Zeng et al. 2022, "Are Transformers Effective for Time Series Forecasting?", table 2, Repeat.
    found = make(data).baseline(data.train, data.test)
    assert found["mse"] == pytest.approx(1.295, abs=0.002)
    assert found["mae"] == pytest.approx(0.713, abs=0.002)


def test_errors_by_step_and_channel_average_to_the_metrics(series) -> None:
    task = make(series)
    output, target = torch.randn(9, 24, 3), torch.randn(9, 24, 3)
    tables, found = task.details(output, target), task.metrics(output, target)
    assert np.mean(tables["mse_by_step"]) == pytest.approx(found["mse"], rel=1e-5)
    assert np.mean(tables["mae_by_channel"]) == pytest.approx(found["mae"], rel=1e-5)
    assert found["mse"] == pytest.approx(float(task.loss(output, target)), rel=1e-5)


def write_toy(path: Path, rows: int) -> pd.DataFrame:
    from gossamer.data.builtin import toy_table

    frame = toy_table(0, 1200).iloc[:rows]
    frame.to_csv(path, index=False)
    return frame


def test_a_forecast_follows_the_end_of_a_file_in_its_units_and_times(series, tmp_path) -> None:
    task = make(series)
    frame = write_toy(tmp_path / "s.csv", 300)
    x, marks = task.read([str(tmp_path / "s.csv")])
    assert torch.allclose(x[0], series.series[252:300], atol=1e-5)
    assert torch.allclose(marks[0], series.marks[252:324])
    (row,) = task.describe(series.series[300:324][None])
    assert len(row["forecast"]) == 24
    assert row["forecast"][0]["date"] == (frame["date"].iloc[-1] + pd.Timedelta("1h")).isoformat()
    truth = write_toy(tmp_path / "t.csv", 324).iloc[300:]
    assert [step["tide"] for step in row["forecast"]] == pytest.approx(truth["tide"].tolist(), abs=1e-4)


def test_files_too_short_or_irregular_for_a_forecast_are_told(series, tmp_path) -> None:
    task = make(series)
    frame = write_toy(tmp_path / "s.csv", 300)
    frame.iloc[:40].to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(DataError, match=r"short\.csv: 40 rows are too few; the model looks back on 48"):
        task.read([str(tmp_path / "short.csv")])
    frame.drop(index=[280]).to_csv(tmp_path / "gap.csv", index=False)
    with pytest.raises(DataError, match=r"gap\.csv: row .*is expected; the series has the frequency 'h'"):
        task.read([str(tmp_path / "gap.csv")])
    frame.drop(columns="tide").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(DataError, match="no column 'tide'"):
        task.read([str(tmp_path / "less.csv")])


def test_pictures_show_forecasts_and_the_error_by_step(series) -> None:
    task = make(series)
    _, target = task.batch(series.test, torch.arange(len(series.test)))
    figures = task.figures(target + 0.1, target, series.test)
    assert [figure.title for figure in figures] == ["Forecasts", "Error by step"]
    assert all(is_svg(figure) for figure in figures)
    again = task.figures(target + 0.1, target, series.test)
    assert [figure.data for figure in again] == [figure.data for figure in figures]
