"""Sources, tasks and splits: what is recognised, what is refused, what is repeated."""

import numpy as np
import pytest
import torch

from gossamer.data import DataError, read_dataset
from gossamer.data.builtin import BUILTINS, GOOD, toy_sentences, toy_table
from gossamer.data.read import UnknownOption
from gossamer.data.splits import hold_out, make_plan


@pytest.mark.parametrize("name", BUILTINS)
def test_builtins_repeat_with_the_seed_and_differ_without(name) -> None:
    few = {} if name == "digits" else {"rows": 800}
    first, again, other = (read_dataset(name, seed=seed, **few) for seed in (1, 1, 2))
    assert first.task == BUILTINS[name][0]
    assert first.meta["split"]["hash"] == again.meta["split"]["hash"] != other.meta["split"]["hash"]
    for split in first.splits:
        for one, two in zip(first.splits[split].inputs, again.splits[split].inputs, strict=True):
            assert torch.equal(one, two)


def test_a_builtin_refuses_an_option_of_other_data() -> None:
    for name, option in (("toy-series", "tokenizer"), ("toy-text", "horizon"), ("digits", "max_len")):
        with pytest.raises(UnknownOption, match=f"has no option '{option}'"):
            read_dataset(name, **{option: "1"})


def test_digits_are_all_there_once_stratified_and_not_mirrored() -> None:
    data = read_dataset("digits")
    assert sum(len(split) for split in data.splits.values()) == 1797
    assert data.spec == {"img_size": (8, 8), "in_chans": 1, "num_classes": 10}
    assert data.train.inputs[0].dtype == torch.uint8
    assert data.train.inputs[0].max() == 255
    assert data.meta["flip"] is False
    for split in (data.val, data.test):
        share = torch.bincount(split.targets, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.03
    assert len({name for split in data.splits.values() for name in split.names}) == 1797


def test_words_without_their_order_tell_nothing_of_the_toy_text() -> None:
    texts, labels = toy_sentences(0, 4000)
    liked = np.array(labels) == "liked"
    assert all(text.count(" not ") == 1 for text in texts)
    for word in GOOD:
        has = np.array([f" {word}" in text for text in texts])
        assert abs(liked[has].mean() - liked[~has].mean()) < 0.08


def test_the_echo_of_the_toy_series_is_the_tide_thirty_hours_late() -> None:
    frame = toy_table(0)
    assert np.corrcoef(frame["tide"][:-30], frame["echo"][30:])[0, 1] < -0.9


def test_seeded_splits_are_stratified_and_never_part_duplicates() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 300, 1000)  # about three of each
    labels = keys % 3
    held = hold_out(labels, keys, 0.2, seed=0)
    assert not set(keys[held]) & set(keys[~held])
    for label in range(3):
        assert held[labels == label].mean() == pytest.approx(0.2, abs=0.03)
    assert not np.array_equal(held, hold_out(labels, keys, 0.2, seed=1))


def test_a_class_of_two_items_is_on_both_sides() -> None:
    labels = np.array([0] * 50 + [1, 1])
    held = hold_out(labels, np.arange(52), 0.1, seed=0)
    assert held[50:].sum() == 1


def test_too_few_items_to_split_are_told() -> None:
    with pytest.raises(DataError, match="too few items"):
        make_plan({"train": np.array([0, 1])}, {"train": np.arange(2)}, 0)


def test_items_in_two_given_splits_or_under_two_labels_are_told(write, reviews) -> None:
    write("d/train.csv", reviews(40) + "a good film number 0 indeed,neg\n")
    path = write("d/test.csv", reviews(4))
    problems = read_dataset(path.parent).problems
    assert any("4 of 4 test items also occur in train" in line for line in problems)
    assert any("1 items occur under more than one label" in line for line in problems)


def test_duplicates_stay_on_one_side_of_our_split(write, reviews) -> None:
    rows = reviews(30).splitlines()
    data = read_dataset(write("r.csv", "\n".join([rows[0], *rows[1:] * 4])))
    train, val, test = (set(split.names) for split in data.splits.values())
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("name", ["nothing.csv", "no/such/folder/at/all", "plainword"])
def test_a_source_that_is_not_there_is_told(name) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_dataset(name)


def test_an_unknown_extension_is_told(write) -> None:
    with pytest.raises(DataError, match=r"unknown extension '\.xyz'"):
        read_dataset(write("x.xyz", "a b c"))


def test_a_folder_of_other_things_is_told(write, tmp_path) -> None:
    path = write("d/notes.doc", "x")
    with pytest.raises(DataError, match=r"no images in class folders and no tables found.*\.doc"):
        read_dataset(path.parent)
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        read_dataset(tmp_path / "void")


def test_a_table_of_neither_kind_says_what_was_seen_and_what_to_give(write) -> None:
    rows = "\n".join(f"{i * 0.5},{i * 0.25}" for i in range(50))
    with pytest.raises(DataError, match=r"--task text-classification .*'width' \(number"):
        read_dataset(write("x.csv", "width,height\n" + rows))


def test_a_table_that_could_be_both_asks_for_the_task(write) -> None:
    lines = ["date,text,label,price"]
    lines += [f"2024-01-{i % 31 + 1:02} {i // 31:02}:00,words number {i} here,k{i % 2},{i}.5" for i in range(90)]
    path = write("x.csv", "\n".join(lines))
    with pytest.raises(DataError, match="could be text or a series; say --task"):
        read_dataset(path)
    assert read_dataset(path, task="text-classification").task == "text-classification"


def test_several_tables_without_a_training_one_are_told(write, reviews) -> None:
    write("d/one.csv", reviews(10))
    path = write("d/two.csv", reviews(10))
    with pytest.raises(DataError, match=r"one\.csv, two\.csv; name one train"):
        read_dataset(path.parent)


def test_images_beside_split_tables_ask_for_the_task(class_folders, write, reviews) -> None:
    root = class_folders({"a": 3, "b": 3}, name="both")
    write("both/train.csv", reviews(20))
    with pytest.raises(DataError, match=r"6 images and the tables train\.csv; say --task"):
        read_dataset(root)
    assert read_dataset(root, task="image-classification").meta["classes"] == ["a", "b"]


def test_unknown_tasks_and_options_are_refused_with_those_there(write, reviews) -> None:
    path = write("r.csv", reviews(40))
    with pytest.raises(ValueError, match="task must be one of image-classification"):
        read_dataset(path, task="translation")
    with pytest.raises(ValueError, match="no option 'horizont'; its options are label, max_len"):
        read_dataset(path, horizont=3)
    with pytest.raises(DataError, match="cannot be read for image-classification"):
        read_dataset(path, task="image-classification")


def test_tables_in_an_archive_are_read(write, reviews, tmp_path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("top/train.csv", reviews(40))
        file.writestr("top/test.csv", reviews(6, start=60))
    data = read_dataset(tmp_path / "t.zip")
    assert len(data.test) == 6


def test_a_hub_name_goes_through_the_datasets_library(monkeypatch) -> None:
    import datasets

    texts = {
        "train": [f"words number {i} here" for i in range(40)],
        "validation": [f"more words {i}" for i in range(6)],
    }
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    parts = {
        name: datasets.Dataset.from_dict({"sentence": rows, "label": [i % 2 for i in range(len(rows))]}, features)
        for name, rows in texts.items()
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or datasets.DatasetDict(parts))
    data = read_dataset("somebody/reviews")
    assert asked == [("somebody/reviews", None)]
    assert data.meta["classes"] == ["no", "yes"]
    assert data.test.names == texts["validation"]


def test_hub_images_are_decoded_like_files(monkeypatch, class_folders) -> None:
    import datasets

    root = class_folders({"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2}, name="hub")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def part(split: str) -> datasets.Dataset:
        paths = sorted((root / split).rglob("*.png"))
        rows = {"image": [str(p) for p in paths], "label": [p.parent.name for p in paths]}
        return datasets.Dataset.from_dict(rows, features)

    parts = datasets.DatasetDict({"train": part("train"), "test": part("test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: parts)
    data, files = read_dataset("hub:somebody/pictures"), read_dataset(root)
    assert torch.equal(data.test.inputs[0], files.test.inputs[0])
    assert torch.equal(data.train.inputs[0], files.train.inputs[0])


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch) -> None:
    import datasets

    def fail(*_: object) -> None:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"somebody/gone: .*not loadable from the Hub \(no route to host\)$"):
        read_dataset("somebody/gone")
